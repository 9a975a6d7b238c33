"""``isoflop submit``: run a sweep on a cluster's head node through Ray's Jobs API."""

from __future__ import annotations

import secrets
import shlex
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlparse

import click

from isoflop.cli.common import emit, json_option
from isoflop.cli.run import find_spec
from isoflop.core.errors import UserError
from isoflop.core.knobs import path_knobs
from isoflop.core.secrets import has_secret
from isoflop.core.version import __version__
from isoflop.sweep.blocks import OWN_TEXT
from isoflop.sweep.spec import SweepSpec, load_spec
from isoflop.tasks.base import TASKS

if TYPE_CHECKING:
    from isoflop.execute.submit import ClusterJobs, JobState


@click.command("submit")
@click.argument("spec", type=click.Path(path_type=Path), metavar="[SWEEP.yaml]", required=False)
@click.option(
    "--address",
    metavar="URL",
    required=True,
    envvar="RAY_API_SERVER_ADDRESS",
    show_envvar=True,
    help="Dashboard of the head node: http://HEAD:8265.",
)
@click.option("--store", metavar="PATH|URI", help="As the cluster sees it (default: the sweep's, else the head's own).")
@click.option("--tracking-uri", metavar="URI", help="MLflow as the head sees it; none for no tracking.")
@click.option("--workers", type=click.IntRange(min=1), help="At most so many jobs at once.")
@click.option("--retry-failed", is_flag=True, help="Run the failed jobs again, and only what is missing.")
@click.option("--no-code", is_flag=True, help="The cluster has this version of isoflop installed: send only the sweep.")
@click.option("--python", default="python", show_default=True, help="Python on the head node.")
@click.option("--submission-id", metavar="ID", help="Name of the job (default: isoflop-NAME-RANDOM).")
@click.option(
    "--follow/--no-follow",
    default=True,
    show_default=True,
    help="Print the log until the end, and exit as the job did.",
)
@click.option("--status", "status_of", metavar="ID", help="Say how a submitted job stands, instead.")
@click.option("--stop", "stop_of", metavar="ID", help="Stop a submitted job, instead; finished results stay.")
@json_option
def submit_command(
    spec: Path | None, address: str, follow: bool, status_of: str | None, stop_of: str | None, as_json: bool, **options: Any
) -> int:  # fmt: skip
    """Run a sweep on a cluster: sends the YAML, the modules beside it that it imports, and isoflop itself to the head node,
    which then does `isoflop run SWEEP.yaml --ray-address auto`. The cluster has isoflop's dependencies (torch and so on).

    Exit code: 0 when it was submitted (--no-follow), else that of the job; 130 when somebody stopped it.
    """
    if sum(given is not None for given in (spec, status_of, stop_of)) != 1:
        raise UserError("submit needs one of SWEEP.yaml, --status ID and --stop ID")
    bundle = _read(spec, options["store"]) if spec is not None else None  # mistakes before connections
    from isoflop.execute.submit import ClusterJobs

    cluster = ClusterJobs(address)
    if bundle is None:
        state = cluster.state(status_of) if status_of is not None else cluster.stop(str(stop_of))
        return _report(cluster, state, as_json)
    job = _submit(cluster, *bundle, options)
    click.echo(f"submitted {job} to {cluster.address}", err=True)
    if not follow:
        return _report(cluster, cluster.state(job), as_json)
    try:
        state = cluster.follow(job, lambda text: click.echo(text, nl=False, err=as_json))
    except KeyboardInterrupt:
        where = f"--address {cluster.address}"
        click.echo(f"the job goes on; isoflop submit --status {job} {where}, or --stop {job} {where}", err=True)
        return 130
    _report(cluster, state, as_json)
    return {"SUCCEEDED": 0, "STOPPED": 130}.get(state.status, state.exit_code or 1)


def _read(given: Path, store: str | None) -> tuple[Path, SweepSpec]:
    """Check what can be checked here: the YAML's form. Names and models are looked up on the head, which has them."""
    path = find_spec(given)
    spec, _ = load_spec(path)
    chosen = store or spec.store
    if chosen is not None and not urlparse(chosen).scheme and not Path(chosen).is_absolute() and chosen[0] != "~":
        raise UserError(
            f"store {chosen!r} is relative, and would be lost with the job's temporary folder; "
            "give --store an absolute path or a URI that the head node can reach"
        )
    return path, spec


def _submit(cluster: ClusterJobs, path: Path, spec: SweepSpec, options: dict[str, Any]) -> str:
    from isoflop.execute.bundle import copy_package, copy_sweep

    with tempfile.TemporaryDirectory(prefix="isoflop-submit-") as scratch:
        folder = Path(scratch) / "sweep"
        elsewhere = copy_sweep(path, spec.imports, folder, _relative_paths(path.parent, spec))
        if elsewhere:
            click.echo(f"not beside {path.name}, so the cluster must have it: {', '.join(elsewhere)}", err=True)
        code = None if options["no_code"] else copy_package(Path(scratch))
        metadata = {"isoflop_sweep": spec.name, "isoflop_version": __version__}
        job_id = options["submission_id"] or f"isoflop-{spec.name}-{secrets.token_hex(4)}"
        return cluster.submit(_entrypoint(path.name, options), folder, code, job_id, metadata)


def _relative_paths(folder: Path, spec: SweepSpec) -> list[str]:
    """Data beside the YAML that its tasks and its calibration name: options that are paths, of tasks that are known here; of others, what is there."""
    found: list[str] = []
    for entry in spec.tasks:
        kind = entry.name.split(":")[0]
        paths = path_knobs(TASKS.get(kind)) if kind in TASKS.names() else None
        for option, value in entry.options.items():
            if (
                not isinstance(value, str)
                or not value
                or urlparse(value).scheme
                or Path(value).expanduser().is_absolute()
            ):
                continue
            if option in paths if paths is not None else (folder / value).exists():
                found.append(value)
    for text in spec.calibration or ():
        if text.data != OWN_TEXT and not urlparse(text.data).scheme and not Path(text.data).expanduser().is_absolute():
            found.append(text.data)
    return found


def _entrypoint(name: str, options: dict[str, Any]) -> str:
    for key, instead in (
        ("tracking_uri", "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD on the head node"),
        ("store", "give the head node its keys in the environment or in a file"),
    ):
        if has_secret(str(options[key])):
            raise UserError(f"--{key.replace('_', '-')} holds a password, which Ray's dashboard would show; {instead}")
    command = [options["python"], "-m", "isoflop", "run", name, "--ray-address", "auto"]
    for key in ("store", "tracking_uri", "workers"):
        if options[key] is not None:
            command += [f"--{key.replace('_', '-')}", str(options[key])]
    if options["retry_failed"]:
        command.append("--retry-failed")
    return shlex.join(command)


def _report(cluster: ClusterJobs, state: JobState, as_json: bool) -> int:
    def human() -> None:
        message = f": {' '.join(state.message.split())}" if state.message and state.status != "SUCCEEDED" else ""
        click.echo(f"{state.id} {state.status.lower()}{message}", err=True)

    emit({"address": cluster.address, **asdict(state)}, as_json, human)
    return 0
