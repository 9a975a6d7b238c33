"""Looks at finished rows for what a spec asks of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import pyarrow as pa

from isoflop.core.errors import nearest
from isoflop.core.expressions import RECORDS, parse
from isoflop.core.yaml_source import Source
from isoflop.sweep.blocks import Objective
from isoflop.sweep.reports import NUMBERS, Reports
from isoflop.sweep.spec import SweepSpec
from isoflop.tasks.base import Task


class ColumnWatch:
    """Looks at finished rows, and says once what the spec asks of rows and none of them has.

    Objectives are told of as soon as one finished job of each task tells it, or of each task and method where a method may
    measure it; laws once every task and method has a finished row.

    Attributes:
        aimless: an objective names what none of these rows has, so that no trial has a value: the lines that say so.
    """

    def __init__(self, spec: SweepSpec, source: Source, tasks: Mapping[str, Task]) -> None:
        self._spec = spec
        self._source = source
        self._reports = Reports(spec, tasks)
        self._methods = len(spec.methods)
        self._seen: dict[tuple[str, str], Mapping[str, Any]] = {}
        self._open = list(_asked_of_objectives(spec, source))
        self._over = False
        self.aimless: list[str] = []

    def see(self, rows: Iterable[Mapping[str, Any]]) -> list[str]:
        """Take notice of rows; returns a line for each thing that is missing, when that can be told for the first time."""
        if self._over:
            return []
        for row in rows:
            if row["status"] == "ok":
                self._seen.setdefault((row["task"], row["method"]), row)
        lines = []
        for asked in list(self._open):
            if (line := self._missing(*asked)) is not None:
                lines.append(line)
                self._open.remove(asked)
        self.aimless += lines
        if len(self._seen) < len(self._spec.tasks) * self._methods:
            return lines
        self._over = True
        return lines + missing_of_laws(self._spec, self._source, self._seen.values())

    def see_table(self, table: pa.Table) -> list[str]:
        """:meth:`see`, of rows of earlier sessions."""
        names = zip(table["task"].to_pylist(), table["method"].to_pylist(), table["status"].to_pylist(), strict=True)
        first: dict[tuple[str, str], int] = {}
        for index, (task, method, status) in enumerate(names):
            if status == "ok":
                first.setdefault((task, method), index)
        wanted = [c for c in table.column_names if c in (*NUMBERS, *RECORDS, "task", "method", "status")]
        return self.see(table.select(wanted).take(pa.array(list(first.values()), pa.int64())).to_pylist())

    def _missing(self, objective: Objective, where: str) -> str | None:
        """A line where some task that an objective looks at has shown that its rows lack the metric."""
        needed = self._methods if self._reports.may_be_cost(objective.metric) else 1
        for task in (t.name for t in self._spec.tasks):
            rows = [row for (name, _), row in self._seen.items() if name == task]
            if objective.task not in (None, task) or len(rows) < needed:
                continue
            columns, keys = _held(rows)
            known = columns.union(*keys.values())
            if objective.metric not in known:
                return _line(where, objective.metric, known, f" of task {task}" if len(self._spec.tasks) > 1 else "")
        return None


def missing_of_laws(spec: SweepSpec, source: Source, rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """What laws ask of finished rows that none of them has, a line each."""
    columns, keys = _held(rows)
    full = columns | {f"{record}.{key}" for record in RECORDS for key in keys[record]}
    return [_line(where, name, full) for name, where in _asked_of_laws(spec, source) if name not in full]


def _held(rows: Iterable[Mapping[str, Any]]) -> tuple[set[str], dict[str, set[str]]]:
    """Columns in which some row has a number, and the names in the rows' records."""
    keys: dict[str, set[str]] = {record: set() for record in RECORDS}
    columns: set[str] = set()
    for row in rows:
        columns.update(c for c in NUMBERS if row.get(c) is not None)
        for record in RECORDS:
            keys[record].update(name for name, _ in row.get(record) or ())
    return columns, keys


def _line(where: str, name: str, known: set[str], of: str = "") -> str:
    hint = nearest(name, sorted(known)) or nearest(name.rpartition(".")[2], sorted(known))
    guess = f" (did you mean {hint!r}?)" if hint else ""
    return f"{where}: no row{of} so far has {name!r}{guess}; they have: {', '.join(sorted(known))}"


def _asked_of_objectives(spec: SweepSpec, source: Source) -> Iterator[tuple[Objective, str]]:
    for index, objective in enumerate(spec.objectives):
        yield objective, source.where(("objectives", index, "metric"))


def _asked_of_laws(spec: SweepSpec, source: Source) -> Iterator[tuple[str, str]]:
    for index, block in enumerate(spec.laws):
        texts: dict[tuple[str, ...], str] = {("y",): block.y, **{("x", v): text for v, text in block.x.items()}}
        if block.weights is not None:
            texts[("weights",)] = block.weights
        for path, text in texts.items():
            where = source.where(("laws", index, *path))
            yield from ((name, where) for name in sorted(parse(text, where).names))
