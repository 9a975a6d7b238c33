"""The loop of every training, its schedule, and how it goes on after a kill; initial weights and rates that follow the width."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from isoflop.core.hashing import derive_seed

StepT = TypeVar("StepT")
log = logging.getLogger(__name__)


class Schedule(Protocol):
    """The fields of a recipe that :func:`fit` reads."""

    @property
    def steps(self) -> int:
        """Optimiser steps."""

    @property
    def warmup(self) -> float:
        """Share of the steps with a rising learning rate."""

    @property
    def final(self) -> float:
        """Share of the learning rate left at the end."""

    @property
    def clip(self) -> float:
        """Gradient norm; infinite for none."""


class Rates(Protocol):
    """The fields of a recipe that :func:`rate_groups` reads."""

    @property
    def lr(self) -> float:
        """Learning rate of matrices at width 64."""

    @property
    def vector_lr(self) -> float:
        """Learning rate of vectors, and of the head at width 64."""

    @property
    def embedding_lr(self) -> float:
        """Learning rate of token embeddings, times the width."""


Pace = Callable[[torch.optim.Optimizer, int], None]
"""Sets the learning rates of a step, counted from 0."""


def fit(
    groups: Iterable[nn.Parameter] | list[dict[str, Any]],
    recipe: Schedule,
    steps: Iterable[StepT],
    loss_of: Callable[[StepT], Tensor],
    *,
    lr: float | None = None,
    betas: tuple[float, float] = (0.9, 0.98),
    weight_decay: float = 0.0,
    fused: bool = True,
    learned: Callable[[float], None] | None = None,
    keeper: Keeper | None = None,
    seed: int = 0,
) -> list[float]:
    """Train parameters with AdamW; returns the loss of every step. The one loop of every training but the exchanged ones.

    Args:
        groups: parameters, or groups of them with their peak learning rates (``lr``).
        recipe: number of steps, warm-up, decay, clipping.
        steps: batches, drawn one by one: the next one after the weights have learned from the one before.
        loss_of: the scalar loss of a batch, with gradients.
        lr: peak learning rate of groups that name none.
        learned: is told the loss of each batch before the next one is drawn, for curricula.
        keeper: keeps weights and optimiser now and then, and goes on where a killed training stopped; batches before that
            are drawn again and their losses told again, so that lessons and curriculum are where they were.
        seed: of what modules draw in a step (dropout, noise): the same numbers whatever was drawn before it.
    """
    options: dict[str, Any] = {} if lr is None else {"lr": lr}
    optimizer = torch.optim.AdamW(groups, betas=betas, weight_decay=weight_decay, fused=fused, **options)
    return descend(optimizer, recipe, steps, loss_of, learned=learned, keeper=keeper, seed=seed)


def descend(
    optimizer: torch.optim.Optimizer,
    recipe: Schedule,
    steps: Iterable[StepT],
    loss_of: Callable[[StepT], Tensor],
    pace: Pace | None = None,
    learned: Callable[[float], None] | None = None,
    keeper: Keeper | None = None,
    seed: int = 0,
) -> list[float]:
    """Train on every step with the recipe's schedule and clipping; returns the losses.

    Args:
        optimizer: each group's learning rate is its peak.
        loss_of: the scalar loss of a step, with gradients.
        pace: in place of the recipe's schedule.
        learned, keeper, seed: see ``fit``.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def differentiate(step: StepT) -> Tensor:
        loss = loss_of(step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if math.isfinite(recipe.clip):
            nn.utils.clip_grad_norm_(parameters, recipe.clip)
        return loss.detach()

    return follow(optimizer, recipe, steps, differentiate, pace, learned, keeper, seed)


def follow(
    optimizer: torch.optim.Optimizer,
    recipe: Schedule,
    steps: Iterable[StepT],
    differentiate: Callable[[StepT], Tensor],
    pace: Pace | None = None,
    learned: Callable[[float], None] | None = None,
    keeper: Keeper | None = None,
    seed: int = 0,
) -> list[float]:
    """Step along directions with the recipe's schedule of learning rates; returns the losses.

    Args:
        optimizer: each group's learning rate is its peak.
        differentiate: leaves in ``grad`` of the parameters the direction of a step, and returns its loss.
        pace, learned, keeper, seed: see ``descend``.
    """
    paced = pace or linear(optimizer, recipe)
    losses: list[Tensor] = [] if keeper is None else [torch.tensor(loss) for loss in keeper.restore(optimizer)]
    done = len(losses)
    for number, step in enumerate(steps):
        if number >= done:
            paced(optimizer, number)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(derive_seed("step", seed, number))
                losses.append(differentiate(step))
        if learned is not None:
            learned(float(losses[number]))
        if number < done:
            continue
        optimizer.step()
        if keeper is not None:
            keeper.note(optimizer, losses)
    return torch.stack(losses).tolist()


def linear(optimizer: torch.optim.Optimizer, recipe: Schedule) -> Pace:
    """Each group's own peak times ``schedule``."""
    peaks = [group["lr"] for group in optimizer.param_groups]

    def pace(optimizer: torch.optim.Optimizer, number: int) -> None:
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * schedule(number, recipe)

    return pace


@dataclass(frozen=True)
class Unclipped:
    """A recipe whose learning rates come from elsewhere, and whose gradients stay as they are."""

    steps: int
    warmup: float = 0.0
    final: float = 1.0
    clip: float = math.inf


def one_cycle(optimizer: torch.optim.Optimizer, peak: float, steps: int) -> Pace:
    """torch's ``OneCycleLR``: up to ``peak`` and down to almost nothing, momentum the other way round."""
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=peak, total_steps=steps)

    def pace(optimizer: torch.optim.Optimizer, number: int) -> None:
        if number:
            cycle.step()

    return pace


class Keeper:
    """Keeps a training's state in a folder that outlives the process, and gives it back to the next one.

    Args:
        folder: of one training; whoever owns it removes it when the training is done.
        every: seconds between two states.

    Attributes:
        modules: those whose buffers change while they are trained (running means, codebooks), which are kept, too.
    """

    def __init__(self, folder: Path, every: float = 60.0) -> None:
        self.modules: Sequence[nn.Module] = ()
        self._path = folder / "training-state.pt"
        self._every = every
        self._last = time.monotonic()

    def restore(self, optimizer: torch.optim.Optimizer) -> list[float]:
        """Put weights and optimiser back where they were; the losses until then, none for a training that begins."""
        if not self._path.exists():
            return []
        tensors = [*_parameters(optimizer), *self._buffers()]
        try:
            state = torch.load(self._path, weights_only=True)
            if [t.shape for t in state["tensors"]] != [t.shape for t in tensors]:
                raise ValueError("it is of another training")
            optimizer.load_state_dict(state["optimizer"])
        except Exception as error:  # torn by a power cut, or of other code: the training begins again
            log.warning("training state %s is of no use (%s); beginning anew", self._path, error)
            self._path.unlink()
            return []
        for tensor, kept in zip(tensors, state["tensors"], strict=True):
            tensor.data.copy_(kept)
        losses: list[float] = state["losses"]
        return losses

    def note(self, optimizer: torch.optim.Optimizer, losses: Sequence[Tensor]) -> None:
        """After a step: keep the state when it is time. Written elsewhere and renamed, so that no half of it is ever read."""
        if time.monotonic() - self._last < self._every:
            return
        part = self._path.with_suffix(".part")
        state = {
            "tensors": [t.detach() for t in [*_parameters(optimizer), *self._buffers()]],
            "optimizer": optimizer.state_dict(),
            "losses": [float(loss) for loss in losses],
        }
        torch.save(state, part)
        part.replace(self._path)
        self._last = time.monotonic()

    def _buffers(self) -> list[Tensor]:
        return [buffer for module in self.modules for buffer in module.buffers()]


def _parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def schedule(step: int, recipe: Schedule) -> float:
    """Learning rate at a step as a share of its peak: linear warm-up, then linear decay to ``final``."""
    warmup = max(1, round(recipe.warmup * recipe.steps))
    if step < warmup:
        return (step + 1) / warmup
    return 1 - (1 - recipe.final) * (step - warmup) / max(1, recipe.steps - warmup)


def rate_groups(
    parameters: Iterable[nn.Parameter],
    embedding: nn.Parameter,
    head: nn.Parameter,
    width: int,
    rates: Rates,
    fixed: Iterable[nn.Parameter] = (),
) -> list[dict[str, Any]]:
    """Parameter groups of a decoder: rates of matrices, head and embeddings go as 1/width, that of vectors is fixed.

    Args:
        parameters: of the decoder and of what feeds it; ``embedding`` may be among them.
        fixed: matrices among them with the rate of vectors, because their inputs do not grow with the width.
    """
    everything = {id(p): p for p in parameters}
    everything.pop(id(embedding), None)
    flat = {id(p): p for p in [*fixed, *(p for p in everything.values() if p.ndim == 1)]}
    matrices = [p for key, p in everything.items() if key not in flat]
    return [
        {"params": matrices, "lr": rates.lr * 64 / width},
        {"params": [head], "lr": rates.vector_lr * 64 / width},
        {"params": list(flat.values()), "lr": rates.vector_lr},
        {"params": [embedding], "lr": rates.embedding_lr / width},
    ]


@torch.no_grad()
def draw_weights(
    named: Iterable[tuple[str, nn.Parameter]], head: nn.Parameter, layers: int, embedding_std: float, seed: int
) -> None:
    """Draw a decoder's weights (and those of what feeds it), then its head's, from one generator.

    Embeddings N(0, embedding_std²); matrices N(0, 1/fan_in); residual outputs also divided by √(2·layers); head
    N(0, 0.01/d); norms 1, biases 0. Hugging Face's default (0.02 everywhere) leaves such narrow models at chance.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(parameter: nn.Parameter, std: float) -> None:
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)

    for name, parameter in named:
        if "embed_tokens" in name:
            draw(parameter, embedding_std)
        elif parameter.ndim >= 2:  # experts of a mixture lie in one parameter, inputs last
            residual = name.endswith(("o_proj.weight", "down_proj.weight", "experts.down_proj"))
            draw(parameter, parameter.shape[-1] ** -0.5 / ((2 * layers) ** 0.5 if residual else 1.0))
        else:
            parameter.fill_(1.0 if "norm" in name else 0.0)
    draw(head, 0.1 * head.shape[1] ** -0.5)


def record_training(
    folder: Path, losses: Sequence[float], started: float, figures: Mapping[str, float] | None = None
) -> dict[str, float]:
    """Write ``training.json``: steps, mean loss of the last tenth, CPU seconds since ``started``, and other figures."""
    tail = losses[-max(1, len(losses) // 10) :]
    record = {
        "steps": len(losses),
        "final_loss": sum(tail) / len(tail),
        **(figures or {}),
        "cpu_seconds": time.process_time() - started,
    }
    (folder / "training.json").write_text(json.dumps(record) + "\n")
    return record
