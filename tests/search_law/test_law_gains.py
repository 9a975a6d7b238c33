"""The arithmetic of choosing runs: exact identities, brute-force references."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from isoflop.laws import Fit, fit
from isoflop.search.law.belief import Belief
from isoflop.search.law.contenders import make_blocks, make_contender
from isoflop.search.law.gains import (
    d_gains,
    disagreement,
    fantasise,
    linearise,
    normal_draws,
    overlap,
    v_gains,
)
from isoflop.search.law.rows import Row, RowTable, pool


def problem(seed: int, outputs: int = 1) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(seed)
    p, t, n, m = 4, 3, 9, 6
    rows, target = rng.standard_normal((n, p)), rng.standard_normal((t, p))
    h, noise = rng.standard_normal((m, outputs, p)), rng.uniform(0.1, 2.0, (m, outputs))
    prior = np.diag(rng.uniform(0.5, 2.0, p))
    return rows, target, h, noise, prior


@given(st.integers(0, 10_000), st.sampled_from([1, 2, 3]))
def test_v_gain_is_the_refits_reduction_of_the_targets_variance(seed: int, outputs: int) -> None:
    rows, target, h, noise, prior = problem(seed, outputs)
    weight = np.array([0.5, 0.3, 0.2])
    cov = np.linalg.inv(rows.T @ rows + prior)
    gains = v_gains(cov, target @ cov, h, noise, weight)
    for m in range(len(h)):
        more = np.linalg.inv(rows.T @ rows + prior + h[m].T @ np.diag(1 / noise[m]) @ h[m])
        expected = weight @ np.diag(target @ (cov - more) @ target.T)
        assert gains[m] == pytest.approx(expected, rel=1e-9)
        fantasy, cross = fantasise(cov, target @ cov, h[m], noise[m])
        np.testing.assert_allclose(fantasy, more, atol=1e-12)
        np.testing.assert_allclose(cross, target @ more, atol=1e-11)


@given(st.integers(0, 10_000))
def test_d_gain_is_the_refits_change_of_the_log_determinant(seed: int) -> None:
    rows, _, h, noise, prior = problem(seed, 2)
    precision = rows.T @ rows + prior
    gains = d_gains(np.linalg.inv(precision), h, noise)
    for m in range(len(h)):
        more = precision + h[m].T @ np.diag(1 / noise[m]) @ h[m]
        assert gains[m] == pytest.approx(np.linalg.slogdet(more)[1] - np.linalg.slogdet(precision)[1], rel=1e-9)


@given(st.integers(0, 10_000))
def test_linearisation_is_exact_for_linear_targets(seed: int) -> None:
    rows, target, _, _, prior = problem(seed)
    cov = np.linalg.inv(rows.T @ rows + prior)
    root = np.linalg.cholesky(cov)
    z = normal_draws(4, 64)
    np.testing.assert_allclose(z.T @ z / len(z), np.eye(4), atol=1e-12)
    np.testing.assert_allclose(z.mean(axis=0), 0, atol=1e-12)
    np.testing.assert_allclose(linearise((z @ root.T) @ target.T + 5.0, z, root), target @ cov, atol=1e-12)


def test_d_optimal_places_are_the_ends_and_the_identric_mean() -> None:
    """y = E + A N^-alpha on [1e6, 1e9] at alpha = .34: the middle of the locally D-optimal design is N = 9.1325e6."""
    sizes = np.geomspace(1e6, 1e9, 3001)
    (block,) = make_blocks(make_contender("power", ["N"]), ["N"], [10**7.5], 1, (), 1.0)
    u = block.coordinates(np.array([[0.3, 0.4, 0.34]]))[0]
    h = block.jacobian(u, sizes[:, None], np.zeros(len(sizes), dtype=int))
    chosen = [0, 1500, 3000]
    for _ in range(12):  # exchange each point for the best one given the others
        for k in range(3):
            rest = h[[c for i, c in enumerate(chosen) if i != k]]
            cov = np.linalg.inv(rest.T @ rest + 1e-9 * np.eye(3))
            chosen[k] = int(np.argmax(d_gains(cov, h[:, None], np.ones((len(h), 1)))))
    low, middle, high = np.sort(sizes[chosen])
    assert (low, high) == (pytest.approx(1e6), pytest.approx(1e9))
    assert middle == pytest.approx(9.1325e6, rel=2.4e-3)  # the grid's step


def test_overlap_is_the_integral_of_the_root_of_the_densities_product() -> None:
    y = np.linspace(-40, 40, 400_001)

    def density(m: float, v: float) -> np.ndarray:
        return np.exp(-((y - m) ** 2) / (2 * v)) / np.sqrt(2 * np.pi * v)

    for a, b in [((0.0, 1.0), (0.0, 1.0)), ((0.0, 1.0), (2.0, 1.0)), ((1.0, 0.3), (-2.0, 4.0))]:
        exact = np.sum(np.sqrt(density(*a) * density(*b))) * (y[1] - y[0])
        got = overlap(*(np.array([v]) for v in (*a, *b)))
        assert float(got) == pytest.approx(exact, rel=1e-9)


def test_disagreement_is_settled_where_predictions_differ_and_nowhere_else() -> None:
    weight, target = np.array([0.5, 0.5]), np.array([[1.0], [3.0]])
    mean = np.array([[[0.2], [0.2]], [[0.2], [0.9]]])
    gain = disagreement(weight, target, np.ones(1), mean, np.full((2, 2, 1), 1e-4))
    assert gain[0] == pytest.approx(0.0, abs=1e-12)
    assert gain[1] == pytest.approx(0.25 * 4.0, rel=1e-6)  # all of the variance between hypotheses
    assert disagreement(np.array([1.0, 0.0]), target, np.ones(1), mean, np.full((2, 2, 1), 1e-4))[1] == 0.0


def test_pooling_keeps_the_sum_of_squares() -> None:
    rng = np.random.default_rng(0)
    x = rng.integers(1, 4, (60, 2)).astype(float)
    y, q = rng.standard_normal(60), rng.uniform(0.5, 2, 60)
    cells = pool(x, np.zeros(60, dtype=int), y, q, np.zeros(60))
    for value in (0.0, 1.3):
        within = cells.pure + np.sum((cells.y - value) ** 2 / cells.q)
        assert within == pytest.approx(np.sum((y - value) ** 2 / q))
    assert cells.count.sum() == 60
    assert cells.pure_dof == 60 - len(cells.y)


def test_covariance_is_the_inverse_of_information_and_prior() -> None:
    belief, _ = believed(40)
    h = belief.hypotheses[0]
    cells, noise = belief.cells, belief.noise
    assert cells is not None
    j = h.jacobian(cells.x, cells.group)
    precision = (j.T / (noise.sigma2 * cells.q + noise.tau2)) @ j + np.diag(h.prior_sd**-2.0)
    np.testing.assert_allclose(h.cov @ precision, np.eye(len(h.u)), atol=1e-8)
    step = 1e-6
    for k in range(len(h.u)):
        up, down = h.u.copy(), h.u.copy()
        up[k] += step
        down[k] -= step
        slope = (h.predict(up[None], cells.x, cells.group) - h.predict(down[None], cells.x, cells.group))[0] / (
            2 * step
        )
        np.testing.assert_allclose(j[:, k], slope, rtol=1e-5, atol=1e-9)


def test_the_fit_with_many_rows_is_the_law_engines() -> None:
    belief, table = believed(3000, noise="constant")
    x, _, y, _, _ = table.columns()
    fitted = fit({"N": x[:, 0], "V": x[:, 1], "error": y}, "product", bootstrap=0, profile=False)
    assert isinstance(fitted, Fit)
    h = next(h for h in belief.hypotheses if h.label == "product")
    natural = h.blocks[0].natural(h.u[None])[0]
    np.testing.assert_allclose(natural, fitted.p, rtol=3e-3)  # the weak prior's trace
    assert h.weight > 0.99


def test_shared_parameters_are_one_number_and_others_are_not() -> None:
    rng = np.random.default_rng(3)
    rows = []
    for group, (a, beta) in enumerate([(0.6, 0.1), (0.5, 0.2)]):
        for n in 1e7 * 2.0 ** np.arange(6):
            for v in (1.0, 4.0, 16.0, 64.0):
                y = 0.08 + a * (n / 1e7) ** -0.25 * v**-beta + 1e-4 * rng.standard_normal()
                rows.append(Row((n, v), group, y, np.nan, 2 * n * (50 + v)))
    table = RowTable()
    table.extend(rows)
    belief = Belief([make_contender("product", ["N", "V"])], ["N", "V"], [5e7, 8.0], 2, [("E", "alpha")])
    assert belief.parameters == 6
    for _ in range(3):
        belief.update(table)
    h = belief.hypotheses[0]
    found = dict(zip(h.blocks[0].form.names, h.blocks[0].natural(h.u[None])[0], strict=True))
    assert found["alpha"] == pytest.approx(0.25, abs=0.01)
    assert (found["beta_0"], found["beta_1"]) == (pytest.approx(0.1, abs=0.01), pytest.approx(0.2, abs=0.01))
    assert found["A_0"] / found["A_1"] == pytest.approx(1.2, rel=0.02)


def believed(n: int, noise: str = "auto") -> tuple[Belief, RowTable]:
    rng = np.random.default_rng(1)
    axes = ["N", "V"]
    contenders = [make_contender("product", axes), make_contender(("chinchilla", {"D": "V"}), axes)]
    belief = Belief(contenders, axes, [1e8, 20.0], noise=noise)
    table = RowTable()
    for _ in range(n):
        size, tokens = np.exp(rng.uniform(np.log(1e7), np.log(1e9))), np.exp(rng.uniform(0, 6))
        y = 0.08 + 0.6 * (size / 1e7) ** -0.25 * tokens**-0.1 + 0.006 * rng.standard_normal()
        table.extend([Row((size, tokens), 0, y, np.nan, 2 * size * (50 + tokens))])
    belief.update(table)
    return belief, table
