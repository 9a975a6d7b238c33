"""Rate curves: hulls, crossings and Bjøntegaard's difference against cases that can be done by hand, and properties."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isoflop.core.errors import UserError
from isoflop.frontier.rate_curves import RateCurve

RATES = st.lists(st.integers(1, 10_000), min_size=2, max_size=8, unique=True)


@st.composite
def curves(draw: st.DrawFn) -> RateCurve:
    rates = draw(RATES)
    errors = draw(st.lists(st.floats(0, 1), min_size=len(rates), max_size=len(rates)))
    return RateCurve.of(zip(rates, errors, strict=True))


def line(rates: list[float], height: float, slope: float) -> RateCurve:
    """Points of height - slope · ln rate."""
    return RateCurve.of([(rate, height - slope * math.log(rate)) for rate in rates])


def between(curve: RateCurve, other: RateCurve | None = None) -> list[float]:
    """Rates on the common range: points, and places between them."""
    other = other or curve
    low, high = max(curve.rates[0], other.rates[0]), min(curve.rates[-1], other.rates[-1])
    return [] if low > high else np.geomspace(low, high, 40).clip(low, high).tolist()


def test_errors_between_points_lie_on_lines_in_the_logarithm() -> None:
    curve = RateCurve.of([(4, 0.2), (1, 0.6), (4, 0.4)])
    assert curve.rates.tolist() == [1, 4]
    assert curve.at(2) == pytest.approx(0.45)
    assert math.isnan(curve.at(5))


def test_half_the_rate_everywhere_is_a_difference_of_minus_one_half() -> None:
    full = RateCurve.of([(2, 0.8), (8, 0.3), (64, 0.1)])
    half = RateCurve.of([(rate / 2, error) for rate, error in zip(full.rates, full.errors, strict=True)])
    assert half.extra_rate(full) == pytest.approx(-0.5)
    assert full.extra_rate(half) == pytest.approx(1.0)
    assert full.extra_rate(full) == pytest.approx(0.0)
    assert full.crossings(half) == []
    assert math.isnan(full.extra_rate(RateCurve.of([(1, 5.0), (2, 4.0)])))


def test_settings_that_buy_nothing_do_not_change_the_difference() -> None:
    plain = RateCurve.of([(1, 0.8), (10, 0.2)])
    bumpy = RateCurve.of([(1, 0.8), (2, 0.9), (10, 0.2), (50, 0.2)])
    assert bumpy.extra_rate(plain) == pytest.approx(0.0)


def test_the_difference_of_two_lines_is_the_integral_over_their_common_errors() -> None:
    """ln rate is 2 (1 - e) and 4 (1 - e): the difference -2 (1 - e), a mean of -1.2 over errors from 0.2 to 0.6."""
    a = RateCurve.of([(math.exp(2 * (1 - e)), e) for e in (0.6, 0.35, 0.1)])
    b = RateCurve.of([(math.exp(4 * (1 - e)), e) for e in (0.9, 0.5, 0.2)])
    assert a.extra_rate(b) == pytest.approx(math.exp(-1.2) - 1)
    assert b.extra_rate(a) == pytest.approx(math.exp(1.2) - 1)


def test_curves_cross_where_their_lines_meet() -> None:
    a, b = RateCurve.of([(1, 1.0), (100, 0.0)]), RateCurve.of([(1, 0.6), (100, 0.4)])
    assert a.crossings(b) == pytest.approx([10.0])
    assert b.crossings(a) == pytest.approx([10.0])


@given(
    cross=st.floats(2, 500),
    height=st.floats(0.5, 2),
    slopes=st.lists(st.floats(0.01, 1), min_size=2, max_size=2),
    inner=st.tuples(*[st.lists(st.floats(1, 1000), max_size=5)] * 2),
)
@settings(max_examples=100)
def test_two_lines_cross_where_algebra_says_wherever_their_points_lie(
    cross: float, height: float, slopes: list[float], inner: tuple[list[float], list[float]]
) -> None:
    if abs(slopes[0] - slopes[1]) < 1e-3:
        return
    a, b = (
        line([1, 1000, *points], height + slope * math.log(cross), slope)
        for slope, points in zip(slopes, inner, strict=True)
    )
    assert a.crossings(b) == pytest.approx([cross], rel=1e-6)


@pytest.mark.parametrize(
    ("gaps", "expected"),
    [
        ({1: 1, 10: 0, 1000: -3}, [10]),  # on a point of both, not where a line past it would meet zero
        ({1: 1, 10: 0, 1000: 1}, []),  # they touch
        ({1: 1, 10: 0, 1000: 0, 10000: -1}, [100]),  # together from 10 to 1000
        ({1: 0, 10: 1, 100: 0}, []),  # together at the ends only
        ({1: -2, 10: 1, 100: -1}, [10 ** (2 / 3), 10**1.5]),
        ({1: 1, 10: 1e-17, 1000: 1}, []),
        ({1: 1, 10: -1e-17, 1000: 1}, []),  # rounding is no crossing
    ],
)
def test_crossings_at_points_and_stretches(gaps: dict[float, float], expected: list[float]) -> None:
    base = line([1, 10, 100, 1000, 10000], 9.0, 0.0)
    moved = RateCurve(np.array([*gaps], dtype=float), 9.0 + np.array([*gaps.values()], dtype=float))
    assert moved.crossings(base) == pytest.approx(expected)
    assert base.crossings(moved) == pytest.approx(expected)


@given(a=curves(), b=curves())
@settings(max_examples=150)
def test_curves_change_sides_at_their_crossings_and_nowhere_else(a: RateCurve, b: RateCurve) -> None:
    found = a.crossings(b)
    assert found == sorted(found)
    assert found == pytest.approx(b.crossings(a))
    assert all(a.at(rate) == pytest.approx(b.at(rate), abs=1e-9) for rate in found)
    signs = [(rate, a.at(rate) - b.at(rate)) for rate in between(a, b)]
    signs = [(rate, gap) for rate, gap in signs if abs(gap) > 1e-9]
    for (low, gap_low), (high, gap_high) in pairwise(signs):
        inside = sum(low <= rate <= high for rate in found)
        assert inside % 2 == (gap_low * gap_high < 0)


@given(a=curves(), b=curves(), unit=st.floats(0.1, 10), power=st.floats(0.5, 2))
@settings(max_examples=100)
def test_one_scale_of_rates_throughout(a: RateCurve, b: RateCurve, unit: float, power: float) -> None:
    """rate -> unit · rate^power is a shift and a stretch of the logarithm: hulls keep their points, crossings move along."""

    def moved(curve: RateCurve) -> RateCurve:
        return RateCurve(unit * curve.rates**power, curve.errors)

    hull, moved_hull = moved(a.hull()), moved(a).hull()
    for rate in between(hull):
        assert moved_hull.at(rate) == pytest.approx(hull.at(rate), abs=1e-9)
    sharp = all(abs(a.at(rate) - b.at(rate)) > 1e-6 for rate in {*a.rates, *b.rates})
    if sharp:  # where a gap is nearly nothing, rounding decides which side it is on
        assert moved(a).crossings(moved(b)) == pytest.approx([unit * rate**power for rate in a.crossings(b)])


@given(curve=curves())
@settings(max_examples=150)
def test_the_hull_is_the_largest_convex_curve_below(curve: RateCurve) -> None:
    hull = curve.hull()
    points = set(zip(curve.rates.tolist(), curve.errors.tolist(), strict=True))
    assert points >= set(zip(hull.rates.tolist(), hull.errors.tolist(), strict=True))  # touches at every corner
    slopes = np.diff(hull.errors) / np.diff(np.log(hull.rates))
    assert (slopes < 0).all()
    assert (np.diff(slopes) > -1e-9 * np.abs(slopes[:-1])).all()
    assert (hull.rates[0], hull.errors[-1]) == (curve.rates[0], curve.errors.min())
    assert all(hull.at(rate) <= curve.at(rate) + 1e-9 for rate in between(hull))
    assert hull.hull().rates.tolist() == hull.rates.tolist()


def test_a_point_below_the_line_in_the_rate_can_lie_above_the_line_in_its_logarithm() -> None:
    """On 1 … 100 the line in the rate is at .909 at 10, that in the logarithm at .5."""
    assert RateCurve.of([(1, 1.0), (10, 0.7), (100, 0.0)]).hull().rates.tolist() == [1, 100]
    assert RateCurve.of([(1, 1.0), (10, 0.49), (100, 0.0)]).hull().rates.tolist() == [1, 10, 100]
    assert RateCurve.of([(1, 1.0), (10, 0.2), (100, 0.3), (1000, 0.2)]).hull().rates.tolist() == [1, 10]


def test_numbers_that_no_curve_has_are_refused() -> None:
    for points in ([(0, 1.0)], [], [(math.inf, 1.0)], [(math.nan, 1.0)]):
        with pytest.raises(UserError, match="rates above 0"):
            RateCurve.of(points)
    with pytest.raises(UserError, match="finite errors"):
        RateCurve.of([(1, math.nan)])
