"""What ``run`` and ``show`` print of a sweep: the grid of results, laws, frontiers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from rich.console import Console
from rich.text import Text

from isoflop.cli.common import grid, show
from isoflop.sweep.api import SweepResults
from isoflop.sweep.note import frontier_rows, frontier_title
from isoflop.sweep.results import Findings, usable

if TYPE_CHECKING:
    from isoflop.frontier.result import Frontier

_MAX_COLUMNS, _MAX_ROWS = 8, 60
Model = tuple[str, int | None]
Setting = tuple[str, float | None, str]  # method, number to sort by, number with its unit


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
    """Mean error per model and setting (a method at V tokens, or else at a ratio or bits), over repeats and other knobs.

    A row per model where the settings fit beside each other, else a row per setting.
    """
    errors = _errors(table, task)
    if not errors:
        return
    models = sorted({model for model, _ in errors}, key=lambda m: (m[1] or 0, m[0]))
    settings = sorted({setting for _, setting in errors}, key=lambda s: (s[0], s[1] or 0.0))
    methods = {method for method, _, _ in settings}
    title = f"{task}: error" + (f" of {next(iter(methods))}" if len(methods) == 1 else "")
    heads = [label if len(methods) == 1 else f"{method} {label}".strip() for method, _, label in settings]
    rows = [(m, n, *(_mean(errors.get(((m, n), s))) for s in settings)) for m, n in models]
    shown = grid(("model", "N", *heads), rows, right=("N", *heads), title=title)
    left = 0
    if len(settings) > _MAX_COLUMNS or out.measure(shown).maximum > out.width:
        names = [f"{m} (N {show(n)})" if n else m for m, n in models]
        rows = [(s[0], s[2], *(_mean(errors.get((m, s))) for m in models)) for s in settings[:_MAX_ROWS]]
        shown, left = grid(("method", "at", *names), rows, right=names, title=title), len(settings) - len(rows)
    out.print(shown)
    if left:
        name = table["sweep"][0].as_py()
        out.print(Text(f"… and {left} more settings: isoflop show {name} --rows", style="dim"))
    out.print()


def _errors(table: pa.Table, task: str) -> dict[tuple[Model, Setting], list[float]]:
    found: dict[tuple[Model, Setting], list[float]] = {}
    for row in table.select(["task", "model", "N", "method", "V", "ratio", "bits", "error"]).to_pylist():
        if row["task"] == task:
            found.setdefault(((row["model"], row["N"]), _setting(row)), []).append(row["error"])
    return found


def _setting(row: Mapping[str, Any]) -> Setting:
    """What tells how much is compressed: visual tokens where there are any, else the ratio, else the bits."""
    for column, text in (("V", "V={:g}"), ("ratio", "{:.3g} ×"), ("bits", "{:.3g} bits")):
        if row[column] is not None and not (column == "V" and row["V"] == 0):
            value = float(f"{row[column]:.3g}")
            return row["method"], value, text.format(value)
    return row["method"], None, ""


def _mean(values: Sequence[float] | None) -> str:
    return f"{sum(values) / len(values):.3f}" if values else "-"
