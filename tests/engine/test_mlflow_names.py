"""Names and numbers in MLflow are those of the ledger: whatever tasks, methods and knobs call theirs, none stands for another."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_mlflow_projection import row

from isoflop.laws import fit
from isoflop.laws.result import Fit
from isoflop.sweep.blocks import LawBlock
from isoflop.sweep.results import Findings, LawFinding
from isoflop.track.names import MOST, spelt, spelt_apart
from isoflop.track.projection import Projection
from isoflop.track.run_data import _COLUMNS, _PARAMS, _STEPS, RunData

ALLOWED = re.compile(r"[A-Za-z0-9_\-. :/]{0,250}")
RESERVED = (*_COLUMNS, *_STEPS, "trace/loss")
VALUES = {name: float(n) for n, name in enumerate(_COLUMNS, 1)}


def shown(**more: Any) -> dict[str, float]:
    return RunData.of(row("a", 1, **(VALUES | more))).metrics


@pytest.mark.parametrize("record", ["metrics", "footprint"])
def test_no_metric_and_no_cost_stands_for_a_column(record: str) -> None:
    """Also where the row has nothing in that column."""
    plain = shown()
    for full in (True, False):
        values = VALUES if full else dict.fromkeys(VALUES)
        found = RunData.of(row("a", 1, **values, **{record: [(name, -7.0) for name in RESERVED]})).metrics
        assert {k: v for k, v in found.items() if k in RESERVED} == (plain if full else {})
        assert {f"{record}.{name}": -7.0 for name in RESERVED} == {k: v for k, v in found.items() if k not in RESERVED}


def test_a_cost_that_has_a_column_is_shown_once_and_one_called_like_a_metric_apart() -> None:
    found = shown(metrics=[("loss", 1.0)], footprint=[("flops", VALUES["flops"]), ("loss", 2.0), ("own", 3.0)])
    assert {k: v for k, v in found.items() if k not in _COLUMNS} == {"loss": 1.0, "footprint.loss": 2.0, "own": 3.0}


def test_every_character_keeps_two_names_apart() -> None:
    printable = [chr(n) for n in range(33, 127)] + ["ö", "ß", "β", "é"]
    names = [f"hit{c}1" for c in printable]
    found = spelt_apart(names)
    assert len(set(found.values())) == len(names)
    assert all(ALLOWED.fullmatch(v) for v in found.values())
    assert [found[f"hit{c}1"] for c in "@#<>"] == ["hit_at_1", "hit_hash_1", "hit_lt_1", "hit_gt_1"]


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"])), unique=True), st.lists(st.text("ab_", max_size=3)))
def test_no_two_names_are_spelt_alike(names: list[str], taken: list[str]) -> None:
    found = spelt_apart(names, taken)
    assert set(found) == set(names)
    assert len({*found.values(), *taken}) == len(names) + len(set(taken))
    for name, text in found.items():
        assert ALLOWED.fullmatch(text)
        if ALLOWED.fullmatch(name) and name == " ".join(name.split()) and len(name) <= MOST:
            assert spelt(name) == name


def test_a_name_is_spelt_alike_in_every_run() -> None:
    """Unless two of a run would be one: columns of a table of runs hold one quantity."""
    alone = {n: next(k for k in shown(metrics=[(n, 9.0)]) if k not in _COLUMNS) for n in ("hit@1", "hit#1", "größe")}
    together = shown(metrics=[(n, 9.0) for n in alone])
    assert set(alone.values()) == set(together) - set(_COLUMNS)


def test_a_knob_that_is_called_like_what_names_the_job_is_shown_beside_it() -> None:
    knobs = {name: f"of the knob {name}" for name in _PARAMS} | {"x@": 1, "x#": 2}
    found = RunData.of(row("a", 1, knobs=json.dumps(knobs))).params
    assert {k: found[k] for k in _PARAMS} == {"model": "m", "method": "x", "task": "t", "repeat": "0", "seed": "0"}
    assert {k: v for k, v in found.items() if k not in _PARAMS} == {
        **{f"knobs.{name}": f"of the knob {name}" for name in _PARAMS}, "x_at_": "1", "x_hash_": "2",
    }  # fmt: skip


@pytest.mark.parametrize("bulk", [True, False])
def test_mlflow_shows_the_ledgers_numbers(tmp_path: Path, empty_mlflow: Path, bulk: bool) -> None:
    from mlflow import MlflowClient

    shutil.copy(empty_mlflow, tmp_path / "mlflow.db")
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    odd = [
        ("p<0.5", 0.1),
        ("p>0.5", 0.9),
        ("hit@1", 0.2),
        ("hit#1", 0.8),
        ("größe", 3.0),
        ("a/b c", 1.0),
        ("nan", float("nan")),
    ]
    own = [("error", 0.777), ("flops", 5.0), ("N", 1.0), ("shard_error", 4.0), ("trace/loss", 6.0)]
    traces = [("loss", [{"step": 0, "value": 2.0}]), ("lo@ss", [{"step": 0, "value": 3.0}])]
    projection = Projection(uri, "s", None, bulk=bulk)
    projection.begin("spec", {})
    projection.show([RunData.of(row("a", 1, **VALUES, metrics=odd + own, traces=traces))])
    client = MlflowClient(uri)
    (run,) = client.search_runs([client.get_experiment_by_name("s").experiment_id], "tags.`isoflop.job_id` = 'a'")
    assert run.data.metrics == {
        **VALUES, "p_lt_0.5": 0.1, "p_gt_0.5": 0.9, "hit_at_1": 0.2, "hit_hash_1": 0.8, "gr_xf6__xdf_e": 3.0, "a/b c": 1.0,
        **{f"metrics.{name}": value for name, value in own}, "shard_error": 0.75, "running_error": 0.5,
        "trace/loss": 2.0, "trace/lo_at_ss": 3.0,
    }  # fmt: skip


def test_a_number_that_the_data_do_not_determine_is_called_that() -> None:
    """An exponent that says nothing must not stand among exponents that do."""
    sizes, tokens = (a.ravel() for a in np.meshgrid([1e4, 3e4, 1e5, 3e5, 1e6], [1.0, 4.0, 16.0]))
    law = fit(
        {"N": sizes, "V": tokens, "error": 0.1 + 30 * sizes**-0.5 * tokens**-0.3}, law="product", y="error", bootstrap=0
    )
    assert isinstance(law, Fit)
    verdicts: dict[str, bool | None] = dict(zip(law.form.names, itertools.cycle([True, False, None]), strict=False))
    for name, identified in verdicts.items():
        law.params[name] = replace(law.params[name], identified=identified)
    found = Findings("", [LawFinding(LawBlock(law="product"), law)]).metrics()
    for name, identified in verdicts.items():
        assert (f"law/product/{name}" in found) == (identified is not False)
        assert (f"law/product/{name} not identified" in found) == (identified is False)


def test_groups_of_a_law_whose_names_mlflow_spells_alike_stay_two() -> None:
    sizes = np.array([1e4, 3e4, 1e5, 3e5, 1e6, 3e6])
    table = {
        "N": np.tile(sizes, 3), "error": np.concatenate([0.1 + f * sizes**-0.5 for f in (10, 20, 30)]),
        "task": list(itertools.chain.from_iterable([[name] * 6 for name in ("a[b", "a]b", "a_b")])),
    }  # fmt: skip
    fits = fit(table, law="E + A/N**alpha", map={"N": "N"}, y="error", by=["task"], bootstrap=0)
    found = Findings("", [LawFinding(LawBlock(law="x"), fits)]).metrics()
    assert len({v for k, v in found.items() if "/A" in k}) == 3
