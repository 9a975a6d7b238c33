"""What a model is to the rest of isoflop: a reference, a size N, hook points, and how its weights come to be."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from isoflop.core.errors import Infeasible, UserError
from isoflop.core.knobs import check_knobs, knob_specs
from isoflop.core.registry import Registry
from isoflop.core.stage import Stage, StageContext

if TYPE_CHECKING:
    from isoflop.methods.base import Method
    from isoflop.models.distributed import ExchangeReport


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
        dense_bits: what an element of a weight or of a cache counts where nothing compresses it. Families trained here
            compute in float32, because CPUs do, and count 16 bits, as they would be served; checkpoints count what
            they are loaded in.
        options: the sweep's options for this model, checked, as sorted (name, value) pairs.
    """

    ref: str
    family: str
    version: str
    n_params: int
    hooks: frozenset[str]
    geometry: Mapping[str, Any] = field(default_factory=dict)
    dense_bits: int = 16
    options: tuple[tuple[str, Any], ...] = ()


class Model(ABC):
    """A loaded model, held warm by a worker. Methods change it only inside their ``apply`` and restore it exactly.

    Attributes:
        info: its description.
        module: the Hugging Face model, in evaluation mode.
        stored: bytes of the weights that a method holds in a compressed form, by parameter name in ``module``; every
            other tensor counts ``info.dense_bits`` per element (see ``weight_bytes``).
        exchange: what its training recorded of the exchange of gradients, while a method on gradients is applied.
    """

    info: ModelInfo
    module: nn.Module
    stored: Mapping[str, float] = {}  # noqa: RUF012: replaced, never changed in place
    exchange: ExchangeReport | None = None

    def calibration(self, ctx: StageContext, examples: int, seed: int) -> Iterator[Any]:
        """Batches of training examples (never test examples), about ``examples`` rows in all, for ``supervised``.

        Methods must be applied that took part in the model's training (``Method.trains_model``).
        """
        raise NotImplementedError(f"model {self.info.ref} has no calibration examples")

    def supervised(self, batch: Any) -> tuple[Tensor, Tensor]:
        """A forward pass as the model is now: logits (S, classes) and targets (S,) of every scored position.

        Gradients flow when they are enabled.
        """
        raise NotImplementedError(f"model {self.info.ref} has no supervised forward pass")

    def weight_bytes(self) -> float:
        """Bytes of all weights and buffers as they would be stored, those of compressed ones as their methods hold them."""
        named = {**dict(self.module.named_parameters()), **dict(self.module.named_buffers())}
        dense = {name: t for name, t in named.items() if name not in self.stored}
        distinct = {id(t): t for t in dense.values()}.values()
        return sum(tensor_bytes(t, self.info.dense_bits) for t in distinct) + sum(self.stored.values())

    def served_bytes(self) -> float:
        """``weight_bytes``, and those of weights that a method adds to the model."""
        return self.weight_bytes()

    def dense_weight_bytes(self) -> float:
        """Bytes of all weights and buffers where nothing is compressed."""
        distinct = {id(t): t for t in [*self.module.parameters(), *self.module.buffers()]}.values()
        return sum(tensor_bytes(t, self.info.dense_bits) for t in distinct)

    @contextmanager
    def storing(self, stored: Mapping[str, float]) -> Iterator[None]:
        """Inside the ``with`` block these parameters count the given bytes.

        Raises:
            Infeasible: another method holds one of them in a compressed form already.
        """
        twice = sorted(self.stored.keys() & stored.keys())
        if twice:
            raise Infeasible(f"{twice[0]} is compressed twice: a trial takes one weight method per matrix")
        before = vars(self).get("stored")
        self.stored = {**self.stored, **stored}
        try:
            yield
        finally:
            if before is None:
                del self.stored
            else:
                self.stored = before


def tensor_bytes(tensor: Tensor, dense_bits: int) -> float:
    """Bytes of a dense tensor: float32 counts ``dense_bits`` per element, every other type what it takes."""
    bits = dense_bits if tensor.dtype is torch.float32 else 8 * tensor.element_size()
    return tensor.numel() * bits / 8


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

    def trained_with(self, info: ModelInfo, methods: tuple[Method, ...]) -> tuple[Method, ...]:
        """Those of a trial's methods that ``weights`` trains the model with; what calibrates on it applies them first."""
        return tuple(method for method in methods if method.trains_model)

    def calibration_stages(self, info: ModelInfo, methods: tuple[Method, ...]) -> tuple[Stage, ...]:
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
