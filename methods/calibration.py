"""Stages that run a model: calibration statistics, decompositions, sensitivity measurements.

A stage of this kind names the model as it was trained, with the methods that took part in its training, and nothing
else of the trial, so that one calibration serves every combination of methods and every value of a ratio knob.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from isoflop.core.stage import Stage, StageContext
from isoflop.methods.base import Method
from isoflop.models.base import Model, ModelInfo
from isoflop.models.family import family_of
from isoflop.models.reading import TextInfo
from isoflop.models.worlds.own_text import OwnText


@dataclass(frozen=True)
class OnModel(Stage):
    """Base class of stages that need the loaded model; subclasses add the knobs that their result depends on.

    Attributes:
        ref, options, model_version: of the model.
        weights: the stage that trained it, or None for a checkpoint.
        trained_with, prepared: methods that took part in the training, and their stages.
        examples: stages that the model's calibration examples come from.
        seed: of the job.
        text: a user's own that it calibrates on, or None for the model's.
        behind, behind_prepared: other methods of the trial, and their stages, through which the result is learned.
    """

    ref: str
    options: tuple[tuple[str, Any], ...]
    model_version: str
    weights: Stage | None
    trained_with: tuple[Method, ...]
    prepared: tuple[Stage | None, ...]
    examples: tuple[Stage, ...]
    seed: int
    text: OwnText | None = field(default=None, kw_only=True)
    behind: tuple[Method, ...] = field(default=(), kw_only=True)
    behind_prepared: tuple[Stage | None, ...] = field(default=(), kw_only=True)

    @staticmethod
    def source(
        info: ModelInfo, weights: Stage | None, seed: int, trained_with: tuple[Method, ...] = ()
    ) -> dict[str, Any]:
        """The fields of this class for the arguments of ``Method.prepare``.

        Raises:
            Infeasible: the model has no examples to calibrate on.
        """
        info.check_calibration()
        family = family_of(info.ref)
        trained_with = tuple(method.as_trained() for method in trained_with)
        return {
            "ref": info.ref,
            "options": info.options,
            "model_version": info.version,
            "weights": weights,
            "trained_with": trained_with,
            "prepared": tuple(m.prepare(info, weights, seed, trained_with) for m in trained_with),
            "examples": family.calibration_stages(info, trained_with),
            "seed": seed,
            "text": info.text if isinstance(info, TextInfo) and isinstance(info.text, OwnText) else None,
        }

    def spec(self) -> dict[str, Any]:
        """Without a text of one's own, and methods to learn behind, where there are none: such stages keep their keys."""
        newer = {"text", "behind", "behind_prepared"}
        return {name: value for name, value in super().spec().items() if name not in newer or value}

    def deps(self) -> tuple[Stage, ...]:
        """Weights, the stages of the methods, and the examples."""
        found = (self.weights, *self.prepared, *self.behind_prepared, *self.examples)
        return tuple(stage for stage in found if stage is not None)

    @contextmanager
    def model(self, ctx: StageContext) -> Iterator[Model]:
        """The loaded model with the methods it was trained with, and those to learn behind, to be measured; changed copies are the caller's."""
        family = family_of(self.ref)
        info = family.info(self.ref, dict(self.options))
        if self.text is not None and isinstance(info, TextInfo):
            info = replace(info, text=self.text)
        model = family.load(info, self.weights, ctx)
        with ExitStack() as stack:
            in_place = (*self.trained_with, *self.behind), (*self.prepared, *self.behind_prepared)
            for method, stage in zip(*in_place, strict=True):
                stack.enter_context(method.apply(model, ctx.get(stage) if stage is not None else None))
            yield model
