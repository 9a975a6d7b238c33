"""``isoflop ui``: the real MLflow server over a store."""

from __future__ import annotations

import os
import socket
import sys

import click

from isoflop.cli.common import store_option
from isoflop.core.errors import UserError
from isoflop.ledger import Store
from isoflop.sweep.api import own_tracking_uri
from isoflop.track.database import prepare

_ENVIRONMENT = {
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # it would start eight more processes that nothing here uses
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "PYTHONWARNINGS": "ignore:starlette.middleware.wsgi is deprecated",  # nothing that a user of MLflow could mend
}


@click.command("ui")
@store_option
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    help="Address to bind; anything but loopback shows your runs to the network.",
)
@click.option("--port", default=5000, show_default=True, type=click.IntRange(0, 65535), help="0 picks a free one.")
@click.option("--tracking-uri", help="Another MLflow database than the store's own.")
def ui_command(store: str | None, host: str, port: int, tracking_uri: str | None) -> None:
    """Start MLflow over a store, on 127.0.0.1. Ends with Ctrl-C."""
    opened = Store.open(store)
    uri = tracking_uri or own_tracking_uri(opened)
    if uri is None:
        raise UserError(f"store {opened.shown} holds no MLflow database; give --tracking-uri")
    if tracking_uri is None and opened.local is not None and not (opened.local / "mlflow.db").is_file():
        raise UserError(
            f"store {opened.shown} holds no MLflow database yet; run a sweep first, or name another --store"
        )
    prepare(uri)  # one that somebody was killed over would keep the server from starting
    chosen = _free_port(host, port)
    environment = {**os.environ, **_ENVIRONMENT}
    click.echo(f"MLflow over {opened.shown}: http://{host}:{chosen} in some ten seconds  (Ctrl-C ends it)", err=True)
    arguments = [
        sys.executable,
        "-m",
        "mlflow",
        "server",
        "--backend-store-uri",
        uri,
        "--registry-store-uri",  # named, or MLflow says that it is not
        uri,
        "--host",
        host,
        "--port",
        str(chosen),
        "--workers",
        "1",
        "--uvicorn-opts",
        "--log-level warning",  # not a line per request
    ]
    if opened.local is not None:
        arguments += ["--default-artifact-root", f"file://{opened.local / 'mlartifacts'}"]
    os.execve(sys.executable, arguments, environment)


def _free_port(host: str, port: int) -> int:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise UserError(
                f"--port {port}: {error.strerror.lower() if error.strerror else error}; give another, or 0 for any free one"
            ) from None
        return int(probe.getsockname()[1])
