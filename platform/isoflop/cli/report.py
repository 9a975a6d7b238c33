"""What ``run`` and ``show`` print of a sweep: the grid of results, laws, frontiers, or what the rows answer without a law."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from isoflop.cli.common import grid
from isoflop.cli.error_table import print_errors
from isoflop.sweep.api import SweepResults
from isoflop.sweep.asking import OR, WORDS, best_at_shares
from isoflop.sweep.note import frontier_rows, frontier_title
from isoflop.sweep.results import Findings, usable

if TYPE_CHECKING:
    from isoflop.frontier.answers import Answers
    from isoflop.frontier.result import Frontier

SHARES = (0.5, 0.125)
"""Of the uncompressed cost: what is best at them is told where a sweep asks for nothing."""


def measured_frontier(opened: SweepResults) -> Answers | None:
    """What is best at shares of the uncompressed cost, by the rows alone; None where the YAML asks for laws or frontiers, and
    where nothing is compressed, or nothing is there to compare it with."""
    if opened.spec.laws or opened.spec.frontiers:
        return None
    table = usable(opened.results())
    return best_at_shares(table, SHARES) if table.num_rows else None


def to_ask(name: str, found: Answers) -> str:
    """The command whose answers these are, or with several things that are compressed, those of the first."""
    kinds = found.cost.split(OR)
    costs = [cost for cost, (words, _) in WORDS.items() if words == kinds[0]] if len(kinds) > 1 else []
    return f"frontier {name} --share {SHARES[0]:g}" + (f" --cost {costs[0]}" if costs else "")


def print_measured(out: Console, opened: SweepResults, found: Answers) -> None:
    """The answers, and why there is no law."""
    sizes = len(set(usable(opened.results())["N"].to_pylist()))
    why = "one model size: no law can be fitted" if sizes == 1 else "the YAML asks for no law"
    out.print(Text(f"{why}. Measured, at shares of what is compressed:"))
    out.print(Text(str(found)))
    out.print()


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
