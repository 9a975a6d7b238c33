"""A small regression to exchange gradients of, and the processes that train it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from isoflop.methods.gradients.base import GradientMethod
from isoflop.models.hooks.gradients import ExchangeReport
from isoflop.models.training.collectives import ByteMeter, Worker, run_together
from isoflop.models.training.distributed import Setting, connect, leave, simulate, train_rank

WIDTH, BATCH = 24, 12
Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Recipe:
    """The schedule of a training."""

    steps: int = 12
    warmup: float = 0.25
    final: float = 0.1
    clip: float = 1e9


class Regression(nn.Module):
    """Mean squared error of a network with two hidden layers, a convolution's weight of three dimensions among them."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.first = nn.Linear(width, width)
            self.mixing = nn.Conv1d(1, 2, 3, padding=1)
            self.last = nn.Linear(2 * width, 1)

    def forward(self, batch: Batch) -> Tensor:
        """The error of a batch."""
        x_BD, y_B = batch
        hidden_BD = torch.tanh(self.first(x_BD))
        mixed_BD = torch.tanh(self.mixing(hidden_BD[:, None])).flatten(1)
        return (self.last(mixed_BD)[:, 0] - y_B).square().mean()


def lessons(steps: int, width: int = WIDTH) -> Iterator[Batch]:
    """The same batches for everybody."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x_BD = torch.randn(BATCH, width, generator=generator)
        yield x_BD, x_BD[:, :3].sum(1).sin()


def share(batch: Batch, rank: int, workers: int) -> Batch:
    """A rank's rows."""
    rows = BATCH // workers
    part = slice(rank * rows, (rank + 1) * rows)
    return batch[0][part], batch[1][part]


def simulated(
    method: GradientMethod, recipe: Recipe | None = None, width: int = WIDTH
) -> tuple[Regression, ExchangeReport]:
    """A trained network and what its training sent."""
    recipe = recipe or Recipe()
    network = Regression(width)
    report = simulate(network, method, recipe, lessons(recipe.steps, width), share, 0)
    return network, report


def settings(
    method: GradientMethod, shapes: dict[str, torch.Size], steps: int = 100, clip: float = 1e9
) -> list[Setting]:
    """What the workers of a training are told."""
    return [Setting(method.workers, rank, 0, steps, clip, shapes) for rank in range(method.workers)]


def exchanged(
    exchanges: list[Any], step: int, grads: list[dict[str, Tensor]]
) -> tuple[list[dict[str, Tensor]], list[ByteMeter]]:
    """One step of all workers: their directions and meters."""
    meters = [ByteMeter(len(exchanges)) for _ in exchanges]
    workers = [Worker(e.step(step, g), m) for e, g, m in zip(exchanges, grads, meters, strict=True)]
    return run_together(workers), meters


def random_gradients(workers: int, shapes: dict[str, torch.Size], seed: int) -> list[dict[str, Tensor]]:
    """Gradients of all workers."""
    generator = torch.Generator().manual_seed(seed)
    return [{name: torch.randn(shape, generator=generator) for name, shape in shapes.items()} for _ in range(workers)]


def trained_in_processes(
    folder: Path, rank: int, count: int, methods: dict[str, GradientMethod], width: int, recipe: Recipe
) -> None:
    """Train with each method in turn, in one group of processes; weights of rank 0 and records go into ``folder``."""
    store = connect(folder, rank, count)
    for name, method in methods.items():
        place = folder / name
        place.mkdir(exist_ok=True)
        network = Regression(width)
        train_rank(network, method, recipe, lessons(recipe.steps, width), share, 0, rank, place)
        torch.save(dict(network.named_parameters()), place / f"weights-{rank}.pt")
    leave(store, rank, count)
