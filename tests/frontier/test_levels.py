"""Tables from elsewhere: which rows are one setting, and what one configuration without results costs the others."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

import isoflop
from isoflop.core.errors import UserError
from isoflop.sweep.configs import read_configs
from isoflop.sweep.outside import as_rows

Rows = list[dict[str, Any]]
LEVELS = {"none": {1: 0.1}, "a": {2: 0.11, 4: 0.12, 8: 0.5}, "b": {2: 0.1, 4: 0.3}}
NAMES: dict[str, list[dict[str, Any]]] = {
    "nothing": [{}],
    "repeats": [{"repeat": r} for r in range(3)],
    "examples": [{"example": f"q{i}"} for i in range(6)],
    "both": [{"repeat": r, "example": f"q{i}"} for r in range(2) for i in range(4)],
}


def made(cost: str, names: str, noise: float = 0.0, settings: str = "") -> Rows:
    """The levels above as rows: of ``ratio``, of bytes or of bits."""
    rng = np.random.default_rng(0)
    rows = []
    for method, errors in LEVELS.items():
        for ratio, error in errors.items():
            for name in NAMES[names]:
                value = ratio if cost == "ratio" else 16 / ratio if cost == "bits" else 100 / ratio
                row = {"method": method, **name, cost: value * (1 + rng.uniform(-noise, noise)), "error": error}
                if settings and method != "none":
                    row[settings] = ratio if settings != "knobs" else f"level {ratio}"
                rows.append(row)
    return rows


def arrow(rows: Rows) -> pa.Table:
    return pa.table({name: [row.get(name) for row in rows] for name in {k: 0 for row in rows for k in row}})


def told(rows: Rows) -> set[tuple[str, float, int]]:
    """(method, error, repeats) of the configurations that are read."""
    configs = read_configs(as_rows(arrow(rows))[0])
    return {(c.method, round(c.error, 6), c.repeats) for c in configs}


@pytest.mark.parametrize("names", NAMES)
@pytest.mark.parametrize(
    ("cost", "noise", "settings"),
    [("ratio", 0, ""), ("ratio", 0.02, ""), ("ratio", 0.4, "knob.k"), ("ratio", 0.4, "knobs")]
    + [(c, 0, "") for c in ("bytes", "kv_bytes", "weight_bytes", "flops", "bits", "V", "seconds")],
)
def test_each_level_is_a_setting_and_noise_is_none(cost: str, noise: float, settings: str, names: str) -> None:
    rows = made(cost, names, noise, settings)
    repeats = {"nothing": 1, "repeats": 3, "examples": 1, "both": 2}[names]
    assert told(rows) == {(m, e, repeats) for m, errors in LEVELS.items() for e in errors.values()}


def test_what_is_best_at_half_is_a_configuration_that_exists() -> None:
    (answer,) = isoflop.answers(arrow(made("ratio", "nothing")), share=0.5)
    assert answer.values["configuration"] == "b ratio 2"
    assert (answer.values["cost"], answer.values["error"]) == (0.5, 0.1)
    assert "at half of what its method cuts: b ratio 2" in answer.sentence
    (answer,) = isoflop.answers(arrow(made("ratio", "examples")), within=0.05)
    assert {c["configuration"]: c["ratio"] for c in answer.candidates} == {
        "none": 1, "a ratio 2": 2, "a ratio 4": 4, "a ratio 8": 8, "b ratio 2": 2, "b ratio 4": 4
    }  # fmt: skip


@pytest.mark.parametrize("method", ["a", "snapkv"])  # not registered, and registered
def test_levels_are_more_or_less_of_one_method(method: str) -> None:
    rows = [{**r, "method": method} for r in made("ratio", "examples") if r["method"] == "a"]
    assert {c.variant for c in read_configs(as_rows(arrow(rows))[0])} == {method}


def test_a_ratio_measured_per_example_is_averaged() -> None:
    """4 ± 0.1, and as wide as data make it: each example stands once, so that there is one setting."""
    rng = np.random.default_rng(1)
    for width in (0.1, 2.5):
        rows: Rows = [{"method": "none", "example": i, "ratio": 1.0, "error": 0.0} for i in range(40)]
        rows += [
            {"method": "a", "example": i, "ratio": 4 + width * rng.uniform(-1, 1), "error": float(i % 2)}
            for i in range(40)
        ]
        table, _ = as_rows(arrow(rows))
        assert table["error"].to_pylist() == [0.0, 0.5]
        assert table["ratio"].to_pylist()[1] == pytest.approx(4, abs=width)
        assert [json.loads(k) for k in table["knobs"].to_pylist()] == [{}, {}]


def test_levels_nearer_than_noise_are_told_apart_by_their_names() -> None:
    rows = [{"method": "a", "example": i, "ratio": r, "error": r} for r in (2.0, 2.1) for i in range(4)]
    assert told(rows) == {("a", 2.0, 1), ("a", 2.1, 1)}
    fine = [{"method": "a", "ratio": r, "error": r} for r in np.arange(1.05, 2, 0.05).round(2).tolist()]
    assert len(told(fine)) == len(fine)  # no chain of neighbours becomes one setting


@pytest.mark.parametrize("name", [{"example": "x"}, {"repeat": 1}, {"repeat": 1, "example": "x"}])
def test_rows_of_one_name_that_nothing_tells_apart_ask_for_a_knob(name: dict[str, Any]) -> None:
    rows = [{"method": "a", **name, "ratio": 2.0, "error": e} for e in (0.1, 0.2)]
    for more in ({}, {"knob.k": 3}):
        with pytest.raises(UserError, match=r"a .*of task error.*column knob\.NAME") as error:
            as_rows(arrow([row | more for row in rows]))
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("bad", [25, 26, 49, 50])
def test_a_configuration_without_results_is_left_out_and_named(bad: int) -> None:
    """Of 50 examples: it does not take those away from the others."""
    rng = np.random.default_rng(2)
    rows: Rows = [
        {"method": m, "example": i, "ratio": r, "error": float("nan") if m == "b" and i < bad else float(rng.random() < e)}
        for m, r, e in (("none", 1.0, 0.2), ("a", 2.0, 0.3), ("b", 4.0, 0.4))
        for i in range(50)
    ]  # fmt: skip
    (answer,) = (found := isoflop.answers(arrow(rows), share=0.5))
    left = bad > 25
    assert (
        any(f"b of task error is left out: it has finite errors on {50 - bad} of 50" in n for n in found.notes) == left
    )
    wanted = [r["error"] for r in rows if r["method"] == "a" and (left or r["example"] >= bad)]
    table, _ = as_rows(arrow(rows))
    assert table["error"].to_pylist()[1] == pytest.approx(np.mean(wanted))
    assert [len(s or ()) for s in table["scores"].to_pylist()] == ([50, 50, 0] if left else [25, 25, 25])
    assert {c["method"] for c in answer.candidates} == ({"a"} if left else {"a", "b"})
