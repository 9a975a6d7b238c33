"""``isoflop report``: a sweep as one HTML file."""

from __future__ import annotations

from pathlib import Path

import click

from isoflop.cli.common import emit, json_option, store_option
from isoflop.core.errors import UserError
from isoflop.core.secrets import redacted
from isoflop.core.text import safe_line
from isoflop.dashboards.session import REPORT
from isoflop.sweep.api import open_sweep, own_tracking_uri
from isoflop.track import Artifact


@click.command("report")
@click.argument("name")
@store_option
@click.option(
    "--out", type=click.Path(dir_okay=False, path_type=Path), help="File to write (default: NAME-report.html, here)."
)
@click.option("--tracking-uri", metavar="URI", help="MLflow (default: the store's own); none for no tracking.")
@json_option
def report_command(name: str, store: str | None, out: Path | None, tracking_uri: str | None, as_json: bool) -> None:
    """Write a sweep's report: one HTML file that works offline, can be sent and printed, and holds charts, tables,
    laws, failures and where every number comes from. It is logged to the sweep's parent run in MLflow, too.

    Run it again at any time, also while the sweep is running: it shows what the ledger holds.
    """
    from isoflop.dashboards.report import report_data
    from isoflop.dashboards.report.render import render

    opened = open_sweep(name, store)
    data = report_data(opened)
    page = render(data)
    target = out or Path(f"{name}-report.html")
    try:
        target.write_text(page, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--out {target}: {(error.strerror or str(error)).lower()}") from None
    run_id, problem = _log(own_tracking_uri(opened.store) if tracking_uri is None else tracking_uri, name, page)

    def human() -> None:
        click.echo("; ".join(data["headline"]) + ".")
        for line in data["left_out"]:
            click.echo(f"left out: {line}", err=True)
        click.echo(f"wrote {target} ({len(page.encode()) / 1e6:.1f} MB)")
        if run_id:
            click.echo(f"MLflow shows it in the run 'sweep {name}', under Artifacts, as {REPORT}")
        elif problem:
            click.echo(f"not logged to MLflow: {problem}", err=True)

    emit(
        {
            "sweep": name,
            "path": str(target),
            "bytes": len(page.encode()),
            "headline": data["headline"],
            "sections": [s["id"] for s in data["sections"]],
            "left_out": data["left_out"],
            "mlflow_run_id": run_id,
            "mlflow_problem": problem or None,
        },
        as_json,
        human,
    )


def _log(uri: str | None, name: str, page: str) -> tuple[str | None, str]:
    """The parent run's id and why there is none. A report is written whether MLflow answers or not."""
    if uri == "none":
        return None, ""
    if uri is None:
        return None, "the store is not on this host; give --tracking-uri"
    from isoflop.track.attach import attach

    try:
        run_id = attach(uri, name, [Artifact(REPORT, page)])
    except Exception as error:  # of a server: anything can come back
        return None, safe_line(error, 200)
    return run_id, "" if run_id else f"{redacted(uri)} has no run of sweep {name!r}"
