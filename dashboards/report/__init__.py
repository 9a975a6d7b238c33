"""The sweep report: one self-contained HTML page with everything a sweep found, to read, print and send."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from isoflop.dashboards.report.charts import Json
    from isoflop.sweep.api import SweepResults
    from isoflop.sweep.results import Findings

__all__ = ["report_data", "report_html"]


def report_data(sweep: SweepResults, findings: Findings | None = None) -> Json:
    """The report as plain JSON; see :func:`isoflop.dashboards.report.build.build`."""
    from isoflop.dashboards.report.build import build

    return build(sweep, findings)


def report_html(sweep: SweepResults, findings: Findings | None = None) -> str:
    """The report of an opened sweep as one HTML file of less than 5 MB that needs no network.

    Args:
        sweep: from :func:`isoflop.open` or :func:`isoflop.run`.
        findings: its laws and frontiers, when they are at hand; fitted anew otherwise.

    Raises:
        UserError: the sweep has no rows yet.
    """
    from isoflop.dashboards.report.render import render

    return render(report_data(sweep, findings))
