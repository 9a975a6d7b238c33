"""What a model family is, and which one a reference belongs to."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from isoflop.core.errors import Infeasible, UserError
from isoflop.core.hook import Hook, names_of
from isoflop.core.knobs import check_knobs, knob_specs
from isoflop.core.registry import Registry
from isoflop.core.stage import Stage, StageContext
from isoflop.models.base import Model, ModelInfo
from isoflop.models.training.taught import Taught, TaughtT, one_per_hook
from isoflop.models.training.teaching import Course


class ModelFamily(ABC):
    """Everything that is loaded in the same way: a tiny family trained here, or Hugging Face checkpoints.

    Class attributes:
        trainable: hooks with whose occupants in place the family trains its models.
    """

    name: ClassVar[str]
    trainable: ClassVar[frozenset[Hook[Any]]] = frozenset()

    @abstractmethod
    def members(self) -> list[str]:
        """References that can be listed (``tiny-llava/d24`` …); empty for open-ended families."""

    @abstractmethod
    def info(self, ref: str, options: Mapping[str, Any]) -> ModelInfo:
        """Describe ``ref`` without loading weights. Raises UserError for a reference that does not exist."""

    def canonical_options(self, ref: str, options: Mapping[str, Any]) -> dict[str, Any]:
        """``options`` as they enter a job's id: equal for options that give the same model.

        Override it to leave defaults out, so that writing one down runs nothing again (see :func:`without_defaults`).
        """
        return dict(options)

    def weights(self, info: ModelInfo, methods: tuple[Taught, ...], seed: int) -> Stage | None:
        """The stage that trains the weights, or None when they lie on disk already.

        ``methods`` are the trial's methods; those of ``trained_with`` take part in the training.
        """
        return None

    def trained_with(self, info: ModelInfo, methods: tuple[TaughtT, ...]) -> tuple[TaughtT, ...]:
        """Those of a trial's methods that ``weights`` trains the model with; what calibrates on it applies them first.

        Raises:
            Infeasible: a method with ``trains_model`` takes a hook that the family cannot train with, or that another has.
        """
        taking = tuple(method for method in methods if method.trains_model and not method.idle(info))
        for method in taking:
            stuck = names_of(set(method.hooks) - self.trainable)
            if stuck:
                works = ", ".join(names_of(self.trainable & info.hooks)) or "no hook"
                raise Infeasible(
                    f"method {method.name} takes part in training at {', '.join(stuck)}, and models of the family "
                    f"{self.name} are trained with methods at: {works}"
                )
        one_per_hook(taking)
        return taking

    def course_stages(self, info: ModelInfo, methods: tuple[Taught, ...]) -> tuple[Stage, ...]:
        """Stages that ``course`` asks for."""
        return ()

    def course(self, info: ModelInfo, methods: tuple[Taught, ...], seed: int, ctx: StageContext) -> Course:
        """How a member is trained with ``methods`` in place; for families with ``trainable`` hooks."""
        raise NotImplementedError(f"models of the family {self.name} are not trained with methods in place")

    def calibration_stages(self, info: ModelInfo, methods: tuple[Taught, ...]) -> tuple[Stage, ...]:
        """Stages that ``Model.calibration`` asks for; ``methods`` are those that took part in the training."""
        return ()

    def series(self, info: ModelInfo, weights: Stage | None) -> tuple[tuple[ModelInfo, Stage | None], ...]:
        """The checkpoints of the training that a model is one of, the last one last; by default the model alone.

        Args:
            weights: the model's own, as ``weights()`` gave them.
        """
        return ((info, weights),)

    @abstractmethod
    def load(self, info: ModelInfo, weights: Stage | None, ctx: StageContext) -> Model:
        """The model on ``ctx.device`` in evaluation mode."""


def without_defaults(cls: type, options: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """The options, in their types, that differ from the defaults of ``cls``, a dataclass with knobs.

    Args:
        kind: what to call the owner in a UserError ("model tiny-llava/d24").
    """
    specs = knob_specs(cls)
    checked = check_knobs(cls, options, kind)
    return {name: checked[name] for name in options if checked[name] != specs[name].default}


def split_ref(ref: str) -> tuple[str, dict[str, Any]]:
    """A reference without the options that are written into it: ``tiny-lm/text-d64?act=relu&at=64``.

    Options that are part of the name tell members of a sweep apart that differ in nothing else.

    Raises:
        UserError: something behind the question mark is no ``name=value``, or a name stands twice.
    """
    plain, mark, text = ref.partition("?")
    options: dict[str, Any] = {}
    for part in text.split("&") if mark else ():
        name, equals, value = part.partition("=")
        if not name or not equals or not value or name in options:
            raise UserError(f"model {ref}: {part!r} is no option of its own; allowed: {plain}?name=value&name=value")
        options[name] = _scalar(value)
    return plain, options


def all_options(ref: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The given options with those that the reference names; these may be given again, but not otherwise.

    Raises:
        UserError: they are given otherwise.
    """
    named = split_ref(ref)[1]
    for name, value in named.items():
        if name in options and options[name] != value:
            raise UserError(
                f"model {ref}: {name} = {options[name]!r} is given beside the reference; allowed: one of both"
            )
    return {**options, **named}


def _scalar(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return {"true": True, "false": False}.get(text, text)


FAMILIES: Registry[ModelFamily] = Registry("model family", ("isoflop.models",), group="isoflop.models")


def family_of(ref: str, where: str = "") -> ModelFamily:
    """The family that a reference belongs to: the part before ``:`` or ``/``."""
    name = ref.split(":", 1)[0] if ref.startswith("hf:") else ref.split("/", 1)[0]
    return FAMILIES.get(name, where)
