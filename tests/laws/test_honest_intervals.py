"""Intervals on tables that are not as the textbook has them (leverage, copies, clusters, few resamples), and one rule for verdicts."""

from __future__ import annotations

import math

import numpy as np
import pytest
from law_cases import additive_table, product_table

from isoflop.core.errors import UserError
from isoflop.frontier import frontier
from isoflop.laws import Estimate, Fit, compare, fit, wald
from isoflop.laws.bootstrap import fewest_resamples
from isoflop.laws.inference import judge
from isoflop.laws.objective import Objective

CHINCHILLA = {"law": "chinchilla", "y": "loss"}


def width(estimate: Estimate) -> float:
    assert estimate.interval is not None
    return estimate.interval[1] - estimate.interval[0]


def with_far_rows(seed: int, off: float = 0.06, far: int = 6, rows: int = 240) -> dict[str, np.ndarray]:
    """A published-like table: most rows close together, a few small runs far out that the law misses."""
    rng = np.random.default_rng(seed)
    n = np.exp(rng.uniform(np.log(6e7), np.log(2e9), rows))
    d = np.exp(rng.uniform(np.log(3e9), np.log(3e10), rows))
    n[:far] = np.exp(rng.uniform(np.log(5e7), np.log(8e7), far))
    d[:far] = np.exp(rng.uniform(np.log(2e8), np.log(6e8), far))
    noise = 0.004 * rng.standard_normal(rows)
    noise[:far] = off * rng.standard_normal(far)
    return {"N": n, "D": d, "loss": (1.8 + 480 * n**-0.35 + 2000 * d**-0.365) * np.exp(noise)}


@pytest.mark.parametrize("objective", ["squared", "squared-log"])
def test_rows_far_out_do_not_make_intervals_too_narrow(objective: str) -> None:
    """Without a bootstrap as with one; the plain likelihood's were about four times too narrow here."""
    table = with_far_rows(1)
    plain = fit(table, **CHINCHILLA, objective=objective, bootstrap=0)
    drawn = fit(table, **CHINCHILLA, objective=objective, bootstrap=200, profile=False)
    for name in ("E", "beta", "alpha"):
        assert 0.75 < width(plain.params[name]) / width(drawn.params[name]) < 1.8, name
    beta = plain.form.position("beta")
    assert 0.75 < 3.94 * math.sqrt(plain.cov[beta, beta]) / width(drawn.params["beta"]) < 1.8
    assert "times wider" in plain.params["beta"].method
    assert "sandwich" in str(plain.record["covariance"])


def test_huber_terms_say_that_their_intervals_are_too_narrow() -> None:
    options = {**CHINCHILLA, "objective": "huber-log", "profile": False}
    assert any("too narrow" in w for w in fit(with_far_rows(0), bootstrap=0, **options).warnings)
    assert not any("too narrow" in w for w in fit(with_far_rows(0), bootstrap=50, **options).warnings)
    assert not any("too narrow" in w for w in fit(with_far_rows(0, off=0.004), bootstrap=0, **options).warnings)


def test_equal_noise_keeps_its_intervals() -> None:
    found = [
        fit(additive_table(s, 200, 0.004), **CHINCHILLA, objective="squared-log", bootstrap=0, profile=False)
        for s in range(12)
    ]
    free = np.ones(5, dtype=bool)
    factors = [wald.widening(f.form, f.data, f.p, Objective("squared-log"), free) for f in found]
    assert np.mean(np.stack(factors) > 1) < 0.05
    assert found[0].record["covariance"] == "SSE/(n - p) (J^T J)^-1: no sign of unequal noise"


def copied(times: int, rows: int = 40) -> dict[str, np.ndarray]:
    table = additive_table(3, rows, 0.004)
    return {**{k: np.tile(v, times) for k, v in table.items()}, "run": np.tile(np.arange(rows), times)}


@pytest.mark.parametrize("bootstrap", [0, 200])
def test_copies_of_rows_are_said_and_clusters_undo_them(bootstrap: int) -> None:
    once, four = (fit(copied(k), **CHINCHILLA, bootstrap=bootstrap) for k in (1, 4))
    alone, clustered = (fit(copied(k), **CHINCHILLA, bootstrap=bootstrap, cluster="run") for k in (1, 4))
    assert any("120 of 160 rows repeat others exactly" in w and "--cluster" in w for w in four.warnings)
    for fitted in (once, alone, clustered):
        assert not any("repeat others" in w for w in fitted.warnings)
    for name in ("alpha", "beta", "E"):
        assert width(four.params[name]) < 0.75 * width(once.params[name])
        assert width(clustered.params[name]) == pytest.approx(width(alone.params[name]), rel=0.03)
        assert width(clustered.params[name]) == pytest.approx(width(once.params[name]), rel=0.35)
    np.testing.assert_allclose(clustered.cov, alone.cov, rtol=1e-3)


def test_a_cluster_that_holds_the_copies_apart_does_not_help() -> None:
    table = copied(2)
    table["run"] = np.arange(80)
    assert any(
        "40 of 80 rows" in w for w in fit(table, **CHINCHILLA, bootstrap=0, profile=False, cluster="run").warnings
    )


def test_a_few_equal_rows_are_no_copies() -> None:
    table = {k: np.append(v, v[:2]) for k, v in additive_table(3, 40, 0.004).items()}
    assert not any("repeat others" in w for w in fit(table, **CHINCHILLA, bootstrap=0, profile=False).warnings)


@pytest.mark.parametrize("level", [0.5, 0.8, 0.95, 0.99])
def test_too_few_resamples_give_no_interval_anywhere(level: float) -> None:
    """Not for parameters, derived quantities, optima, predictions; enough of them do."""
    least = fewest_resamples(level)
    assert least == round(2 / (1 - level)) - 1
    table = product_table(0)
    for count in sorted({1, 2, 5, least - 1, least}):
        fitted = fit(table, bootstrap=count, level=level)
        point = frontier(fitted, q=50, budget=1e12)[0]
        derived = [*point.continuous.values(), point.error]
        drawn = [e for e in [*fitted.params.values(), *fitted.derived.values(), *derived] if "bootstrap" in e.method]
        if count >= least:
            assert len(drawn) >= len(derived)
            continue
        assert drawn == []
        assert all(c.probability is None for c in point.discrete)
        assert all(e.interval is None and f"{count} resample" in e.verdict for e in derived)
        assert any(f"{count} resample" in w and f"no {100 * level:g}% interval" in w for w in fitted.warnings)
        with pytest.raises(UserError, match=f"at least {least}"):
            fitted.predict_interval({"N": 1e9, "V": 16})
    told = compare(table, "product", bootstrap=5)
    assert told["product"].cuts[0].coverage is None
    assert any("5 resamples" in v for v in told.verdict)


@pytest.mark.parametrize(
    ("value", "ends", "scale", "good"),
    [
        (16.7, (0.8, 91.7), None, False),
        (16.7, (8.0, 40.0), None, True),
        (0.1, (0.0, 0.21), None, False),
        (-0.1, (-0.2, -0.05), None, True),
        (1.0, (0.5, math.inf), None, False),
        (1.0, (-math.inf, 2.0), None, False),
        (math.nan, (0.0, 1.0), None, False),
        (0.0, (0.0, 0.0), None, True),
        (0.0, (0.0, 0.05), None, False),
        (0.0, (0.0, 0.05), 0.3, True),
        (0.1, (0.0, 0.4), 0.3, False),
    ],
)
def test_the_rule(value: float, ends: tuple[float, float], scale: float | None, good: bool) -> None:
    assert (judge(value, ends, scale) == "") == good


def verdicts(fitted: Fit) -> dict[str, tuple[Estimate, float | None]]:
    point = frontier(fitted, q=50, budget=1e12)[0]
    spread = float(np.ptp(fitted.data.y)) if fitted.data else None
    plain = {**fitted.derived, **point.continuous, "error": point.error, "twice": fitted.quantity("2*A")}
    return {
        **{k: (e, None) for k, e in plain.items()},
        **{k: (e, spread if k == "E" else None) for k, e in fitted.params.items()},
    }


@pytest.mark.parametrize(
    "options",
    [{"bootstrap": 100}, {"bootstrap": 0}, {"bootstrap": 100, "profile": False}, {"bootstrap": 0, "profile": False}],
)
@pytest.mark.parametrize("noise", [0.001, 0.02, 0.08])
def test_one_rule_decides_on_every_number(noise: float, options: dict) -> None:
    """Whatever is called identified has an interval that passes it; whatever fails it is not called so."""
    fitted = fit(product_table(1, noise), **options)
    for name, (estimate, scale) in verdicts(fitted).items():
        if estimate.interval is None:
            assert estimate.identified is None
            continue
        why = judge(estimate.value, estimate.interval, scale)
        assert not (estimate.identified and why), (name, estimate)
        assert why == "" or estimate.identified is False, (name, estimate)
        assert estimate.verdict.startswith("identified" if estimate.identified else "not identified")
    text = str(fitted)
    assert "ident.: both ends known" in text
    assert all(len(line) <= 80 for line in text.splitlines())
