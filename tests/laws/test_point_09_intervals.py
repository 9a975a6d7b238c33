"""Acceptance point 9: intervals that contain the truth as often as they say, by Wald, profile and bootstrap."""

from __future__ import annotations

import numpy as np
import pytest
from law_cases import additive_table
from scipy import stats

from isoflop.frontier import frontier
from isoflop.laws import GroupedFit, fit, wald
from isoflop.laws.engine import Box
from isoflop.laws.objective import Objective
from isoflop.laws.profile import ProfileInterval, profile, profile_at

TRUTH = {"E": 1.8, "A": 480.0, "B": 2000.0, "alpha": 0.35, "beta": 0.365}


def many(sets: int, n: int, noise: float, first_seed: int = 100) -> dict[str, np.ndarray]:
    parts = [additive_table(first_seed + k, n, noise) for k in range(sets)]
    return {
        **{c: np.concatenate([p[c] for p in parts]) for c in ("N", "D", "loss")},
        "set": np.repeat(np.arange(sets), n),
    }


def test_point_09_wald_coverage_on_200_sets() -> None:
    grouped = fit(
        many(200, 60, 0.005), "chinchilla", y="loss", by="set", objective="squared-log", bootstrap=0, profile=False
    )
    assert isinstance(grouped, GroupedFit)
    assert len(grouped) == 200
    hits = dict.fromkeys(TRUTH, 0)
    errors: dict[str, list[float]] = {n: [] for n in TRUTH}
    for fitted in grouped:
        for n, true in TRUTH.items():
            i = fitted.form.position(n)
            low, high = wald.interval(fitted.form, i, fitted.p, fitted.cov, fitted.n - 5, 0.95)
            hits[n] += low <= true <= high
            scale = fitted.p[i] if n in ("A", "B", "E") else 1.0
            errors[n].append(np.sqrt(fitted.cov[i, i]) / scale)
    for n, count in hits.items():
        assert 0.90 <= count / 200 <= 0.995, (n, count)
    means = {n: float(np.mean(v)) for n, v in errors.items()}
    for n, expected in {"A": 0.223, "B": 0.113, "E": 0.0069, "alpha": 0.0130, "beta": 0.0058}.items():
        assert means[n] == pytest.approx(expected, rel=0.1), n


def test_point_09_bootstrap_coverage() -> None:
    grouped = fit(
        many(40, 60, 0.005, 700),
        "chinchilla",
        y="loss",
        by="set",
        objective="squared-log",
        bootstrap=200,
        profile=False,
    )
    for n, true in TRUTH.items():
        inside = np.mean([f.params[n].interval[0] <= true <= f.params[n].interval[1] for f in grouped])
        assert inside >= 0.90, (n, inside)
    policy = TRUTH["beta"] / (TRUTH["alpha"] + TRUTH["beta"])
    assert np.mean([f.derived["a_N"].interval[0] <= policy <= f.derived["a_N"].interval[1] for f in grouped]) >= 0.90


def product_sets(sets: int, noise: float = 0.004, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    n, v = (a.ravel() for a in np.meshgrid([0.5e9, 1.8e9, 4e9, 7e9], [1, 4, 16, 36, 64, 144, 576], indexing="ij"))
    clean = 2.6 * n**-0.071 * v**-0.0151
    return {
        "N": np.tile(n, sets),
        "V": np.tile(v, sets).astype(float),
        "error": (clean + noise * rng.standard_normal((sets, 28))).ravel(),
        "set": np.repeat(np.arange(sets), 28),
    }


def test_point_09_coverage_of_the_ratio_and_of_the_optimum() -> None:
    grouped = fit(
        product_sets(60), "product", by="set", fixed={"E": 0.0}, bootstrap=300, scheme="parametric", profile=False
    )
    ratio, best = 0.071 / 0.0151, 0.0151 * 50 / (0.071 - 0.0151)
    inside = [f.derived["alpha/beta"].interval[0] <= ratio <= f.derived["alpha/beta"].interval[1] for f in grouped]
    assert 0.88 <= np.mean(inside) <= 1.0
    hits = []
    for f in grouped:
        low, high = frontier(f, q=50, budget=1e12)[0].continuous["V"].interval
        hits.append(low <= best <= high)
    assert 0.88 <= np.mean(hits) <= 1.0


def test_point_09_three_kinds_of_intervals_agree_when_nearly_linear() -> None:
    table = additive_table(3, 400, 0.002)
    options = {"law": "chinchilla", "y": "loss", "objective": "squared-log"}
    drawn = fit(table, bootstrap=2000, scheme="parametric", profile=False, **options)
    profiled = fit(table, bootstrap=0, profile=True, **options)
    for n in ("alpha", "beta", "E"):
        i = drawn.form.position(n)
        ends = wald.interval(drawn.form, i, drawn.p, drawn.cov, 395, 0.95)
        widths = [b - a for a, b in (ends, drawn.params[n].interval, profiled.params[n].interval)]
        assert max(widths) / min(widths) < 1.15, (n, widths)


def test_profiles_of_a_linear_law_are_its_exact_intervals() -> None:
    rng = np.random.default_rng(8)
    n, v = np.exp(rng.uniform(0.0, 5.0, 30)), np.exp(rng.uniform(0.0, 6.0, 30))
    y = 2.0 - 0.02 * np.log(n) - 0.01 * np.log(v) + 0.01 * rng.normal(size=30)
    fitted = fit({"N": n, "V": v, "y": y}, "semilog", y="y", bootstrap=0, profile=False)
    columns = np.stack([np.ones(30), -np.log(n), -np.log(v)], axis=1)
    errors = np.sqrt(np.diag(np.linalg.inv(columns.T @ columns)) * fitted.sse / 27)

    def ends(box: Box, **options: float) -> dict[str, ProfileInterval]:
        return profile(fitted.form, fitted.data, fitted.p, fitted.sse, box, Objective(), errors, **options)

    for options, level in (({}, 0.95), ({"level": 0.8}, 0.8)):
        reach = stats.t.ppf(0.5 + level / 2, 27) * errors
        for i, (name, found) in enumerate(ends(fitted.box, **options).items()):
            assert name == fitted.form.names[i]
            np.testing.assert_allclose(
                [found.low, found.high], [fitted.p[i] - reach[i], fitted.p[i] + reach[i]], rtol=1e-4
            )
            assert found.bounded
    # a bound before the end: the interval stops there, open; exactly on the first step or not
    for far in (1.5, 1.2):
        high = fitted.box.high.copy()
        high[1] = fitted.p[1] + far * errors[1]
        found = ends(Box(fitted.box.low, high))["a"]
        assert (found.high, found.high_closed, found.low_closed) == (high[1], False, True)
    # one standard error away costs one residual variance, two cost four
    curve = profile_at(
        fitted.form,
        fitted.data,
        fitted.p,
        fitted.box,
        Objective(),
        "a",
        fitted.p[1] + errors[1] * np.array([-1.0, 0.0, 2.0]),
    )
    np.testing.assert_allclose(curve - fitted.sse, fitted.sse / 27 * np.array([1.0, 0.0, 4.0]), rtol=1e-6, atol=1e-12)


def test_point_09_cluster_bootstrap_is_wider_when_checkpoints_share_noise() -> None:
    rng = np.random.default_rng(0)
    runs, each = 30, 8
    base = additive_table(1, runs, 0.0)
    tokens = base["D"][:, None] * np.geomspace(0.2, 1, each)
    size = np.repeat(base["N"], each)
    shared = np.repeat(0.02 * rng.standard_normal(runs), each) + 0.002 * rng.standard_normal(runs * each)
    loss = (1.8 + 480 * size**-0.35 + 2000 * tokens.ravel() ** -0.365) * np.exp(shared)
    table = {"N": size, "D": tokens.ravel(), "loss": loss, "run": np.repeat(np.arange(runs), each)}
    options = {"law": "chinchilla", "y": "loss", "objective": "squared-log", "bootstrap": 400, "profile": False}
    naive, clustered = fit(table, **options), fit(table, cluster="run", **options)
    assert clustered.record["bootstrap"]["scheme"] == "cluster"
    for n in ("E", "alpha"):
        width = [f.params[n].interval[1] - f.params[n].interval[0] for f in (naive, clustered)]
        assert width[1] > 1.3 * width[0], (n, width)


@pytest.mark.parametrize("scheme", ["cases", "wild", "parametric"])
def test_schemes_agree_on_plain_noise(scheme: str) -> None:
    table = additive_table(5, 150, 0.005)
    fitted = fit(table, "chinchilla", y="loss", objective="squared-log", bootstrap=400, scheme=scheme, profile=False)
    i = fitted.form.position("alpha")
    low, high = fitted.params["alpha"].interval
    assert (high - low) / (2 * 1.98 * np.sqrt(fitted.cov[i, i])) == pytest.approx(1.0, abs=0.25)


def test_prediction_intervals_of_new_runs_are_wider_and_cover() -> None:
    table = additive_table(6, 200, 0.01)
    fitted = fit(table, "chinchilla", y="loss", bootstrap=400, profile=False)
    fresh = additive_table(7, 300, 0.01)
    mean = fitted.predict_interval(fresh)
    new = fitted.predict_interval(fresh, new_run=True)
    assert np.all(new[1] - new[0] > mean[1] - mean[0])
    assert 0.90 <= np.mean((fresh["loss"] >= new[0]) & (fresh["loss"] <= new[1])) <= 0.99
