"""Names of columns in objectives, laws and frontiers, checked before anything runs.

Columns of the ledger are known beforehand. What stands in ``metrics`` and ``footprint`` is up to tasks and methods and known
once jobs have finished: :class:`ColumnWatch` says then what no row has, before a search has gone on without values, or a fit
fails at the end.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import pyarrow as pa

from isoflop.core.errors import UserError, nearest, unknown
from isoflop.core.expressions import RECORDS, parse
from isoflop.core.yaml_source import Source
from isoflop.ledger import SCHEMA
from isoflop.sweep.blocks import FrontierBlock, LawBlock
from isoflop.sweep.spec import SweepSpec

_MISSPELT = 0.85  # of the letters agree; the nearest keys that parts of isoflop report are at .8
_UNBOUND = re.compile(r'Referenced column "([^"]+)" not found')


def _is_number(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)


NUMBERS = tuple(field.name for field in SCHEMA if _is_number(field.type))
"""Columns that an objective or a law can use."""
_KEYS = tuple(field.name for field in SCHEMA if not pa.types.is_nested(field.type))


def check(spec: SweepSpec, source: Source) -> None:
    """Raise UserError for what cannot be right: names the file, the key, what is allowed and the nearest right name."""
    _check_objectives(spec, source)
    for index, block in enumerate(spec.laws):
        _check_law_block(block, index, source)
    for index, frontier in enumerate(spec.frontiers):
        described = next((b for b in spec.laws if b.law == frontier.law), None)
        _check_frontier(frontier, described.x if described else {}, index, source)


def _check_objectives(spec: SweepSpec, source: Source) -> None:
    names = [t.name for t in spec.tasks]
    for index, objective in enumerate(spec.objectives):
        if objective.task is not None and objective.task not in names:
            raise unknown("task of this sweep", objective.task, names, source.where(("objectives", index, "task")))
        where, metric = source.where(("objectives", index, "metric")), objective.metric
        record, dot, key = metric.partition(".")
        if dot and record in RECORDS:
            raise UserError(f"{where}: {metric!r} is named without its column here: {key}")
        if metric in SCHEMA.names and metric not in NUMBERS:
            raise UserError(f"{where}: column {metric!r} holds no number; allowed: a metric, or {', '.join(NUMBERS)}")
        _refuse_misspelt(metric, spec, where)


def _refuse_misspelt(metric: str, spec: SweepSpec, where: str) -> None:
    """Refuse an objective that is all but a column's name. What tasks and methods report besides is known once they have run.

    Raises:
        UserError: where all parts of the sweep come with isoflop, so that no other name can be as near.
    """
    from difflib import SequenceMatcher

    near = nearest(metric, NUMBERS) or ""
    alike = sorted(metric) == sorted(near) or SequenceMatcher(None, metric, near).ratio() >= _MISSPELT
    if alike and metric not in NUMBERS and not spec.imports:
        raise UserError(
            f"{where}: no row has {metric!r} (did you mean {near!r}?); allowed: a metric, or {', '.join(NUMBERS)}"
        )


def _check_law_block(block: LawBlock, index: int, source: Source) -> None:
    from isoflop.laws.base import resolve_form

    where = source.where(("laws", index, "law"))
    _check_law(block.law, block.x, where)
    for variable in resolve_form(block.law, list(block.x)).variable_names:
        if variable not in block.x and variable not in NUMBERS:
            raise UserError(
                f"{where}: law {block.law} reads {variable}, and results have no such column; "
                f"say what it stands for, e.g. x: {{{variable}: V}}"
            )
    for key in ("y", "weights"):
        text = getattr(block, key)
        if text is not None:
            _check_expression(text, source.where(("laws", index, key)))
    for variable, text in block.x.items():
        _check_expression(text, source.where(("laws", index, "x", variable)))
    for place, column in enumerate(block.by):
        if column not in _KEYS:
            raise unknown("column of results", column, _KEYS, source.where(("laws", index, "by", place)))
    if block.where is not None:
        _check_condition(block.where, source.where(("laws", index, "where")))


def _check_law(law: str, variables: Mapping[str, str], where: str) -> None:
    from isoflop.laws.base import resolve_form

    try:
        form = resolve_form(law, list(variables))
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    for name in variables:
        if name not in form.variable_names:
            raise unknown(f"variable of law {form.name}", name, form.variable_names, where)


def _check_expression(text: str, where: str) -> None:
    """An expression of columns that rows have; which metrics and costs these will hold is not known yet."""
    for name in sorted(parse(text, where).names):
        record, dot, _ = name.partition(".")
        if dot and record in RECORDS:
            continue
        if name not in SCHEMA.names:
            raise unknown("column of results", name, [*NUMBERS, *(f"{r}.NAME" for r in RECORDS)], where)
        if name not in NUMBERS:
            raise UserError(
                f"{where}: column {name!r} holds no number; allowed: {', '.join(NUMBERS)}, metrics.NAME, footprint.NAME"
            )


def _check_condition(text: str, where: str) -> None:
    """An SQL condition, by asking it of a table without rows."""
    from isoflop.laws import table

    try:
        table.where(SCHEMA.empty_table(), text)
    except UserError as error:
        column = _UNBOUND.search(str(error))
        if column is not None:
            raise unknown("column of results", column[1], SCHEMA.names, where) from None
        raise UserError(f"{where}: {text!r}: {str(error).removeprefix('sql: ').removeprefix('where: ')}") from None


def _check_frontier(block: FrontierBlock, variables: Mapping[str, str], index: int, source: Source) -> None:
    from isoflop.frontier.optimum import CostModel
    from isoflop.laws.base import resolve_form

    _check_law(block.law, variables, source.where(("frontiers", index, "law")))
    form = resolve_form(block.law, list(variables))
    if block.cost is None:
        return
    where = source.where(("frontiers", index, "cost"))
    try:
        CostModel.build(block.cost, form.variable_names, {"Q": 0.0})
    except UserError as error:
        raise UserError(f"{where}: {str(error).removeprefix('cost: ')}") from None


class ColumnWatch:
    """Looks at a finished row of every task and method, and then says once what the spec asks of rows and none of these has.

    Attributes:
        aimless: an objective names what none of these rows has, so that a search learns nothing from any trial.
    """

    def __init__(self, spec: SweepSpec, source: Source) -> None:
        self._spec = spec
        self._source = source
        self._expected = len(spec.tasks) * len(spec.methods)
        self._seen: dict[tuple[str, str], Mapping[str, Any]] = {}
        self._over = False
        self.aimless = False

    def see(self, rows: Iterable[Mapping[str, Any]]) -> list[str]:
        """Take notice of rows; returns a line for each thing that is missing, when that can be told for the first time."""
        if self._over:
            return []
        for row in rows:
            if row["status"] == "ok":
                self._seen.setdefault((row["task"], row["method"]), row)
        if len(self._seen) < self._expected:
            return []
        self._over = True
        found = missing(self._spec, self._source, self._seen.values())
        aims = [where for _, where in _asked_of_objectives(self._spec, self._source)]
        self.aimless = any(line.startswith(f"{where}:") for line in found for where in aims)
        return found


def missing(spec: SweepSpec, source: Source, rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """What objectives and laws ask of finished rows that none of them has, a line each."""
    keys: dict[str, set[str]] = {record: set() for record in RECORDS}
    columns: set[str] = set()
    for row in rows:
        columns.update(c for c in NUMBERS if row.get(c) is not None)
        for record in RECORDS:
            keys[record].update(name for name, _ in row.get(record) or ())
    bare = columns.union(*keys.values())
    full = columns | {f"{record}.{key}" for record in RECORDS for key in keys[record]}
    lines = [_line(where, name, bare) for name, where in _asked_of_objectives(spec, source) if name not in bare]
    return lines + [_line(where, name, full) for name, where in _asked_of_laws(spec, source) if name not in full]


def _line(where: str, name: str, known: set[str]) -> str:
    hint = nearest(name, sorted(known)) or nearest(name.rpartition(".")[2], sorted(known))
    guess = f" (did you mean {hint!r}?)" if hint else ""
    return f"{where}: no row so far has {name!r}{guess}; they have: {', '.join(sorted(known))}"


def _asked_of_objectives(spec: SweepSpec, source: Source) -> Iterator[tuple[str, str]]:
    for index, objective in enumerate(spec.objectives):
        yield objective.metric, source.where(("objectives", index, "metric"))


def _asked_of_laws(spec: SweepSpec, source: Source) -> Iterator[tuple[str, str]]:
    for index, block in enumerate(spec.laws):
        texts: dict[tuple[str, ...], str] = {("y",): block.y, **{("x", v): text for v, text in block.x.items()}}
        if block.weights is not None:
            texts[("weights",)] = block.weights
        for path, text in texts.items():
            where = source.where(("laws", index, *path))
            yield from ((name, where) for name in sorted(parse(text, where).names))
