"""``search: {sampler: law}`` in a sweep: validation, the run, what plan and show say."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from click.testing import CliRunner

import isoflop
from isoflop.cli.run import plan_command
from isoflop.cli.show import show_command
from isoflop.core.errors import UserError
from isoflop.ledger import Store
from isoflop.search.law.proposer import LawProposer
from isoflop.search.law.sampler import LawSampler
from isoflop.search.law.strategy import LawSearch, about, describe
from isoflop.search.proposer import Tell
from isoflop.sweep.resolve import resolve
from isoflop.sweep.resolved import Sweep
from isoflop.sweep.searching import SweepShelf, make_proposer_for, problem_of

pytestmark = pytest.mark.usefixtures("toy_parts")
EMPTY: dict[str, Any] = {
    "target": [],
    "best_method": {},
    "forms": {},
    "verdict": "v",
    "check": None,
    "steps": [],
    "stop": None,
}
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


def make_law_proposer(sweep: Sweep) -> LawProposer:
    made = make_proposer_for(sweep)
    assert isinstance(made, LawProposer)
    return made


def make_law_sampler(sweep: Sweep) -> LawSampler:
    assert isinstance(sweep.strategy, LawSearch)
    return sweep.strategy.sampler(problem_of(sweep))


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


def test_a_finished_search_runs_nothing_when_it_is_run_again_and_its_check_stays(
    toy_parts: ModuleType, tmp_path: Path
) -> None:
    given = spec({"sampler": "law", "target": {**TARGET, "width": 0.02}}, budget={"trials": 14})
    done = run(given, tmp_path)
    first = done.law_search()
    assert first["check"] is not None
    for _ in range(2):
        again = run(given, tmp_path)
        assert again.summary.ran == 0
        assert again.law_search()["check"]["place"] == first["check"]["place"]
        assert again.law_search()["rows"] == first["rows"] == 13


def test_dearer_runs_are_known_to_be_dearer_before_any_has_run(toy_parts: ModuleType, tmp_path: Path) -> None:
    """Without a ``cost`` of its own a search takes its target's; the check is then the largest run that there is."""
    sampler = make_law_sampler(resolve(spec(budget={"trials": 14})))
    sizes = {
        m: sampler.cost_of({"model": m, "method": "toy-tokens", "toy-tokens.tokens": 8}) for m in ("toy/s", "toy/xl")
    }
    assert sizes["toy/xl"] > sizes["toy/s"]
    more = sampler.cost_of({"model": "toy/s", "method": "toy-tokens", "toy-tokens.tokens": 64})
    assert more / sizes["toy/s"] == pytest.approx((50 + 64) / (50 + 8))
    done = run(spec({"sampler": "law", "target": {**TARGET, "width": 0.02}}, budget={"trials": 14}), tmp_path)
    table = done.results()
    assert done.law_search()["check"]["place"] == {"N": max(table["N"].to_pylist()), "V": 64}


def test_a_check_under_way_when_a_session_died_is_the_check_of_the_next(toy_parts: ModuleType, tmp_path: Path) -> None:
    sweep = resolve(spec({"sampler": "law", "target": TARGET}, budget={"trials": 14}))
    store = Store.open(str(tmp_path / "store"))
    dying = make_law_proposer(sweep)
    sweep.strategy.keep(dying, SweepShelf(store, sweep.spec.name))
    told: list[Any] = []
    while dying.check is None:
        for p in dying.ask(1):
            told.append((p, Tell(p.number, p.config, "complete", (0.5 - 0.01 * len(told),), attributes={"flops": 1e6})))
            if dying.check is None:
                dying.tell(told[-1][1])
    begun = told.pop()[0]
    heir = make_law_proposer(sweep)
    sweep.strategy.keep(heir, SweepShelf(store, sweep.spec.name))
    assert heir.check == begun.config
    heir.reserve(begun.number, begun.config)
    for _, tell in told:
        heir.tell(tell)
    assert all(p.config != begun.config for p in heir.ask(3))
    heir.tell(Tell(begun.number, begun.config, "complete", (0.4,), attributes={"flops": 1e6}))
    assert heir.report().check is not None
    assert heir.report().rows == len(told)


def test_a_failed_trial_counts_alike_before_and_after_a_resume() -> None:
    sweep = resolve(spec(budget={"trials": 14}))
    first, heir = make_law_proposer(sweep), make_law_proposer(sweep)
    (p,) = first.ask(1)
    for proposer in (first, heir):
        proposer.tell(Tell(p.number, p.config, "failed"))
    proposed = [proposer.ask(1)[0].config for proposer in (first, heir)]
    assert proposed[0] == proposed[1] != p.config
    planners = [proposer._law._planner for proposer in (first, heir)]
    assert planners[0].runs == planners[1].runs == 1
    assert planners[0].spent == pytest.approx(planners[1].spent)


def test_a_mean_over_tasks_is_said_to_be_one() -> None:
    one = problem_of(resolve(spec()))
    two = replace(one, tasks=(*one.tasks, "other"))
    assert describe({**EMPTY, "about": about(one)}) == describe(EMPTY)
    assert "mean error of toy-task, other" in describe({**EMPTY, "about": about(two)})[0]
    each = tuple(replace(one.aims[0], task=task) for task in two.tasks)
    assert about(replace(two, aims=each)) == ""


def test_a_law_whose_variable_no_column_gives_is_refused_before_anything_runs() -> None:
    given = spec(laws=[{"law": "chinchilla", "y": "error", "by": ["task"]}])
    with pytest.raises(UserError, match=r"law chinchilla reads D, and results have no such column; .* x: {D: V}"):
        resolve(given)


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
