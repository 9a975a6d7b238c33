"""What the parts of a sweep report: columns of the ledger, metrics of tasks, costs that tasks and methods measure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from difflib import SequenceMatcher
from functools import cached_property

import pyarrow as pa

from isoflop.core.errors import UserError, nearest
from isoflop.costs.names import MEASURED, is_measured
from isoflop.ledger import SCHEMA
from isoflop.methods.base import METHODS
from isoflop.sweep.spec import SweepSpec
from isoflop.tasks.base import Task

_MISSPELT = 0.85  # of the letters agree; the nearest keys that parts of isoflop report are at .8


def _is_number(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)


NUMBERS = tuple(field.name for field in SCHEMA if _is_number(field.type))
"""Columns that an objective or a law can use."""


class Reports:
    """What the parts of a sweep say that they report, before any of them runs.

    Args:
        tasks: with their options.
    """

    def __init__(self, spec: SweepSpec, tasks: Mapping[str, Task]) -> None:
        self._imports = bool(spec.imports)
        self._tasks = tasks
        methods = [METHODS.get(m.name).footprint for composition in spec.methods for m in composition]
        measures = [type(task).measure for task in tasks.values()]
        self._costs_known = all(f.__module__.startswith("isoflop.") for f in (*methods, *measures))

    @cached_property
    def metrics(self) -> dict[str, tuple[str, ...] | None]:
        """Secondary metrics by task; None where they are not known before it runs."""
        return {name: task.reported() for name, task in self._tasks.items()}

    def may_be_cost(self, name: str) -> bool:
        """Whether something may measure it."""
        return is_measured(name) or not self._costs_known

    def without(self, metric: str, task: str | None) -> list[str]:
        """Tasks, among those that an objective looks at, of whose jobs no row can hold a metric."""
        if metric in NUMBERS or self.may_be_cost(metric):
            return []
        asked = [task] if task is not None else list(self._tasks)
        return [name for name in asked if (known := self.metrics[name]) is not None and metric not in known]

    def refuse_objective(self, metric: str, task: str | None, where: str) -> None:
        """Raise UserError for an objective that no trial can have a value of."""
        lacking = self.without(metric, task)
        if not lacking:
            return self._refuse_misspelt(metric, where)
        having = [name for name in self._tasks if name not in lacking]
        if task is None and having:
            raise UserError(
                f"{where}: task {lacking[0]} reports no {metric!r}, and an objective is a mean over all tasks; "
                f"allowed: task: {' or '.join(having)} beside it, or {self._known(lacking)}"
            )
        what = "no task of this sweep" if task is None else f"task {task} does not"
        verb = "reports" if task is None else "report"
        raise UserError(
            f"{where}: {what} {verb} {metric!r}{self._guess(metric, lacking)}; allowed: {self._known(lacking)}"
        )

    def refuse_in_record(self, record: str, key: str, where: str) -> None:
        """Raise UserError for ``metrics.KEY`` or ``footprint.KEY`` that no row can hold."""
        if record == "metrics":
            known = [names for names in self.metrics.values() if names is not None]
            if len(known) < len(self.metrics) or any(key in names for names in known):
                return
            allowed = sorted({f"metrics.{name}" for names in known for name in names})
            if is_measured(key):  # what a method notes of every example, too, is a metric
                return
        elif self.may_be_cost(key):
            return
        else:
            allowed = [f"footprint.{name}" for name in MEASURED]
        guess = nearest(f"{record}.{key}", allowed)
        hint = f" (did you mean {guess!r}?)" if guess else ""
        shown = ", ".join(allowed[:12]) + (", … (isoflop.costs.names has them all)" if len(allowed) > 12 else "")
        raise UserError(
            f"{where}: no part of this sweep reports {record + '.' + key!r}{hint}; allowed: {shown or 'columns'}"
        )

    def _refuse_misspelt(self, metric: str, where: str) -> None:
        """Refuse an objective that is all but a column's name, where all parts of the sweep come with isoflop."""
        near = nearest(metric, NUMBERS) or ""
        alike = sorted(metric) == sorted(near) or SequenceMatcher(None, metric, near).ratio() >= _MISSPELT
        if alike and metric not in (*NUMBERS, *MEASURED) and not self._imports:
            raise UserError(
                f"{where}: no row has {metric!r} (did you mean {near!r}?); allowed: a metric, or {', '.join(NUMBERS)}"
            )

    def _metrics_of(self, tasks: Iterable[str]) -> list[str]:
        return list(dict.fromkeys(metric for task in tasks for metric in self.metrics[task] or ()))

    def _guess(self, metric: str, tasks: Iterable[str]) -> str:
        guess = nearest(metric, [*self._metrics_of(tasks), *NUMBERS, *MEASURED])
        return f" (did you mean {guess!r}?)" if guess else ""

    def _known(self, tasks: Sequence[str]) -> str:
        metrics = [m for m in self._metrics_of(tasks) if all(m in (self.metrics[t] or ()) for t in tasks)]
        return ", ".join(dict.fromkeys(["error", *metrics, *NUMBERS]))
