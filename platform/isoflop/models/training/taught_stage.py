"""The stage of a model that is trained here with methods in place: one for every family, whatever the methods do."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from isoflop.core.stage import Stage, StageContext
from isoflop.models.base import Checkpoint, ModelInfo
from isoflop.models.family import family_of
from isoflop.models.training.loop import Keeper
from isoflop.models.training.taught import TRAINED, Taught
from isoflop.models.training.teaching import Pupil, Teaching


@dataclass(frozen=True)
class _OnCpu:
    """A stage context whose models are loaded on the CPU, whatever the worker's device."""

    ctx: StageContext
    device: str = "cpu"
    devices: tuple[str, ...] = ("cpu",)

    def get(self, stage: Stage) -> Any:
        return self.ctx.get(stage)

    def scratch(self, stage: Stage) -> Path:
        return self.ctx.scratch(stage)


@dataclass(frozen=True)
class TaughtStage(Stage):
    """A model in ``save_pretrained`` form, with ``<method>.safetensors`` for each method that has weights of its own.

    Trained on the CPU wherever it runs, so that the weights do not depend on the worker's device. A training that is killed
    goes on where it was.

    Attributes:
        ref, options, model_version: of the model.
        methods: those in place.
        sources: stages that the course asks for (text, features).
        teacher: the model trained without the methods, where one of them follows it.
    """

    kind: ClassVar[str] = "taught"

    ref: str
    options: tuple[tuple[str, Any], ...]
    model_version: str
    methods: tuple[Taught, ...]
    seed: int
    sources: tuple[Stage, ...]
    teacher: Stage | None = None

    @classmethod
    def of(cls, info: ModelInfo, methods: tuple[Taught, ...], seed: int) -> TaughtStage:
        """The stage for a model of a family that gives a course."""
        family = family_of(info.ref)
        methods = tuple(sorted(methods, key=lambda m: (min((hook.order for hook in m.hooks), default=0), m.name)))
        taught = tuple(method.as_trained() for method in methods)
        follows = any(m.teacher is not None and m.teacher.source == TRAINED for m in taught)
        teacher = family.weights(info, (), seed) if follows else None
        return cls(info.ref, info.options, info.version, taught, seed, family.course_stages(info, taught), teacher)

    def deps(self) -> tuple[Stage, ...]:
        """What the course asks for, and the teacher."""
        return (*self.sources, *(() if self.teacher is None else (self.teacher,)))

    def compute(self, ctx: StageContext, folder: Path) -> None:
        """Train, save."""
        from safetensors.torch import save_file

        family = family_of(self.ref)
        info = family.info(self.ref, dict(self.options))
        course = family.course(info, self.methods, self.seed, ctx)
        pupils = [Pupil(method, method.untrained(info, self.seed)) for method in self.methods]
        teacher = None if self.teacher is None else family.load(info, self.teacher, _OnCpu(ctx))
        losses = Teaching(course, pupils, self.seed, teacher).run(Keeper(ctx.scratch(self)))
        course.save(folder, losses)
        for pupil in pupils:
            if pupil.module is not None:
                state = {name: t.detach().contiguous() for name, t in pupil.module.state_dict().items()}
                save_file(state, folder / f"{pupil.method.name}.safetensors")

    def load(self, ctx: StageContext, folder: Path) -> Checkpoint:
        """Where the files are."""
        return Checkpoint(folder, json.loads((folder / "training.json").read_text()))
