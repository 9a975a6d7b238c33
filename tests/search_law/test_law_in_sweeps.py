"""``search: {sampler: law}`` in a sweep: validation, the run, what plan and show say."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from click.testing import CliRunner

import isoflop
from isoflop.cli.run import plan_command
from isoflop.cli.show import show_command
from isoflop.core.errors import UserError
from isoflop.sweep.law_search import make_law_sampler
from isoflop.sweep.resolve import resolve

pytestmark = pytest.mark.usefixtures("toy_parts")
TARGET = {"kind": "allocation", "budget": 2e6, "width": 0.2}


def spec(search: dict[str, Any] | None = None, **rest: Any) -> dict[str, Any]:
    return {
        "name": "lawtoy",
        "models": ["toy/s", "toy/m", "toy/l", "toy/xl"],
        "methods": [{"toy-tokens": {"tokens": [1, 2, 4, 8, 16, 32, 64]}}],
        "tasks": [{"toy-task": {"examples": 50}}],
        "search": search or {"sampler": "law", "target": TARGET},
        **rest,
    }


def run(given: dict[str, Any], folder: Path) -> Any:
    return isoflop.run(
        given, executor="local", store=str(folder / "store"), tracking_uri="none", cache_dir=str(folder / "cache")
    )


def test_a_sweep_stops_when_the_target_is_known_and_says_what_it_knows(toy_parts: ModuleType, tmp_path: Path) -> None:
    done = run(spec(), tmp_path)
    assert done.summary.reason.startswith("known: half-width")
    assert done.summary.ok < 28  # the grid
    found = done.law_search()
    (quantity,) = found["target"]
    truth = 50 * toy_parts.BETA / (toy_parts.ALPHA - toy_parts.BETA)
    assert quantity["low"] < truth < quantity["high"]
    assert found["half_width"] <= 0.2
    assert found["steps"][-1]["spent"] == pytest.approx(found["spent"])
    spent = [s["spent"] for s in found["steps"]]
    assert spent == sorted(spent)
    table = done.results()
    flops = sum(f * n for f, n in zip(table["flops"].to_pylist(), table["n_examples"].to_pylist(), strict=True))
    assert found["spent"] == pytest.approx(flops)

    again = run(spec(), tmp_path)  # rebuilt from the ledger: knows the same, runs nothing
    assert again.summary.ok == 0
    assert again.law_search()["target"][0]["value"] == pytest.approx(quantity["value"], rel=1e-3)

    shown = CliRunner().invoke(show_command, ["lawtoy", "--store", str(tmp_path / "store")]).output
    assert "V*(2e+06)" in shown
    assert "half-width" in shown
    data = json.loads(CliRunner().invoke(show_command, ["lawtoy", "--store", str(tmp_path / "store"), "--json"]).output)
    assert data["law_search"]["steps"]


def test_plan_tells_the_expected_cost_of_the_width_before_anything_runs(tmp_path: Path) -> None:
    path = tmp_path / "s.json"
    path.write_text(json.dumps(spec({"sampler": "law", "target": {**TARGET, "width": 3.0}})))
    data = json.loads(CliRunner().invoke(plan_command, [str(path), "--json"]).output)
    assert data["forecast"]["width"] == 3.0
    assert 0 < data["forecast"]["reached"] <= 1
    assert data["forecast"]["everything"] > data["forecast"]["cost"] > 0
    text = CliRunner().invoke(plan_command, [str(path)]).output
    assert "half-width 3 is expected to cost" in text


def test_several_tasks_methods_and_forms(tmp_path: Path) -> None:
    given = spec(
        {
            "sampler": "law",
            "target": {"kind": "best-method", "budget": 2e6},
            "axes": {"N": "N", "V": ["toy-tokens.tokens", "toy-prepared.k"]},
            "laws": ["product", {"law": "chinchilla", "x": {"D": "V"}}],
            "by": ["method"],
            "share": "exponents",
            "options": {"gamma": 0.6, "explore": 0.25},
        },
        methods=[{"toy-tokens": {"tokens": [1, 2, 4, 8]}}, {"toy-prepared": {"k": [1, 2, 4, 8]}}],
        budget={"trials": 30},
    )
    found = run(given, tmp_path).law_search()
    ((budget, best),) = found["best_method"].items()
    assert budget == "2e+06"
    assert best["method"] in ("toy-tokens", "toy-prepared")
    assert set(found["forms"]) <= {"product", "chinchilla"}


def test_the_sweeps_number_of_trials_is_part_of_the_design() -> None:
    planner = make_law_sampler(resolve(spec(budget={"trials": 12})))._planner
    assert planner.max_runs == 12
    assert planner.pilot_runs <= 6


@pytest.mark.parametrize(
    "search, words",
    [
        ({"sampler": "law"}, "search.target: sampler 'law' needs one"),
        ({"sampler": "tpe", "target": TARGET}, "search.target: only 'sampler: law' takes it; the sampler is 'tpe'"),
        ({"sampler": "grid", "laws": ["product"]}, "search.laws: only 'sampler: law' takes it"),
        ({"sampler": "law", "target": TARGET, "pruner": "median"}, "sampler 'law' takes none"),
        ({"sampler": "law", "target": {"kind": "alocation"}}, "did you mean 'allocation'"),
        ({"sampler": "law", "target": {"kind": "allocation"}}, "the key 'budget' is missing"),
        ({"sampler": "law", "target": {"kind": "allocation", "buget": 1}}, "did you mean 'budget'"),
        ({"sampler": "law", "target": {**TARGET, "low": 1}}, "low: a target of kind allocation does not take it"),
        ({"sampler": "law", "target": {**TARGET, "width": -1}}, "greater than 0"),
        ({"sampler": "law", "target": {**TARGET, "of": "W"}}, "unknown axis 'W'"),
        ({"sampler": "law", "target": {**TARGET, "cost": "2*N*M"}}, "unknown name in cost 'M'"),
        ({"sampler": "law", "target": {**TARGET, "budget": "much"}}, "must be a number"),
        (
            {"sampler": "law", "target": TARGET, "axes": {"N": "N", "V": "toy-tokens.tokns"}},
            "did you mean 'toy-tokens.tokens'",
        ),
        ({"sampler": "law", "target": TARGET, "laws": ["prodct"]}, "did you mean 'product'"),
        ({"sampler": "law", "target": TARGET, "options": {"gama": 1}}, "did you mean 'gamma'"),
        ({"sampler": "law", "target": TARGET, "options": {"gamma": "x"}}, "must be a number"),
        ({"sampler": "law", "target": TARGET, "share": ["gamma"]}, "unknown parameter 'gamma'"),
        ({"sampler": "law", "target": {"kind": "best-method", "budget": 2e6}}, "give at least two groups"),
    ],
)
def test_bad_searches_are_refused_before_anything_runs(search: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as caught:
        resolve(spec(search))
    assert words in str(caught.value), str(caught.value)
    assert "\n" not in str(caught.value)
    assert "search" in str(caught.value)
