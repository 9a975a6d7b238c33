"""Acceptance points 2, 5, 6: published numbers of the additive law, the tolerance trap, the bias of IsoFLOP parabolas."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from law_cases import additive_table
from scipy.optimize import minimize

from isoflop.core.errors import UserError
from isoflop.laws import LAWS, fit
from isoflop.laws.allocation import (
    HOFFMANN_2022,
    RoundedParameters,
    allocate,
    inference_aware,
    loss,
    optimum_of_size,
    policy_exponent,
)
from isoflop.laws.objective import Objective
from isoflop.laws.parabolas import NoVertex, fit_parabolas

ROUNDED = {"E": 1.69, "A": 406.4, "B": 410.7, "alpha": 0.34, "beta": 0.28}
REPLICATION = {"E": 1.8172, "A": 482.01, "B": 2085.43, "alpha": 0.3478, "beta": 0.3658}


def optimum(params: dict[str, float], compute: float):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RoundedParameters)
        return allocate(params, compute)


def test_point_02_losses() -> None:
    assert float(loss(ROUNDED, 1e9, 2e10)) == pytest.approx(2.5800478722, abs=5e-11)
    assert float(loss(ROUNDED, 70e9, 1.4e12)) == pytest.approx(1.9366454706, abs=5e-11)
    assert float(loss(ROUNDED, 280e9, 300e9)) == pytest.approx(1.9932584617, abs=5e-11)
    assert float(loss(HOFFMANN_2022, 1e9, 2e10)) == pytest.approx(2.5306682013, abs=1e-7)
    assert float(loss(HOFFMANN_2022, 70e9, 1.4e12)) == pytest.approx(1.9208460266, abs=1e-7)
    assert float(loss(REPLICATION, 1e9, 2e10)) == pytest.approx(2.5300503, abs=5e-8)
    assert float(loss(REPLICATION, 70e9, 1.4e12)) == pytest.approx(1.9738819, abs=5e-8)


def test_point_02_log_gradient_and_huber_term() -> None:
    form = LAWS.get("chinchilla")
    p = np.array([ROUNDED[n] for n in form.names])
    x = {"N": np.array([1e9]), "D": np.array([2e10])}
    f = form.evaluate(x, p)
    gradient = dict(zip(form.names, form.jacobian(x, p)[0] / f[0], strict=True))
    assert gradient["alpha"] == pytest.approx(-2.8430476, abs=5e-8)
    assert gradient["beta"] == pytest.approx(-4.9283879, abs=5e-8)  # -.20778233 ln(2e10); the published digits end in 3
    weights = [gradient[n] * ROUNDED[n] for n in ("A", "B", "E")]
    np.testing.assert_allclose(weights, [0.1371911, 0.2077823, 0.6550266], atol=5e-8)
    goal = Objective("huber-log", 1e-3)
    r = goal.residual(f, np.array([2.6]))
    assert r[0] == pytest.approx(-7.7034911e-3, abs=5e-11)
    assert goal.loss(r, np.ones(1)) == pytest.approx(7.203491e-6, abs=5e-13)


@pytest.mark.parametrize(
    "params, compute, n, d, ratio",
    [
        (ROUNDED, 1e21, 1.824e9, 9.136e10, None),
        (ROUNDED, 5.88e23, 3.249e10, 3.016e12, 92.83),
        (ROUNDED, 1e24, 4.1297e10, 4.03583e12, 97.73),
        (HOFFMANN_2022, 5.88e23, 4.074e10, 2.405e12, 59.04),
        (HOFFMANN_2022, 1e24, 5.192e10, 3.210e12, 61.83),
        (REPLICATION, 5.88e23, 7.302e10, 1.342e12, 18.38),
        (REPLICATION, 1e24, 9.586e10, 1.739e12, 18.14),
        (REPLICATION, 3.8e25, 6.187e11, 1.024e13, 16.55),
    ],
)
def test_point_02_optima(params, compute: float, n: float, d: float, ratio: float | None) -> None:
    best = optimum(params, compute)
    assert pytest.approx(n, rel=5e-4) == best.N
    assert pytest.approx(d, rel=5e-4) == best.D
    if ratio is not None:
        assert best.tokens_per_parameter == pytest.approx(ratio, abs=0.006)
    assert pytest.approx(compute, rel=1e-14) == 6 * best.N * best.D
    marginal = params["alpha"] * params["A"] * best.N ** -params["alpha"]
    assert marginal == pytest.approx(params["beta"] * params["B"] * best.D ** -params["beta"], rel=1e-10)


def test_point_02_exponents_and_scale() -> None:
    form = LAWS.get("chinchilla")
    for params, g, a_n in (
        (ROUNDED, 1.34471064, None),
        (HOFFMANN_2022, 1.300046, 0.456526),
        (REPLICATION, 0.1196298, 0.512612),
    ):
        p = np.array([[params[n] for n in form.names]])
        assert form.quantity(form.derived["G"], p)[0] == pytest.approx(g, rel=1e-6)
        if a_n is not None:
            assert form.quantity(form.derived["a_N"], p)[0] == pytest.approx(a_n, abs=5e-7)
    assert optimum(ROUNDED, 1e21).loss == pytest.approx(2.328883, abs=5e-7)
    assert optimum(ROUNDED, 1e24).loss == pytest.approx(1.911195, abs=5e-7)
    assert optimum(HOFFMANN_2022, 5.88e23).loss == pytest.approx(1.917695, abs=5e-7)
    assert optimum(REPLICATION, 5.88e23).loss == pytest.approx(1.973864, abs=5e-7)


def test_rounding_moves_the_optimum_and_warns() -> None:
    with pytest.warns(RoundedParameters):
        rounded = allocate(ROUNDED, 5.88e23)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        exact = allocate(HOFFMANN_2022, 5.88e23)
    assert rounded.tokens_per_parameter > 1.5 * exact.tokens_per_parameter


def test_policy_exponent_of_a_fit_has_a_delta_method_error() -> None:
    fitted = fit(additive_table(0), "chinchilla", y="loss", objective="squared-log", bootstrap=0, profile=False)
    value, se = policy_exponent(fitted)
    low, high = fitted.derived["a_N"].interval
    assert value == fitted["a_N"]
    assert high - low == pytest.approx(2 * 1.97 * se, rel=0.01)


def test_point_05_tolerance_trap_reproduced_and_avoided() -> None:
    table = additive_table(seed=0)
    goal = Objective("huber-log", 1e-3)
    log_n, log_d, log_l = (np.log(table[k]) for k in ("N", "D", "loss"))

    def sum_huber(z: np.ndarray) -> tuple[float, np.ndarray]:
        a, b, e, alpha, beta = z
        terms = np.stack([a - alpha * log_n, b - beta * log_d, np.full_like(log_n, e)])
        top = terms.max(axis=0)
        w = np.exp(terms - top)
        r = top + np.log(w.sum(axis=0)) - log_l
        w /= w.sum(axis=0)
        psi = np.clip(r, -1e-3, 1e-3)
        gradient = np.array([psi @ w[0], psi @ w[1], psi @ w[2], -psi @ (w[0] * log_n), -psi @ (w[1] * log_d)])
        return float(goal.rho(r).sum()), gradient

    def run(scale: float, **options: float) -> float:
        start = np.array([6, 6, 0.5, 0.34, 0.28])
        found = minimize(
            lambda z: tuple(scale * v for v in sum_huber(z)), start, jac=True, method="L-BFGS-B", options=options
        )
        return sum_huber(found.x)[0]

    mean, summed = run(1 / 240), run(1.0)
    tight = run(1e6, ftol=1e-15, gtol=1e-12, maxiter=10_000)
    assert mean > 1.4 * tight
    assert mean > summed > tight
    ours = fit(table, "chinchilla", y="loss", objective="huber-log", bootstrap=0, profile=False)
    assert ours.loss <= tight * (1 + 1e-6)
    assert ours.loss == pytest.approx(0.0017386, abs=5e-8)
    assert (ours["alpha"], ours["beta"]) == (pytest.approx(0.3619, abs=1e-4), pytest.approx(0.3604, abs=1e-4))


def iso_rows(params: dict[str, float], k: float) -> np.ndarray:
    rows = []
    for compute in 10.0 ** np.arange(17, 22):
        centre = optimum(params, compute).D
        for d in np.geomspace(centre / k, centre * k, 15):
            rows.append((compute, d, float(loss(params, compute / 6 / d, d))))
    return np.array(rows).T


@pytest.mark.parametrize(
    "params, slope, table",
    [
        (
            {**ROUNDED, "A": 400.0, "B": 400.0, "alpha": 0.31, "beta": 0.31},
            0.5,
            dict.fromkeys((2, 4, 8, 16), (-0.389076, 0.0)),
        ),
        (
            ROUNDED,
            0.548387,
            {2: (-0.556779, -0.00327), 4: (-0.561045, -0.01301), 8: (-0.568151, -0.02903), 16: (-0.578092, -0.05100)},
        ),
        (
            {**ROUNDED, "alpha": 0.465, "beta": 0.155},
            0.75,
            {2: (-1.35313, -0.0167), 4: (-1.37497, -0.0650), 8: (-1.41084, -0.1391), 16: (-1.45996, -0.2312)},
        ),
    ],
)
def test_point_06_isoflop_bias(params, slope: float, table) -> None:
    for k, (intercept, error) in table.items():
        found = fit_parabolas(*iso_rows(params, k))
        assert found.slope == pytest.approx(slope, abs=1e-6)
        assert found.intercept == pytest.approx(intercept, abs=1e-5)
        assert found.at(1e24) / optimum(params, 1e24).D - 1 == pytest.approx(error, abs=1e-4)


def test_point_06_refuses_without_an_interior_minimum() -> None:
    budget, size, values = iso_rows(ROUNDED, 8)
    with pytest.raises(NoVertex, match="opens downward"):
        fit_parabolas(budget, size, -values)
    left = np.concatenate([np.flatnonzero(budget == c)[:5] for c in np.unique(budget)])
    with pytest.raises(NoVertex, match="outside the sizes sampled"):
        fit_parabolas(budget[left], size[left], values[left])
    with pytest.raises(UserError, match="at least 3"):
        fit_parabolas(budget[[0, 1, 15, 16, 17]], size[[0, 1, 15, 16, 17]], values[[0, 1, 15, 16, 17]])


@pytest.mark.parametrize(
    "size, served, n, d, saving",
    [
        (13e9, 2e12, 7.12e9, 1.295e12, 0.1632),
        (30e9, 13e12, 1.298e10, 5.19e12, 0.3136),
        (70e9, 1e12, 6.332e10, 5.081e12, 0.00345),
    ],
)
def test_point_08_inference_aware(size: float, served: float, n: float, d: float, saving: float) -> None:
    reference = optimum_of_size(HOFFMANN_2022, size)
    best = inference_aware(HOFFMANN_2022, reference.loss, served)
    total = 6 * reference.N * reference.D + 2 * reference.N * served
    assert pytest.approx(n, rel=5e-4) == best.N
    assert pytest.approx(d, rel=5e-4) == best.D
    assert 1 - best.compute / total == pytest.approx(saving, abs=6e-5)
    assert float(loss(HOFFMANN_2022, best.N, best.D)) == pytest.approx(reference.loss, rel=1e-12)
    nobody = inference_aware(HOFFMANN_2022, reference.loss, 0.0)
    assert (pytest.approx(reference.N, rel=1e-9), pytest.approx(reference.D, rel=1e-9)) == (nobody.N, nobody.D)
    with pytest.raises(UserError, match="not above the floor"):
        inference_aware(HOFFMANN_2022, 1.0, served)
