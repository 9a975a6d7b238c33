"""Methods whose own weights are trained on a model that stays as it is: on checkpoints and on models trained here alike.

What takes part in the training of a model itself is trained elsewhere (``isoflop.models.training``); the loop is the same.
"""

from __future__ import annotations

import json
import time
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from isoflop.core.errors import Infeasible
from isoflop.core.stage import Stage, StageContext
from isoflop.methods.base import Method
from isoflop.methods.calibration import OnModel
from isoflop.models.base import Checkpoint, Model, ModelInfo
from isoflop.models.lm import LmBatch
from isoflop.models.training.loop import Keeper, Pace, Schedule, descend, record_training


@dataclass(frozen=True)
class Learner(Method):
    """Base class: what a method says of the training of its own weights (``build``, ``learning_rate``)."""

    @property
    @abstractmethod
    def schedule(self) -> Schedule:
        """Steps, warm-up, decay, clipping. Without steps the weights stay as they are drawn."""

    @property
    @abstractmethod
    def examples(self) -> int:
        """Of all lessons together."""

    @abstractmethod
    def lessons(self, model: Model, ctx: StageContext, seed: int) -> Iterable[Any]:
        """One for each step."""

    @abstractmethod
    def loss(self, model: Model, module: nn.Module, lesson: Any) -> Tensor:
        """The scalar loss of a lesson, with gradients."""

    def drawn(self, model: Model, ctx: StageContext, seed: int) -> nn.Module | None:
        """The weights before the training, where they go by the model's own; by default ``untrained``."""
        return self.untrained(model.info, seed)

    def pace(self, optimizer: torch.optim.Optimizer) -> Pace | None:
        """Learning rates step by step where ``schedule`` does not give them."""
        return None

    def prepare(
        self, info: ModelInfo, weights: Stage | None, seed: int, trained_with: tuple[Method, ...] = ()
    ) -> Stage | None:
        """The training, for all values of knobs that act at inference only."""
        self.check(info)
        return OwnWeightsStage(**OnModel.source(info, weights, seed, trained_with), method=self.as_trained())

    def calibrate(self, model: Model, ctx: StageContext, seed: int) -> nn.Module | None:
        """What the stage computes, on a loaded model."""
        return trained(self, model, ctx, seed)[0]

    def trace(self, prepared: Any) -> Mapping[str, Sequence[float]]:
        """The losses of the training."""
        losses = prepared.log.get("losses", ()) if isinstance(prepared, Checkpoint) else ()
        return {"loss": losses} if losses else {}


@dataclass(frozen=True)
class OwnWeightsStage(OnModel):
    """``<method>.safetensors``, and ``training.json``: steps, losses, and the CPU seconds that it took.

    AdamW without decay, in float32 whatever the type at evaluation: small steps vanish in 16 bits.

    Attributes:
        method: a ``Learner``.
    """

    kind: ClassVar[str] = "own-weights"

    method: Any

    def compute(self, ctx: StageContext, folder: Path) -> None:
        """Train, save."""
        from safetensors.torch import save_file

        options = tuple((name, "float32" if name == "dtype" else value) for name, value in self.options)
        with replace(self, options=options).model(ctx) as model:
            started = time.process_time()
            module, losses = trained(self.method, model, ctx, self.seed, Keeper(ctx.scratch(self)))
        state = {name: t.detach().contiguous().cpu() for name, t in module.state_dict().items()}
        save_file(state, folder / f"{self.method.name}.safetensors")
        log = record_training(folder, losses, started) if losses else {"steps": 0}
        (folder / "training.json").write_text(json.dumps({**log, "losses": losses}) + "\n")

    def load(self, ctx: StageContext, folder: Path) -> Checkpoint:
        """Where the files are."""
        return Checkpoint(folder, json.loads((folder / "training.json").read_text()))


def trained(
    method: Learner,
    model: Model,
    ctx: StageContext,
    seed: int,
    keeper: Keeper | None = None,
    begun: nn.Module | None = None,
) -> tuple[nn.Module, list[float]]:
    """The method's weights behind all lessons, and the loss of each.

    Nothing of the model changes: its parameters take no gradients while it lasts.

    Args:
        begun: where its weights begin; by default as they are drawn.

    Raises:
        Infeasible: the loss does not depend on the weights.
    """
    module = begun if begun is not None else method.drawn(model, ctx, seed)
    if module is None:
        raise ValueError(f"method {method.name} has no weights to train")
    module = module.to(next(model.module.parameters()).device).train().requires_grad_(True)
    if keeper is not None:
        keeper.modules = [module]

    def loss_of(lesson: Any) -> Tensor:
        loss = method.loss(model, module, lesson)
        if not loss.requires_grad:
            raise Infeasible(
                f"method {method.name}: nothing that model {model.info.ref} says of its texts depends on what should learn; allowed: longer texts"
            )
        return loss

    learning = [(parameter, parameter.requires_grad) for parameter in model.module.parameters()]
    losses: list[float] = []
    try:
        model.module.requires_grad_(False)
        if method.schedule.steps:
            optimizer = torch.optim.AdamW(module.parameters(), lr=method.learning_rate, weight_decay=0.0)
            with torch.enable_grad():
                losses = descend(
                    optimizer,
                    method.schedule,
                    method.lessons(model, ctx, seed),
                    loss_of,
                    method.pace(optimizer),
                    keeper=keeper,
                    seed=seed,
                )
    finally:
        for parameter, before in learning:
            parameter.requires_grad_(before)
    return module.eval().requires_grad_(False), losses


def texts_of(model: Model, ctx: StageContext, steps: int, batch: int, seed: int) -> Iterator[LmBatch]:
    """A language model's calibration texts, ``batch`` for each of ``steps``."""
    done = 0
    for texts in model.calibration(ctx, 2 * steps * batch, seed):  # their last batches may be smaller
        for first in range(0, len(texts.ids_BT) - batch + 1, batch):
            if done == steps:
                return
            rows = slice(first, first + batch)
            yield LmBatch(texts.ids_BT[rows], texts.targets_BT[rows])
            done += 1


def training_seconds(prepared: Any) -> float:
    """CPU seconds that a training took, by the value of its stage."""
    return float(prepared.log.get("cpu_seconds", 0.0)) if isinstance(prepared, Checkpoint) else 0.0
