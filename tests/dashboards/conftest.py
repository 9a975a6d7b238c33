"""Reports that several test files look at, built once."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from report_sweeps import failed_sweep, law_sweep, methods_sweep, objectives_sweep

from isoflop.dashboards.report import report_data
from isoflop.dashboards.report.charts import Json
from isoflop.dashboards.report.render import render
from isoflop.sweep.api import SweepResults


@dataclass(frozen=True)
class Reported:
    """A sweep, its report as JSON, and as a page."""

    sweep: SweepResults
    data: Json
    page: str

    def section(self, key: str) -> Json:
        """A section by id."""
        found: Json = next(s for s in self.data["sections"] if s["id"] == key)
        return found


def _reported(sweep: SweepResults) -> Reported:
    data = report_data(sweep)
    return Reported(sweep, data, render(data))


@pytest.fixture(scope="session")
def lawful(tmp_path_factory: pytest.TempPathFactory) -> Reported:
    """A sweep with a law and a frontier."""
    return _reported(law_sweep(tmp_path_factory.mktemp("lawful")))


@pytest.fixture(scope="session")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Reported:
    """A sweep of several methods, without a law, with one failure."""
    return _reported(methods_sweep(tmp_path_factory.mktemp("compared")))


@pytest.fixture(scope="session")
def failed(tmp_path_factory: pytest.TempPathFactory) -> Reported:
    """A sweep of which nothing succeeded."""
    return _reported(failed_sweep(tmp_path_factory.mktemp("failed")))


@pytest.fixture(scope="session")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Reported:
    """A sweep with two objectives."""
    return _reported(objectives_sweep(tmp_path_factory.mktemp("searched")))
