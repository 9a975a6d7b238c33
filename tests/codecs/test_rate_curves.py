"""Rate curves: hulls, crossings and Bjøntegaard's difference against cases that can be done by hand."""

from __future__ import annotations

import math

import numpy as np
import pyarrow as pa
import pytest

from isoflop.core.errors import UserError
from isoflop.frontier.rate_curves import RateCurve, compare_curves, rate_curves


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


def test_curves_cross_where_their_lines_meet() -> None:
    a, b = RateCurve.of([(1, 1.0), (100, 0.0)]), RateCurve.of([(1, 0.6), (100, 0.4)])
    assert a.crossings(b) == pytest.approx([10.0])
    assert b.crossings(a) == pytest.approx([10.0])
    assert compare_curves({("a",): a, ("b",): b})[0]["crossings"] == pytest.approx([10.0])


def test_the_hull_is_convex_and_falls() -> None:
    rng = np.random.default_rng(0)
    curve = RateCurve.of(zip(range(1, 40), rng.random(39).tolist(), strict=True))
    hull = curve.hull()
    slopes = np.diff(hull.errors) / np.diff(hull.rates)
    assert (slopes < 0).all()
    assert (np.diff(slopes) >= -1e-12).all()
    assert hull.errors[-1] == curve.errors.min()
    assert all(
        np.interp(r, hull.rates, hull.errors) <= e + 1e-12 for r, e in zip(curve.rates, curve.errors, strict=True)
    )


def test_rates_must_be_positive() -> None:
    with pytest.raises(UserError, match="rates above 0"):
        RateCurve.of([(0, 1.0)])
    with pytest.raises(UserError, match="rates above 0"):
        RateCurve.of([])


def test_curves_of_rows_average_repeats_and_leave_failures_out() -> None:
    rows = [
        ("jpeg", '{"quality": 1}', "ok", 10.0, 0.5),
        ("jpeg", '{"quality": 1}', "ok", 12.0, 0.3),
        ("jpeg", '{"quality": 9}', "ok", 40.0, 0.1),
        ("jpeg", '{"quality": 50}', "failed", 90.0, 0.0),
        ("webp", '{"quality": 1}', "ok", 5.0, 0.7),
    ]
    method, knobs, status, size, error = zip(*rows, strict=True)
    footprint = pa.array([[("codec_bytes", s)] for s in size], pa.map_(pa.string(), pa.float64()))
    table = pa.table({"method": method, "knobs": knobs, "status": status, "footprint": footprint, "error": error})
    curves = rate_curves(table)
    assert curves.keys() == {("jpeg",), ("webp",)}
    assert curves["jpeg",].rates.tolist() == [11, 40]
    assert curves["jpeg",].errors.tolist() == pytest.approx([0.4, 0.1])
