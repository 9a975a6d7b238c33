"""``isoflop.run``: a sweep from Python, with its figures in MLflow as the command line puts them there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from isoflop.sweep import api

if TYPE_CHECKING:
    from isoflop.sweep.progress import Progress
    from isoflop.sweep.results import Findings
    from isoflop.track import Artifact


def run(given: str | Path | Mapping[str, Any], progress: Progress | None = None, **options: Any) -> api.SweepResults:
    """Run a sweep, or what is missing of it, and return its results.

    Args:
        given: path of a YAML file, or the same content as a dict.
        progress: told what happens; quiet by default.
        options: fields of :class:`isoflop.sweep.api.RunOptions`.

    Raises:
        UserError: the spec, an option or the environment is wrong; says what to mend.
    """
    return api.run(given, progress, draw=draw, **options)


def draw(findings: Findings) -> Sequence[Artifact]:
    """The figures of a session that has just ended, for its run in MLflow; Plotly is loaded here and not before."""
    from isoflop.dashboards.plots import artifacts

    return artifacts(findings)
