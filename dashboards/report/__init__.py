"""The sweep report: one self-contained HTML page with everything a sweep found, to read, print and send."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from isoflop.dashboards.report.charts import Json
    from isoflop.sweep.api import SweepResults
    from isoflop.sweep.results import Findings

__all__ = ["report_data", "report_html", "table_data"]


def report_data(sweep: SweepResults, findings: Findings | None = None) -> Json:
    """The report as plain JSON; see :func:`isoflop.dashboards.report.build.build`."""
    from isoflop.dashboards.report.build import build

    return build(sweep, findings)


def table_data(name: str, table: Any, source: str = "", y: str = "error", **names: Any) -> Json:
    """The report of a plain table of results as JSON; see :func:`isoflop.dashboards.report.build.build_table`.

    Args:
        name: of the report.
        table: an Arrow table, DataFrame or dict of columns; ``y`` and ``names`` (``map``, ``baseline``) as for :func:`isoflop.answers`.
        source: where it is from, for people.
    """
    from isoflop.dashboards.report.build import build_table
    from isoflop.laws.table import as_table
    from isoflop.sweep.outside import as_rows

    rows, notes = as_rows(as_table(table), y, **names)
    return build_table(name, rows, notes, source or "a table")


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
