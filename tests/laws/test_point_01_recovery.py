"""Acceptance points 1, 3, 4, 11: noise-free recovery of every form, unit invariance, variable projection, invariances."""

from __future__ import annotations

import numpy as np
import pytest
from law_cases import CASES, additive_table, published
from scipy.optimize import minimize

from isoflop.laws import LAWS, fit
from isoflop.laws.base import linear_parameters
from isoflop.laws.objective import Objective
from isoflop.laws.solver import CONVERGED, Batch, Solution, solve
from isoflop.laws.varpro import project


@pytest.mark.parametrize("name", LAWS.names())
def test_point_01_noise_free_recovery(name: str) -> None:
    form, case = LAWS.get(name), CASES[name]
    for k in range(5):
        rng = np.random.default_rng([k, 7])
        x, true = case.design(rng), case.parameters(form, rng)
        fitted = fit({**x, "y": form.evaluate(x, true)}, law=name, y="y", bootstrap=0, profile=False)
        wide = case.design(rng, widen=10**0.5)
        expected = form.evaluate(wide, true)
        np.testing.assert_allclose(form.evaluate(wide, fitted.p), expected, rtol=1e-6, err_msg=f"{name} {k}")
        np.testing.assert_allclose(fitted.p, true, rtol=1e-4, err_msg=f"{name} {k}")
        assert fitted.status == "converged"


@pytest.mark.parametrize("name", LAWS.names())
def test_declared_linear_parameters_are_those_of_the_formula(name: str) -> None:
    form = LAWS.get(name)
    declared = [form.names[i] for i in form.linear]
    assert linear_parameters(form.expression, declared) == set(declared)


@pytest.mark.parametrize("name", LAWS.names())
def test_jacobian_is_the_derivative(name: str) -> None:
    form, case = LAWS.get(name), CASES[name]
    rng = np.random.default_rng(3)
    x, p = case.design(rng), case.parameters(form, rng)
    x = {v: a[:7] for v, a in x.items()}
    jacobian = form.jacobian(x, p)
    for i in range(len(p)):
        h = 1e-5 * abs(p[i])
        up, down = p.copy(), p.copy()
        up[i] += h
        down[i] -= h
        numeric = (form.evaluate(x, up) - form.evaluate(x, down)) / (2 * h)
        np.testing.assert_allclose(jacobian[:, i], numeric, rtol=2e-5, atol=1e-8 * np.abs(jacobian[:, i]).max())


@pytest.mark.parametrize(
    "name",
    [
        "power",
        "chinchilla",
        "product",
        "kaplan",
        "precision",
        "bnsl",
        "ptq_penalty",
        "coverage",
        "sparsing_relu",
        "farseer",
    ],
)
def test_rescaled_parameters_give_the_same_law(name: str) -> None:
    form, case = LAWS.get(name), CASES[name]
    rng = np.random.default_rng(5)
    x, p = case.design(rng), case.parameters(form, rng)
    scales = {v.name: (7.3 if v.rescale else 1.0) for v in form.variables}
    natural = form.to_natural(p[None], {v: np.float64(s) for v, s in scales.items()})[0]
    np.testing.assert_allclose(
        form.evaluate({v: a * scales[v] for v, a in x.items()}, natural), form.evaluate(x, p), rtol=1e-10
    )


@pytest.mark.parametrize("objective", ["squared", "huber-log"])
def test_point_03_unit_invariance(objective: str) -> None:
    table = additive_table(seed=1, n=120)
    fits = {
        u: fit(
            table,
            "chinchilla",
            y="loss",
            map={"N": f"N/{u!r}", "D": "D"},
            objective=objective,
            bootstrap=0,
            profile=False,
        )
        for u in (1.0, 1e6, 1e9)
    }
    n, d = np.array([1e8, 3e9, 7e10]), np.array([1e10, 1e11, 2e12])
    base = fits[1.0].predict(N=n, D=d)
    for u, fitted in fits.items():
        np.testing.assert_allclose(fitted.predict(N=n / u, D=d), base, rtol=1e-8)
        np.testing.assert_allclose(fitted["A"] * u ** fitted["alpha"], fits[1.0]["A"], rtol=1e-6)


def test_power_of_size_divides_the_exponent() -> None:
    table = additive_table(seed=2, n=120)
    plain = fit(table, "chinchilla", y="loss", bootstrap=0, profile=False)
    bent = fit(table, "chinchilla", y="loss", map={"N": "N**1.25"}, bootstrap=0, profile=False)
    assert bent["alpha"] == pytest.approx(plain["alpha"] / 1.25, rel=1e-6)
    assert bent.sse == pytest.approx(plain.sse, rel=1e-9)


def test_point_04_envelope_gradient_equals_finite_differences() -> None:
    table = additive_table(seed=3, n=100)
    form = LAWS.get("chinchilla")
    x = {"N": table["N"] / 1e9, "D": table["D"] / 1e10}
    w = np.ones(100)
    for theta in ([0.3, 0.4], [0.5, 0.2], [0.36, 0.36]):
        _, value, gradient = project(form, x, table["loss"], w, np.array(theta), signs=False)

        def reduced(t: np.ndarray) -> float:
            return project(form, x, table["loss"], w, t, signs=False)[1]

        numeric = np.array(
            [(reduced(np.array(theta) + h) - reduced(np.array(theta) - h)) / 2e-5 for h in 1e-5 * np.eye(2)]
        )
        np.testing.assert_allclose(gradient, numeric, rtol=1e-6, atol=1e-6 * value)


def test_point_04_variable_projection_equals_full_search() -> None:
    table = additive_table(seed=4, n=100)
    form = LAWS.get("chinchilla")
    x = {"N": table["N"] / 1e9, "D": table["D"] / 1e10}
    w = np.ones(100)

    def reduced(t: np.ndarray) -> tuple[float, np.ndarray]:
        _, value, gradient = project(form, x, table["loss"], w, t, signs=False)
        return value, gradient

    best = min(
        (
            minimize(
                reduced, t, jac=True, method="L-BFGS-B", bounds=[(0.01, 2)] * 2, options={"ftol": 1e-15, "gtol": 1e-12}
            )
            for t in ([0.2, 0.2], [0.4, 0.4])
        ),
        key=lambda r: r.fun,
    )
    fitted = fit(table, "chinchilla", y="loss", bootstrap=0, profile=False)
    assert fitted.sse == pytest.approx(best.fun, rel=1e-8)
    np.testing.assert_allclose([fitted["alpha"], fitted["beta"]], best.x, rtol=1e-4)


def _solved(law: str, x: dict[str, np.ndarray], y: np.ndarray, starts: np.ndarray, kind: str, passes: str) -> Solution:
    """The same points fitted from several starts in one batch."""
    form, same = LAWS.get(law), np.zeros(len(starts), dtype=np.int64)
    batch = Batch(form, {v: a[None] for v, a in x.items()}, y[None], np.ones((1, len(y))), same, same, same)
    low, high = (np.array(ends) for ends in zip(*((p.low, p.high) for p in form.parameters), strict=True))
    return solve(batch, starts, low, high, Objective(kind), passes=passes)


@pytest.mark.parametrize("kind", ["squared", "squared-log", "huber-log"])
def test_projection_needs_no_start_of_the_linear_parameters(kind: str) -> None:
    x = {"N": np.geomspace(1.0, 1e3, 20)}
    noise = np.exp(0.05 * np.random.default_rng(0).normal(size=20))
    y = LAWS.get("power").evaluate(x, np.array([1.0, 3.0, 0.4])) * noise
    found = _solved("power", x, y, np.array([[1.0, 1.0, 0.3], [7.0, 200.0, 0.3]]), kind, "project")
    np.testing.assert_array_equal(found.p[0], found.p[1])
    weight = np.ones(20) if kind == "squared" else y**-2.0  # relative residuals where logarithms are asked for
    basis = np.stack([np.ones(20), x["N"] ** -found.p[0, 2]])
    linear = np.linalg.solve(basis * weight @ basis.T, basis * weight @ y)
    np.testing.assert_allclose(found.p[0, :2], linear, rtol=1e-9)


def test_a_start_outside_the_law_s_domain_is_infinitely_bad_and_harms_no_other() -> None:
    x = {"N": np.geomspace(1.0, 1e3, 20), "V": np.geomspace(2.0, 500.0, 20)[::-1]}
    y = LAWS.get("semilog").evaluate(x, np.array([2.0, 0.02, 0.01]))
    starts = np.array(
        [[-5.0, 0.02, 0.01], [1.5, 0.01, 0.02]]
    )  # the first gives negative values: they have no logarithm
    found = _solved("semilog", x, y, starts, "squared-log", "last")
    assert found.loss[0] == np.inf
    np.testing.assert_array_equal(found.p[0], starts[0])
    alone = _solved("semilog", x, y, starts[1:], "squared-log", "last")
    assert found.loss[1] < 1e-25
    assert found.status[1] == CONVERGED
    np.testing.assert_allclose(found.p[1], alone.p[0], rtol=1e-9)


@pytest.mark.parametrize("objective", ["squared", "huber-log"])
def test_point_11_order_duplicates_and_seed_do_not_matter(objective: str) -> None:
    table = additive_table(seed=5, n=80)
    options = {"law": "chinchilla", "y": "loss", "objective": objective, "bootstrap": 0, "profile": False}
    base = fit(table, **options)
    n, d = np.array([1e8, 7e10]), np.array([1e10, 2e12])
    order = np.random.default_rng(0).permutation(80)
    shuffled = fit({k: a[order] for k, a in table.items()}, **options)
    assert shuffled.data_hash == base.data_hash
    twice = fit({**{k: np.tile(a, 2) for k, a in table.items()}, "w": np.full(160, 0.5)}, weights="w", **options)
    again = fit(table, seed=99, starts=13, **options)
    for other in (shuffled, twice, again):
        np.testing.assert_allclose(other.predict(N=n, D=d), base.predict(N=n, D=d), rtol=1e-8)
        assert other.loss == pytest.approx(base.loss, rel=1e-9)


def test_published_table_is_permutation_invariant_at_its_bound() -> None:
    table = published()
    order = np.random.default_rng(1).permutation(28)
    options = {"map": {"N": "params_b", "V": "visual_tokens"}, "bootstrap": 0, "profile": False}
    a, b = fit(table, **options), fit(table.take(order), **options)
    np.testing.assert_allclose(a.p, b.p, rtol=1e-8, atol=1e-12)
