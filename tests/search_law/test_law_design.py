"""The best division of what is left: optimality conditions, closed forms, limits that hold."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isoflop.search.law import LawSampler, PredictionAt
from isoflop.search.law.design import Linear, best_counts


def problem(seed: int, volume: bool = False) -> tuple[list[Linear], np.ndarray]:
    """Two hypotheses on 30 candidates with two observations each, and (money, runs) that one run takes."""
    rng = np.random.default_rng(seed)
    m, o, p, t = 30, 2, 4, 3
    out = []
    for weight in (0.7, 0.3):
        a = rng.standard_normal((2, p))
        slope = None if volume else rng.standard_normal((t, p))
        out.append(Linear(weight, a.T @ a + 0.1 * np.eye(p), rng.standard_normal((m, o, p)), slope))
    return out, np.stack([rng.lognormal(-2.0, 1.0, m), np.full(m, 1 / 9)])


@pytest.mark.parametrize("volume", [False, True])
@pytest.mark.parametrize("most", [math.inf, 1.0])
@settings(max_examples=4, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_nothing_that_may_still_run_is_worth_more_than_what_runs(seed: int, most: float, volume: bool) -> None:
    """The equivalence theorem: worth per price is one number where 0 < n < most, at most it where n = 0, at least it at the top."""
    problems, use = problem(seed, volume)
    money = use[:1]
    n = best_counts(problems, money, most, rounds=2000, prune=False)
    assert n.min() >= 0
    assert n.max() <= most * (1 + 1e-9)
    assert float((money @ n)[0]) == pytest.approx(min(1.0, float(money.sum()) * most), rel=1e-6)
    worth = sum(p.weight * p.derivative(n) for p in problems) / money[0]
    inside = (n > 0.05) & (n < most - 0.05 if most < math.inf else True)
    if not inside.any():
        return
    level = float(worth[inside].mean())
    np.testing.assert_allclose(worth[inside], level, rtol=0.05)
    assert worth[n < 1e-6].max(initial=0.0) <= level * 1.02
    assert worth[n >= most * (1 - 1e-6)].min(initial=math.inf) >= level * 0.98


@settings(max_examples=4, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_every_limit_is_kept_and_no_division_of_the_price_does_better(seed: int) -> None:
    """Weak duality: the optimum under any mixture of the limits bounds the optimum under all of them from below."""
    problems, use = problem(seed)

    def variance(n: np.ndarray) -> float:
        return sum(p.weight * p.variance(n) for p in problems)

    n = best_counts(problems, use, rounds=2000, prune=False)
    assert (use @ n <= 1 + 1e-9).all()
    bounds = [
        variance(best_counts(problems, (a * use[0] + (1 - a) * use[1])[None], rounds=1000, prune=False))
        for a in (0.0, 0.25, 0.5, 0.75, 1.0)
    ]
    assert variance(n) >= max(bounds) * (1 - 1e-3)
    one = [variance(best_counts(problems, use[k : k + 1], rounds=1000, prune=False)) for k in (0, 1)]
    assert variance(n) <= 2.0 * max(one)  # half of each design keeps both limits


def test_separate_unknowns_get_money_by_slope_noise_and_cost() -> None:
    """Candidate m observes parameter m alone, with variance r_m: shares of the money are as |a_m| sqrt(r_m c_m)."""
    a, r, c = np.array([1.0, 3.0, 0.5]), np.array([1.0, 0.2, 4.0]), np.array([0.01, 0.02, 0.05])
    h = (np.eye(3) / np.sqrt(r)[:, None])[:, None]
    n = best_counts([Linear(1.0, 1e-9 * np.eye(3), h, np.diag(a))], c[None], rounds=500)
    share = a * np.sqrt(r * c)
    np.testing.assert_allclose(n * c, share / share.sum(), rtol=1e-4)


def test_few_rounds_and_pruning_cost_little() -> None:
    rng = np.random.default_rng(0)
    h = rng.standard_normal((400, 1, 5))
    problems = [Linear(1.0, 0.1 * np.eye(5), h, rng.standard_normal((3, 5)))]
    use = rng.lognormal(-2.0, 1.0, 400)[None]
    quick, exact = best_counts(problems, use), best_counts(problems, use, rounds=5000, prune=False)
    assert problems[0].variance(quick) <= 1.03 * problems[0].variance(exact)


def test_what_is_affordable_altogether_all_runs_once() -> None:
    problems, use = problem(3)
    np.testing.assert_allclose(best_counts(problems, use[:1] / 1000, 1.0), 1.0)


GRID: list[dict[str, Any]] = [{"n": float(n), "v": v} for n in 1e7 * 2.0 ** np.arange(8) for v in (1, 4, 16, 64, 256)]


def searched(max_runs: int | None, budget: float | None) -> tuple[LawSampler, list[tuple[str, float]]]:
    """Roles and costs of a search on a product law."""
    rng = np.random.default_rng(0)
    sampler = LawSampler(
        {"N": "n", "V": "v"},
        PredictionAt(at={"N": 1e10, "V": 64.0}),
        candidates=GRID,
        cost="2*N*(50+V)",
        budget=budget,
        max_runs=max_runs,
        seed=0,
    )
    study = optuna.create_study(sampler=sampler)
    made = []
    while sampler.stop_reason(study) is None and len(made) < 130:
        trial = study.ask(sampler.search_space)
        n, v = trial.params["n"], trial.params["v"]
        made.append((str(study.trials[-1].system_attrs["law:role"]), 2 * n * (50 + v)))
        study.tell(trial, 0.08 + 0.6 * (n / 1e7) ** -0.25 * v**-0.1 + 0.005 * rng.standard_normal())
    assert (sampler.stop_reason(study) or "").startswith(("runs:", "budget:", "nothing affordable"))
    return sampler, made


def test_a_number_of_runs_is_kept_and_the_money_goes_to_dearer_ones() -> None:
    budget = 1e12
    few, many = searched(30, budget)[1], searched(120, budget)[1]
    assert len(few) <= 30
    assert len(many) <= 120
    for made in (few, many):
        assert sum(c for _, c in made) <= budget
    assert sum(c for _, c in few) > 0.7 * budget
    gains = [np.mean([c for role, c in made if role == "gain"]) for made in (few, many)]
    assert gains[0] > 1.5 * gains[1]


def test_a_number_of_runs_alone_is_enough_and_says_why_it_ended() -> None:
    sampler, made = searched(16, None)
    assert len(made) == 16
    assert [role for role, _ in made].count("pilot") == 8  # at most half
    assert sampler.pilot_runs == 8
