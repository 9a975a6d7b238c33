"""One worker's exchange of all gradients of a step: clipping, memory, compressor, and the dense rest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from isoflop.methods.gradients.compressors import GradCompressor, mean_of
from isoflop.methods.gradients.memory import Memory
from isoflop.models.training.collectives import Exchanging


@dataclass(frozen=True)
class Compression:
    """A compressor, the memory in front of it, and which parameters they take care of.

    Attributes:
        names: of parameters that are compressed; the others are averaged as they are.
        clip: largest norm of a worker's own gradient before it is accumulated; None for no clipping.
        steady_from: first step after the warm-up.
    """

    compressor: GradCompressor
    memory: Memory
    names: frozenset[str]
    clip: float | None = None
    steady_from: int = 0


class Exchanger:
    """Turns a worker's gradients into the direction in which all workers step.

    Args:
        workers: N.
        compression: what is compressed and how; None averages everything.
        clip_mean: largest norm of the averaged gradient; None for no clipping. Only where nothing is compressed: what has
            been sent is gone from the memory, so that shortening it afterwards would lose it.
    """

    def __init__(self, workers: int, compression: Compression | None = None, clip_mean: float | None = None) -> None:
        self.workers = workers
        self.compression = compression
        self.clip_mean = clip_mean

    @property
    def corrected(self) -> frozenset[str]:
        """Parameters whose direction holds the momentum already."""
        if self.compression is None or not self.compression.memory.corrects_momentum:
            return frozenset()
        return self.compression.names

    @property
    def steady_from(self) -> int:
        """First step after the warm-up."""
        return self.compression.steady_from if self.compression is not None else 0

    def step(self, number: int, grads: Mapping[str, Tensor]) -> Exchanging[dict[str, Tensor]]:
        """The directions of all parameters, from this worker's gradients (left as they are)."""
        if self.compression is None:
            return clipped((yield from mean_of(grads, self.workers)), self.clip_mean)
        part = self.compression
        grads = clipped(grads, part.clip)
        means = yield from mean_of({n: g for n, g in grads.items() if n not in part.names}, self.workers)
        given = {n: part.memory.compensate(n, g) for n, g in grads.items() if n in part.names}
        sent = yield from part.compressor.exchange(number, given)
        for name, result in sent.items():
            part.memory.retain(name, given[name], result)
            means[name] = result.mean
        return means


def clipped(grads: Mapping[str, Tensor], limit: float | None) -> dict[str, Tensor]:
    """All tensors scaled by the same factor, so that their norm together is at most ``limit``."""
    if limit is None:
        return dict(grads)
    norm = torch.stack([grad.norm() for grad in grads.values()]).norm()
    factor = (limit / (norm + 1e-6)).clamp(max=1.0)  # the small number as in torch.nn.utils.clip_grad_norm_
    return {name: grad * factor for name, grad in grads.items()}
