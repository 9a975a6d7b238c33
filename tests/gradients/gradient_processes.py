"""What processes that the tests start do to train; importing this module loads no test."""

from __future__ import annotations

from pathlib import Path

from gradient_cases import Recipe, trained_in_processes

from isoflop.methods.gradients.base import GradientMethod
from isoflop.methods.gradients.dense import DenseGradients
from isoflop.methods.gradients.dgc import Dgc
from isoflop.methods.gradients.powersgd import PowerSgd
from isoflop.methods.gradients.random_k import RandomEntries
from isoflop.methods.gradients.topk_ef import TopKFeedback

STEPS, WIDE = 30, 1200


def methods(workers: int, backend: str) -> dict[str, GradientMethod]:
    """Every method, and the ways in which messages can vary in length."""
    common = {"workers": workers, "backend": backend, "lr": 0.05}
    return {
        "dense": DenseGradients(**common),
        "dgc": Dgc(density=0.05, warmup=0.2, **common),
        "dgc-sampled": Dgc(density=0.05, sampler="sampled", indices="delta-varint", values="fp16", **common),
        "topk": TopKFeedback(density=0.05, indices="bitmap", **common),
        "random": RandomEntries(density=0.05, **common),
        "powersgd": PowerSgd(rank=2, **common),
    }


def wide(workers: int, backend: str) -> dict[str, GradientMethod]:
    """Every pattern of sending, in a network of 1.4 million parameters: sums, gatherings of equal and unequal lengths."""
    common = {"workers": workers, "backend": backend, "lr": 1e-3}
    return {
        "dense": DenseGradients(**common),
        "dgc": Dgc(density=0.3, warmup=0.0, **common),
        "dgc-sampled": Dgc(density=0.3, warmup=0.0, sampler="sampled", indices="delta-varint", **common),
        "topk": TopKFeedback(density=0.3, warmup=0.0, indices="bitmap", **common),
        "random": RandomEntries(density=0.3, warmup=0.0, **common),
        "powersgd": PowerSgd(rank=120, **common),
    }


def train_all(folder: Path, rank: int, count: int) -> None:
    """Each of ``methods``."""
    trained_in_processes(folder, rank, count, methods(count, "ddp"), 24, Recipe(steps=STEPS))


def train_wide(folder: Path, rank: int, count: int) -> None:
    """Each of ``wide``."""
    trained_in_processes(folder, rank, count, wide(count, "ddp"), WIDE, Recipe(steps=3))
