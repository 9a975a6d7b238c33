"""A fit's curves as arrays."""

from __future__ import annotations

import json

import numpy as np
import pytest
from law_cases import published

from isoflop.core.errors import UserError
from isoflop.laws import fit
from isoflop.laws.curves import curves
from isoflop.laws.result import Fit


def test_a_curve_per_level_with_the_law_its_interval_and_its_rows() -> None:
    fitted = fit(published(), map={"N": "params_b", "V": "visual_tokens"}, y="error", bootstrap=40)
    found = curves(fitted)
    x, y = fitted.data.x, fitted.data.y
    assert [c.level["V"] for c in found] == sorted(set(x["V"].tolist()))
    for curve in found:
        at = {"N": curve.x, "V": np.full(80, curve.level["V"])}
        assert curve.x[[0, -1]].tolist() == pytest.approx([x["N"].min(), x["N"].max()])
        assert np.ptp(np.diff(np.log(curve.x))) < 1e-9
        np.testing.assert_array_equal(curve.y, fitted.predict(**at))
        low, high = fitted.predict_interval(at)
        np.testing.assert_array_equal(curve.low, low)
        np.testing.assert_array_equal(curve.high, high)
        mine = x["V"] == curve.level["V"]
        assert (curve.measured_x.tolist(), curve.measured_y.tolist()) == (x["N"][mine].tolist(), y[mine].tolist())


def test_one_variable_is_one_curve_without_an_interval_where_nothing_was_resampled() -> None:
    (curve,) = curves(
        fit(
            {"N": [1.0, 2, 4, 8, 16], "error": [5.0, 4, 3.3, 2.9, 2.7]},
            "E+A*N**-alpha",
            y="error",
            map={"N": "N"},
            bootstrap=0,
        )
    )
    assert (curve.level, curve.low, curve.high) == ({}, None, None)
    assert curve.measured_x.tolist() == [1, 2, 4, 8, 16]


def test_of_many_levels_some_are_chosen_evenly() -> None:
    rows = [(n, v) for n in (1.0, 10.0, 100.0) for v in range(1, 12)]
    data = {"N": [n for n, _ in rows], "V": [float(v) for _, v in rows], "error": [n**-0.2 * v**-0.1 for n, v in rows]}
    fitted = fit(data, "product", y="error", map={"N": "N", "V": "V"}, bootstrap=0)
    assert [c.level["V"] for c in curves(fitted, most=3)] == [1, 6, 11]
    assert len(curves(fitted)) == 8


def test_a_fit_without_its_rows_says_so() -> None:
    fitted = fit(
        {"N": [1.0, 2, 4, 8, 16], "error": [5.0, 4, 3.3, 2.9, 2.7]},
        "E+A*N**-alpha",
        y="error",
        map={"N": "N"},
        bootstrap=0,
    )
    with pytest.raises(UserError, match="without its rows"):
        curves(Fit.from_dict(json.loads(json.dumps(fitted.to_dict()))))
