"""``isoflop.run``: a sweep from Python, with its figures in MLflow as the command line puts them there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from isoflop.sweep import api
from isoflop.sweep.note import Conclusion
from isoflop.track import Artifact

if TYPE_CHECKING:
    from isoflop.sweep.progress import Progress
    from isoflop.sweep.results import Findings


REPORT = "report.html"  # beside a sweep's results, and in its run in MLflow


def run(
    given: str | Path | Mapping[str, Any], progress: Progress | None = None, report: bool = False, **options: Any
) -> api.SweepResults:
    """Run a sweep, or what is missing of it, and return its results.

    Args:
        given: path of a YAML file, or the same content as a dict.
        progress: told what happens; quiet by default.
        report: write the report at the end (HTML), as the command line does; the result's ``conclusion`` says where.
        options: fields of :class:`isoflop.sweep.api.RunOptions`.

    Raises:
        UserError: the spec, an option or the environment is wrong; says what to mend.
    """
    return api.run(given, progress, draw, conclude if report else None, **options)


def conclude(opened: api.SweepResults) -> Conclusion:
    """The report of a session that has just ended, written beside the sweep's results and ready for its run in MLflow."""
    from isoflop.dashboards.report import report_data
    from isoflop.dashboards.report.render import render

    data = report_data(opened, opened.findings_of_run)
    page = render(data)
    path = opened.store.path("sweeps", opened.name, REPORT)
    opened.store.write(path, page.encode())
    return Conclusion(tuple(data["headline"]), (Artifact(REPORT, page),), path)


def draw(findings: Findings) -> Sequence[Artifact]:
    """The figures of a session that has just ended, for its run in MLflow; Plotly is loaded here and not before."""
    from isoflop.dashboards.plots import artifacts

    return artifacts(findings)
