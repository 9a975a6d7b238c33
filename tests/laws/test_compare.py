"""Comparison of forms, extrapolation tests, baselines, nested tests and diagnostics."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from law_cases import additive_table, published

import isoflop
from isoflop.core.errors import UserError
from isoflop.laws import compare, fit, sensitivity
from isoflop.laws.comparison import information, nested_test
from isoflop.laws.diagnostics import lack_of_fit, runs_test
from isoflop.laws.extrapolation import carry_forward, nearest_with_shift, splits

MAP = {"N": "params_b", "V": "visual_tokens"}


def test_baselines_are_always_there_and_the_result_serialises() -> None:
    found = compare(published(), ["product"], map=MAP)
    labels = [e.label for e in found]
    assert labels[-2:] == ["carry-forward", "nearest + trend"]
    assert "semilog (baseline)" in labels
    data = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert {f["form"] for f in data["forms"]} == set(labels)
    table = found.to_arrow()
    assert table.num_rows == len(labels)
    assert "extrapolation_rmse" in table.column_names
    assert all(len(line) <= 80 for line in str(found).splitlines() if not line.startswith("→"))
    assert "<table>" in found._repr_html_()
    assert len(isoflop.plot(found).data) >= 3


def test_akaike_weights_sum_to_one_and_follow_the_distances() -> None:
    found = compare(published(), ["product", "semilog"], map=MAP)
    scored = [e for e in found if e.aicc is not None]
    assert sum(e.weight for e in scored) == pytest.approx(1)
    assert scored[0].delta == 0
    assert scored[1].weight / scored[0].weight == pytest.approx(math.exp(-scored[1].delta / 2))


def test_the_true_form_wins_on_its_own_data_and_extrapolates_better() -> None:
    table = additive_table(3, 200, 0.003)
    found = compare(table, ["chinchilla", "kaplan", "E - a*log(N) - b*log(D)"], y="loss", map={"N": "N", "D": "D"})
    assert found.entries[0].label == "chinchilla"
    law, line = found["chinchilla"], found["E - a*log(N) - b*log(D)"]
    assert all(a.rmse < b.rmse for a, b in zip(law.cuts, line.cuts, strict=True))
    decades = [c.decades for c in law.cuts]
    assert decades == sorted(decades)
    assert law.cuts[0].rmse < found["carry-forward"].cuts[0].rmse


def test_a_form_that_cannot_be_fitted_is_refused_not_dropped() -> None:
    table = {k: v[:6] for k, v in additive_table(0).items()}
    found = compare(table, ["chinchilla", "eff_params"], y="loss", map={"N": "N", "D": "D", "r": "N/N"})
    assert "cannot be estimated" in found["eff_params"].refused


def test_leave_largest_out_by_hand() -> None:
    found = compare(published(), {"flat": {"law": "product", "fixed": {"E": 0.0}}}, map=MAP)
    rows = published().to_pydict()
    small = {k: [v for v, n in zip(rows[k], rows["params_b"], strict=True) if n < 7] for k in rows}
    by_hand = fit(small, map=MAP, fixed={"E": 0.0}, bootstrap=0, profile=False)
    at = np.array([1, 4, 16, 36, 64, 144, 576])
    observed = np.array(rows["error"])[-7:]
    error = by_hand.predict(N=7, V=at) - observed
    cut = found["flat"].cuts[0]
    assert cut.held_out == [7.0]
    assert cut.rmse == pytest.approx(np.sqrt(np.mean(error**2)), rel=1e-6)
    assert cut.decades == pytest.approx(np.log10(7 / 4))
    assert [len(c.held_out) for c in found["flat"].cuts] == [1, 2]


def test_baselines_by_hand() -> None:
    data = fit(published(), map=MAP, bootstrap=0, profile=False).data
    train, test = splits(data, "N")[0]
    np.testing.assert_array_equal(carry_forward(data, "N", train, test), data.y[14:21])
    trend = np.mean(data.y[14:21] - data.y[7:14]) / np.log(4 / 1.8)
    np.testing.assert_allclose(nearest_with_shift(data, "N", train, test), data.y[14:21] + trend * np.log(7 / 4))


def test_held_out_intervals_report_their_coverage() -> None:
    found = compare(additive_table(4, 150, 0.01), ["chinchilla"], y="loss", map={"N": "N", "D": "D"}, bootstrap=200)
    assert 0.8 <= found["chinchilla"].cuts[0].coverage <= 1.0


def test_information_criteria_agree_between_scales() -> None:
    table = additive_table(1, 200, 0.005)
    plain, logs = (
        fit(table, "chinchilla", y="loss", objective=o, bootstrap=0, profile=False) for o in ("squared", "squared-log")
    )
    a, b = information(plain)[0], information(logs)[0]
    assert b < a  # the noise is multiplicative: the log scale has the higher likelihood, once the Jacobian is counted
    assert abs(a - b) < 200
    robust = fit(table, "chinchilla", y="loss", objective="huber-log", bootstrap=0, profile=False)
    assert information(robust)[0] is not None
    wide = fit(table, "chinchilla", y="loss", objective="huber-log", delta=1.0, bootstrap=0, profile=False)
    assert information(wide) == (None, None)


def test_nested_tests() -> None:
    options = {"map": MAP, "bootstrap": 0, "profile": False}
    small = fit(published(), fixed={"E": 0.0}, **options)
    big = fit(
        published(),
        bounds={"E": (-math.inf, math.inf), "A": (-math.inf, math.inf), "alpha": (-5, 5), "beta": (-5, 5)},
        **options,
    )
    found = nested_test(small, big)
    assert found["F"] == pytest.approx((3.79380e-4 - 2.77117e-4) / (2.77117e-4 / 24), rel=1e-4)
    assert found["p"] < 0.01
    assert nested_test(small, big, boundary=True)["p"] == pytest.approx(found["p"] / 2)
    with pytest.raises(UserError, match="free parameters"):
        nested_test(big, small)


def test_runs_test_sees_curvature() -> None:
    assert runs_test(np.array([1, 1, 1, 1, -1, -1, -1, -1, -1, 1, 1, 1, 1]))[1] < 0.05
    assert runs_test(np.random.default_rng(0).choice([-1, 1], 200))[1] > 0.05
    n = np.geomspace(1e7, 1e10, 30)
    line = fit({"N": n, "y": 1.7 + 400 * n**-0.34}, "E - a*log(N)", y="y", map={"N": "N"}, bootstrap=0, profile=False)
    along = line.diagnostics["along"]["N"]
    assert along["curvature_t"] > 5
    assert along["runs_p"] < 0.01


def test_lack_of_fit_uses_repeats() -> None:
    rng = np.random.default_rng(0)
    n = np.repeat(np.geomspace(1e7, 1e10, 8), 4)
    y = 1.7 + 400 * n**-0.34 + 0.01 * rng.standard_normal(32)
    good = fit({"N": n, "y": y}, "power", y="y", bootstrap=0, profile=False)
    assert lack_of_fit(good.form, good.data, good.p, 3)["p"] > 0.05
    bad = fit({"N": n, "y": y}, "A*N**-alpha", y="y", map={"N": "N"}, bootstrap=0, profile=False)
    assert lack_of_fit(bad.form, bad.data, bad.p, 2)["p"] < 1e-6


def test_forms_in_words() -> None:
    fitted = fit(published(), map=MAP)
    text = str(fitted)
    assert all(len(line) <= 80 for line in text.splitlines())
    assert "not identified: on its bound 0" in text
    assert "unidentified" in next(line for line in text.splitlines() if line.startswith("E "))
    html = fitted._repr_html_()
    assert "<table>" in html
    assert (
        "<script"
        not in fit(
            {"N": [1.0, 2, 3, 4, 5], "<script>": [5.0, 4, 3.5, 3.2, 3.1]}, "A*N**-alpha", y="<script>", map={"N": "N"}
        )._repr_html_()
    )
    assert len(isoflop.plot(fitted).data) > 7
    assert fitted.to_arrow().num_rows == 5


def test_sensitivity_to_delta_floor_and_edges() -> None:
    fitted = fit(published(), map=MAP, bootstrap=0, profile=False)
    rows = {
        r["choice"]: r
        for r in sensitivity(fitted, floors=[0.1, 0.3], quantities={"V50": "50*beta/(alpha-beta)"}).to_pylist()
    }
    assert rows["floor held at 0.3"]["alpha"] == pytest.approx(0.1588, abs=6e-5)
    assert rows["as fitted"]["alpha"] == fitted["alpha"]
    spread = [r["alpha/beta"] for r in rows.values() if r["choice"].startswith("floor")]
    assert max(spread) / min(spread) < 1.05  # exponents move with the floor, their ratio does not
    assert rows["without N = 7"]["n"] == 21
    assert rows["huber, delta 0.001"]["V50"] > 0
    with pytest.raises(UserError, match="no floor to hold"):
        sensitivity(fit(published(), "semilog", map=MAP, bootstrap=0, profile=False), floors=[0.1])
