"""What a form misses: the finite basis against the kernel, the posterior against kriging written out, and where runs go."""

from __future__ import annotations

import math

import numpy as np
import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isoflop.bench.search_strategies import distributions, law_sampler
from isoflop.bench.search_worlds import Lab, worlds
from isoflop.search.law.belief import Belief
from isoflop.search.law.contenders import make_contender
from isoflop.search.law.misfit import Waves, kernel
from isoflop.search.law.planner import Planner
from isoflop.search.law.policy import Policy, Pool
from isoflop.search.law.report import make_check
from isoflop.search.law.rows import Row, RowTable
from isoflop.search.law.targets import PredictionAt, Setting

LOW, HIGH = np.array([1.0, 10.0]), np.array([100.0, 1e4])
UNIT = 0.35 * np.log(HIGH / LOW)


def places(seed: int, count: int) -> np.ndarray:
    return np.exp(np.random.default_rng(seed).uniform(np.log(LOW), np.log(HIGH), (count, 2)))


@given(st.integers(0, 10_000), st.sampled_from([1, 2, 3]), st.floats(1e-8, 10))
@settings(deadline=None, max_examples=40)
def test_waves_are_the_kernel_at_their_nodes_and_never_more_than_it(seed: int, groups: int, tau2: float) -> None:
    waves = Waves.over(LOW, HIGH, range(groups), UNIT, tau2)
    at_nodes = waves.at(waves.x, waves.group)
    k = kernel(waves.x, waves.group, waves.x, waves.group, UNIT)
    np.testing.assert_allclose(at_nodes @ at_nodes.T, tau2 * k, atol=1e-6 * tau2)
    x, group = places(seed, 20), np.random.default_rng(seed).integers(0, groups, 20)
    phi = waves.at(x, group)
    np.testing.assert_allclose(np.sum(phi**2, axis=1) + waves.rest(x, group), tau2, rtol=1e-9)
    other = np.where(group[:, None] == group[None, :], 0.0, phi @ phi.T)
    np.testing.assert_array_equal(other, 0.0)  # groups do not share what they miss


def test_one_group_on_two_axes_leaves_little_unexpressed() -> None:
    waves = Waves.over(LOW, HIGH, [0], UNIT, 1.0)
    assert len(waves) == 36
    assert float(waves.rest(places(0, 500), np.zeros(500, dtype=int)).max()) < 0.03


@pytest.mark.parametrize(("axes", "groups"), [(1, 1), (3, 2), (6, 1), (6, 4)])
def test_the_number_of_waves_stays_small_on_many_axes(axes: int, groups: int) -> None:
    waves = Waves.over(np.ones(axes), np.full(axes, 100.0), range(groups), np.full(axes, 1.6), 1.0)
    assert len(waves) <= 72
    assert set(waves.group) == set(range(groups))


def test_an_axis_that_does_not_move_has_one_tick() -> None:
    waves = Waves.over(np.array([1.0, 7.0]), np.array([10.0, 7.0]), [0], np.array([0.8, 1e-6]), 1.0)
    assert set(waves.x[:, 1].round(9)) == {7.0}
    assert len(set(waves.x[:, 0])) == len(waves)


@pytest.fixture(scope="module")
def misfit() -> Belief:
    world = worlds()["wrong-saturating"]
    lab = Lab(world, 3)
    table = RowTable()
    for i in np.random.default_rng(0).permutation(len(lab))[:45]:
        for _ in range(2):
            table.extend([Row(tuple(lab.x[i]), 0, lab.run(int(i)), math.nan, float(lab.cost[i]))])
    belief = Belief([make_contender("product", world.axes)], world.axes, (1e8, 30.0), noise="constant")
    belief.update(table)
    assert belief.lack_of_fit.rejected
    return belief


def test_the_posterior_is_kriging_with_the_laws_tangent_as_its_trend(misfit: Belief) -> None:
    h, cells, tau2 = misfit.hypotheses[0], misfit.cells, misfit.noise.tau2
    assert cells is not None
    assert h.surface is not None
    unit = h.surface.unit
    x = np.exp(np.random.default_rng(1).uniform(np.log(cells.x.min(0)), np.log(cells.x.max(0)), (30, 2)))
    group = np.zeros(30, dtype=int)
    own, prior = slice(0, h.own), np.diag(h.prior_sd[: h.own] ** 2)

    def cov(a: np.ndarray, ga: np.ndarray, b: np.ndarray, gb: np.ndarray) -> np.ndarray:
        return h.jacobian(a, ga)[:, own] @ prior @ h.jacobian(b, gb)[:, own].T + tau2 * kernel(a, ga, b, gb, unit)

    seen = cov(cells.x, cells.group, cells.x, cells.group) + np.diag(misfit.noise.sigma2 * cells.q)
    cross = cov(x, group, cells.x, cells.group)
    exact = np.diag(cov(x, group, x, group) - cross @ np.linalg.solve(seen, cross.T))
    j = h.jacobian(x, group)
    ours = np.einsum("mp,pq,mq->m", j, h.cov, j) + h.surface.waves.rest(x, group)
    assert float(np.median(np.abs(ours / exact - 1))) < 0.1
    np.testing.assert_allclose(ours, exact, rtol=0.6)
    # the mode's prediction adds the kriged residual, exactly
    v = tau2 * kernel(cells.x, cells.group, cells.x, cells.group, unit) + np.diag(misfit.noise.sigma2 * cells.q)
    residual = cells.y - h.law(cells.x, cells.group)
    expected = h.law(x, group) + tau2 * kernel(x, group, cells.x, cells.group, unit) @ np.linalg.solve(v, residual)
    np.testing.assert_allclose(h.predict(h.u[None], x, group)[0], expected, rtol=1e-8)


def in_three_axes(groups: int) -> tuple[Belief, Planner, Pool]:
    """A misfit on three axes, where a few waves leave much unexpressed."""
    rng = np.random.default_rng(0)
    table = RowTable()
    x = np.exp(rng.uniform(0, 4, (60, 3)))
    group = rng.integers(0, groups, 60)
    for place, g in zip(x, group, strict=True):
        y = 0.3 + place[0] ** -0.3 * place[1] ** -0.1 + 0.1 * math.sin(2 * math.log(place[2]))
        for _ in range(2):
            row = Row(tuple(place), int(g), y + 0.002 * rng.standard_normal(), math.nan, float(place[0]))
            table.extend([row])
    axes = ("N", "V", "W")
    belief = Belief([make_contender("E + A*N**(-alpha)*V**(-beta)", axes)], axes, (7.0,) * 3, groups, noise="constant")
    belief.update(table)
    assert belief.lack_of_fit.rejected
    names = tuple(f"g{k}" for k in range(groups))
    target = PredictionAt(at={"N": 50.0, "V": 5.0, "W": 9.0}).bind(Setting(axes, (1.0,) * 3, (55.0,) * 3, names))
    planner = Planner(belief, target, Policy(), None, rng)
    planner.table = table
    planner._fitted_rows = len(table)
    places, which = np.exp(rng.uniform(0, 4, (12, 1, 3))), rng.integers(0, groups, (12, 1))
    yes = np.ones(12, dtype=bool)
    return belief, planner, Pool(places, which, np.ones(12), list(range(12)), yes, ~yes)


@pytest.mark.parametrize("groups", [1, 3])
def test_what_waves_leave_out_counts_as_scatter_of_rows_candidates_and_the_check(groups: int) -> None:
    belief, planner, pool = in_three_axes(groups)
    del belief.hypotheses[1:]  # one basin will do
    h, cells, sigma2 = belief.hypotheses[0], belief.cells, belief.noise.sigma2
    h.weight = 1.0
    assert cells is not None
    assert h.surface is not None
    waves = h.surface.waves
    rest = waves.rest(cells.x, cells.group)
    assert float(np.median(rest)) > 0.03 * belief.noise.tau2  # the case is one in which it matters
    j = h.jacobian(cells.x, cells.group)
    precision = (j.T / (sigma2 * cells.q + rest)) @ j + np.diag(h.prior_sd**-2.0)
    np.testing.assert_allclose(h.cov @ precision, np.eye(len(h.u)), atol=1e-6)
    x, group = pool.x[:, 0], pool.group[:, 0]
    np.testing.assert_allclose(planner.noise(pool)[:, 0], sigma2 + waves.rest(x, group), rtol=1e-9)
    planner.check = Row(tuple(x[0]), int(group[0]), 0.7, math.nan, 1.0)
    check = make_check(planner, Setting(("N", "V", "W"), (1.0,) * 3, (55.0,) * 3, ("a",) * groups))
    at = h.jacobian(x[:1], group[:1])[0]
    assert check is not None
    assert check.sd**2 == pytest.approx(at @ h.cov @ at + sigma2 + waves.rest(x[:1], group[:1])[0], rel=1e-6)


def test_draws_move_with_the_waves_and_are_never_clipped_there(misfit: Belief) -> None:
    h = misfit.hypotheses[0]
    assert h.surface is not None
    x, group = places(5, 7) * [1e7, 1], np.zeros(7, dtype=int)
    w = np.random.default_rng(0).normal(0, 9, len(h.surface.waves))
    u = h.u.copy()
    u[h.own :] = w
    np.testing.assert_array_equal(h.clip(u[None])[0, h.own :], w)
    moved = h.predict(u[None], x, group)[0] - h.predict(h.u[None], x, group)[0]
    np.testing.assert_allclose(moved, h.surface.waves.at(x, group) @ w, rtol=1e-9, atol=1e-12)


def test_where_no_form_fits_new_places_run_before_any_is_repeated() -> None:
    lab = Lab(worlds()["wrong-saturating"], 1)
    sampler = law_sampler(lab, 0.3 * lab.total, 1)
    study = optuna.create_study(sampler=sampler)
    seen: set[int] = set()
    told_misfit = 0
    for _ in range(45):
        trial = study.ask(distributions(lab))
        role = study.get_trials(deepcopy=False)[-1].system_attrs.get("law:role")
        if role is None:
            break
        i = lab.index(trial.params)
        assert i is not None
        if role == "gain" and sampler.report(study).fits is False:
            told_misfit += 1
            assert i not in seen
        seen.add(i)
        study.tell(trial, lab.run(i))
    assert told_misfit > 10
