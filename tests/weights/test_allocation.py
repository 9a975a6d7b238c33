"""The exact allocator against brute force."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from isoflop.methods.allocation import allocate

OPTIONS = st.lists(st.tuples(st.integers(0, 9), st.integers(-20, 20)), min_size=1, max_size=4)
ITEMS = st.lists(OPTIONS, min_size=1, max_size=5)


def brute_force(
    costs: list[list[float]], scores: list[list[float]], budget: float, least: float = 0
) -> tuple[float, float] | None:
    """(score, cost) of the best choice, the cheaper among equals."""
    found = [
        (sum(s[i] for s, i in zip(scores, choice, strict=True)), cost)
        for choice in product(*(range(len(options)) for options in costs))
        if (cost := sum(c[i] for c, i in zip(costs, choice, strict=True))) <= budget and cost >= least
    ]
    return min(found, default=None)


@given(ITEMS, st.integers(0, 40))
def test_the_choice_is_the_best_of_all(items: list[list[tuple[int, int]]], budget: int) -> None:
    costs = [[float(cost) for cost, _ in options] for options in items]
    scores = [[float(score) for _, score in options] for options in items]
    expected = brute_force(costs, scores, budget)
    if expected is None:
        with pytest.raises(ValueError, match="less than the cheapest options cost together"):
            allocate(costs, scores, budget)
        return
    found = allocate(costs, scores, budget)
    assert (found.score, found.cost) == expected
    assert found.cost == sum(options[i] for options, i in zip(costs, found.choice, strict=True))
    assert found.score == sum(options[i] for options, i in zip(scores, found.choice, strict=True))


@given(ITEMS, st.integers(1, 40), st.integers(0, 8))
def test_a_budget_can_be_used_up(items: list[list[tuple[int, int]]], budget: int, slack: int) -> None:
    """Also where spending less would score better."""
    costs = [[float(cost) for cost, _ in options] for options in items]
    scores = [[float(score) for _, score in options] for options in items]
    least = max(0, budget - slack)
    expected = brute_force(costs, scores, budget, least)
    if expected is None:
        with pytest.raises(ValueError, match=r"no choice costs from|less than the cheapest options"):
            allocate(costs, scores, budget, least=least)
        return
    found = allocate(costs, scores, budget, least=least)
    assert (found.score, found.cost) == expected


def test_rounded_costs_keep_no_least() -> None:
    with pytest.raises(ValueError, match="no least"):
        allocate([[1.0]], [[1.0]], 1.0, steps=10, least=1.0)


@given(st.integers(0, 10_000), st.integers(1, 6))
def test_real_costs_are_exact_as_well(seed: int, items: int) -> None:
    rng = np.random.default_rng(seed)
    costs, scores = rng.random((items, 3)).tolist(), rng.normal(size=(items, 3)).tolist()
    budget = sum(min(options) for options in costs) + rng.random() * items / 2
    expected = brute_force(costs, scores, budget)
    assert expected is not None
    assert allocate(costs, scores, budget).score == pytest.approx(expected[0], abs=1e-9)


@given(ITEMS, st.integers(1, 40), st.integers(20, 400))
def test_rounded_costs_keep_the_budget_and_lose_what_a_smaller_budget_loses(
    items: list[list[tuple[int, int]]], budget: int, steps: int
) -> None:
    costs = [[float(cost) for cost, _ in options] for options in items]
    scores = [[float(score) for _, score in options] for options in items]
    least = sum(min(options) for options in costs)
    smaller = budget * (1 - len(items) / steps)
    assume(least <= smaller)
    found = allocate(costs, scores, budget, steps)
    assert found.cost <= budget * (1 + 1e-9)
    worst = brute_force(costs, scores, smaller)
    assert worst is not None
    assert found.score <= worst[0]


def test_a_large_problem_takes_no_time() -> None:
    """200 matrices at 5 levels, costs in the thousands of whole units."""
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 5, 200)
    costs = [[int(size) * bits for bits in (2, 3, 4, 5, 6)] for size in sizes]
    scores = [sorted(rng.random(5).tolist(), reverse=True) for _ in sizes]
    found = allocate(costs, scores, 3 * int(sizes.sum()))
    assert found.cost <= 3 * sizes.sum()
    # a greedy exchange of two matrices finds nothing better
    for i in range(0, 200, 20):
        for j in range(1, 200, 20):
            for a, b in product(range(5), repeat=2):
                cost = found.cost - costs[i][found.choice[i]] - costs[j][found.choice[j]] + costs[i][a] + costs[j][b]
                gain = scores[i][found.choice[i]] + scores[j][found.choice[j]] - scores[i][a] - scores[j][b]
                assert cost > 3 * sizes.sum() or gain <= 1e-9


@pytest.mark.parametrize(
    ("costs", "scores", "message"),
    [
        ([[1.0]], [[1.0, 2.0]], "one cost and one score"),
        ([[]], [[]], "no options"),
        ([[-1.0]], [[0.0]], "at least 0"),
        ([[1.0]], [[float("inf")]], "finite"),
    ],
)
def test_senseless_options_are_refused(costs: list[list[float]], scores: list[list[float]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        allocate(costs, scores, 10)
