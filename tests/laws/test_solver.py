"""The batched solver piece by piece: what each pass minimises, its derivatives, its bounds, and what it reports."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import least_squares

from isoflop.laws import LAWS
from isoflop.laws.objective import OBJECTIVES, Objective
from isoflop.laws.solver import (
    CONVERGED,
    ITERATION_LIMIT,
    STALLED,
    Batch,
    Passes,
    Solution,
    _Chunk,
    _inner,
    _Point,
    _Stage,
    solve,
)

N = 12
SIZES = np.geomspace(1.0, 1e3, N)
TRUE = {"power": (1.0, 3.0, 0.4), "kaplan": (5.0, 20.0, 0.3, 0.2)}


def ends(law: str) -> tuple[np.ndarray, np.ndarray]:
    low, high = (np.array(side) for side in zip(*((p.low, p.high) for p in LAWS.get(law).parameters), strict=True))
    return low, high


def batch_of(law: str, y: np.ndarray, w: np.ndarray, problems: int = 1) -> Batch:
    x = {"N": SIZES[None]} if law == "power" else {"N": SIZES[None], "D": SIZES[None, ::-1] * 3.0}
    same = np.zeros(problems, dtype=np.int64)
    return Batch(LAWS.get(law), x, y[None], w[None], same, same, same)


def chunk_of(law: str, kind: str, delta: float, y: np.ndarray, w: np.ndarray) -> _Chunk:
    batch = batch_of(law, y, w)
    low, high = (_inner(side[None], batch.form.logarithmic) for side in ends(law))
    return _Chunk(batch, np.arange(1), low, high, Objective(kind, delta))


def data(law: str, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Noisy targets with outliers, and uneven weights."""
    rng = np.random.default_rng(seed)
    x = {"N": SIZES} if law == "power" else {"N": SIZES, "D": SIZES[::-1] * 3.0}
    y = LAWS.get(law).evaluate(x, np.array(TRUE[law])) * np.exp(0.02 * rng.normal(size=N))
    y[2], y[7] = 1.5 * y[2], 0.7 * y[7]
    return y, rng.uniform(0.5, 2.0, N)


def off_by(steps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Targets from which the power law with E = 1, A = 3, alpha = 0.4 is off by ``steps`` in the logarithm; unit weights."""
    return LAWS.get("power").evaluate({"N": SIZES}, np.array(TRUE["power"])) * np.exp(-steps), np.ones(N)


def stages(kind: str, delta: float, passes: Passes, y: np.ndarray, w: np.ndarray) -> list[tuple[float | None, bool]]:
    found = chunk_of("power", kind, delta, y, w).stages(np.array([TRUE["power"]]), passes)
    return [(None if s.delta is None else round(s.delta, 9), s.project) for s in found]


PROJECT, SQUARES = (None, True), (None, False)


def test_which_passes_are_made() -> None:
    y, w = off_by(np.full(N, 0.5))
    for kind in ("squared", "squared-log"):
        assert stages(kind, 1e-3, "all", y, w) == [PROJECT, SQUARES]
        assert stages(kind, 1e-3, "project", y, w) == [PROJECT]
        assert stages(kind, 1e-3, "polish", y, w) == stages(kind, 1e-3, "last", y, w) == [SQUARES]
    falling = [(0.5, False), (0.0625, False), (1e-3, False)]
    assert stages("huber-log", 1e-3, "all", y, w) == [PROJECT, SQUARES, *falling]
    assert stages("huber-log", 1e-3, "polish", y, w) == falling
    assert stages("huber-log", 1e-3, "project", y, w) == [PROJECT]
    assert stages("huber-log", 1e-3, "last", y, w) == [(1e-3, False)]


@pytest.mark.parametrize(("delta", "larger"), [(1e-6, 2), (0.0078, 2), (0.0079, 1), (0.0624, 1), (0.0626, 0), (9.0, 0)])
def test_delta_falls_from_the_residuals_spread_by_eights_twice_at_most(delta: float, larger: int) -> None:
    y, w = off_by(np.full(N, 0.5))
    assert stages("huber-log", delta, "polish", y, w) == [*[(0.5, False), (0.0625, False)][:larger], (delta, False)]


def test_the_spread_is_that_of_points_that_count() -> None:
    steps = np.full(N, 0.5)
    steps[:5] = 3.0
    y, w = off_by(steps)
    w[:5] = 0.0
    assert stages("huber-log", 1e-3, "polish", y, w)[0] == (0.5, False)
    y[6:] = np.nan
    assert stages("huber-log", 1e-3, "polish", y, w)[0] == (0.5, False)
    y[:] = np.nan
    assert stages("huber-log", 1e-3, "polish", y, w)[0] == (1.0, False)


def test_only_signs_of_linear_parameters_allow_a_projection() -> None:
    y, w = data("power")
    batch = batch_of("power", y, w)
    inf = np.inf
    cases: list[tuple[tuple[float, float], tuple[float, float], bool]] = [
        ((0.0, 0.0), (inf, inf), True),
        ((-inf, 0.0), (inf, inf), True),
        ((-inf, -inf), (0.0, inf), True),
        ((0.5, 0.0), (inf, inf), False),
        ((0.0, 0.0), (inf, 9.0), False),
        ((0.5, 0.5), (9.0, 9.0), False),
    ]
    for low, high, allowed in cases:
        lo, hi = np.array([[*low, 0.0]]), np.array([[*high, 2.0]])
        assert _Chunk(batch, np.arange(1), lo, hi, Objective()).projects is allowed, (low, high)
    kaplan = batch_of("kaplan", *data("kaplan"))
    lo, hi = (side[None] for side in ends("kaplan"))
    assert not _Chunk(kaplan, np.arange(1), lo, hi, Objective()).projects  # nothing in it is linear


@pytest.mark.parametrize("kind", OBJECTIVES)
@pytest.mark.parametrize("law", TRUE)
def test_losses_and_gradients_are_those_of_the_objective(law: str, kind: str) -> None:
    y, w = data(law)
    delta = 0.05
    chunk, objective = chunk_of(law, kind, delta, y, w), Objective(kind, delta)
    picked = chunk.batch.pick(chunk.rows)
    u = _inner(np.array([TRUE[law]]) * 1.03, chunk.log)
    stage = _Stage(delta if objective.robust else None)

    def half(at: np.ndarray) -> float:
        f = chunk._model(at, picked[0])[0]
        return float(np.sum(w * objective.rho(objective.residual(f[0], y))))

    point = chunk._evaluate(u, picked, stage, np.zeros(1))
    assert point.loss[0] == pytest.approx(half(u), rel=1e-12)
    steps = 1e-6 * np.eye(u.shape[1])
    numeric = [(half(u + step) - half(u - step)) / 2e-6 for step in steps]
    np.testing.assert_allclose(point.gradient[0], numeric, rtol=1e-5)
    # curvature: of the terms as functions of the residual, times the residual's slopes
    f, j = chunk._model(u, picked[0])
    r = objective.residual(f[0], y)
    slopes = j[0] / (f[0] if objective.log else 1.0)
    small = np.abs(r) <= delta
    assert not objective.robust or 0 < small.sum() < N
    bend = w if not objective.robust else w * small
    np.testing.assert_allclose(point.curvature[0], slopes * bend @ slopes.T, rtol=1e-9)
    weights = np.ones(N) if not objective.robust else np.minimum(1.0, delta / np.abs(r))
    np.testing.assert_allclose(point.diagonal[0], np.sum(slopes**2 * w * weights, axis=1), rtol=1e-9)
    if objective.robust:
        major = chunk._evaluate(u, picked, stage, np.ones(1))
        np.testing.assert_allclose(major.curvature[0], slopes * (w * weights) @ slopes.T, rtol=1e-9)


def solved(law: str, start: tuple[float, ...], kind: str = "squared", **options: object) -> Solution:
    y, w = data(law)
    low, high = ends(law)
    given = {"low_BP": low, "high_BP": high, "objective": Objective(kind, 0.05), **options}
    return solve(batch_of(law, y, w), np.array([start]), **given)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", OBJECTIVES)
@pytest.mark.parametrize("law", TRUE)
def test_the_reported_loss_is_that_of_the_reported_parameters(law: str, kind: str) -> None:
    y, w = data(law)
    start = {"power": (0.5, 1.0, 0.8), "kaplan": (1.0, 90.0, 0.5, 0.1)}[law]
    found = solved(law, start, kind)
    assert found.status[0] == CONVERGED
    x = {"N": SIZES} if law == "power" else {"N": SIZES, "D": SIZES[::-1] * 3.0}
    objective = Objective(kind, 0.05)

    def loss(p: np.ndarray) -> float:
        return float(objective.loss(objective.residual(LAWS.get(law).evaluate(x, p), y), w))

    assert found.loss[0] == pytest.approx(loss(found.p[0]), rel=1e-12)
    for i, sign in np.ndindex(len(start), 2):
        near = found.p[0].copy()
        near[i] *= 1 + (2 * sign - 1) * 1e-4
        assert loss(near) > found.loss[0]


@pytest.mark.parametrize(("kind", "passes"), [(k, p) for k in OBJECTIVES for p in ("all", "project", "polish", "last")])
def test_iterations_of_all_passes_are_counted_and_limited(kind: str, passes: Passes) -> None:
    y, w = data("power")
    start = (0.2, 9.0, 1.5)
    count = len(chunk_of("power", kind, 0.05, y, w).stages(np.array([start]), passes))
    found = solved("power", start, kind, max_iter=1, passes=passes)
    assert (found.iterations[0], found.status[0]) == (count, ITERATION_LIMIT)
    whole = solved("power", start, kind, passes=passes)
    assert whole.status[0] == CONVERGED
    assert count < whole.iterations[0] < 60 * count


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("law", TRUE)
def test_within_bounds_the_optimum_is_scipys(law: str, seed: int) -> None:
    """Some parameters end on a bound, of both sides."""
    y, w = data(law, seed)
    rng = np.random.default_rng([seed, 5])
    true = np.array(TRUE[law])
    low, high = true * rng.uniform(0.6, 1.02, len(true)), true * rng.uniform(0.98, 1.5, len(true))
    low, high = np.minimum(low, high * 0.9), np.maximum(high, low * 1.1)
    start = np.sqrt(low * high)
    found = solve(batch_of(law, y, w), start[None], low, high, Objective("squared"))
    x = {"N": SIZES} if law == "power" else {"N": SIZES, "D": SIZES[::-1] * 3.0}

    def residual(p: np.ndarray) -> np.ndarray:
        return np.sqrt(w) * (LAWS.get(law).evaluate(x, p) - y)

    expected = least_squares(residual, start, bounds=(low, high), xtol=1e-15, ftol=1e-15, gtol=1e-15)
    assert 2 * expected.cost * (1 - 1e-6) <= found.loss[0] <= 2 * expected.cost * (1 + 1e-9)  # scipy stays inside
    assert (found.p[0] >= low * (1 - 1e-12)).all()
    assert (found.p[0] <= high * (1 + 1e-12)).all()
    assert found.status[0] == CONVERGED


def test_a_start_outside_the_bounds_is_taken_into_them() -> None:
    """Also one at which nothing pulls any more."""
    free = solved("power", (0.5, 1.0, 0.8))
    low, high = np.array([0.0, 0.0, 0.0]), np.array([np.inf, np.inf, 0.8 * free.p[0, 2]])
    found = solved("power", tuple(free.p[0]), high_BP=high, low_BP=low, passes="last")
    inside = solved("power", (0.5, 1.0, 0.1), high_BP=high, low_BP=low)
    np.testing.assert_allclose(found.p, inside.p, rtol=1e-6)
    assert found.p[0, 2] == high[2]
    assert found.loss[0] > free.loss[0]


@pytest.mark.parametrize("kind", ["squared", "huber"])
@pytest.mark.parametrize("passes", ["all", "last"])
def test_the_scale_of_the_targets_changes_nothing(kind: str, passes: Passes) -> None:
    """No test of convergence is absolute. Powers of two scale every number of the solver exactly."""
    y, w = data("power")
    low, high = ends("power")

    def scaled(by: float) -> Solution:
        units = np.array([by, by, 1.0])
        start = np.array([[0.5, 1.0, 0.8]]) * units
        batch = batch_of("power", y * by, w)
        return solve(batch, start, low, high, Objective(kind, 0.05 * by), passes=passes)

    base = scaled(1.0)
    for by in (2.0**-40, 2.0**40):
        found = scaled(by)
        np.testing.assert_allclose(found.p / np.array([by, by, 1.0]), base.p, rtol=1e-9)
        assert found.loss[0] == pytest.approx(base.loss[0] * by**2, rel=1e-9)
        assert (found.status[0], found.iterations[0]) == (CONVERGED, base.iterations[0])


@pytest.mark.parametrize(("gradient", "status"), [(0.1, STALLED), (1e-9, CONVERGED)])
def test_a_fit_whose_steps_never_help_says_so_unless_nothing_pulls(
    monkeypatch: pytest.MonkeyPatch, gradient: float, status: int
) -> None:
    """At rounding level of the loss no step helps, and none is needed."""
    losses = iter([1.0])

    def worse(self: _Chunk, u: np.ndarray, *_: object) -> _Point:
        one = np.ones_like(u)
        return _Point(u, np.full(len(u), next(losses, 2.0)), gradient * one, np.eye(u.shape[1])[None], one)

    monkeypatch.setattr(_Chunk, "_evaluate", worse)
    found = solved("power", (1.0, 3.0, 0.4), passes="last", tolerance=0.0)
    assert found.status[0] == status
    np.testing.assert_array_equal(found.p[0], (1.0, 3.0, 0.4))
    assert found.loss[0] == 2.0
    assert found.iterations[0] < 30


def test_many_problems_are_solved_as_each_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    y, w = data("power")
    low, high = ends("power")
    starts = np.random.default_rng(1).uniform((0.1, 0.5, 0.1), (2.0, 9.0, 1.2), (7, 3))
    batch = batch_of("power", y, w, 7)
    together = solve(batch, starts, low, high, Objective("huber-log", 0.01))
    monkeypatch.setattr("isoflop.laws.solver._CHUNK", 3 * N + 1)  # three problems at a time
    apart = solve(batch, starts, low, high, Objective("huber-log", 0.01))
    monkeypatch.setattr("isoflop.laws.solver._CHUNK", 1)
    single = solve(batch, starts, low, high, Objective("huber-log", 0.01))
    assert (together.status == CONVERGED).all()
    np.testing.assert_allclose(apart.loss, together.loss, rtol=1e-9)
    np.testing.assert_allclose(single.loss, together.loss, rtol=1e-9)
