"""Methods that repair a compressed model: what they learn stands beside its weights, which nothing changes.

What is learned, is learned through the compressed model: the stage of the training has the weight method of the trial in place
(``learned_on: this``), another one, or none, so that what one compression has taught can be tried behind another.

Shape suffixes: S scored positions, W vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from isoflop.core.errors import Infeasible, UserError
from isoflop.core.hashing import derive_seed
from isoflop.core.hook import Hook
from isoflop.core.knobs import Knob, KnobValue
from isoflop.core.stage import Stage, StageContext
from isoflop.methods.base import METHODS, Method, build
from isoflop.methods.calibration import OnModel
from isoflop.methods.own_weights import Learner, OwnWeightsStage, texts_of, training_seconds
from isoflop.models.base import Checkpoint, Model, ModelInfo
from isoflop.models.family import split_ref
from isoflop.models.hooks.matrices import MATRICES
from isoflop.models.hooks.occupant import Occupant, tensor_bytes
from isoflop.models.lm import LmBatch, LmInfo
from isoflop.models.training.taught import InTraining, in_its_hooks

if TYPE_CHECKING:
    from isoflop.methods.probe import Probe

HERE, NOWHERE = "this", "none"


@dataclass(frozen=True)
class RepairSchedule:
    """Up over the first steps, then down to nothing; gradients are clipped to norm 1 (the released script)."""

    steps: int
    warmup: float
    final: float = 0.0
    clip: float = 1.0


class Learned(nn.Module):
    """Base class of what is learned: it remembers for which width and vocabulary.

    Args:
        info: of the model that it belongs to.
    """

    base: Tensor

    def __init__(self, info: ModelInfo) -> None:
        super().__init__()
        self.register_buffer("base", torch.tensor(base_of(info)))


def base_of(info: ModelInfo) -> int:
    """A number for width and vocabulary of a model: what is learned for one does not fit another."""
    tokenizer = getattr(info, "tokenizer", None)
    vocabulary = getattr(info, "vocabulary", None) if tokenizer is None else tokenizer.key
    return derive_seed("base", info.geometry.get("width"), info.geometry.get("vocab_size"), vocabulary)


def text_loss(model: Model, texts: LmBatch) -> Tensor:
    """Negative log-likelihood of each text's tokens from its second one on, summed; mean over the texts."""
    logits_SW, targets_S = model.supervised(texts)
    return F.cross_entropy(logits_SW.float(), targets_S, reduction="sum") / len(texts.ids_BT)


@dataclass(frozen=True)
class RepairMethod(Learner):
    """Base class of methods that learn something beside a compressed model; occupants keep it (``Occupant.tensors``).

    Each step minimises the loss of ``batch`` texts of the model's calibration text (a sweep's ``calibration``), summed over the
    tokens of a text, with AdamW without decay; rates rise over ``warmup`` and fall to nothing. All of the model is frozen.
    """

    family: ClassVar[str] = "repair"
    calibrates: ClassVar[bool] = True
    learns_behind: ClassVar[frozenset[Hook[Any]]] = frozenset({MATRICES})

    learned_on: Annotated[str, Knob(doc="the compression that it is learned through: this (the trial's), none (the dense model), or one by name and knobs, rtn?bits=2&group=32")] = HERE  # fmt: skip
    steps: Annotated[int, Knob(low=0, high=1_000_000, doc="of the training, 30,000 in the released script; 0: as it is drawn")] = 1000  # fmt: skip
    batch: Annotated[int, Knob(low=1, high=4096, log=True, unit="texts", doc="of a step; 2 in the released script")] = 8
    warmup: Annotated[float, Knob(low=0.0, high=1.0, doc="share of the steps with rising rates; 500 of 30,000 in the released script")] = 0.05  # fmt: skip
    lr: Annotated[float, Knob(low=1e-6, high=10.0, log=True, doc="peak learning rate")] = 1e-3

    # Behind what it is learned

    @property
    def named(self) -> Method | None:
        """The weight method that ``learned_on`` names; None where it names none.

        Raises:
            UserError: no method of that name, or none of those knobs.
            Infeasible: it acts elsewhere than on matrices.
        """
        if self.learned_on in (HERE, NOWHERE):
            return None
        where = f"method {self.name}: learned_on"
        try:
            name, knobs = split_ref(self.learned_on)
        except UserError as error:
            raise UserError(f"{where}: {str(error).removeprefix('model ')}") from error
        method = build(name, knobs, where)
        if MATRICES not in method.hooks:
            weights = [one for one in METHODS if MATRICES in METHODS.get(one).hooks]
            raise Infeasible(
                f"{where} = {self.learned_on}: {name} compresses no weights; allowed: this, none, {', '.join(weights)}"
            )
        return method

    def check(self, info: ModelInfo) -> None:
        """Refuse models without text to learn from, and compressions that cannot be."""
        super().check(info)
        if not isinstance(info, LmInfo):
            raise Infeasible(f"method {self.name}: model {info.ref} is no language model; allowed: language models")
        if (named := self.named) is not None:
            named.check(info)

    def as_trained(self) -> Self:
        """Whatever it is learned behind is a field of the stage."""
        return replace(self, learned_on=HERE)

    def prepare(
        self, info: ModelInfo, weights: Stage | None, seed: int, trained_with: tuple[Method, ...] = ()
    ) -> Stage | None:
        """The training behind no method of the trial."""
        return self.prepare_behind(info, weights, seed, trained_with, ())

    def prepare_behind(
        self,
        info: ModelInfo,
        weights: Stage | None,
        seed: int,
        trained_with: tuple[Method, ...],
        behind: tuple[tuple[Method, Stage | None], ...],
    ) -> Stage | None:
        """The training; one for all trials that learn the same behind the same."""
        self.check(info)
        named = self.named
        if named is not None:
            behind = ((named, named.prepare(info, weights, seed, trained_with)),)
        if self.learned_on == NOWHERE or not self.steps:
            behind = ()
        source = OnModel.source(info, weights, seed, trained_with)
        methods, stages = (tuple(pair[part] for pair in behind) for part in (0, 1))
        return OwnWeightsStage(**source, method=self.as_trained(), behind=methods, behind_prepared=stages)  # type: ignore[arg-type]

    # The training

    @property
    def learning_rate(self) -> float:
        """The knob ``lr``."""
        return self.lr

    @property
    def schedule(self) -> RepairSchedule:
        """Of ``steps``."""
        return RepairSchedule(self.steps, self.warmup)

    @property
    def examples(self) -> int:
        """Texts of the training."""
        return self.steps * self.batch

    def lessons(self, model: Model, ctx: StageContext, seed: int) -> Iterator[Any]:
        """Calibration texts, ``batch`` at a time."""
        return self.texts(model, ctx, self.steps, seed)

    def texts(self, model: Model, ctx: StageContext, steps: int, seed: int) -> Iterator[LmBatch]:
        """Calibration texts of so many steps, as much of each as the model has room for."""
        room = model.info.geometry["positions"] - self.tokens_before(model.info)
        for texts in texts_of(model, ctx, steps, self.batch, derive_seed("repair", seed)):
            yield LmBatch(texts.ids_BT[:, :room], texts.targets_BT[:, :room])

    def loss(self, model: Model, module: nn.Module, lesson: Any) -> Tensor:
        """Through the model as it is, summed over each text's tokens, mean over the texts."""
        with in_its_hooks(self, model, InTraining(module)):
            return text_loss(model, lesson)

    # At work

    def module_of(self, model: Model, prepared: Any) -> nn.Module | None:
        """What was learned.

        Raises:
            Infeasible: it was learned for another width or vocabulary.
        """
        state = prepared.state(self.name) if isinstance(prepared, Checkpoint) else None
        base = state.get("base") if state is not None else getattr(prepared, "base", None)
        if base is not None and int(base) != base_of(model.info):
            raise Infeasible(
                f"method {self.name}: what was learned belongs to a model of another width or vocabulary than {model.info.ref}; "
                "allowed: compressed forms of one model"
            )
        return super().module_of(model, prepared)

    def footprint(self, model: Model, ctx: StageContext) -> dict[str, float]:
        """What is kept beside the model, once, and what the training took. Cache and FLOPs are the task's to measure."""
        held = self.kept(model).tensors()
        return {
            "method_params": float(sum(t.numel() for t in held)),
            "method_bytes": sum(tensor_bytes(t, model.info.dense_bits) for t in held),
            "training_seconds": getattr(self.kept(model), "seconds", 0.0),
        }

    def kept(self, model: Model) -> Occupant:
        """The occupant that keeps what was learned. Raises ValueError when the method is not applied."""
        occupant = model.occupant(self.hooks[0])
        if occupant is None:
            raise ValueError(f"method {self.name} is not applied")
        return occupant

    @staticmethod
    def seconds_of(prepared: Any) -> float:
        """CPU seconds of the training."""
        return training_seconds(prepared)

    @classmethod
    def tried(cls) -> Mapping[str, Sequence[Mapping[str, KnobValue]]]:
        """Settings in which a knob shows what it does (``Probe.settings``)."""
        return {}

    @classmethod
    def probe(cls) -> Probe:
        """An untrained decoder with grouped queries."""
        from isoflop.methods.repair.probe import RepairProbe

        return RepairProbe(cls.tried())
