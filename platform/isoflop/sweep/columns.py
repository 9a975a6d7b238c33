"""Names of columns in objectives, laws and frontiers, checked before anything runs.

Columns of the ledger are known beforehand, and so are the metrics of tasks that declare them and the costs that isoflop's own
parts measure (:mod:`.reports`). What parts of others report is known once jobs have finished (:mod:`.column_watch`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import pyarrow as pa

from isoflop.core.errors import UserError, unknown
from isoflop.core.expressions import RECORDS, parse
from isoflop.core.yaml_source import Source
from isoflop.ledger import SCHEMA
from isoflop.sweep.blocks import FrontierBlock, LawBlock
from isoflop.sweep.reports import NUMBERS, Reports
from isoflop.sweep.spec import SweepSpec
from isoflop.tasks.base import Task

_UNBOUND = re.compile(r'Referenced column "([^"]+)" not found')


_KEYS = tuple(field.name for field in SCHEMA if not pa.types.is_nested(field.type))


def check(spec: SweepSpec, source: Source, tasks: Mapping[str, Task]) -> None:
    """Raise UserError for what cannot be right: names the file, the key, what is allowed and the nearest right name.

    Args:
        tasks: of the sweep, with their options.
    """
    reports = Reports(spec, tasks)
    _check_objectives(spec, source, reports)
    for index, block in enumerate(spec.laws):
        _check_law_block(block, index, source, reports)
    for index, frontier in enumerate(spec.frontiers):
        described = next((b for b in spec.laws if b.law == frontier.law), None)
        _check_frontier(frontier, described.x if described else {}, index, source)


def _check_objectives(spec: SweepSpec, source: Source, reports: Reports) -> None:
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
        reports.refuse_objective(metric, objective.task, where)


def _check_law_block(block: LawBlock, index: int, source: Source, reports: Reports) -> None:
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
            _check_expression(text, source.where(("laws", index, key)), reports)
    for variable, text in block.x.items():
        _check_expression(text, source.where(("laws", index, "x", variable)), reports)
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


def _check_expression(text: str, where: str, reports: Reports) -> None:
    """An expression of columns that rows have, and of metrics and costs that they may hold."""
    for name in sorted(parse(text, where).names):
        record, dot, key = name.partition(".")
        if dot and record in RECORDS:
            reports.refuse_in_record(record, key, where)
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
