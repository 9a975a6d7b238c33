"""The budget sampler's policies for prefixes of a code."""

from __future__ import annotations

from collections import Counter

import pytest

from isoflop.methods.budgets import KINDS, PREFIX_KINDS, BudgetSampler


@pytest.mark.parametrize(
    ("largest", "powers"), [(1, [1]), (2, [1, 2]), (20, [1, 2, 4, 8, 16, 20]), (32, [1, 2, 4, 8, 16, 32])]
)
def test_supports(largest: int, powers: list[int]) -> None:
    assert BudgetSampler("powers", largest, 1).support() == powers
    assert BudgetSampler("every", largest, 1).support() == list(range(1, largest + 1))
    assert BudgetSampler("full", largest, 1).support() == [largest]


@pytest.mark.parametrize("kind", PREFIX_KINDS)
def test_every_length_of_the_support_is_drawn_equally_often(kind: str) -> None:
    sampler = BudgetSampler(kind, 16, 16)
    counts = Counter(n for step in range(100) for n in sampler.draw_each(step, 0, 64))
    support = sampler.support()
    assert sorted(counts) == support
    expected = 6400 / len(support)
    assert all(abs(count - expected) < 5 * expected**0.5 for count in counts.values())


@pytest.mark.parametrize("kind", sorted({*KINDS, *PREFIX_KINDS}))
def test_the_batch_s_budget_is_that_of_its_first_example(kind: str) -> None:
    sampler = BudgetSampler(kind, 12, 5)
    assert [sampler.draw(step, 7) for step in range(30)] == [sampler.draw_each(step, 7, 9)[0] for step in range(30)]
    assert len({tuple(sampler.draw_each(step, 7, 9)) for step in range(5)}) == (1 if kind in ("full", "own") else 5)
