"""Addresses inside MLflow for the description of a run.

Whoever writes a description does not know the run's id. It writes ``[report](artifact:report.html)`` for a file of the
run, ``[jobs](runs:jobs)`` for a view of the runs table (:mod:`isoflop.track.views`) and ``[run](run:)`` for the run; all become addresses relative to the server, so that they work on
whichever host and port the store is shown.
"""

from __future__ import annotations

import re
from urllib.parse import quote

MOST = 8000  # characters of a tag that MLflow keeps; the rest it would cut silently
_TARGET = re.compile(r"\]\((artifact|runs|run):([^()\s]*)\)")


def with_addresses(note: str, experiment_id: str, run_id: str) -> str:
    """``note`` with ``artifact:PATH``, ``runs:VIEW`` and ``run:`` replaced by addresses, at most as long as MLflow keeps it."""

    def address(found: re.Match[str]) -> str:
        kind, name = found.groups()
        if kind == "artifact":
            return f"]({run_artifact(experiment_id, run_id, name)})"
        return f"]({runs_view(experiment_id, name) if kind == 'runs' else run_page(experiment_id, run_id)})"

    return _TARGET.sub(address, note)[:MOST]


def run_page(experiment_id: str, run_id: str) -> str:
    """The page of a run."""
    return f"#/experiments/{experiment_id}/runs/{run_id}"


def run_artifact(experiment_id: str, run_id: str, path: str) -> str:
    """The page that shows a file of a run."""
    return f"{run_page(experiment_id, run_id)}/artifacts/{quote(path)}"


def runs_view(experiment_id: str, view: str) -> str:
    """The runs table as a view shows it."""
    return f"#/experiments/{experiment_id}/runs?viewStateShareKey={quote(view)}"
