"""Healing: matrices in forms that are trained for a while on the model's loss, all else as it is, before they are stored.

A method gives the form of each matrix; the training, its stage and the stored artefact are the same for all of them. The loop is
that of every method with weights of its own (``isoflop.methods.own_weights``).

Shape suffixes: O outputs (rows), I inputs (columns), S scored positions, W classes.
"""

from __future__ import annotations

import json
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from isoflop.core.hashing import derive_seed
from isoflop.core.hook import Hook
from isoflop.core.knobs import Knob, KnobValue
from isoflop.core.stage import Stage, StageContext
from isoflop.methods.base import Method
from isoflop.methods.calibration import OnModel
from isoflop.methods.own_weights import Learner, trained
from isoflop.methods.weights.artefact import Artefact, Serving
from isoflop.methods.weights.base import MatrixCodecMethod, Served
from isoflop.methods.weights.fitness import rows_of, size_of
from isoflop.methods.weights.payloads import DensePayload, Payload
from isoflop.methods.weights.statistics import CalibrationStage, Statistics, ViewStats, calibration_seed, collect
from isoflop.methods.weights.views import LinearView, linear_views
from isoflop.models.base import Model, ModelInfo
from isoflop.models.hooks.matrices import MATRICES
from isoflop.models.hooks.occupant import Occupant
from isoflop.models.training.loop import Keeper

if TYPE_CHECKING:
    from isoflop.methods.probe import Probe

_LOG = "healing.json"


class Form(nn.Module, ABC):
    """A matrix in the form that a method gives it; its parameters are what healing trains."""

    @abstractmethod
    def weight(self) -> Tensor:
        """The matrix (O, I), with gradients."""

    @abstractmethod
    def payload(self) -> Payload:
        """What is stored of it."""

    def entries(self) -> int:
        """Numbers that it consists of; its parameters, where nothing else is said."""
        return sum(parameter.numel() for parameter in self.parameters())


class Whole(Form):
    """A matrix that stays as it is, and learns nothing."""

    def __init__(self, weight_OI: Tensor) -> None:
        super().__init__()
        self._weight_OI = weight_OI  # the model's own, and no buffer

    def weight(self) -> Tensor:
        """As it is."""
        return self._weight_OI

    def payload(self) -> Payload:
        """A copy."""
        return DensePayload.of(self._weight_OI)

    def entries(self) -> int:
        """All of its weights."""
        return self._weight_OI.numel()


class Forms(nn.Module):
    """The forms of all matrices of a model, and passes of the model on them."""

    def __init__(self, views: Sequence[LinearView], forms: Sequence[Form]) -> None:
        super().__init__()
        self.forms = nn.ModuleList(forms)
        self._views = list(views)

    def supervised(self, model: Model, batch: Any) -> tuple[Tensor, Tensor]:
        """``Model.supervised`` with the forms' matrices in the parameters' place, for one pass."""
        return functional_call(_Passes(model), self._parameters_of_model(), (batch,))

    def _parameters_of_model(self) -> dict[str, Tensor]:
        """By name; matrices that stay as they are are left out, unless they share a parameter with one that does not."""
        held: dict[str, list[tuple[LinearView, Form]]] = {}
        for view, form in zip(self._views, self.forms, strict=True):
            assert isinstance(form, Form)
            held.setdefault(view.parameter, []).append((view, form))
        found = {}
        for name, parts in held.items():
            if all(isinstance(form, Whole) for _, form in parts):
                continue
            like = parts[0][0].holder
            weights = [form.weight().to(like) for _, form in parts]
            stored = [w.T if view.transposed else w for (view, _), w in zip(parts, weights, strict=True)]
            found[f"module.{name}"] = stored[0] if parts[0][0].expert is None else torch.stack(stored)
        return found


class _Passes(nn.Module):
    """A model's supervised pass as a module, for ``functional_call``."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.module = model.module
        self._supervised = model.supervised

    def forward(self, batch: Any) -> tuple[Tensor, Tensor]:
        return self._supervised(batch)


@dataclass(frozen=True)
class HealingSchedule:
    """Warm-up over a tenth of the steps, then down to nothing; gradients are clipped to norm 1."""

    steps: int
    warmup: float = 0.1
    final: float = 0.0
    clip: float = 1.0


@dataclass(frozen=True, eq=False)
class Healed:
    """A model in stored form, and how it came about.

    Attributes:
        params: entries of the stored forms, and of matrices that stay whole.
        losses: of each step of the training.
        seconds: CPU seconds of everything.
        profile: further series, by name (see ``Method.trace``).
    """

    artefact: Artefact
    params: int
    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0
    profile: dict[str, list[float]] = field(default_factory=dict)

    def save(self, folder: Path) -> None:
        """Write everything into a folder."""
        self.artefact.save(folder)
        log = {"params": self.params, "losses": self.losses, "seconds": self.seconds, "profile": self.profile}
        (folder / _LOG).write_text(json.dumps(log) + "\n")

    @classmethod
    def load(cls, folder: Path, device: str = "cpu") -> Healed:
        """The inverse of :meth:`save`; payloads are read lazily."""
        return cls(Artefact(folder, device=device), **json.loads((folder / _LOG).read_text()))


class HealedServing(Serving):
    """Decoded payloads in the parameters' place, with what is known of the training."""

    healed: Healed


@dataclass(frozen=True)
class HealedMethod(MatrixCodecMethod, Learner):
    """Base class of methods whose stored forms are healed on training examples (``form``).

    Trained are the parameters of the forms: not matrices that stay whole, nor anything outside the matrices. The loss is the
    model's own, mixed with the divergence from the uncompressed model's logits where ``heal_kd`` says so.
    """

    calibrates: ClassVar[bool] = True

    heal_steps: Annotated[int, Knob(low=0, high=1_000_000, doc="of training the stored form; 0 for none")] = 100
    heal_lr: Annotated[float, Knob(low=1e-6, high=1.0, log=True, doc="peak learning rate of that training")] = 1e-3
    heal_batch: Annotated[int, Knob(low=1, high=4096, log=True, unit="examples", doc="training examples of a step")] = 8
    heal_kd: Annotated[float, Knob(low=0.0, high=1.0, doc="share of the divergence from the uncompressed model's logits in its loss")] = 0.0  # fmt: skip

    @abstractmethod
    def form(self, weight_OI: Tensor, stats: ViewStats | None, seed: int) -> Form:
        """The form of one matrix before it is healed.

        Args:
            stats: of its inputs, where ``calibration_examples`` are asked for.
            seed: of what is drawn.
        """

    @property
    def calibration_examples(self) -> int:
        """Training examples of which statistics are wanted before; 0 for none."""
        return 0

    @property
    def calibration_sizes(self) -> bool:
        """Whether mean and largest magnitudes are among them."""
        return False

    def encode(self, weight_OI: Tensor, stats: ViewStats | None = None) -> Payload:
        """The stored form as it is before healing."""
        return self.form(weight_OI, stats, 0).payload()

    def begun(self, steps: int) -> Self:
        """The same method with at most so many steps of training."""
        return replace(self, heal_steps=min(self.heal_steps, steps))

    # The training

    @property
    def learning_rate(self) -> float:
        """The knob ``heal_lr``."""
        return self.heal_lr

    @property
    def schedule(self) -> HealingSchedule:
        """Of ``heal_steps``."""
        return HealingSchedule(self.heal_steps)

    @property
    def examples(self) -> int:
        """A batch for each step."""
        return self.heal_steps * self.heal_batch

    def lessons(self, model: Model, ctx: StageContext, seed: int) -> Iterator[Any]:
        """Batches of training examples."""
        drawn = model.calibration(ctx, self.examples, derive_seed("healing", seed))
        return islice(in_parts(drawn, self.heal_batch), self.heal_steps)

    @property
    def kd_temperature(self) -> float:
        """By which logits are divided in the divergence, which grows by its square."""
        return 1.0

    def loss(self, model: Model, module: nn.Module, lesson: Any) -> Tensor:
        """Cross-entropy of the served model, and how far its logits are from the uncompressed ones."""
        assert isinstance(module, Forms)
        logits_SW, targets_S = module.supervised(model, lesson)
        loss = F.cross_entropy(logits_SW.float(), targets_S)
        if not self.heal_kd:
            return loss
        with torch.no_grad():
            dense_SW, _ = model.supervised(lesson)
        heat = self.kd_temperature
        wanted_SW, found_SW = (dense_SW.float() / heat).log_softmax(-1), (logits_SW.float() / heat).log_softmax(-1)
        apart = heat**2 * F.kl_div(found_SW, wanted_SW, log_target=True, reduction="batchmean")
        return (1 - self.heal_kd) * loss + self.heal_kd * apart

    def check(self, info: ModelInfo) -> None:
        """Refuse models without a loss, where one is trained on."""
        super().check(info)
        if self.heal_steps:
            info.check_loss(f"method {self.name} with heal_steps = {self.heal_steps}")

    # The stage

    def relevant(self) -> Self:
        """The same method with knobs at their defaults that the others leave without effect: one stage for all of them."""
        return self if self.heal_steps else self.at_defaults("heal_lr", "heal_batch", "heal_kd")

    def prepare(
        self, info: ModelInfo, weights: Stage | None, seed: int, trained_with: tuple[Method, ...] = ()
    ) -> Stage | None:
        """The stage with the healed matrices."""
        self.check(info)
        source = OnModel.source(info, weights, seed, trained_with)
        method = self.relevant()
        calibration = None
        if wanted := method.calibration_examples:
            calibration = CalibrationStage(**source, n_calib=wanted, sizes=method.calibration_sizes)
        return HealedStage(**source, method=method, calibration=calibration)

    def calibrate(self, model: Model, ctx: StageContext, seed: int) -> Healed:  # type: ignore[override]
        """What the stages compute, on a loaded model."""
        wanted = self.calibration_examples
        statistics = collect(model, ctx, wanted, calibration_seed(seed)) if wanted else None
        return self.compress(model, ctx, statistics, seed)

    def compress(
        self, model: Model, ctx: StageContext, statistics: Statistics | None, seed: int, scratch: Path | None = None
    ) -> Healed:
        """Bring the matrices of a loaded model into their forms, heal them, and store them.

        Args:
            scratch: where a training that is killed is gone on with.
        """
        views = linear_views(model)
        forms = self.forms(views, statistics, seed)
        losses = self.heal(model, ctx, Forms(views, forms), seed, scratch)
        return self.stored(views, forms, losses)

    @torch.no_grad()
    def forms(self, views: Sequence[LinearView], statistics: Statistics | None, seed: int) -> list[Form]:
        """The forms of some views."""
        known = ((view, None) for view in views) if statistics is None else statistics.each(views)
        return [
            self.form(view.weight(), stats, derive_seed("form", self.name, view.name, seed)) for view, stats in known
        ]

    def heal(self, model: Model, ctx: StageContext, forms: Forms, seed: int, scratch: Path | None) -> list[float]:
        """Train the forms; the loss of each step. Nothing happens where nothing can learn."""
        if not self.heal_steps or not any(True for _ in forms.parameters()):
            return []
        keeper = None if scratch is None else Keeper(scratch)
        return trained(self, model, ctx, seed, keeper, forms)[1]

    @torch.no_grad()
    def stored(
        self,
        views: Sequence[LinearView],
        forms: Sequence[Form],
        losses: list[float],
        profile: dict[str, list[float]] | None = None,
    ) -> Healed:
        """Their payloads, counted."""
        payloads = {view.name: form.payload() for view, form in zip(views, forms, strict=True)}
        return Healed(Artefact(payloads), sum(form.entries() for form in forms), losses, profile=profile or {})

    def occupants(self, model: Model, prepared: Any) -> dict[Hook[Any], Occupant]:
        """The healed matrices, served."""
        if not isinstance(prepared, Healed):
            raise ValueError(f"method {self.name} is healed: apply() needs the value of its prepare() stage")
        views = linear_views(model)
        serving = HealedServing(views, lambda view: prepared.artefact[view.name], prepared.artefact.vectors)
        serving.healed = prepared
        return {MATRICES: serving}

    def served(self, model: Model, views: list[LinearView], prepared: Any) -> Served:
        """Those of the stage."""
        return super().served(model, views, prepared.artefact)

    def footprint(self, model: Model, ctx: StageContext) -> dict[str, float]:
        """Bytes, the entries of the stored forms (``stored_params``), and what the training took."""
        found, serving = super().footprint(model, ctx), model.occupant(MATRICES)
        assert isinstance(serving, HealedServing)
        return {
            **found,
            "stored_params": float(serving.healed.params),
            "training_seconds": serving.healed.seconds,
        }

    @classmethod
    def probe(cls) -> Probe:
        """What the training is like shows where there is one; ``tried`` says where other knobs show."""
        from isoflop.methods.weights.probe import WeightProbe

        some: dict[str, list[KnobValue]] = {"heal_lr": [1e-3, 1e-2], "heal_batch": [1, 2], "heal_kd": [0.0, 0.5]}
        healed = {name: [{"heal_steps": 2, name: value} for value in values] for name, values in some.items()}
        return WeightProbe(tried={**healed, **cls.tried()})

    @classmethod
    def tried(cls) -> Mapping[str, Sequence[Mapping[str, KnobValue]]]:
        """Settings in which a knob shows what it does, where none shows by itself (``Probe.settings``)."""
        return {}

    def trace(self, prepared: Any) -> Mapping[str, Sequence[float]]:
        """The losses of the training, and what else was measured."""
        if not isinstance(prepared, Healed):
            return {}
        return {**({"loss": prepared.losses} if prepared.losses else {}), **prepared.profile}


def in_parts(batches: Iterable[Any], size: int) -> Iterator[Any]:
    """Batches of training examples in parts of ``size``, none of which reaches over two of them."""
    for batch in batches:
        rows = list(range(size_of(batch)))
        for start in range(0, len(rows), size):
            yield rows_of(batch, rows[start : start + size])


@dataclass(frozen=True)
class HealedStage(OnModel):
    """A model's matrices as a healed method stores them; trained in float32, since small steps vanish in 16 bits."""

    kind: ClassVar[str] = "healed-weights"

    method: HealedMethod
    calibration: CalibrationStage | None

    def deps(self) -> tuple[Stage, ...]:
        """Those of the model, and the calibration."""
        return (*super().deps(), *(() if self.calibration is None else (self.calibration,)))

    def compute(self, ctx: StageContext, folder: Path) -> None:
        """Compress, heal, save."""
        options = tuple((name, "float32" if name == "dtype" else value) for name, value in self.options)
        statistics = None if self.calibration is None else ctx.get(self.calibration)
        with replace(self, options=options).model(ctx) as model:
            started = time.process_time()
            healed = self.method.compress(model, ctx, statistics, self.seed, ctx.scratch(self))
        replace(healed, seconds=time.process_time() - started).save(folder)

    def load(self, ctx: StageContext, folder: Path) -> Healed:
        """The payloads, read lazily."""
        return Healed.load(folder, ctx.device)
