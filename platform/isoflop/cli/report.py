"""What ``run`` and ``show`` print of a sweep: the grid of results, laws, frontiers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pyarrow as pa
from rich.console import Console
from rich.text import Text

from isoflop.cli.common import grid, show
from isoflop.sweep.api import SweepResults
from isoflop.sweep.note import frontier_rows, frontier_title
from isoflop.sweep.results import Findings, usable

if TYPE_CHECKING:
    from isoflop.frontier.result import Frontier

_MAX_COLUMNS = 8


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
    right = [h for h in heads if h != "best at hand"]
    out.print(grid(heads, rows, right=right, title=frontier_title(frontier)))
    for note in notes:
        out.print(Text(note, style="dim"))


def print_errors(out: Console, table: pa.Table, task: str) -> None:
    """Mean error per model (rows) and method at V tokens (columns), ± the standard error over examples and repeats."""
    cells: dict[tuple[str, int | None], dict[tuple[str, float | None], list[tuple[float, float]]]] = {}
    columns: dict[tuple[str, float | None], None] = {}
    for row in table.select(["task", "model", "N", "method", "V", "error", "error_se"]).to_pylist():
        if row["task"] != task:
            continue
        column = (row["method"], row["V"])
        columns[column] = None
        cells.setdefault((row["model"], row["N"]), {}).setdefault(column, []).append(
            (row["error"], row["error_se"] or 0.0)
        )
    if not cells:
        return
    ordered = sorted(columns, key=lambda c: (c[0], c[1] or 0.0))
    methods = {m for m, _ in ordered}
    shown = ordered[:_MAX_COLUMNS]
    heads = [f"V={show(v)}" if len(methods) == 1 else f"{m} {show(v)}" for m, v in shown]
    rows = []
    for (model, size), line in sorted(cells.items(), key=lambda item: (item[0][1] or 0, item[0][0])):
        values = [_cell(line.get(c, [])) for c in shown]
        rows.append((model, size, *values))
    title = f"{task}: error" + (f" of {next(iter(methods))}" if len(methods) == 1 else " by method and V")
    out.print(grid(("model", "N", *heads), rows, right=("N", *heads), title=title))
    if len(ordered) > len(shown):
        out.print(
            Text(
                f"… and {len(ordered) - len(shown)} more columns: isoflop show {table['sweep'][0].as_py()} --rows",
                style="dim",
            )
        )
    out.print()


def _cell(values: list[tuple[float, float]]) -> str:
    if not values:
        return "-"
    mean = sum(v for v, _ in values) / len(values)
    return f"{mean:.3f}"
