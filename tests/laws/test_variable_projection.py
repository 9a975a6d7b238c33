"""Variable projection piece by piece: where it looks, how it ranks cells, how it solves the linear parameters."""

from __future__ import annotations

import numpy as np
import pytest
from law_cases import CASES
from scipy.optimize import lsq_linear

from isoflop.laws import LAWS
from isoflop.laws import varpro as module
from isoflop.laws.base import LawForm, Parameter, Variable
from isoflop.laws.varpro import candidates, constrained, project, rank, spread_best

INF = np.inf


# linear parameters


@pytest.mark.parametrize("seed", range(8))
def test_linear_parameters_of_given_signs_are_the_best_there_are(seed: int) -> None:
    """Normal equations against scipy's bounded least squares; columns of very different norms."""
    rng = np.random.default_rng(seed)
    lo, hi = np.array([0.0, -INF, 0.0, -INF]), np.array([INF, 0.0, INF, INF])
    matrices = rng.normal(size=(5, 20, 4)) * np.array([1e-3, 1.0, 50.0, 1.0])
    targets = rng.normal(size=(5, 20))
    gram = np.einsum("mnk,mnl->mkl", matrices, matrices)
    right = np.einsum("mnk,mn->mk", matrices, targets)
    c, gain = constrained(gram.copy(), right.copy(), lo, hi)
    for m in range(5):
        expected = lsq_linear(matrices[m], targets[m], (lo, hi), tol=1e-14)
        norms = np.linalg.norm(matrices[m], axis=0)
        np.testing.assert_allclose(c[m] * norms, expected.x * norms, rtol=1e-6, atol=1e-7)
        assert gain[m] == pytest.approx(np.sum(targets[m] ** 2) - 2 * expected.cost, rel=1e-8)


def test_where_no_sign_is_right_nothing_is_taken() -> None:
    gram, right = np.eye(2)[None], np.array([[-1.0, -2.0]])
    c, gain = constrained(gram, right, np.zeros(2), np.full(2, INF))
    assert (c == 0).all()
    assert gain[0] == 0


def test_what_is_not_finite_is_the_worst_of_all_and_harms_no_other() -> None:
    gram, right = np.stack([np.eye(2), np.eye(2)]), np.array([[1.0, 2.0], [np.nan, 1.0]])
    c, gain = constrained(gram, right, np.zeros(2), np.full(2, INF))
    np.testing.assert_allclose(c[0], [1.0, 2.0], rtol=1e-9)
    assert gain[0] == pytest.approx(5.0)
    assert gain[1] == -INF
    assert np.isfinite(c[1]).all()


def test_many_signs_are_all_kept_or_none() -> None:
    """Six columns have 64 subsets: only all and nothing are tried."""
    right = np.ones((2, 7))
    right[0, 3] = -1.0
    lo = np.array([*6 * [0.0], -INF])
    c, _ = constrained(np.stack(2 * [np.eye(7)]), right, lo, np.full(7, INF))
    np.testing.assert_allclose(c, [[0, 0, 0, 0, 0, 0, 1], 7 * [1]], rtol=1e-9)


def test_equal_columns_share_and_empty_ones_get_nothing() -> None:
    column = np.linspace(1.0, 2.0, 9)
    matrix = np.stack([column, column, np.zeros(9)], axis=1)
    target = 3.0 * column
    gram, right = (matrix.T @ matrix)[None], (matrix.T @ target)[None]
    c, gain = constrained(gram, right, np.zeros(3), np.full(3, INF))
    np.testing.assert_allclose(matrix @ c[0], target, rtol=1e-9)
    assert c[0, 2] == 0.0
    assert gain[0] == pytest.approx(target @ target, rel=1e-9)


# where it looks


def form_of(*search: tuple[float, float]) -> LawForm:
    """Linear in E, and in nothing else."""
    names = [f"p{k}" for k in range(len(search))]
    return LawForm(
        name="made-up",
        formula=" + ".join(["E", *(f"x**(-{n})" for n in names)]),
        variables=(Variable("x"),),
        parameters=(Parameter("E", 0.0, linear=True), *(Parameter(n, -9.0, 9.0, search=s) for n, s in zip(names, search, strict=True))),
        source="",
    )  # fmt: skip


def looked_at(search: tuple[float, float], low: float, high: float, points: int = 9) -> np.ndarray:
    theta, cube = candidates(form_of(search), np.array([0.0, low]), np.array([INF, high]), points, 0)
    np.testing.assert_allclose(cube[:, 0], np.linspace(0, 1, points))
    return theta[:, 0]


def test_a_positive_range_is_covered_evenly_in_its_logarithm_and_cut_at_the_bounds() -> None:
    np.testing.assert_allclose(looked_at((0.01, 1.0), 0.0, 9.0), np.geomspace(0.01, 1.0, 9))
    np.testing.assert_allclose(looked_at((0.01, 1.0), 0.1, 9.0), np.geomspace(0.1, 1.0, 9))
    np.testing.assert_allclose(looked_at((0.01, 1.0), 0.0, 0.5), np.geomspace(0.01, 0.5, 9))


def test_where_negative_values_are_allowed_the_range_is_mirrored() -> None:
    upper = np.geomspace(0.01, 1.0, 5)
    np.testing.assert_allclose(looked_at((0.01, 1.0), -9.0, 9.0), [*-upper[:0:-1], *upper])
    np.testing.assert_allclose(looked_at((0.01, 1.0), -0.5, 9.0), [-0.5, *-upper[3:0:-1], *upper])


def test_other_ranges_are_covered_evenly_and_a_held_value_is_kept() -> None:
    np.testing.assert_allclose(looked_at((-1.0, 3.0), -9.0, 9.0), np.linspace(-1.0, 3.0, 9))
    np.testing.assert_allclose(looked_at((0.0, 3.0), 1.0, 9.0, 9), np.geomspace(1.0, 3.0, 9))
    np.testing.assert_allclose(looked_at((0.01, 1.0), 0.3, 0.3), np.full(9, 0.3))
    np.testing.assert_allclose(looked_at((0.01, 1.0), 4.0, 9.0), np.full(9, 4.0))


def test_two_parameters_have_a_grid_more_a_design_and_none_one_point() -> None:
    one = ((0.1, 1.0),)
    low, high = np.array([0.0, *4 * [-9.0]]), np.array([INF, *4 * [9.0]])
    two, cube = candidates(form_of(*2 * one), low, high, 100, 0)
    assert two.shape == cube.shape == (100, 2)
    assert len(np.unique(cube, axis=0)) == 100
    assert len(candidates(form_of(*2 * one), low, high, 9, 0)[0]) == 64  # eight a side at the least
    three, cube = candidates(form_of(*3 * one), low, high, 100, 0)
    assert three.shape == (128, 3)
    assert (cube != candidates(form_of(*3 * one), low, high, 100, 1)[1]).any()
    assert [len(a) for a in candidates(form_of(), low, high, 100, 0)] == [1, 1]


# how cells are ranked


def direct(theta: np.ndarray, x: np.ndarray, y: np.ndarray, w: np.ndarray) -> tuple[float, np.ndarray]:
    """SSE and linear parameters of the power law, by scipy."""
    root = np.sqrt(w)
    matrix = np.stack([np.ones_like(x), x ** -theta[0]], axis=1) * root[:, None]
    found = lsq_linear(matrix, y * root, (0.0, INF), tol=1e-14)
    return 2 * found.cost, found.x


def test_cells_are_ranked_by_their_least_squares(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    x, w = np.geomspace(1.0, 1e3, 30), rng.uniform(0.2, 3.0, 30)
    y = 1.0 + 3.0 * x**-0.4 + 0.05 * rng.normal(size=30)
    theta = np.array([[0.1], [0.4], [0.9], [-0.5]])
    low, high = np.array([0.0, 0.0, -9.0]), np.array([INF, INF, 9.0])
    form = LAWS.get("power")
    score, p = rank(form, {"N": x}, y, w, theta, low, high)
    for m in range(4):
        sse, linear = direct(theta[m], x, y, w)
        assert score[m] == pytest.approx(sse, rel=1e-7)
        np.testing.assert_allclose(p[m], [*linear, theta[m, 0]], rtol=1e-5, atol=1e-7)
    assert p[3, 1] == 0.0  # no rising law is allowed
    for numbers in (1, 2 * 30 * 3):  # one cell at a time, two
        monkeypatch.setattr(module, "_CHUNK", numbers)
        again = rank(form, {"N": x}, y, w, theta, low, high)
        np.testing.assert_allclose(again[0], score, rtol=1e-12)
        np.testing.assert_allclose(again[1], p, rtol=1e-12)


def test_a_single_linear_parameter_is_solved() -> None:
    x, w = np.geomspace(1.0, 1e3, 30), np.linspace(0.5, 2.0, 30)
    low, high = np.array([0.0, -9.0]), np.array([INF, 9.0])
    score, p = rank(form_of((0.1, 1.0)), {"x": x}, 2.0 + x**-0.4, w, np.array([[0.4], [0.9]]), low, high)
    np.testing.assert_allclose(p[0], [2.0, 0.4], rtol=1e-9)
    rest = 2.0 + x**-0.4 - x**-0.9
    np.testing.assert_allclose(p[1], [np.average(rest, weights=w), 0.9], rtol=1e-9)
    assert score[0] == pytest.approx(0.0, abs=1e-9)
    assert score[1] == pytest.approx(np.sum(w * (rest - p[1, 0]) ** 2), rel=1e-9)


def test_linear_parameters_stay_within_their_bounds() -> None:
    x = np.geomspace(1.0, 1e3, 30)
    low, high = np.array([1.5, 0.0, 0.0]), np.array([INF, 2.0, 9.0])
    _, p = rank(LAWS.get("power"), {"N": x}, 1.0 + 3.0 * x**-0.4, np.ones(30), np.array([[0.4]]), low, high)
    np.testing.assert_allclose(p, [[1.5, 2.0, 0.4]])


def test_of_very_many_rows_an_even_sample_is_looked_at() -> None:
    x = np.geomspace(1.0, 1e3, 12_001)
    y = 1.0 + 3.0 * x**-0.4
    y[1::3] = y[2::3] = 100.0  # none of the sample
    low, high = np.zeros(3), np.array([INF, INF, 9.0])
    form = LAWS.get("power")
    assert rank(form, {"N": x[:4000]}, y[:4000], np.ones(4000), np.array([[0.4]]), low, high)[0][0] > 1.0
    rows = np.linspace(0, 12_000, 4000).astype(np.int64)
    expected = rank(form, {"N": x[rows]}, y[rows], np.ones(4000), np.array([[0.4]]), low, high)
    np.testing.assert_array_equal(
        rank(form, {"N": x}, y, np.ones(12_001), np.array([[0.4]]), low, high)[0], expected[0]
    )


def test_a_law_without_linear_parameters_is_ranked_as_it_is() -> None:
    form, case = LAWS.get("kaplan"), CASES["kaplan"]
    rng = np.random.default_rng(0)
    x, true = case.design(rng), case.parameters(form, rng)
    y, w = form.evaluate(x, true), rng.uniform(0.5, 2.0, case.points)
    theta = np.stack([true, true * 1.1, np.full(4, np.nan)])
    score, p = rank(form, x, y, w, theta, np.zeros(4), np.full(4, INF))
    assert score[0] == pytest.approx(0.0, abs=1e-20)
    assert score[1] == pytest.approx(np.sum(w * (form.evaluate(x, theta[1]) - y) ** 2), rel=1e-9)
    assert score[2] == INF
    np.testing.assert_array_equal(p[:2], theta[:2])


def test_the_best_cells_lie_apart() -> None:
    cube = np.array([[0.0, 0.0], [0.1, 0.1], [0.1, 0.13], [0.5, 0.5], [0.9, 0.1], [1.0, 1.0]])
    score = np.array([1.0, 2.0, 3.0, 0.5, INF, 4.0])
    assert spread_best(score, cube, 9) == [3, 0, 2, 5]  # 1 is too near to 0, 4 is none
    assert spread_best(score, cube, 2) == [3, 0]
    assert spread_best(score, cube, 9, distance=0.5) == [3]
    assert spread_best(np.array([1.0]), np.zeros((1, 0)), 3) == [0]
    assert spread_best(np.array([INF]), np.zeros((1, 0)), 3) == []


def test_at_one_place_signs_count_where_they_are_asked_for() -> None:
    x = np.geomspace(1.0, 1e3, 30)
    w = np.linspace(0.5, 2.0, 30)
    y = 1.0 + 3.0 * x**0.1
    form = LAWS.get("power")
    free, value, _ = project(form, {"N": x}, y, w, np.array([0.4]), signs=False)
    assert free[1] < 0
    signed, more, _ = project(form, {"N": x}, y, w, np.array([0.4]))
    np.testing.assert_allclose(signed, [np.average(y, weights=w), 0.0], rtol=1e-9)
    assert more == pytest.approx(direct(np.array([0.4]), x, y, w)[0], rel=1e-6)
    assert value < more
