"""``LawSampler`` as Optuna sees it, and what it must never do."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from isoflop.core.errors import UserError
from isoflop.search.law import (
    BestMethod,
    Exponents,
    Frontier,
    LawSampler,
    OptimalAllocation,
    Policy,
    PredictionAt,
)
from isoflop.search.space import Branch, Param, SearchSpace, Zip

AXES = {"N": "n", "V": "v"}
COST = "2*N*(50+V)"
SPACE: dict[str, BaseDistribution] = {
    "n": FloatDistribution(1e7, 1.28e9, log=True),
    "v": IntDistribution(1, 512, log=True),
}
TARGET = OptimalAllocation(budget=5e9)


def error(n: float, v: float, rng: np.random.Generator | None = None) -> float:
    noise = 0.006 * rng.standard_normal() if rng is not None else 0.0
    return float(0.08 + 0.6 * (n / 1e7) ** -0.25 * v**-0.1 + noise)


class Objective:
    def __init__(self, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)

    def __call__(self, trial: optuna.Trial) -> float:
        n = trial.suggest_float("n", 1e7, 1.28e9, log=True)
        v = trial.suggest_int("v", 1, 512, log=True)
        return error(n, v, self.rng)


def study_of(sampler: LawSampler, trials: int, seed: int = 0) -> optuna.Study:
    study = optuna.create_study(sampler=sampler)
    study.optimize(Objective(seed), n_trials=trials)
    return study


def test_optimize_without_a_given_space_finds_the_allocation() -> None:
    sampler = LawSampler(AXES, TARGET, cost=COST, seed=0)
    report = sampler.report(study_of(sampler, 60))
    (quantity,) = report.quantities
    assert quantity.low < 33.3 < quantity.high
    assert quantity.value == pytest.approx(33.3, rel=0.12)
    assert report.fits
    assert report.rows == 60


def test_ask_and_tell_with_a_budget_ends_within_it_and_keeps_the_check_out_of_the_fit() -> None:
    sampler = LawSampler(AXES, TARGET, space=SPACE, cost=COST, budget=2e11, seed=1)
    study, objective = optuna.create_study(sampler=sampler), Objective(1)
    roles = []
    for _ in range(400):
        if sampler.stop_reason(study) is not None:
            break
        trial = study.ask()
        value = objective(trial)
        roles.append(study.trials[-1].system_attrs["law:role"])
        study.tell(trial, value)
    report = sampler.report(study)
    assert report.spent <= 2e11
    assert report.stop is not None
    assert roles.count("check") == 1
    assert report.check is not None
    assert report.rows == len(roles) - 1
    affordable = next(t for t, r in zip(study.trials, roles, strict=True) if r == "check").params
    assert 2 * affordable["n"] * (50 + affordable["v"]) <= 0.1 * 2e11
    assert roles[: roles.index("check")] == ["pilot"] * roles.index("check")


def test_the_same_seed_proposes_the_same_runs() -> None:
    params = [
        [t.params for t in study_of(LawSampler(AXES, TARGET, space=SPACE, cost=COST, seed=s), 20).trials]
        for s in (3, 3, 4)
    ]
    assert params[0] == params[1]
    assert params[0] != params[2]


def test_copies_continue_alike_and_reseeding_separates_them() -> None:
    sampler = LawSampler(AXES, TARGET, space=SPACE, cost=COST, seed=3)
    study = study_of(sampler, 15)
    twins = [pickle.loads(pickle.dumps(sampler)), copy.deepcopy(sampler)]
    first = [t.propose(study, 2) for t in twins]
    assert first[0] == first[1]
    twins[1].reseed_rng()
    fresh = [t._source.draw(t._rng, []) for t in twins]
    assert fresh[0] != fresh[1]


def test_a_study_can_be_resumed_and_extended_by_hand() -> None:
    """Everything but runs under way comes from the trials: a fresh sampler knows what the old one knew."""
    sampler = LawSampler(AXES, TARGET, space=SPACE, cost=COST, seed=3)
    study = study_of(sampler, 25)
    other = LawSampler(AXES, TARGET, space=SPACE, cost=COST, seed=3)
    fresh = optuna.create_study(sampler=other)
    fresh.add_trials(study.trials)
    one, two = sampler.report(study), other.report(fresh)
    assert two.rows == one.rows
    assert two.spent == pytest.approx(one.spent)
    assert two.quantities[0].value == pytest.approx(one.quantities[0].value, rel=0.01)


def test_a_batch_repeats_a_place_only_where_a_repeat_is_worth_more() -> None:
    """Greedy by fantasies: every member of the batch has the best score given those before it."""
    sampler = LawSampler(AXES, TARGET, candidates=grid(), cost=COST, seed=0)
    study = study_from_grid(sampler, 25)
    batch = sampler.propose(study, 8)
    planner, pool = sampler._planner, sampler._pool()
    waiting: list[Any] = []
    planner._since_explored = 0
    keys = [tuple(c.values()) for c in sampler._drawn]
    for config in batch:
        planner.refresh()
        views = planner.views(pool)
        for x, group, cost in waiting:
            planner._imagine(views, x, group, cost)
        score = planner.score(views, pool, planner.noise(pool))
        i = keys.index(tuple(config.values()))
        assert score[i] == pytest.approx(score.max(), rel=1e-9)
        waiting.append((pool.x[i], pool.group[i], float(pool.cost[i])))


def test_without_replicates_nothing_is_proposed_twice_in_a_batch() -> None:
    sampler = LawSampler(AXES, TARGET, candidates=grid(), cost=COST, seed=0, policy=Policy(replicates=False))
    batch = sampler.propose(study_from_grid(sampler, 25), 10)
    assert len({tuple(c.values()) for c in batch}) == 10


def test_runs_under_way_are_fantasised() -> None:
    sampler = LawSampler(AXES, TARGET, candidates=grid(), cost=COST, seed=0)
    study = study_from_grid(sampler, 25)
    batch = sampler.propose(study, 4)
    asked = []
    for _ in range(4):  # none is told before the next is asked
        trial = study.ask(sampler._given.distributions)  # type: ignore[union-attr]
        asked.append(dict(trial.params))
    assert asked == batch


def test_a_check_that_fails_is_replaced_by_the_next_largest_run() -> None:
    sampler = LawSampler(AXES, TARGET, space=SPACE, cost=COST, budget=2e11, seed=1)
    study, objective = optuna.create_study(sampler=sampler), Objective(1)
    checks: list[dict[str, Any]] = []
    for _ in range(400):
        if sampler.stop_reason(study) is not None:
            break
        trial = study.ask()
        value = objective(trial)
        if study.trials[-1].system_attrs["law:role"] == "check":
            checks.append(dict(trial.params))
            if len(checks) == 1:
                study.tell(trial, state=optuna.trial.TrialState.FAIL)
                continue
        study.tell(trial, value)
    assert len(checks) == 2
    costs = [2 * c["n"] * (50 + c["v"]) for c in checks]
    assert checks[0] != checks[1]
    assert costs[1] <= costs[0]
    assert sampler.report(study).check is not None


def test_failed_configurations_are_not_proposed_again() -> None:
    sampler = LawSampler(AXES, TARGET, candidates=grid(), cost=COST, seed=0)
    study = study_from_grid(sampler, 25)
    space = sampler._given.distributions  # type: ignore[union-attr]
    failed = []
    for _ in range(6):
        trial = study.ask(space)
        failed.append(dict(trial.params))
        study.tell(trial, state=optuna.trial.TrialState.FAIL)
    assert len({tuple(f.values()) for f in failed}) == 6


def grid() -> list[dict[str, Any]]:
    return [{"n": float(n), "v": v} for n in 1e7 * 2.0 ** np.arange(8) for v in (1, 4, 16, 64, 256)]


def study_from_grid(sampler: LawSampler, count: int) -> optuna.Study:
    rng = np.random.default_rng(5)
    study = optuna.create_study(sampler=sampler)
    configs, space = grid(), sampler._given.distributions  # type: ignore[union-attr]
    for i in rng.integers(len(configs), size=count):
        value = error(configs[i]["n"], configs[i]["v"], rng)
        study.add_trial(optuna.trial.create_trial(params=configs[i], distributions=space, value=value))
    return study


def test_methods_with_conditional_knobs_and_the_best_of_them() -> None:
    """Two methods, one of which has a knob of its own; the sampler finds which is better at the budget."""
    amplitude = {"plain": 0.62, "merge": 0.55}
    space = SearchSpace(
        ("a", "b", "c", "d", "e"),
        (
            Branch("plain", (Param("plain.k", low=1, high=64, integer=True, log=True),)),
            Branch(
                "merge",
                (
                    Param("merge.mode", ("soft", "hard")),
                    Param("merge.k", low=1, high=64, integer=True, log=True),
                    Param("merge.tau", low=0.1, high=1.0, when=(("merge.mode", ("soft",)),), default=0.5),
                ),
            ),
        ),
    )
    sizes = {m: 1e7 * 3.0**i for i, m in enumerate("abcde")}
    sampler = LawSampler(
        {"N": {"model": sizes}, "V": lambda c: c.get("plain.k", c.get("merge.k", np.nan))},
        BestMethod(budget=1e10),
        by=["method"],
        share=["E", "alpha"],
        space=space,
        cost=COST,
        seed=0,
    )
    study, rng = optuna.create_study(sampler=sampler), np.random.default_rng(0)
    from isoflop.search.distributions import suggest

    for _ in range(60):
        trial = study.ask()
        config = space.walk(lambda p, t=trial: suggest(t, p))  # type: ignore[misc]
        n, v, a = sizes[str(config["model"])], config[f"{config['method']}.k"], amplitude[str(config["method"])]
        study.tell(trial, 0.08 + a * (n / 1e7) ** -0.25 * float(v) ** -0.1 + 0.005 * rng.standard_normal())
    report = sampler.report(study)
    ((method, probability),) = report.best_method.values()
    assert method == "merge"
    assert probability > 0.95
    assert {t.params["method"] for t in study.trials} == {"plain", "merge"}


def test_coupled_parameters_move_together() -> None:
    rows = tuple((("model", m), ("q.k", k)) for m, k in [("a", 1), ("a", 8), ("b", 2), ("b", 16), ("c", 4)])
    space = SearchSpace(("a", "b", "c"), (Branch("q", (Param("q.k", (1, 2, 4, 8, 16)),)),), zips=(Zip("zip0", rows),))
    sampler = LawSampler({"N": {"model": {"a": 1, "b": 3, "c": 9}}, "V": "q.k"}, Exponents(), space=space, seed=0)
    study = optuna.create_study(sampler=sampler)
    from isoflop.search.distributions import suggest

    for _ in range(12):
        trial = study.ask()
        config = space.walk(lambda p, t=trial: suggest(t, p))  # type: ignore[misc]
        assert space.contains(config)
        study.tell(trial, 0.5)


def test_several_outputs_have_a_law_each() -> None:
    sampler = LawSampler(
        AXES,
        PredictionAt(at={"N": 1e10, "V": 64}),
        outputs=("reading", "reasoning"),
        space=SPACE,
        cost=COST,
        seed=0,
    )
    study, rng = optuna.create_study(sampler=sampler, directions=["minimize", "minimize"]), np.random.default_rng(0)
    for _ in range(40):
        trial = study.ask(SPACE)
        n, v = trial.params["n"], trial.params["v"]
        noise = 0.004 * rng.standard_normal(2)
        study.tell(trial, [error(n, v) + noise[0], 0.05 + 0.5 * (n / 1e7) ** -0.1 * v**-0.3 + noise[1]])
    report = sampler.report(study)
    assert [q.label.rsplit(" ", 1)[1] for q in report.quantities] == ["reading", "reasoning"]
    for q, truth in zip(report.quantities, (error(1e10, 64), 0.05 + 0.5 * 1000**-0.1 * 64**-0.3), strict=True):
        assert q.value == pytest.approx(truth, rel=0.1)


def test_measured_costs_replace_modelled_ones() -> None:
    sampler = LawSampler(AXES, TARGET, space=SPACE, cost=COST, cost_attr="seconds", seed=0)
    study, objective = optuna.create_study(sampler=sampler), Objective()
    for _ in range(15):
        trial = study.ask()
        value = objective(trial)
        n, v = trial.params["n"], trial.params["v"]
        trial.set_user_attr("seconds", 3e-9 * 2 * n * (50 + v))
        study.tell(trial, value)
    report = sampler.report(study)
    assert report.spent == pytest.approx(sum(t.user_attrs["seconds"] for t in study.trials))
    assert sampler._reader._pricing(np.array([1e9, 1e11])) == pytest.approx([3.0, 300.0], rel=1e-6)


def test_a_warm_stage_makes_its_jobs_cheaper() -> None:
    sampler = LawSampler(
        {"N": {"model": {"a": 1e7, "b": 1.1e7}}, "V": "v"},
        Exponents(names=("beta",)),
        space={"model": CategoricalDistribution(("a", "b")), "v": IntDistribution(1, 64, log=True)},
        cost="1e-9*N*(50+V)",
        setup=lambda c: {f"train {c['model']}": 1000.0},
        seed=0,
    )
    study = optuna.create_study(sampler=sampler)
    trial = study.ask(sampler._given.distributions)  # type: ignore[union-attr]
    study.tell(trial, 0.5)
    sampler.propose(study, 1)
    costs: dict[str, list[float]] = {}
    for config, cost in zip(sampler._drawn, sampler._pool().cost, strict=True):
        costs.setdefault(config["model"], []).append(float(cost))
    warm, cold = trial.params["model"], {"a": "b", "b": "a"}[trial.params["model"]]
    assert max(costs[warm]) < 10
    assert min(costs[cold]) > 1000


def test_a_wrong_form_is_said_to_be_wrong() -> None:
    sampler = LawSampler(AXES, Frontier(low=5e9, high=2e11), candidates=grid(), cost=COST, seed=0)
    study, rng = optuna.create_study(sampler=sampler), np.random.default_rng(0)
    space = sampler._given.distributions  # type: ignore[union-attr]
    for _ in range(80):
        trial = study.ask(space)
        n, v = trial.params["n"], trial.params["v"]
        value = 0.08 + 0.5 * (n / 1e7) ** -0.25 * (0.6 + 0.4 / (1 + (v / 12) ** 1.5)) + 0.004 * rng.standard_normal()
        study.tell(trial, float(value))
    report = sampler.report(study)
    assert not report.fits
    assert "does not fit" in report.verdict
    assert report.stop is None or not report.stop.startswith("known")


def test_a_width_that_is_reached_ends_the_study() -> None:
    target = OptimalAllocation(budget=5e9, width=0.1)
    sampler = LawSampler(AXES, target, space=SPACE, cost=COST, seed=0)
    study = optuna.create_study(sampler=sampler)
    study.optimize(Objective(), n_trials=150, callbacks=[sampler.stop_when_known])
    assert len(study.trials) < 150
    assert sampler.report(study).half_width <= 0.1


@pytest.mark.parametrize(
    "change, words",
    [
        ({"axes": {}}, "axes: at least one is needed"),
        ({"axes": {"N": "n"}}, "unknown axis of law 'product' 'V'"),
        ({"axes": {"N": "m", "V": "v"}}, "unknown parameter 'm'"),
        ({"axes": {"N": "n", "V": {"v": 3}}}, "must be followed by a table"),
        ({"laws": []}, "at least one is needed"),
        ({"laws": ["prodct"]}, "did you mean 'product'"),
        ({"laws": [("chinchilla", {"B": "V"})]}, "unknown variable of law 'chinchilla' 'B'"),
        ({"laws": [("chinchilla", {"D": "W"})]}, "unknown axis 'W'"),
        ({"budget": 0.0}, "must be a positive number"),
        ({"max_runs": 0}, "max_runs = 0; allowed: 1 or more"),
        ({"noise": "loud"}, "unknown noise 'loud'"),
        ({"target": "V*"}, "one of the target classes"),
        ({"target": OptimalAllocation(budget=-1.0)}, "budget = -1.0 must be a positive number"),
        ({"target": OptimalAllocation(budget=5e9, of="W")}, "unknown axis 'W'"),
        ({"target": OptimalAllocation(budget=5e9, cost="2*M*V")}, "unknown name in cost 'M'"),
        ({"target": Frontier(low=2.0, high=1.0)}, "allowed: 0 < low <= high"),
        ({"target": PredictionAt(at={"N": 1e9})}, "a value for V is needed"),
        ({"target": PredictionAt(at={"N": 1e9, "W": 1})}, "unknown axis 'W'"),
        ({"target": BestMethod(budget=5e9)}, "give at least two groups"),
        ({"target": OptimalAllocation(budget=5e9, group="x")}, "unknown group 'x'"),
        ({"cost": "2*N*(50+W)"}, "unknown parameter 'W'"),
        ({"space": {"n": 3}}, "is not an Optuna distribution"),
    ],
)
def test_bad_input_is_one_line_that_says_what_works(change: dict[str, Any], words: str) -> None:
    given = {"axes": AXES, "target": TARGET, "space": SPACE, "cost": COST, **change}
    with pytest.raises(UserError) as caught:
        LawSampler(**given)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
