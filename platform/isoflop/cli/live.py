"""Live progress of a sweep on a terminal; plain lines without one."""

from __future__ import annotations

import time

import click
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from isoflop.cli.common import duration
from isoflop.sweep.progress import Snapshot

_REFRESHES = 4.0  # a second
_PLAIN_SECONDS = 30.0
_MAX_WORKERS = 8
_STAYS = (  # in a line that is not only the latest event
    " failed", "lost:", "died", "SIG", "stopped at once", "MLflow", "budget:", "Ray is not up", "Ray's start", "no node of",
)  # fmt: skip


class LiveProgress:
    """A few lines that are redrawn in place, with the latest event below them."""

    def __init__(self, console: Console, name: str) -> None:
        self._console = console
        self._name = name
        self._last = ""
        # a thread draws: what runs in this very process, of the local executor, keeps this one busy
        self._live = Live(console=console, refresh_per_second=_REFRESHES, transient=True)

    def __enter__(self) -> LiveProgress:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def update(self, snapshot: Snapshot) -> None:
        """What is drawn from now on."""
        self._live.update(self._render(snapshot))

    def line(self, text: str) -> None:
        """Remember the latest event; failures stay on the screen."""
        self._last = text
        if any(word in text for word in _STAYS):
            self._live.console.print(Text(text, style="yellow", overflow="ellipsis", no_wrap=True))

    def _render(self, s: Snapshot) -> RenderableType:
        parts: list[RenderableType] = [Text.assemble((self._name, "bold"), "  ", counts(s), "  ", times(s))]
        if s.total:
            parts.append(
                ProgressBar(total=s.total, completed=min(s.done, s.total), width=min(self._console.width - 2, 60))
            )
        if s.best is not None:
            parts.append(Text(f"best so far {s.best[0]:.4f}  {s.best[1]}", overflow="ellipsis", no_wrap=True))
        workers = Table.grid(padding=(0, 1))
        for worker, what in list(s.doing.items())[:_MAX_WORKERS]:
            workers.add_row(Text(worker, style="dim"), Text(what, overflow="ellipsis", no_wrap=True))
        if len(s.doing) > _MAX_WORKERS:
            workers.add_row("", Text(f"… and {len(s.doing) - _MAX_WORKERS} more workers", style="dim"))
        parts.append(workers)
        if s.problem:
            parts.append(Text(s.problem, style="yellow", overflow="ellipsis", no_wrap=True))
        parts.append(Text(self._last, style="dim", overflow="ellipsis", no_wrap=True))
        return Group(*parts)


class PlainProgress:
    """One line per event and a count now and then: for logs and pipes."""

    def __init__(self) -> None:
        self._last = 0.0

    def __enter__(self) -> PlainProgress:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing to restore."""

    def update(self, snapshot: Snapshot) -> None:
        """Print the counts every half minute."""
        if time.monotonic() - self._last < _PLAIN_SECONDS:
            return
        if self._last:
            click.echo(f"{counts(snapshot)}; {times(snapshot)}", err=True)
        self._last = time.monotonic()

    def line(self, text: str) -> None:
        """Print an event."""
        click.echo(text, err=True)


def counts(s: Snapshot) -> str:
    """``12/32 jobs · 2 running · 1 failed``."""
    parts = [f"{s.done}/{s.total if s.total is not None else '?'} jobs"]
    parts += [f"{s.running} running"] if s.running or not s.stages_running else []
    waiting = s.stages_left - s.stages_running
    parts += [
        f"{n} {word}"
        for n, word in (
            (s.stages_running, "stage running" if s.stages_running == 1 else "stages running"),
            (waiting, "more to go" if s.stages_running else "stage to go" if waiting == 1 else "stages to go"),
            (s.failed, "failed"),
            (s.infeasible, "infeasible"),
            (s.pruned, "pruned"),
        )
        if n
    ]
    if s.cached:
        parts.append(f"{s.cached} from before")
    if s.draining:
        parts.append("draining")
    return " · ".join(parts)


def times(s: Snapshot) -> str:
    """Elapsed time and what is left."""
    left = f", about {duration(s.eta)} left" if s.eta is not None and (s.total is None or s.done < s.total) else ""
    behind = f", MLflow {s.backlog} behind" if s.backlog else ""
    return f"{duration(s.elapsed)}{left}{behind}"
