"""What a spec names besides methods: models and tasks, looked up and checked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from isoflop.core.errors import Infeasible, UserError
from isoflop.core.knobs import check_knobs, placed, without_newer
from isoflop.core.yaml_source import Source
from isoflop.models.family import family_of
from isoflop.sweep.spec import SweepSpec
from isoflop.tasks.base import task_class


def check_models(spec: SweepSpec, source: Source) -> None:
    """Every model exists, and none stands there twice under two spellings of its options."""
    seen: dict[tuple[Any, ...], str] = {}
    for index, entry in enumerate(spec.models):
        where = source.where(("models", index))
        try:
            info = family_of(entry.ref, where).info(entry.ref, entry.options)
        except UserError as error:
            raise error if str(error).startswith(where) else UserError(f"{where}: {error}") from None
        same = seen.setdefault((entry.ref.partition("?")[0], info.version, info.options), entry.ref)
        if same != entry.ref:
            raise UserError(f"{where}: {entry.ref} is the same model as {same}, with the same options; keep one")


def task_options(spec: SweepSpec, source: Source) -> dict[str, dict[str, Any]]:
    """Of each task all of its options, paths made absolute; newer ones only where they are not at their defaults."""
    out = {}
    for index, entry in enumerate(spec.tasks):
        where = source.where(("tasks", index))
        cls = task_class(entry.name, where)
        given = dict(placed(cls, entry.options, source.folder))
        label = entry.name.partition(":")[2]
        if cls.labelled and label:
            given.setdefault(cls.labelled, label)
        out[entry.name] = without_newer(cls, check_knobs(cls, given, f"task {entry.name}", where))
    return out


def check_tasks(spec: SweepSpec, options: Mapping[str, Mapping[str, Any]], source: Source) -> None:
    """Every model can do every task: a sweep runs them all."""
    for index, entry in enumerate(spec.tasks):
        task = task_class(entry.name)(**options[entry.name])
        for model in spec.models:
            try:
                task.check(family_of(model.ref).info(model.ref, model.options))
            except UserError as error:
                where = source.where(("tasks", index))
                several = len(spec.models) > 1 or len(spec.tasks) > 1
                several = several and isinstance(error, Infeasible)  # else the task itself is wrong, whatever the model
                more = "; every task runs on every model: give it a sweep of its own" if several else ""
                raise UserError(f"{where}: {error}{more}") from None
