"""What every training of a tiny model shares: initial weights and learning rates that follow the width, schedule, loop."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

StepT = TypeVar("StepT")


class Schedule(Protocol):
    """The fields of a recipe that :func:`descend` reads."""

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
        """Gradient norm."""


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


def descend(
    optimizer: torch.optim.Optimizer, recipe: Schedule, steps: Iterable[StepT], loss_of: Callable[[StepT], Tensor]
) -> list[float]:
    """Train on every step with the recipe's schedule and clipping; returns the losses.

    Args:
        optimizer: each group's learning rate is its peak.
        loss_of: the scalar loss of a step, with gradients.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def differentiate(step: StepT) -> Tensor:
        loss = loss_of(step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, recipe.clip)
        return loss.detach()

    return follow(optimizer, recipe, steps, differentiate)


def follow(
    optimizer: torch.optim.Optimizer, recipe: Schedule, steps: Iterable[StepT], differentiate: Callable[[StepT], Tensor]
) -> list[float]:
    """Step along directions with the recipe's schedule of learning rates; returns the losses.

    Args:
        optimizer: each group's learning rate is its peak.
        differentiate: leaves in ``grad`` of the parameters the direction of a step, and returns its loss.
    """
    groups = optimizer.param_groups
    peaks = [group["lr"] for group in groups]
    losses: list[Tensor] = []
    for number, step in enumerate(steps):
        for group, peak in zip(groups, peaks, strict=True):
            group["lr"] = peak * schedule(number, recipe)
        losses.append(differentiate(step))
        optimizer.step()
    return torch.stack(losses).tolist()


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
        elif parameter.ndim == 2:
            residual = name.endswith(("o_proj.weight", "down_proj.weight"))
            draw(parameter, parameter.shape[1] ** -0.5 / ((2 * layers) ** 0.5 if residual else 1.0))
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
