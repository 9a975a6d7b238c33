"""What ``run`` and ``show`` print of a sweep: the grid of results, laws, frontiers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from isoflop.cli.common import grid
from isoflop.cli.error_table import print_errors
from isoflop.sweep.api import SweepResults
from isoflop.sweep.note import frontier_rows, frontier_title
from isoflop.sweep.results import Findings, usable

if TYPE_CHECKING:
    from isoflop.frontier.result import Frontier


def print_report(out: Console, opened: SweepResults, findings: Findings) -> None:
    """Print the errors by size and tokens, the laws, and the frontiers."""
    table = usable(opened.results())
    for task in dict.fromkeys(table["task"].to_pylist()):
        print_errors(out, table, task)
    for law in findings.laws:
        if law.problem:
            out.print(Text(f"law {law.block.law}: {law.problem}", style="yellow"))
        for fit in law.fits:
            out.print(Text(str(fit)))
            out.print()
    for found in findings.frontiers:
        if found.problem:
            out.print(Text(f"frontier: {found.problem}", style="yellow"))
        for frontier in found.frontiers:
            print_frontier(out, frontier)
            out.print()


def print_frontier(out: Console, frontier: Frontier) -> None:
    """One line per budget."""
    heads, rows, notes = frontier_rows(frontier)
    right = [h for h in heads if h != "at hand"]
    out.print(grid(heads, rows, right=right, title=frontier_title(frontier)))
    for note in notes:
        out.print(Text(note, style="dim"))
