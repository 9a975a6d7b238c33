"""What a law search may claim: nothing of too few rows, one side of an optimum on the end of its range, and no check outside unsaid."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.distributions import FloatDistribution, IntDistribution
from scipy import stats

from isoflop.search.law import Exponents, Frontier, LawSampler, OptimalAllocation, PredictionAt, Target
from isoflop.search.law.policy import NO_WIDTH
from isoflop.search.law.report import Report
from isoflop.search.law.strategy import describe

AXES = {"N": "n", "V": "v"}
COST = "2*N*(50+V)"
SPACE = {"n": FloatDistribution(1e7, 1.28e9, log=True), "v": IntDistribution(1, 512, log=True)}


def told(
    target: Target, rows: int, beta: float = 0.1, check: float | None = None, seed: int = 0, **options: Any
) -> tuple[LawSampler, optuna.Study]:
    """A search with so many rows of a product law; ``check``: what its check is made to give, relative to the truth."""
    rng = np.random.default_rng(seed)
    sampler = LawSampler(AXES, target, space=SPACE, cost=COST, seed=seed, **options)
    study = optuna.create_study(sampler=sampler)
    for _ in range(rows):
        trial = study.ask()
        n, v = (trial.suggest_float("n", 1e7, 1.28e9, log=True), trial.suggest_int("v", 1, 512, log=True))
        value = 0.08 + 0.6 * (n / 1e7) ** -0.25 * v**-beta + 0.004 * rng.standard_normal()
        if check is not None and study.trials[-1].system_attrs["law:role"] == "check":
            value *= check
        study.tell(trial, float(value))
    return sampler, study


def lines(report: Report) -> list[str]:
    return describe({**report.to_dict(), "steps": []})


TARGETS = [
    OptimalAllocation(budget=5e9, width=10.0),
    OptimalAllocation(budget=5e9, of="N", width=10.0),
    Frontier(low=5e9, high=2e11, width=10.0),
    PredictionAt(at={"N": 1e9, "V": 64}, width=10.0),
    Exponents(width=10.0),
]


@pytest.mark.parametrize("target", TARGETS, ids=lambda t: f"{t.kind} {getattr(t, 'of', '')}")
@pytest.mark.parametrize("rows", range(1, 8))
def test_fewer_rows_than_parameters_and_two_know_nothing(target: Target, rows: int) -> None:
    """However wide the width that was asked for."""
    sampler, study = told(target, rows)
    report = sampler.report(study)
    least = 4 + 2
    assert (report.quantities != []) == (rows >= least)
    assert math.isinf(report.half_width) == (rows < least)
    if rows >= least:
        return
    assert report.stop is None
    assert f"{rows} rows tell nothing of a law of 4 parameters: it takes {least}" in report.verdict
    assert not any("=" in line or "≥" in line for line in lines(report))
    assert all(m.rows >= least for m in sampler.steps(study))


def test_an_untested_form_is_not_believed_however_narrow() -> None:
    sampler, study = told(OptimalAllocation(budget=5e9, width=10.0), 6)
    report = sampler.report(study)
    if not sampler._planner.belief.lack_of_fit.tested:
        assert report.stop is None
        assert "too few rows to test its fit, so that no width is believed" in report.verdict
    sampler, study = told(OptimalAllocation(budget=5e9, width=10.0), 40)
    assert (sampler.report(study).stop or "").startswith("known: half-width")


@pytest.mark.parametrize(("beta", "end"), [(0.9, "high"), (0.001, "low")])
@pytest.mark.parametrize("of", ["V", "N"])
def test_an_optimum_on_the_end_of_its_range_is_one_sided_knowledge(beta: float, end: str, of: str) -> None:
    sampler, study = told(OptimalAllocation(budget=5e9, of=of, width=0.1), 40, beta)
    report = sampler.report(study)
    (quantity,) = report.quantities
    wanted = end if of == "V" else {"high": "low", "low": "high"}[end]  # more tokens leave less for the model
    assert quantity.end == wanted
    first = lines(report)[0]
    assert ("≥" if wanted == "high" else "≤") in first
    assert "one-sided" in first
    assert " = " not in first
    assert str(report).splitlines()[0] == first
    if math.log(quantity.high / quantity.low) < NO_WIDTH:
        assert math.isinf(report.half_width)
        assert report.stop is not None
        assert "on the end of its range or beyond" in report.stop
    assert report.half_width != 0


def test_an_optimum_inside_has_two_sides() -> None:
    sampler, study = told(OptimalAllocation(budget=5e9, width=0.01), 60)
    report = sampler.report(study)
    assert report.quantities[0].end == ""
    assert " = " in lines(report)[0]
    assert "95 % [" in lines(report)[0]


@pytest.mark.parametrize(("off", "outside"), [(1.0, False), (0.8, True), (0.95, None), (1.3, True)])
def test_a_check_outside_its_interval_is_said_to_be(off: float, outside: bool | None) -> None:
    """The interval that is shown is the one that is judged by."""
    sampler, study = told(OptimalAllocation(budget=5e9), 30, check=off, budget=4e11)
    report = sampler.report(study)
    check = report.check
    assert check is not None
    assert check.outside == (abs(check.observed - check.predicted) > check.half)
    assert outside is None or check.outside == outside
    assert check.outside == (check.p < 0.05)
    assert check.half == pytest.approx(
        check.sd * stats.t.ppf(0.975, max(2.0, sampler._planner.belief.noise.dof)), rel=1e-6
    )
    line = next(text for text in lines(report) if text.startswith("check at"))
    assert line.endswith("outside") == check.outside
    assert "never fitted" not in line
    assert "outside" in report.verdict or not report.fits or not check.outside
