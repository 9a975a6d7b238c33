"""What a model is to the rest of isoflop: a reference, a size N, hook points, and how its weights come to be."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn

from isoflop.core.knobs import check_knobs, knob_specs
from isoflop.core.registry import Registry
from isoflop.core.stage import Stage, StageContext

if TYPE_CHECKING:
    from isoflop.methods.base import Method


@dataclass(frozen=True)
class ModelInfo:
    """What is known of a model without loading its weights.

    Attributes:
        ref: the reference as written in a sweep: ``tiny-llava/d24`` or ``hf:<repo or local path>``.
        family: name of the family that loads it.
        version: changes whenever the same reference would give other weights (recipe, revision, file hash).
        n_params: N, the number of non-embedding parameters of the language model (vision tower and projector
            excluded; input and output embeddings excluded).
        hooks: hook points that it offers: ``visual-tokens``, ``kv-cache``, ``weights``, …
        geometry: sizes that methods check against: ``grid`` (patches per side), ``visual_tokens``, ``hidden``, ``layers``…
    """

    ref: str
    family: str
    version: str
    n_params: int
    hooks: frozenset[str]
    geometry: Mapping[str, Any] = field(default_factory=dict)


class Model(ABC):
    """A loaded model, held warm by a worker. Methods change it only inside their ``apply`` and restore it exactly."""

    info: ModelInfo
    module: nn.Module


class ModelFamily(ABC):
    """Everything that is loaded in the same way: a tiny family trained here, or Hugging Face checkpoints."""

    name: ClassVar[str]

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

    def weights(self, info: ModelInfo, methods: tuple[Method, ...], seed: int) -> Stage | None:
        """The stage that trains the weights, or None when they lie on disk already.

        ``methods`` are the trial's methods, of which those with ``trains_model`` take part in the training.
        """
        return None

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


FAMILIES: Registry[ModelFamily] = Registry("model family", ("isoflop.models",), group="isoflop.models")


def family_of(ref: str, where: str = "") -> ModelFamily:
    """The family that a reference belongs to: the part before ``:`` or ``/``."""
    name = ref.split(":", 1)[0] if ref.startswith("hf:") else ref.split("/", 1)[0]
    return FAMILIES.get(name, where)
