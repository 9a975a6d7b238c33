"""``isoflop ls`` and ``isoflop show``."""

from __future__ import annotations

import textwrap
from collections import Counter
from typing import Any

import click
import pyarrow as pa
from rich.console import Console
from rich.text import Text

from isoflop.cli.common import console, duration, emit, grid, json_option, show, store_option
from isoflop.cli.report import measured_frontier, print_measured, print_report
from isoflop.ledger import Ledger, Store
from isoflop.sweep.api import open_sweep
from isoflop.sweep.compression import COLUMNS as COMPRESSION_COLUMNS
from isoflop.sweep.compression import compression, definitions
from isoflop.sweep.titles import knobs_title

_STATUSES = ("ok", "failed", "infeasible", "pruned")
_COLUMNS = (
    "model",
    "method",
    "knobs",
    "task",
    "repeat",
    "status",
    "N",
    "V",
    "Q",
    "ratio",
    "bits",
    "error",
    "error_se",
    "flops",
    "seconds",
)

_NARROW = ("model", "method", "knobs", "task", "status", "V", "error", "error_se")

_NARROWEST = ("model", "method", "knobs", "task", "status", "error")
_NUMBERS = ("N", "V", "Q", "ratio", "bits", "error", "error_se", "flops", "seconds", "repeat")


@click.command("ls")
@store_option
@json_option
def ls_command(store: str | None, as_json: bool) -> None:
    """List the sweeps of a store."""
    opened = Store.open(store)
    data = []
    for name in opened.sweeps():
        table = Ledger(opened, name).read(["job_id", "status", "finished"])
        counts = Counter(table["status"].to_pylist())
        finished = [t for t in table["finished"].to_pylist() if t is not None]
        data.append(
            {
                "name": name,
                "jobs": table.num_rows,
                **{s: counts.get(s, 0) for s in _STATUSES},
                "last": max(finished) if finished else None,
            }
        )

    def human() -> None:
        out = console()
        if not data:
            out.print(Text(f"no sweeps in {opened.shown} yet; begin with: isoflop run SWEEP.yaml"))
            return
        rows = [
            (d["name"], d["jobs"], *(d[s] for s in _STATUSES), f"{d['last']:%Y-%m-%d %H:%M}" if d["last"] else "-")
            for d in data
        ]
        out.print(grid(("sweep", "jobs", *_STATUSES, "last result (UTC)"), rows, right=("jobs", *_STATUSES)))

    emit({"store": opened.shown, "sweeps": data}, as_json, human)


@click.command("show")
@click.argument("name")
@store_option
@click.option("--rows", is_flag=True, help="One line per job.")
@click.option("--failed", is_flag=True, help="Only jobs that failed or were infeasible, with their errors.")
@json_option
def show_command(name: str, store: str | None, rows: bool, failed: bool, as_json: bool) -> None:
    """Show a sweep: counts, results, failures, laws and frontiers."""
    opened = open_sweep(name, store)
    table = opened.results()
    counts = Counter(table["status"].to_pylist())
    bad = [
        r
        for r in table.select(
            ["job_id", "model", "method", "knobs", "task", "repeat", "status", "error_type", "error_text"]
        ).to_pylist()
        if r["status"] in ("failed", "infeasible")
    ]
    stale = opened.results(["job_id"], everything=True).num_rows - table.num_rows
    findings = None if rows or failed else opened.findings()
    measured = None if findings is None else measured_frontier(opened)
    searched = opened.search_findings()
    data: dict[str, Any] = {
        "name": name,
        "store": opened.store.shown,
        "counts": {s: counts.get(s, 0) for s in _STATUSES},
        "workers": _placement(table),
        "stale_rows": stale,
        "failures": bad,
        "rows": _rows(table) if rows else None,
        **(findings.to_dict() if findings is not None else {}),
        **({"answers": measured.to_dict()["answers"]} if measured is not None else {}),
        **({f"{opened.spec.search.sampler}_search": searched} if searched is not None else {}),
    }

    def human() -> None:
        out = console()
        if rows:
            _print_rows(out, table)
            return
        if failed:
            _print_failures(bad)
            if not bad:
                out.print(Text(f"no job of {name} failed; {counts['ok']} ok"))
            return
        assert findings is not None
        print_report(out, opened, findings)
        if measured is not None:
            print_measured(out, opened, measured)
        for line in opened.search_lines():
            out.print(Text(line))
        _print_placement(table)
        out.print(
            f"[bold]{name}[/bold]: "
            + ", ".join(f"{counts[s]} {s}" for s in _STATUSES if counts.get(s))
            + f"; store {opened.store.shown}"
        )
        if stale:
            out.print(
                Text(
                    f"{stale} rows are of an earlier version of the YAML or of a model, method or task, and are left out",
                    style="yellow",
                )
            )
        _print_failures(bad[:5])
        if len(bad) > 5:
            out.print(f"… and {len(bad) - 5} more: isoflop show {name} --failed")

    emit(data, as_json, human)


def _print_rows(out: Console, table: pa.Table) -> None:
    """A line per job in the most columns that fit; where even few do not, a paragraph per job. No word is broken."""
    rows = table.select(list(dict.fromkeys((*_COLUMNS, *COMPRESSION_COLUMNS)))).to_pylist()
    found = [compression(row) for row in rows]
    cells = [
        {c: show(row[c]) for c in _COLUMNS}
        | {"knobs": knobs_title(row["knobs"]), "ratio": "-" if one is None else f"{one.times:.3g} ×"}
        for row, one in zip(rows, found, strict=True)
    ]
    for columns in (_COLUMNS, _NARROW, _NARROWEST):
        shown = grid(columns, [[cell[c] for c in columns] for cell in cells], right=_NUMBERS)
        if out.measure(shown, options=out.options.update(width=10_000)).maximum <= out.width:
            out.print(shown)
            break
    else:
        columns = _COLUMNS
        for cell in cells:
            out.print(Text(_paragraph(cell, out.width)), soft_wrap=True)
    if "ratio" in columns and any(one is not None for one in found):
        meaning = definitions((row["method"], one) for row, one in zip(rows, found, strict=True))
        out.print(Text(f"ratio: uncompressed over compressed, {meaning}", style="dim"))


def _paragraph(cell: dict[str, str], width: int) -> str:
    """A job in words: what it is, then its numbers."""
    names = [cell["model"], cell["method"], cell["knobs"], cell["task"], f"repeat {cell['repeat']}", cell["status"]]
    numbers = [f"{c} {cell[c]}" for c in _NUMBERS if c != "repeat" and cell[c] != "-"]
    text = " ".join([n for n in names if n]) + (": " + ", ".join(numbers) if numbers else "")
    return textwrap.fill(text, width, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False)


def _rows(table: pa.Table) -> list[dict[str, Any]]:
    """The rows for a program; ``compression`` is what tables and reports show as the ratio."""
    found = []
    for row in table.select(["job_id", *dict.fromkeys((*_COLUMNS, *COMPRESSION_COLUMNS))]).to_pylist():
        one = compression(row)
        shown = None if one is None else {"of": one.of, "times": one.times}
        found.append({**{k: row[k] for k in ("job_id", *_COLUMNS)}, "compression": shown})
    return found


def _placement(table: pa.Table) -> list[dict[str, Any]]:
    """Jobs and seconds per host, worker and device."""
    found: dict[tuple[str, str, str], list[float]] = {}
    for row in table.select(["host", "worker", "device", "wall_seconds"]).to_pylist():
        found.setdefault((row["host"] or "-", row["worker"] or "-", row["device"] or "-"), []).append(
            row["wall_seconds"] or 0.0
        )
    return [
        {"host": h, "worker": w, "device": d, "jobs": len(s), "seconds": sum(s)}
        for (h, w, d), s in sorted(found.items())
    ]


def _print_placement(table: pa.Table) -> None:
    rows = [(p["host"], p["worker"], p["device"], p["jobs"], duration(p["seconds"])) for p in _placement(table)]
    if rows:
        console().print(grid(("host", "worker", "device", "jobs", "busy"), rows, right=("jobs", "busy")))


def _print_failures(bad: list[dict[str, Any]]) -> None:
    for row in bad:
        text = Text(
            f"{row['status']}: {row['model']} {row['method']} {knobs_title(row['knobs'])} {row['task']}: {row['error_type']}: {row['error_text']}"
        )
        console().print(text)
