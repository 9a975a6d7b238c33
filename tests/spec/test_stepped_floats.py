"""Stepped floats are the decimals that people write, wherever a sweep compares them: ranges, exclude, when, zip, lists, rows."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import isoflop
from isoflop.core.knobs import same
from isoflop.search import STRATEGIES
from isoflop.search.proposer import Tell
from isoflop.search.space import Param
from isoflop.sweep.resolve import resolve
from isoflop.sweep.searching import make_proposer_for

pytestmark = pytest.mark.usefixtures("toy_parts")

STEPS = {"low": 0, "high": 1, "step": 0.1}
DECIMALS = [n / 10 for n in range(11)]
SUMMED = [n * 0.1 for n in range(11)]  # .30000000000000004 is among them


def spec(values: Any, **rest: Any) -> dict[str, Any]:
    methods = [{"toy-required": {"strength": values}}]
    return {"name": "steps", "models": ["toy/s", "toy/m"], "methods": methods, "tasks": ["toy-task"], **rest}


def values_of(given_: dict[str, Any], knob: str = "toy-required.strength") -> list[Any]:
    return [config[knob] for config in resolve(given_).space.grid()]


def test_a_range_holds_the_decimals() -> None:
    assert SUMMED != DECIMALS
    assert values_of(spec(STEPS, models=["toy/s"])) == DECIMALS


@pytest.mark.parametrize("written", [[0.3, 0.6, 0.7], [0.1 + 0.2, 3 * 0.2, 7 * 0.1]])
@pytest.mark.parametrize("values", [STEPS, DECIMALS, SUMMED])
def test_exclude_finds_them(values: Any, written: list[float]) -> None:
    given_ = spec(values, models=["toy/s"], exclude=[{"toy-required.strength": written}])
    assert values_of(given_) == pytest.approx([n / 10 for n in range(11) if n not in (3, 6, 7)], abs=1e-15)


@pytest.mark.parametrize("written", [[0.6, 1.1], [0.5 + 0.1, 0.5 + 6 * 0.1]])
def test_when_finds_them(written: list[float]) -> None:
    scale = {"low": 0.5, "high": 1.5, "step": 0.1}
    method = {"toy-tokens": {"scale": scale, "flag": {"values": [True, False], "when": {"scale": written}}}}
    configs = list(resolve(spec(0, models=["toy/s"]) | {"methods": [method]}).space.grid())
    assert sorted({c["toy-tokens.scale"] for c in configs if c["toy-tokens.flag"]}) == [0.6, 1.1]
    assert len(configs) == 11 + 2


def test_zip_finds_the_rows_of_another_spelling(tmp_path: Path) -> None:
    def zipped(values: list[float]) -> dict[str, Any]:
        models = ["toy/s", "toy/m"]
        block = {"model": models, "toy-required.strength": values}
        return spec(0, zip=[block]) | {"methods": ["toy-required"]}

    assert run(zipped([0.1 + 0.2, 0.5]), tmp_path).ran == 2
    assert run(zipped([0.3, 0.5]), tmp_path).ran == 0


@pytest.mark.parametrize("sampler", [n for n in STRATEGIES if n != "law"])
def test_every_sampler_proposes_them(sampler: str) -> None:
    budget = {} if sampler == "grid" else {"budget": {"trials": 22}}
    sweep = resolve(spec(STEPS, search={"sampler": sampler}, **budget))
    proposer = make_proposer_for(sweep)
    for number in range(8 if sampler == "gp" else 22):
        (p,) = proposer.ask(1)
        assert p.config["toy-required.strength"] in DECIMALS
        (job,) = sweep.jobs_of(p.config)
        assert sweep.config_of(job) == p.config
        proposer.tell(Tell(p.number, p.config, "complete", (float(number),)))


def run(given_: dict[str, Any], folder: Path) -> Any:
    opened = isoflop.run(
        given_, store=str(folder / "store"), cache_dir=folder / "cache", executor="local", tracking_uri="none"
    )
    return opened.summary


@pytest.mark.parametrize("repeats", [1, 2])
def test_rewriting_range_and_list_into_each_other_computes_nothing_twice(
    repeats: int, tmp_path: Path, toy_parts: ModuleType
) -> None:
    """Also against rows of an earlier version, which hold .30000000000000004."""
    grid = {"low": 0, "high": 0.7, "step": 0.1}
    first = run(spec(SUMMED[:4], repeats=repeats), tmp_path)
    assert first.ran == 8 * repeats
    second = run(spec(grid, repeats=repeats), tmp_path)
    assert (second.cached, second.ran) == (8 * repeats, 8 * repeats)
    for values in (DECIMALS[:8], SUMMED[:8], grid, grid | {"low": 0.0}):
        again = run(spec(values, repeats=repeats), tmp_path)
        assert (again.cached, again.ran) == (16 * repeats, 0)
    rows = isoflop.open("steps", str(tmp_path / "store")).results(["trial_id", "repeat"])
    assert rows.num_rows == 16 * repeats
    assert len(toy_parts.log_lines(tmp_path / "cache", "eval")) == 16 * repeats


def test_a_search_goes_on_from_rows_of_another_spelling(tmp_path: Path) -> None:
    search = {"search": {"sampler": "tpe"}, "budget": {"trials": 12}}
    assert run(spec(SUMMED[2:5], models=["toy/s"], **search), tmp_path).ran == 3
    second = run(spec({"low": 0.2, "high": 0.4, "step": 0.1}, models=["toy/s"], **search), tmp_path)
    assert (second.cached, second.ran) == (3, 0)


def test_where_both_spellings_were_computed_one_row_counts(tmp_path: Path) -> None:
    """As earlier versions left it: a range, and then the list of its decimals."""
    both = {"methods": [{"toy-required": {"strength": [0.3, 0.1 + 0.2]}}]}
    assert run(spec(0, models=["toy/s"]) | both, tmp_path).ran == 2
    one = run(spec([0.3], models=["toy/s"]), tmp_path)
    assert (one.cached, one.ran) == (1, 0)
    rows = isoflop.open("steps", str(tmp_path / "store")).results(["knobs"])
    assert rows["knobs"].to_pylist() == ['{"strength": 0.3}']


GRIDS = st.tuples(st.integers(-50, 50), st.integers(1, 400), st.integers(0, 3), st.integers(1, 60))


@given(GRIDS, st.integers(0, 60))
def test_however_a_value_is_added_up_it_is_the_decimal(grid: tuple[int, int, int, int], n: int) -> None:
    start, width, decimals, count = grid
    low, step = start / 10**decimals, width / 10**decimals
    n = min(n, count)
    param = Param("x", None, low, float(f"{(start + count * width) / 10**decimals:.{decimals}f}"), step)
    listed = Param("x", tuple(param.grid()))
    written = float(f"{(start + n * width) / 10**decimals:.{decimals}f}")
    assert param.grid()[n] == written
    for value in (low + n * step, sum([step] * n, low)):
        for one in (param, listed):
            assert one.contains(value)
            assert one.spelled(value) == written
    for value in (low + (n + 0.5) * step, written + 1e-4 * step):
        assert not param.contains(value)
        assert not listed.contains(value)


def test_numbers_that_differ_are_not_the_same() -> None:
    assert same(0.1 + 0.2, 0.3)
    assert same((1, 0.1 + 0.2), (1, 0.3))
    assert same(1.0, 1)
    assert same(1e-17, 0.0, 0.1)
    for a, b in (
        (0.3, 0.3001),
        (1e-17, 0.0),
        ("a", "b"),
        (True, 1.0),
        (1, 2),
        ((1.0,), (1.0, 1.0)),
        (2**60, 2**60 + 1),
    ):
        assert not same(a, b)  # type: ignore[arg-type]
