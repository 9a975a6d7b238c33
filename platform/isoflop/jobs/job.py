"""Job: trial × task × repeat, named by its content."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from isoflop.core.documents import documents
from isoflop.core.errors import Infeasible
from isoflop.core.hashing import content_hash
from isoflop.core.knobs import KnobValue, frozen, with_newer, without_newer
from isoflop.core.stage import Stage, walk
from isoflop.methods.base import METHODS, Method, build, in_turn
from isoflop.models.base import ModelInfo
from isoflop.models.family import ModelFamily, family_of
from isoflop.models.lm import calibrated_on
from isoflop.models.training.taught import one_per_hook
from isoflop.tasks.base import TASKS, Task, task_of


@dataclass(frozen=True)
class MethodSpec:
    """A method by name with all of its knob values."""

    name: str
    knobs: tuple[tuple[str, KnobValue], ...] = ()

    @classmethod
    def of(cls, name: str, knobs: Mapping[str, KnobValue]) -> MethodSpec:
        """From a mapping of knobs; lists, as JSON has them, become tuples."""
        return cls(name, tuple(sorted((k, frozen(v)) for k, v in knobs.items())))


@dataclass(frozen=True)
class Job:
    """One unit of execution, retry, caching, one MLflow run and one result row.

    Holds plain values only, so that it can be sent to another process, written to a row and read back.

    Attributes:
        model: reference; ``model_options`` are passed to its family.
        methods: the composition, in the order of the YAML.
        task: name, perhaps with a label; ``task_options`` are its knobs, but for ``task_paths``, which name places. The id has the
            content of these, by the task's version.
        repeat: 0-based.
        seed: trains and evaluates; the sweep's seed plus the repeat.
        versions: of model, methods and task, as resolved; part of the id.
        calibration: text that its methods calibrate on where that is no model's own, see ``own_text``; empty where none does. The
            id has its content, by the version of that name.
    """

    model: str
    methods: tuple[MethodSpec, ...]
    task: str
    repeat: int
    seed: int
    model_options: tuple[tuple[str, Any], ...] = ()
    task_options: tuple[tuple[str, Any], ...] = ()
    versions: tuple[tuple[str, str], ...] = field(default=())
    task_paths: tuple[tuple[str, str], ...] = ()
    calibration: tuple[tuple[str, Any], ...] = ()

    @cached_property
    def trial_id(self) -> str:
        """Hash of model, methods and knobs."""
        return content_hash({"model": self._model_spec(), "methods": self._method_specs(), **self._calibration_spec()})

    @cached_property
    def id(self) -> str:
        """Hash of the content: everything that the result depends on, nothing else (not the sweep's name)."""
        return content_hash(
            {
                "model": self._model_spec(),
                "methods": self._method_specs(),
                **self._calibration_spec(),
                "task": {"name": self.task, "options": dict(self.task_options), "version": self.version("task")},
                "repeat": self.repeat,
                "seed": self.seed,
            }
        )

    @property
    def method_label(self) -> str:
        """``quecc``, or ``mqt+zipcache`` for a composition."""
        return "+".join(m.name for m in self.methods)

    def version(self, part: str) -> str:
        """Version of ``model``, ``task`` or ``method:<name>``."""
        return dict(self.versions).get(part, "")

    def knobs(self) -> dict[str, KnobValue]:
        """Knob values; in a composition, prefixed with the method's name."""
        if len(self.methods) == 1:
            return dict(self.methods[0].knobs)
        return {f"{m.name}.{k}": v for m in self.methods for k, v in m.knobs}

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "model": self.model,
            "model_options": dict(self.model_options),
            "methods": [{"name": m.name, "knobs": dict(m.knobs)} for m in self.methods],
            "task": self.task,
            "task_options": dict(self.task_options),
            "repeat": self.repeat,
            "seed": self.seed,
            "versions": dict(self.versions),
            **({"task_paths": dict(self.task_paths)} if self.task_paths else {}),
            **({"calibration": dict(self.calibration)} if self.calibration else {}),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Job:
        """The inverse of :meth:`to_dict`."""
        return cls(
            model=data["model"],
            methods=tuple(MethodSpec.of(m["name"], whole_knobs(m["name"], m["knobs"])) for m in data["methods"]),
            task=data["task"],
            repeat=data["repeat"],
            seed=data["seed"],
            model_options=tuple(sorted(data.get("model_options", {}).items())),
            task_options=tuple(sorted((k, frozen(v)) for k, v in data.get("task_options", {}).items())),
            versions=tuple(sorted(data.get("versions", {}).items())),
            task_paths=tuple(sorted(data.get("task_paths", {}).items())),
            calibration=tuple(sorted(data.get("calibration", {}).items())),
        )

    def _model_spec(self) -> dict[str, Any]:
        return {"ref": self.model, "options": dict(self.model_options), "version": self.version("model")}

    def _calibration_spec(self) -> dict[str, Any]:
        if not self.calibration:
            return {}
        chosen = {name: value for name, value in self.calibration if name not in ("data", "split")}
        return {"calibration": {**chosen, "content": self.version("calibration")}}

    def _method_specs(self) -> list[dict[str, Any]]:
        return [
            {"name": m.name, "knobs": _naming(m), "version": self.version(f"method:{m.name}")} for m in self.methods
        ]


def whole_knobs(method: str, knobs: Mapping[str, Any]) -> dict[str, Any]:
    """The knobs of a method that a row of whatever age was written with."""
    return with_newer(METHODS.get(method), knobs) if method in METHODS else dict(knobs)


def _naming(method: MethodSpec) -> dict[str, Any]:
    knobs = dict(method.knobs)
    return without_newer(METHODS.get(method.name), knobs) if method.name in METHODS else knobs


@dataclass(frozen=True)
class ResolvedJob:
    """A job together with the objects its names stand for and the stages it needs. Loads no weights."""

    job: Job
    family: ModelFamily
    info: ModelInfo
    methods: tuple[Method, ...]
    task: Task
    weights: Stage | None
    prepared: tuple[Stage | None, ...]

    @classmethod
    def of(cls, job: Job) -> ResolvedJob:
        """Resolve names and check the configuration.

        Raises:
            UserError: an unknown name or knob.
            Infeasible: knobs, model and task that cannot work together.
        """
        family = family_of(job.model)
        info = family.info(job.model, dict(job.model_options))
        if job.calibration:
            info = calibrated_on(info, dict(job.calibration))
        methods = in_turn([build(m.name, dict(m.knobs)) for m in job.methods])
        built = task_of(job.task, dict(job.task_options), dict(job.task_paths))
        built.check(info)
        for method in methods:
            method.check(info)
            built.check_method(method, info)
            _asked_for(method, built)
            prompt = built.prompt_length(info)
            if prompt is not None:
                method.check_prompt(prompt, built.name)
                method.check_room(info, prompt, built.name)
        _room_before(methods, built, info)
        one_per_hook(methods)
        for place, method in enumerate(methods):
            method.check_beside([*methods[:place], *methods[place + 1 :]], info)
        weights = family.weights(info, methods, job.seed)
        trained_with = family.trained_with(info, methods)
        prepared = _prepared(methods, info, weights, job.seed, trained_with)
        return cls(job, family, info, methods, built, weights, prepared)

    @property
    def in_order(self) -> list[tuple[Method, Stage | None]]:
        """Methods with their prepared stages, in the order in which they are applied."""
        return sorted(zip(self.methods, self.prepared, strict=True), key=lambda pair: pair[0].order())

    @property
    def model_key(self) -> str:
        """Names the loaded model; jobs with equal keys share it."""
        return self.weights.key if self.weights is not None else f"{self.info.ref}@{self.info.version}"

    def stages(self) -> tuple[Stage, ...]:
        """All stages, dependencies first."""
        own = (self.weights, *self.prepared, *self.task.stages(self.info))
        return tuple(walk(tuple(s for s in own if s is not None)))


def _prepared(
    methods: Sequence[Method], info: ModelInfo, weights: Stage | None, seed: int, trained_with: tuple[Method, ...]
) -> tuple[Stage | None, ...]:
    """The stage of each method; those that learn behind others are told of them."""
    found: dict[int, Stage | None] = {}
    order = sorted(range(len(methods)), key=lambda place: methods[place].order())
    for place in order:
        wanted = methods[place].learns_behind
        behind = [other for other in found if wanted & set(methods[other].hooks) and methods[other] not in trained_with]
        pairs = tuple((methods[other], found[other]) for other in behind)
        found[place] = methods[place].prepare_behind(info, weights, seed, trained_with, pairs)
    return tuple(found[place] for place in range(len(methods)))


def _room_before(methods: Sequence[Method], task: Task, info: ModelInfo) -> None:
    """Raise Infeasible where a task that fits into the model does not fit behind what methods put before every input."""
    for method in methods:
        tokens = method.tokens_before(info)
        if not tokens or "positions" not in info.geometry:
            continue
        try:
            task.check(replace(info, geometry={**info.geometry, "positions": info.geometry["positions"] - tokens}))
        except Infeasible as error:
            raise Infeasible(
                f"method {method.name} puts {tokens} tokens before every input, and then {error}"
            ) from error


def _asked_for(method: Method, task: Task) -> None:
    """A method that acts, or is measured, through a hook which the task never looks at would do nothing, or say nothing."""
    for hook in method.hooks:
        if hook.asked and hook not in task.asks:
            asking = [name for name in TASKS if hook in TASKS.get(name).asks]
            raise Infeasible(
                f"task {task.name} does not ask for the {hook.name} of a model, where method {method.name} acts and is "
                f"measured; tasks that do: {', '.join(asking)}"
            )


def versions_of(
    model: str,
    model_options: Mapping[str, Any],
    methods: tuple[str, ...],
    task: Task,
    calibration: Mapping[str, Any] | None = None,
) -> dict[str, str]:
    """Versions that enter a job's id; the task's with its outside data, and that of calibration text by its content."""
    content = task.content()
    return {
        "model": family_of(model).info(model, model_options).version,
        "task": f"{task.version}+{content}" if content else task.version,
        **{f"method:{name}": METHODS.get(name).version for name in methods},
        **({"calibration": documents(calibration["data"], calibration["split"]).content} if calibration else {}),
    }
