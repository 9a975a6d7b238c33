"""Gradient compressors: what a worker sends of its tensors, and what everybody makes of all workers' messages.

Two kinds: messages that must be gathered (sparse), and those that can be added up on the way (low rank, common entries).
All are written as generators of requests (see ``isoflop.models.training.collectives``), the same for every back-end.

Shape suffixes: n elements of the flattened tensor, R rows, C columns, r rank, K entries, B bytes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from isoflop.core.hashing import derive_seed
from isoflop.methods.gradients.coding import Entries, EntryCoding
from isoflop.methods.gradients.memory import Sent
from isoflop.methods.gradients.selection import entries_at, exact_top, sampled_top
from isoflop.models.training.collectives import Exchanging, Gather, Sum

Density = Callable[[int], float]
"""Step → share of the entries that is sent."""


class GradCompressor(ABC):
    """One worker's compressor of tensors with two or more dimensions."""

    @abstractmethod
    def exchange(self, step: int, tensors: Mapping[str, Tensor]) -> Exchanging[dict[str, Sent]]:
        """Send what is to be sent of all tensors, in the order given, which is the same on all workers."""


@dataclass
class TopK(GradCompressor):
    """The largest entries of each tensor by magnitude, gathered and added up where workers chose the same place.

    Attributes:
        density: share of the entries, by step.
        coding: of the entries.
        workers, rank, seed: of the training; the sampled threshold draws its start from them, step and tensor.
        sampler: ``exact`` or ``sampled``.
    """

    density: Density
    coding: EntryCoding
    workers: int
    rank: int
    seed: int
    sampler: str = "exact"

    def exchange(self, step: int, tensors: Mapping[str, Tensor]) -> Exchanging[dict[str, Sent]]:
        """One gathering for all tensors."""
        if not tensors:
            return {}
        shares = {name: self.compress(name, tensor, step) for name, tensor in tensors.items()}
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        message_B = torch.cat([self.coding.encode(share, shapes[name].numel()) for name, share in shares.items()])
        messages = yield Gather(message_B, self.coding.fixed)
        mean = self.decompress(messages, shapes, step)
        own = self._unpack(message_B, shapes, step)  # as the others see it, rounding included
        return {
            name: Sent(mean[name], _scattered([own[name]], shape), own[name].indices_K)
            for name, shape in shapes.items()
        }

    def compress(self, name: str, tensor: Tensor, step: int) -> Entries:
        """The entries to send."""
        flat_n = tensor.flatten()
        k = entries_at(self.density(step), len(flat_n))
        if self.sampler == "exact":
            indices_K = exact_top(flat_n.abs(), k)
        else:
            generator = torch.Generator().manual_seed(derive_seed("sample", self.seed, step, self.rank, name))
            indices_K = sampled_top(flat_n.abs(), k, generator)
        return Entries(indices_K, flat_n[indices_K])

    def decompress(self, messages: Sequence[Tensor], shapes: Mapping[str, torch.Size], step: int) -> dict[str, Tensor]:
        """The averages over all workers; who did not send an entry counts as 0 there."""
        parts = [self._unpack(message_B, shapes, step) for message_B in messages]
        return {
            name: _scattered([part[name] for part in parts], shape) / self.workers for name, shape in shapes.items()
        }

    def _unpack(self, message_B: Tensor, shapes: Mapping[str, torch.Size], step: int) -> dict[str, Entries]:
        found, start = {}, 0
        for name, shape in shapes.items():
            k = entries_at(self.density(step), shape.numel())
            found[name], used = self.coding.decode(message_B[start:], shape.numel(), k)
            start += used
        return found


def _scattered(parts: Sequence[Entries], shape: torch.Size) -> Tensor:
    """The sum of the entries in a tensor of zeros; the same place may come several times."""
    total_n = torch.zeros(shape.numel())
    for part in parts:  # one after the other, so that additions have one order
        total_n.index_add_(0, part.indices_K, part.values_K)
    return total_n.view(shape)


@dataclass
class RandomK(GradCompressor):
    """Entries at random places, the same on all workers: only values travel, and they are added up on the way."""

    density: Density
    workers: int
    seed: int

    def exchange(self, step: int, tensors: Mapping[str, Tensor]) -> Exchanging[dict[str, Sent]]:
        """One sum for all tensors."""
        if not tensors:
            return {}
        places = {name: self.places(name, tensor.numel(), step) for name, tensor in tensors.items()}
        values = [tensor.flatten()[places[name]] for name, tensor in tensors.items()]
        total = yield Sum(torch.cat(values))
        means = (total / self.workers).split([len(value) for value in values])
        return {
            name: Sent(
                _scattered([Entries(indices_K, mean_K)], tensors[name].shape),
                _scattered([Entries(indices_K, own_K)], tensors[name].shape),
                indices_K,
            )
            for (name, indices_K), own_K, mean_K in zip(places.items(), values, means, strict=True)
        }

    def places(self, name: str, numel: int, step: int) -> Tensor:
        """Where all workers read in this step, ascending."""
        generator = torch.Generator().manual_seed(derive_seed("places", self.seed, step, name))
        chosen_K = torch.randperm(numel, generator=generator)[: entries_at(self.density(step), numel)]
        return chosen_K.sort().values


@dataclass
class LowRank(GradCompressor):
    """PowerSGD (arXiv 1905.13727): one round of power iteration per step, from the last step's right factor.

    With M = G + e: P = M·Q, averaged; P orthonormal; Q = Mᵀ·P, averaged; the average gradient is P·Qᵀ. Tensors that two
    factors would not halve are sent whole.

    Attributes:
        rank: r, at most the smaller side of a matrix.
        workers, seed: of the training; first right factors are normal and the same on all workers.
        factors: Q, by parameter name.
    """

    rank: int
    workers: int
    seed: int
    factors: dict[str, Tensor] = field(default_factory=dict)

    def exchange(self, step: int, tensors: Mapping[str, Tensor]) -> Exchanging[dict[str, Sent]]:
        """Two sums for all tensors: left factors with what is sent whole, then right factors."""
        low = [name for name, tensor in tensors.items() if worth_factoring(tensor.shape, self.rank)]
        matrices = {name: tensors[name].flatten(1) for name in low}
        whole = {name: tensor for name, tensor in tensors.items() if name not in matrices}
        first = yield from mean_of(
            {**whole, **{name: m_RC @ self._right(name, m_RC) for name, m_RC in matrices.items()}}, self.workers
        )
        left = {name: torch.linalg.qr(first[name]).Q for name in low}
        self.factors |= yield from mean_of({name: m_RC.T @ left[name] for name, m_RC in matrices.items()}, self.workers)
        means = {name: (left[name] @ self.factors[name].T).view(tensors[name].shape) for name in low}
        return {
            name: Sent(first[name], tensor) if name in whole else Sent(means[name], means[name])
            for name, tensor in tensors.items()
        }

    def _right(self, name: str, m_RC: Tensor) -> Tensor:
        if name not in self.factors:
            generator = torch.Generator().manual_seed(derive_seed("powersgd", self.seed, name))
            self.factors[name] = torch.randn(m_RC.shape[1], min(self.rank, *m_RC.shape), generator=generator)
        return self.factors[name]


def worth_factoring(shape: torch.Size, rank: int) -> bool:
    """Whether two factors of this rank have less than half of the matrix's elements."""
    rows, cols = shape[0], shape[1:].numel()
    return 2 * rank * (rows + cols) < rows * cols


def mean_of(tensors: Mapping[str, Tensor], workers: int) -> Exchanging[dict[str, Tensor]]:
    """The averages of tensors over all workers, in one sum."""
    if not tensors:
        return {}
    total = yield Sum(torch.cat([tensor.flatten() for tensor in tensors.values()]))
    parts = (total / workers).split([tensor.numel() for tensor in tensors.values()])
    return {name: part.view(tensor.shape) for (name, tensor), part in zip(tensors.items(), parts, strict=True)}
