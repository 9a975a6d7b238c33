"""A sweep whose names have been looked up: the space it searches, and points of it as jobs and back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import pyarrow as pa

from isoflop.core.knobs import check_knobs, path_knobs
from isoflop.core.yaml_source import Source
from isoflop.jobs import Job, MethodSpec
from isoflop.jobs.job import versions_of
from isoflop.methods.base import METHODS
from isoflop.models.family import family_of
from isoflop.search import Config, SearchSpace, Strategy
from isoflop.sweep.calibrations import PARAMETER, WITHOUT, Calibration, calibrate
from isoflop.sweep.spec import SweepSpec
from isoflop.tasks.base import Task, task_class, task_of


@dataclass(frozen=True)
class Sweep:
    """A spec with everything it names looked up. Build it with :func:`isoflop.sweep.resolve.resolve`."""

    spec: SweepSpec
    source: Source
    strategy: Strategy
    space: SearchSpace
    task_options: Mapping[str, dict[str, Any]]
    branch_methods: Mapping[str, tuple[str, ...]]
    calibrations: tuple[Calibration, ...] = ()

    @cached_property
    def tasks(self) -> dict[str, Task]:
        """The tasks with their options."""
        return {name: task_class(name)(**options) for name, options in self.task_options.items()}

    def methods_of(self, config: Config) -> tuple[MethodSpec, ...]:
        """The methods of a point with all of their knobs."""
        out = []
        text = self._text_of(config)
        for position, name in enumerate(self.branch_methods[str(config["method"])]):
            prefix = knob_prefix(str(config["method"]), position)
            given = {
                k.removeprefix(prefix): v
                for k, v in config.items()
                if k.startswith(prefix) and "." not in k.removeprefix(prefix)
            }
            given = {**text.given(name), **given}
            out.append(MethodSpec.of(name, check_knobs(METHODS.get(name), given, f"method {name}")))
        return tuple(out)

    def jobs_of(self, config: Config) -> list[Job]:
        """The jobs of a trial: one per task and repeat."""
        methods, text = self.methods_of(config), self._text_of(config)
        return [
            self._job(str(config["model"]), methods, task, repeat, text)
            for repeat in range(self.spec.repeats)
            for task in self.task_options
        ]

    def _job(self, model: str, methods: tuple[MethodSpec, ...], task: str, repeat: int, text: Calibration) -> Job:
        names = tuple(m.name for m in methods)
        return Job(
            model=model,
            methods=methods,
            task=task,
            repeat=repeat,
            seed=self.spec.seed + repeat,
            model_options=self._model_options[model],
            task_options=self._task_parts[task][0],
            versions=tuple(sorted(self._versions(model, names, task, text).items())),
            task_paths=self._task_parts[task][1],
            calibration=text.choice,
        )

    def _versions(self, model: str, methods: tuple[str, ...], task: str, text: Calibration) -> dict[str, str]:
        key = (model, methods, task, text)
        if key not in self._version_cache:
            self._version_cache[key] = versions_of(
                model,
                dict(self._model_options[model]),
                methods,
                task_of(task, self.task_options[task]),
                dict(text.choice),
            )
        return self._version_cache[key]

    def _text_of(self, config: Config) -> Calibration:
        """The text that a point calibrates on; of several, the one that it names."""
        if not self.calibrations or not calibrate(self.branch_methods[str(config["method"])]):
            return WITHOUT
        return next((one for one in self.calibrations if one.name == config.get(PARAMETER)), self.calibrations[0])

    @cached_property
    def _model_options(self) -> dict[str, tuple[tuple[str, Any], ...]]:
        """Per model, its options as they enter the ids of jobs."""
        return {
            m.ref: tuple(sorted(family_of(m.ref).canonical_options(m.ref, m.options).items())) for m in self.spec.models
        }

    @cached_property
    def _task_parts(self) -> dict[str, tuple[tuple[tuple[str, Any], ...], tuple[tuple[str, str], ...]]]:
        """Per task, its options without and with those that are paths."""
        found = {}
        for task, options in self.task_options.items():
            paths = path_knobs(task_class(task))
            plain = tuple(sorted((k, v) for k, v in options.items() if k not in paths))
            found[task] = plain, tuple(sorted((k, str(v)) for k, v in options.items() if k in paths))
        return found

    @cached_property
    def _version_cache(self) -> dict[tuple[str, tuple[str, ...], str, Calibration], dict[str, str]]:
        return {}

    def config_of(self, job: Job) -> Config:
        """The point of the space that a job of this sweep came from."""
        label = job.method_label
        config: Config = {"model": job.model, "method": label}
        branch = self.space.by_label.get(label)
        wanted = {p.name for p in branch.params} if branch else set()
        for position, method in enumerate(job.methods):
            prefix = knob_prefix(label, position)
            config.update({prefix + k: v for k, v in method.knobs if prefix + k in wanted})
        if PARAMETER in wanted and (text := next((one for one in self.calibrations if one.suits(job)), None)):
            config[PARAMETER] = text.name
        return config

    def job_now(self, job: Job) -> Job | None:
        """The job of this sweep that ``job``, perhaps of an earlier version of the YAML, stands for; None where there is none.

        It differs from ``job`` at most in the spelling of its numbers: .3 for .30000000000000004.
        """
        written = self.config_of(job)
        config = self.space.spelled(written)
        if job.task not in self.task_options or job.repeat >= self.spec.repeats or not self.space.contains(config):
            return None
        now = self._job(job.model, self.methods_of(config), job.task, job.repeat, self._text_of(config))
        then = job if config == written else replace(job, methods=self._spelled(job.methods, job.method_label, config))
        return now if now.id == then.id else None

    def job_of(self, text: str) -> Job:
        """The job of this sweep that a row of :meth:`current` stands for, from the row's ``spec``."""
        job = Job.from_dict(json.loads(text))
        written = self.config_of(job)
        now = job if self.space.spelled(written) == written else self.job_now(job)  # hashing each again would take long
        return now or job

    def _spelled(self, methods: tuple[MethodSpec, ...], label: str, config: Config) -> tuple[MethodSpec, ...]:
        """The methods with the values that a point gives their knobs."""
        prefixes = [knob_prefix(label, position) for position in range(len(methods))]
        return tuple(
            MethodSpec.of(m.name, {k: config.get(prefix + k, v) for k, v in m.knobs})
            for prefix, m in zip(prefixes, methods, strict=True)
        )

    def current(self, table: pa.Table) -> pa.Table:
        """The rows of a ledger that belong to the sweep as it is now: one per job, the one of its very spelling first."""
        chosen: dict[str, int] = {}
        exact: set[str] = set()
        for index, (job_id, text) in enumerate(
            zip(table["job_id"].to_pylist(), table["spec"].to_pylist(), strict=True)
        ):
            now = self.job_now(Job.from_dict(json.loads(text)))
            if now is not None and now.id not in exact:
                chosen[now.id] = index
                exact.update({job_id} & {now.id})
        keep = set(chosen.values())
        return table.filter(pa.array([index in keep for index in range(table.num_rows)], pa.bool_()))


def knob_prefix(label: str, position: int) -> str:
    """Knobs are ``quecc.k``; in a composition the method's own name prefixes each, and a second use of it is numbered."""
    names = label.split("+")
    name = names[position]
    twin = names[:position].count(name)
    base = f"{name}{twin + 1 if twin else ''}"
    return f"{base}." if len(names) == 1 else f"{label}/{base}."
