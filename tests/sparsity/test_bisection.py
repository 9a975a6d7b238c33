"""The search for the largest allowed setting: bracket, tolerance, and quantities that do not quite rise."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isoflop.methods.bisection import largest_allowed


@given(edge=st.floats(0.0, 1.0), target=st.floats(-0.5, 1.5))
def test_a_rising_quantity_is_met_to_the_tolerance(edge: float, target: float) -> None:
    found = largest_allowed(lambda x: x**3 + edge, target, 0.0, 1.0, 1e-6)
    if target < edge:
        assert (found.x, found.status) == (0.0, "none")
    elif target >= 1 + edge:
        assert (found.x, found.status) == (1.0, "all")
    else:
        assert found.status == "inside"
        assert found.y <= target
        assert (found.x + 2e-6) ** 3 + edge > target
    assert found.dip == 0.0


@given(values=st.lists(st.integers(0, 20), min_size=2, max_size=40), target=st.integers(-1, 21))
def test_whole_numbers_end_at_a_neighbour_that_is_not_allowed(values: list[int], target: int) -> None:
    rising = sorted(values)
    found = largest_allowed(lambda k: rising[int(k)], target, 0, len(rising) - 1, 1)
    allowed = [k for k, value in enumerate(rising) if value <= target]
    assert found.x == (allowed[-1] if allowed else 0)
    assert isinstance(found.x, int)


def test_a_dip_beyond_the_slack_ends_at_the_first_crossing() -> None:
    def wave(x: float) -> float:
        return math.sin(6 * math.pi * x) + x  # crosses 0.9 upwards near 0.06 and falls again

    careless = largest_allowed(wave, 0.9, 0.0, 1.0, 1e-6, slack=10.0)
    careful = largest_allowed(wave, 0.9, 0.0, 1.0, 1e-6, slack=0.1, scan=33)
    assert careful.dip > 0.1
    assert careful.x < 0.1 < careless.x
    assert max(wave(k * careful.x / 500) for k in range(501)) <= 0.9 + 1e-6


def test_nothing_is_tried_twice() -> None:
    tried: list[float] = []
    found = largest_allowed(lambda x: tried.append(x) or x, 0.3, 0.0, 1.0, 1e-3)
    assert len(tried) == len(set(tried)) == found.evaluations


@pytest.mark.parametrize("bracket", [(1.0, 0.0, 1e-3), (0.0, 1.0, 0.0), (0, 5, 0)])
def test_impossible_searches_are_refused(bracket: tuple[float, float, float]) -> None:
    with pytest.raises(ValueError, match="cannot search"):
        largest_allowed(float, 0.5, *bracket)
