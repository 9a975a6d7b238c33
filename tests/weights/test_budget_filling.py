"""Budgets of whole levels of different sizes: never exceeded, never left with room, against brute force."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from weight_cases import gpt2, mixtral, trained_decoder

from isoflop.methods.weights.evolution import distinct, evolve, selections
from isoflop.methods.weights.evopress import EvoPress
from isoflop.methods.weights.filling import fewest_steps, most_within, shares
from isoflop.methods.weights.space import Levels, LevelSpace
from isoflop.methods.weights.views import LinearView, linear_views

COUNTS = st.dictionaries(st.integers(1, 12), st.integers(0, 5), min_size=1, max_size=3)


@given(COUNTS, st.integers(0, 80))
def test_the_largest_sum_within_the_room_is_that_of_brute_force(counts: dict[int, int], room: int) -> None:
    sums = {
        sum(size * taken for size, taken in zip(counts, choice, strict=True))
        for choice in product(*(range(count + 1) for count in counts.values()))
    }
    assert most_within(counts, room) == max(total for total in sums if total <= room)


@given(
    st.dictionaries(st.integers(1, 12), st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=3),
    st.integers(-30, 30),
)
def test_steps_are_the_fewest_that_add_up(room: dict[int, tuple[int, int]], need: int) -> None:
    ways = [
        sum(map(abs, choice))
        for choice in product(*(range(-downs, ups + 1) for downs, ups in room.values()))
        if sum(size * steps for size, steps in zip(room, choice, strict=True)) == need
    ]
    if not ways:
        with pytest.raises(ValueError, match=f"add up to {need}"):
            fewest_steps(room, need)
        return
    found = fewest_steps(room, need)
    assert sum(size * steps for size, steps in found.items()) == need
    assert all(-room[size][0] <= steps <= room[size][1] for size, steps in found.items())
    assert sum(map(abs, found.values())) == min(ways)


@given(
    st.dictionaries(st.integers(1, 12), st.integers(1, 3), min_size=1, max_size=3),
    st.integers(200, 500),
)
def test_shares_are_the_most_that_the_budget_holds(counts: dict[int, int], hundredths: int) -> None:
    """By brute force over the levels 2 … 5 of every size together; decimal averages are meant as they are written."""
    average = hundredths / 100
    found = shares(counts, average, 2, 5)
    used = sum(size * levels for size, levels in found.items())
    everything = {
        sum(size * levels for size, levels in zip(counts, choice, strict=True))
        for choice in product(*(range(2 * count, 5 * count + 1) for count in counts.values()))
    }
    weights = sum(size * count for size, count in counts.items())
    assert used == max(total for total in everything if 100 * total <= hundredths * weights)
    assert all(2 * count <= found[size] <= 5 * count for size, count in counts.items())


def test_sizes_keep_the_average_where_whole_levels_allow() -> None:
    """As in the published configurations of Llama-2-7B: 128 matrices of 4096², 96 of 4096·11008, 2.25 bits in both."""
    assert shares({4096**2: 128, 4096 * 11008: 96}, 2.25, 2, 6) == {4096**2: 288, 4096 * 11008: 216}
    assert shares({4096**2: 128, 4096 * 11008: 96}, 3, 2, 6) == {4096**2: 384, 4096 * 11008: 288}


def test_large_models_with_awkward_sizes_take_no_time() -> None:
    """A hundred matrices of each of four sizes with a small common divisor, a budget that no size can meet by itself."""
    counts = {1023 * 1025: 100, 1023 * 4097: 100, 1025 * 4097: 100, 33 * 1025: 100}
    found = shares(counts, 2.317, 2, 6)
    weights = sum(size * count for size, count in counts.items())
    left = 2.317 * weights - sum(size * levels for size, levels in found.items())
    assert 0 <= left < min(counts)


def stored(levels: Levels, views: list[LinearView]) -> int:
    return sum(view.numel * level for view, level in zip(views, levels, strict=True))


@settings(max_examples=20, deadline=None)
@given(
    st.sampled_from(["llama", "gpt2", "mixtral"]),
    st.sampled_from([2.0, 2.25, 2.3, 2.5, 3.0, 3.37, 4.0, 5.9]),
    st.sampled_from(["size", "any"]),
    st.integers(0, 1000),
)
def test_no_configuration_exceeds_the_budget_or_leaves_room(name: str, bits: float, exchange: str, seed: int) -> None:
    """Starts, offspring, offspring of offspring and random draws all store the same, and no matrix fits a level more."""
    views = linear_views({"llama": trained_decoder, "gpt2": gpt2, "mixtral": mixtral}[name]())
    method, rng = EvoPress(bits=bits, exchange=exchange), np.random.default_rng(seed)
    space = method.space(views)
    total = sum(view.numel for view in views)
    starts = method.starts(views, 3, rng)
    found = list(starts)
    for start in starts:
        for levels in [*distinct(start, space.mutate, 6, rng), space.shuffle(start, rng)]:
            found += [levels, space.mutate(levels, rng)]
    used = {stored(levels, views) for levels in found}
    assert len(used) == 1
    budget = bits * total * (1 + 1e-12)
    assert max(used) <= budget
    assert all(
        level == 6 or stored(levels, views) + view.numel > budget
        for levels in found
        for view, level in zip(views, levels, strict=True)
    )
    assert all(2 <= level <= 6 for levels in found for level in levels)


def test_offspring_among_all_sizes_trade_levels_of_unequal_size() -> None:
    """One unit of 4 for two of 2, seen from both sides, and never more than ten changes."""
    space = LevelSpace((0,) * 7, (4,) * 7, (tuple(range(7)),), (2, 2, 2, 2, 4, 4, 11))
    parent = (2,) * 7
    found = distinct(parent, space.mutate, 60, np.random.default_rng(0))
    moves = [np.subtract(levels, parent) for levels in found]
    assert len(found) == 60
    assert all((move * space.sizes).sum() == 0 for move in moves)
    assert max(np.abs(move).sum() for move in moves) <= 10
    assert any(move[:4].sum() == 2 and move[4:6].sum() == -1 for move in moves)
    assert any(move[:4].sum() == -2 and move[4:6].sum() == 1 for move in moves)


def test_where_sizes_cannot_trade_the_parent_comes_back() -> None:
    """Three of one size for two of the other, but only one of each there is."""
    space = LevelSpace((0, 0), (4, 4), ((0, 1),), (2, 3))
    assert distinct((0, 4), space.mutate, 5, np.random.default_rng(0)) == [(3, 2)]
    assert distinct((1, 1), LevelSpace((0, 0), (2, 2), ((0, 1),), (2, 3)).mutate, 5, np.random.default_rng(0)) == []


class Additive:
    """A fitness that adds up over units."""

    def __init__(self, errors: list[list[float]]) -> None:
        self.errors, self.tokens = errors, 0

    def scores(self, candidates: Sequence[Levels], examples: int, rng: np.random.Generator) -> list[float]:
        return [sum(errors[level] for errors, level in zip(self.errors, levels, strict=True)) for levels in candidates]


@pytest.mark.parametrize("seed", range(3))
def test_the_search_among_all_sizes_reaches_the_optimum_of_equal_storage(seed: int) -> None:
    """By brute force over what is stored, which the search within sizes cannot reach here."""
    rng = np.random.default_rng(seed)
    sizes, parent = (2, 2, 4, 4, 6, 6), (1,) * 6
    errors = [[float(size * rate**level) for level in range(4)] for size, rate in rng.uniform(0.2, 0.9, (6, 2))]
    every = [levels for levels in product(range(4), repeat=6) if np.dot(sizes, levels) == np.dot(sizes, parent)]
    best = min(Additive(errors).scores(every, 1, rng))
    found = {}
    for name, groups in (("any", (tuple(range(6)),)), ("size", ((0, 1), (2, 3), (4, 5)))):
        space = LevelSpace((0,) * 6, (3,) * 6, groups, sizes)
        search = evolve([parent], space.mutate, Additive(errors), selections(1, 1, 1, 1), 80, 12, rng)
        found[name] = search.fitness[-1]
    assert found["any"] == pytest.approx(best)
    assert found["any"] < found["size"]
