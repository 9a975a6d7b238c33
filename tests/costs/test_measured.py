"""Measured costs become formulas that a frontier can spend."""

from __future__ import annotations

import numpy as np
import pytest

from isoflop.core.errors import UserError
from isoflop.costs import measured_cost
from isoflop.frontier import frontier
from isoflop.laws import fit


def rows() -> dict[str, np.ndarray]:
    n, v = (a.ravel() for a in np.meshgrid([0.5, 1.8, 4, 7], [1, 4, 16, 64, 144, 576], indexing="ij"))
    noise = np.exp(0.02 * np.random.default_rng(0).standard_normal(len(n)))
    return {
        "N": n,
        "V": v.astype(float),
        "latency": (0.01 + 0.003 * n + 2e-4 * n * v) * noise,
        "error": 0.6 * n**-0.2 * v**-0.08,
    }


def test_a_latency_model_recovers_its_terms() -> None:
    found = measured_cost(rows(), "latency")
    assert found.coefficients["1"] == pytest.approx(0.01, rel=0.15)
    assert found.coefficients["N*V"] == pytest.approx(2e-4, rel=0.05)
    assert found.typical_error < 0.03
    assert found.n == 24


def test_a_frontier_can_spend_measured_seconds() -> None:
    table = rows()
    found = measured_cost(table, "latency")
    point = frontier(fit(table, bootstrap=0, profile=False), cost=found.formula, budget=0.1)[0]
    best = point.continuous
    assert 1 < best["V"].value < 576
    v = np.geomspace(1, 576, 4000)
    c = found.coefficients
    n = (0.1 - c["1"] - c["V"] * v) / (c["N"] + c["N*V"] * v)
    assert best["V"].value == pytest.approx(v[np.argmin(0.6 * n**-0.2 * v**-0.08)], rel=0.01)


def test_too_few_rows_are_refused() -> None:
    with pytest.raises(UserError, match="3 usable rows for 4 terms"):
        measured_cost({k: a[:3] for k, a in rows().items()}, "latency")
