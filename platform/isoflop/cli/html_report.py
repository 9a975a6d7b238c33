"""``isoflop report``: a sweep as one HTML file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import pyarrow as pa

from isoflop.cli.common import emit, json_option, store_option
from isoflop.cli.laws import parse_map
from isoflop.core.errors import UserError
from isoflop.core.secrets import redacted
from isoflop.core.text import safe_line
from isoflop.dashboards.session import REPORT
from isoflop.laws.render import wrapped
from isoflop.sweep.api import own_tracking_uri
from isoflop.sweep.tables import open_source
from isoflop.track import Artifact


@click.command("report")
@click.argument("name", metavar="SWEEP_OR_FILE")
@store_option
@click.option(
    "--out", type=click.Path(dir_okay=False, path_type=Path), help="File to write (default: NAME-report.html, here)."
)
@click.option("--tracking-uri", metavar="URI", help="MLflow (default: the store's own); none for no tracking.")
@click.option("--y", default="error", show_default=True, metavar="COL", help="Of a file: its error, e.g. '1-score'.")
@click.option("--map", "mapping", metavar="method=COL,…", help="Of a file: names of its columns, as for frontier.")
@click.option("--baseline", metavar="METHOD", help="Of a file: the method that compresses nothing; default: none.")
@click.option("--separator", metavar="CHAR", help="Between the columns of a CSV file; default: a comma.")
@json_option
def report_command(
    name: str, store: str | None, out: Path | None, tracking_uri: str | None, as_json: bool, separator: str | None, **of_file: Any
) -> None:  # fmt: skip
    """Write a sweep's report, or that of a CSV, Parquet, Arrow or JSON file of results: one HTML file that works offline, can be sent and printed, and holds charts, tables,
    laws, failures and where every number comes from. It is logged to the sweep's parent run in MLflow, too.

    Run it again at any time, also while the sweep is running: it shows what the ledger holds.
    """
    from isoflop.dashboards.report import report_data, table_data
    from isoflop.dashboards.report.render import render

    opened = open_source(name, store, separator)
    if isinstance(opened, pa.Table):
        mapping = parse_map(of_file["mapping"])
        data = table_data(Path(name).stem, opened, name, of_file["y"], map=mapping, baseline=of_file["baseline"])
    else:
        if strange := next((k for k in ("y", "mapping", "baseline") if of_file[k] not in (None, "error")), None):
            raise UserError(f"--{strange.removesuffix('ping')} is for files: a sweep's rows have their names")
        data = report_data(opened)
    page = render(data)
    target = out or Path(f"{data['name']}-report.html")
    try:
        target.write_text(page, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--out {target}: {(error.strerror or str(error)).lower()}") from None
    run_id, problem = None, ""
    if not isinstance(opened, pa.Table):
        run_id, problem = _log(own_tracking_uri(opened.store) if tracking_uri is None else tracking_uri, name, page)

    def human() -> None:
        for clause in data["headline"]:
            click.echo("\n".join(wrapped(f"{clause}.", "", "  ")))
        for line in data["left_out"]:
            click.echo("\n".join(wrapped(f"left out: {line}", "", "  ")), err=True)
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
