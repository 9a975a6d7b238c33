"""``isoflop export``: what was measured, as a checkpoint."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from isoflop.cli.common import emit, json_option, store_option
from isoflop.core.errors import unknown
from isoflop.sweep.api import open_sweep
from isoflop.sweep.exporting import DENSE, FORMATS, export


@click.command("export")
@click.argument("sweep", metavar="SWEEP")
@click.argument("job", metavar="JOB")
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option(
    "--format", "form", default=DENSE, show_default=True, metavar="FORMAT",
    help="dense: safetensors with every weight as it is served. compressed-tensors: codes and scales of integer grids.",
)  # fmt: skip
@click.option(
    "--cache-dir", metavar="PATH", type=click.Path(path_type=Path), help="Of stages (default: ~/.cache/isoflop)."
)
@store_option
@json_option
def export_command(
    sweep: str, job: str, folder: Path, form: str, cache_dir: Path | None, store: str | None, as_json: bool
) -> None:
    """Write the compressed model of a finished job as a checkpoint: DIR, which must be new or empty, gets config, weights,
    tokenizer and a README with the measured error, bytes, and how it was made.

    JOB is the beginning of a job's id (isoflop show SWEEP --json lists them). In a sweep, hf:DIR has the scores that were measured.
    """
    if form not in FORMATS:
        raise unknown("format", form, FORMATS)
    done = export(open_sweep(sweep, store), job, folder, form, cache_dir)

    def human() -> None:
        click.echo(f"wrote {done.folder}: {done.model} with {done.method}, {done.format}, {done.bytes / 1e6:.1f} MB")
        if done.unchecked:
            click.echo(f"not run beside what was measured: {done.unchecked}", err=True)

    emit(asdict(done), as_json, human)
