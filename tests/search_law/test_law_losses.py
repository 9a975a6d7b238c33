"""Runs that come to nothing, odd values and odd callers: money is counted, nothing is proposed in vain, nothing raises."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.distributions import BaseDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState

from isoflop.core.errors import UserError
from isoflop.search.law import Exponents, LawSampler, OptimalAllocation, Policy, PredictionAt

AXES = {"N": "n", "V": "v"}
COST = "2*N*(50+V)"
SIZES, TOKENS = (1e7, 4e7, 1.6e8, 6.4e8), (1, 4, 16, 64, 256)
GRID = [{"n": n, "v": v} for n in SIZES for v in TOKENS]
SPACE: dict[str, BaseDistribution] = {"n": FloatDistribution(1e7, 6.4e8), "v": IntDistribution(1, 256)}
EVERYTHING = sum(2 * c["n"] * (50 + c["v"]) for c in GRID)
TARGET = OptimalAllocation(budget=5e9)


def error(n: float, v: float, rng: np.random.Generator | None = None) -> float:
    noise = 0.004 * rng.standard_normal() if rng is not None else 0.0
    return float(0.08 + 0.6 * (n / 1e7) ** -0.25 * max(v, 0.5) ** -0.1 + noise)


def cost(c: dict[str, Any]) -> float:
    return float(2 * c["n"] * (50 + c["v"]))


def law(**rest: Any) -> LawSampler:
    return LawSampler(AXES, TARGET, cost=COST, **{"candidates": GRID, "seed": 0, **rest})


def key(params: dict[str, Any]) -> str:
    return json.dumps(params, sort_keys=True)


@pytest.mark.parametrize("how", ["inf", "pruned", "failed"])
def test_runs_without_a_value_are_paid_for_and_not_proposed_again(how: str) -> None:
    sampler = law(budget=0.3 * EVERYTHING)
    study, seen, paid = optuna.create_study(sampler=sampler), set(), 0.0
    for _ in range(60):
        if sampler.stop_reason(study) is not None:
            break
        trial = study.ask(sampler.search_space)
        assert key(trial.params) not in seen
        seen.add(key(trial.params))
        paid += cost(trial.params)
        if how == "inf":
            study.tell(trial, math.inf)
        else:
            study.tell(trial, state=TrialState.PRUNED if how == "pruned" else TrialState.FAIL)
    assert sampler.stop_reason(study) is not None
    assert paid <= 0.3 * EVERYTHING * (1 + 1e-9)


def test_a_trial_that_never_ran_costs_nothing() -> None:
    sampler = law(budget=0.3 * EVERYTHING)
    study = optuna.create_study(sampler=sampler)
    trial = study.ask(sampler.search_space)
    trial.set_user_attr("law:not-run", True)
    study.tell(trial, state=TrialState.FAIL)
    again = study.ask(sampler.search_space)
    assert again.params != trial.params
    study.tell(again, error(**again.params))
    study.tell(study.ask(sampler.search_space), 0.5)
    spent = sampler.report(study).spent
    assert spent == pytest.approx(sum(cost(t.params) for t in study.trials[1:]))


def test_a_measured_cost_of_a_failed_run_counts_instead_of_the_modelled_one() -> None:
    sampler = law(budget=EVERYTHING, cost_attr="flops")
    study = optuna.create_study(sampler=sampler)
    for paid in (17.0, None, None):
        trial = study.ask(sampler.search_space)
        if paid is None:
            trial.set_user_attr("flops", cost(trial.params))
            study.tell(trial, error(**trial.params))
        else:
            trial.set_user_attr("flops", paid)
            study.tell(trial, state=TrialState.FAIL)
    rest = sum(cost(t.params) for t in study.trials[1:])
    assert sampler.report(study).spent == pytest.approx(rest + 17.0)


def test_an_objective_that_dies_between_two_suggestions_is_not_asked_the_same_again() -> None:
    sampler, begun = law(candidates=None, space=SPACE), []

    def objective(trial: optuna.Trial) -> float:
        begun.append(trial.suggest_float("n", 1e7, 6.4e8))
        if len(begun) < 12:
            raise RuntimeError("out of memory")
        return error(begun[-1], trial.suggest_int("v", 1, 256))

    study = optuna.create_study(sampler=sampler)
    study.optimize(objective, n_trials=16, catch=RuntimeError)
    assert len({t.params["n"] for t in study.trials if t.state == TrialState.FAIL}) > 3


@pytest.mark.parametrize("number", [int, np.int64, float])
def test_candidates_are_the_same_whatever_number_type_they_come_in(number: type) -> None:
    given = [{"n": number(c["n"]), "v": number(c["v"])} for c in GRID]
    sampler = law(candidates=given, space=SPACE)
    study, seen = optuna.create_study(sampler=sampler), set()
    for _ in range(len(GRID)):
        trial = study.ask(sampler.search_space)
        assert key(trial.params) not in seen
        seen.add(key(trial.params))
        study.tell(trial, state=TrialState.FAIL)


def test_a_failure_that_was_enqueued_is_not_proposed() -> None:
    sampler = law()
    first = optuna.create_study(sampler=law()).ask(sampler.search_space).params
    study = optuna.create_study(sampler=sampler)
    study.enqueue_trial(first)
    study.tell(study.ask(sampler.search_space), state=TrialState.FAIL)
    for _ in range(15):
        trial = study.ask(sampler.search_space)
        assert trial.params != first
        study.tell(trial, error(**trial.params))


def test_when_the_money_is_committed_only_the_cheapest_run_is_proposed() -> None:
    sampler = law(budget=0.05 * EVERYTHING, policy=Policy(pilot_share=1.0))
    study = optuna.create_study(sampler=sampler)
    trials = [study.ask(sampler.search_space) for _ in range(24)]
    roles = [study.get_trials(deepcopy=False)[t.number].system_attrs.get("law:role") for t in trials]
    assert sum(cost(t.params) for t, r in zip(trials, roles, strict=True) if r) <= 0.05 * EVERYTHING * (1 + 1e-9)
    beyond = [t.params for t, r in zip(trials, roles, strict=True) if r is None]
    assert beyond
    assert all(p == {"n": 1e7, "v": 1} for p in beyond)


def test_a_budget_in_another_unit_than_the_models_begins_with_the_cheapest_run() -> None:
    sampler = law(budget=600.0, cost_attr="seconds")
    study = optuna.create_study(sampler=sampler)
    assert sampler.stop_reason(study) is None
    spent = 0.0
    for k in range(200):
        if sampler.stop_reason(study) is not None:
            break
        trial = study.ask(sampler.search_space)
        if k == 0:
            assert trial.params == {"n": 1e7, "v": 1}
        seconds = 1e-8 * cost(trial.params)
        spent += seconds
        trial.set_user_attr("seconds", seconds)
        study.tell(trial, error(**trial.params))
    assert 0.8 * 600 < spent <= 600 * 1.001


def test_places_at_which_a_law_has_no_value_are_set_aside() -> None:
    space: dict[str, BaseDistribution] = {"n": FloatDistribution(1e7, 6.4e8, log=True), "v": IntDistribution(0, 64)}
    sampler = LawSampler(AXES, TARGET, space=space, cost=COST, seed=0)
    study = optuna.create_study(sampler=sampler)
    study.add_trial(optuna.trial.create_trial(params={"n": 1e7, "v": 0}, distributions=space, value=0.9))
    for _ in range(20):
        trial = study.ask(space)
        assert trial.params["v"] > 0
        study.tell(trial, error(**trial.params))
    assert sampler.report(study).rows == 20


def test_a_batch_without_trials_holds_no_check_and_leaves_it_for_later() -> None:
    sampler = law(budget=EVERYTHING)
    study = optuna.create_study(sampler=sampler)
    sampler.propose(study, 20)
    roles = []
    for _ in range(30):
        trial = study.ask(sampler.search_space)
        roles.append(study.get_trials(deepcopy=False)[trial.number].system_attrs["law:role"])
        study.tell(trial, error(**trial.params))
    assert roles.count("check") == 1


def test_the_check_is_never_fitted_in_a_resumed_study_either() -> None:
    rng = np.random.default_rng(0)
    study = optuna.create_study(sampler=law(budget=3 * EVERYTHING))
    check: dict[str, Any] = {}
    for k in range(60):
        if k % 15 == 0:
            study.sampler = law(budget=3 * EVERYTHING, seed=k)
        trial = study.ask(law().search_space)
        role = study.get_trials(deepcopy=False)[trial.number].system_attrs.get("law:role")
        assert not check or trial.params != check
        check = trial.params if role == "check" else check
        study.tell(trial, error(**trial.params, rng=rng))
    assert check


def test_a_number_of_runs_alone_keeps_a_check_too() -> None:
    sampler = law(max_runs=25)
    study = optuna.create_study(sampler=sampler)
    while sampler.stop_reason(study) is None:
        trial = study.ask(sampler.search_space)
        study.tell(trial, error(**trial.params))
    report = sampler.report(study)
    assert report.check is not None
    assert report.check.place == {"N": SIZES[-1], "V": TOKENS[-1]}
    assert report.rows == 24


def test_looking_changes_nothing_that_is_proposed_later() -> None:
    space: dict[str, BaseDistribution] = {"n": FloatDistribution(1e7, 6.4e8, log=True), "v": IntDistribution(1, 64)}

    def proposals(look: bool) -> list[dict[str, Any]]:
        sampler = LawSampler(AXES, TARGET, space=space, cost=COST, seed=3)
        study, out = optuna.create_study(sampler=sampler), []
        for _ in range(14):
            trial = study.ask(space)
            out.append(trial.params)
            study.tell(trial, error(**trial.params))
            if look and len(out) > 3:
                sampler.stop_reason(study)
                sampler.report(study)
                sampler.forecast(0.1, study)
        return out

    assert proposals(True) == proposals(False)


def test_where_no_form_fits_a_measured_axis_does_not_hide_what_has_run() -> None:
    rng, sampler = np.random.default_rng(0), law(budget=20 * EVERYTHING)
    study, gains = optuna.create_study(sampler=sampler), []
    for _ in range(20):
        trial = study.ask(sampler.search_space)
        role = study.get_trials(deepcopy=False)[trial.number].system_attrs.get("law:role")
        n, v = trial.params["n"], trial.params["v"]
        if role == "gain" and not sampler.report(study).fits:
            gains.append(key(trial.params))
        trial.set_user_attr("N", n * 1.01)  # measured: a little off what was asked
        study.tell(trial, 0.1 + 0.4 * (n / 1e7) ** -0.2 / (1 + (v / 9) ** 3) + 0.001 * rng.standard_normal())
    ran = [key(t.params) for t in study.trials]
    assert len(gains) > 2
    assert all(ran.count(g) == 1 for g in gains)


def test_exponents_are_all_of_them_by_default_and_must_exist() -> None:
    sampler = LawSampler(AXES, Exponents(), ["product", ("chinchilla", {"D": "V"})], candidates=GRID, cost=COST, seed=0)
    study = optuna.create_study(sampler=sampler)
    for _ in range(16):
        trial = study.ask(sampler.search_space)
        study.tell(trial, error(**trial.params))
    assert [q.label for q in sampler.report(study).quantities] == ["alpha", "beta"]
    LawSampler(AXES, Exponents(names=("alpha",)), ["product", "semilog"], candidates=GRID)  # a logarithm has none
    LawSampler(AXES, Exponents(), ["product", "semilog"], candidates=GRID)
    with pytest.raises(UserError, match="'semilog' has no exponents"):
        LawSampler(AXES, Exponents(), ["semilog"], candidates=GRID)
    with pytest.raises(UserError, match=r"'alpah'.*did you mean 'alpha'|alpah.*alpha"):
        LawSampler(AXES, Exponents(names=("alpah",)), candidates=GRID)


def test_a_forecast_knows_the_number_of_runs() -> None:
    few, many = law(max_runs=6).forecast(0.3), law(max_runs=400).forecast(0.3)
    assert few.runs <= 6
    assert many.half_width < few.half_width


def test_intervals_follow_the_curved_posterior() -> None:
    """Against the posterior summed on a fine grid: a floor that few rows leave open makes it far from Gaussian."""
    from isoflop.search.law.belief import Belief
    from isoflop.search.law.contenders import make_contender
    from isoflop.search.law.rows import Row, RowTable
    from isoflop.search.law.targets import Setting
    from isoflop.search.law.views import target_state

    rng = np.random.default_rng(1)
    sizes = np.geomspace(1, 30, 6)
    table = RowTable()
    for n in sizes:
        for _ in range(2):
            table.extend([Row((float(n),), 0, 0.1 + n**-0.35 + 0.01 * rng.standard_normal(), math.nan, 1.0)])
    belief = Belief([make_contender("E + A*N**(-alpha)", ["N"])], ["N"], [1.0], noise="constant")
    belief.update(table)
    assert not belief.lack_of_fit.rejected
    setting = Setting(("N",), (1.0,), (30.0,), ("all",))
    target = PredictionAt(at={"N": 300.0}).bind(setting)
    state = target_state(belief, target)
    h = belief.hypotheses[0]
    spans = [np.linspace(lo, hi, 120) for lo, hi in ((-9, 0.5), (-3, 1.5), (0.01, 1.5))]
    order = [h.blocks[0].form.names.index(n) for n in ("E", "A", "alpha")]
    mesh = np.stack([m.ravel() for m in np.meshgrid(*spans, indexing="ij")], axis=1)
    u = np.empty_like(mesh)
    u[:, order] = mesh
    p = np.concatenate([belief.log_posterior(h, part) for part in np.array_split(u, 40)])
    weight = np.exp(p - p.max())
    value = np.concatenate([target.values(h, part)[:, 0] for part in np.array_split(u, 40)])
    rank = np.argsort(value)
    share = np.cumsum(weight[rank]) / weight.sum()
    low, high = (float(value[rank][np.searchsorted(share, q)]) for q in (0.025, 0.975))
    assert float(state.low[0]) == pytest.approx(low, abs=0.25 * (high - low))
    assert float(state.high[0]) == pytest.approx(high, abs=0.25 * (high - low))


def test_an_optimum_on_the_end_of_its_range_is_said_to_be_there() -> None:
    sampler = LawSampler(
        AXES, OptimalAllocation(budget=5e9, width=0.3), candidates=GRID, cost=COST, budget=EVERYTHING, seed=0
    )
    study, rng = optuna.create_study(sampler=sampler), np.random.default_rng(0)
    reason = None
    while (reason := sampler.stop_reason(study)) is None:
        trial = study.ask(sampler.search_space)
        n, v = trial.params["n"], trial.params["v"]
        study.tell(trial, 0.05 + 0.5 * (n / 1e7) ** -0.1 * v**-0.6 + 1e-4 * rng.standard_normal())
    assert reason == "known: V*(5e+09) lies on the end of its range or beyond"
