"""What a worker remembers of gradients that it has not sent, independent of how the sent part is chosen and coded."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sent:
    """What became of one tensor in an exchange.

    Attributes:
        mean: the average over workers of what they sent, decoded; the same on all of them.
        own: what this worker's message decodes to; for low rank the average, since the second factor exists only as one.
        indices: of the entries of the flattened tensor in this worker's message; None for all.
    """

    mean: Tensor
    own: Tensor
    indices: Tensor | None = None


class Memory(ABC):
    """State of one worker by parameter name: never by bucket, since DDP regroups its buckets after the first step.

    Attributes:
        corrects_momentum: what is sent holds the momentum already, so that the optimiser must not add another.
    """

    corrects_momentum = False

    @abstractmethod
    def compensate(self, name: str, grad: Tensor) -> Tensor:
        """The tensor to be compressed in place of ``grad``; the caller does not change it."""

    @abstractmethod
    def retain(self, name: str, tensor: Tensor, sent: Sent) -> None:
        """Keep of ``tensor``, which ``compensate`` gave, what was not sent."""


class Forgetful(Memory):
    """What is not sent is lost."""

    def compensate(self, name: str, grad: Tensor) -> Tensor:
        """The gradient."""
        return grad

    def retain(self, name: str, tensor: Tensor, sent: Sent) -> None:
        """Nothing."""


@dataclass
class ErrorFeedback(Memory):
    """x = g + e; e ← x - decode(encode(x)).

    Attributes:
        error: e, by parameter name.
    """

    error: dict[str, Tensor] = field(default_factory=dict)

    def compensate(self, name: str, grad: Tensor) -> Tensor:
        """g + e."""
        return grad + self.error[name] if name in self.error else grad.clone()

    def retain(self, name: str, tensor: Tensor, sent: Sent) -> None:
        """e: the difference to what was sent."""
        self.error[name] = tensor - sent.own


@dataclass
class MomentumCorrection(Memory):
    """Deep Gradient Compression's memory (arXiv 1712.01887, algorithm 1 with sections 3.1 and 3.2).

    u ← m·u + g, v ← v + u; v is compressed. What was sent leaves v, and with ``masking`` u as well, so that stale momentum
    does not carry on what has just been applied. With Nesterov's momentum u ← m·(u + g), v ← v + u + g.

    Where values travel in float32, v is exactly 0 on what was sent; in float16 the rounding remainder stays in v.

    Attributes:
        momentum: m.
        velocity, accumulated: u and v, by parameter name.
    """

    momentum: float
    nesterov: bool = False
    masking: bool = True
    velocity: dict[str, Tensor] = field(default_factory=dict)
    accumulated: dict[str, Tensor] = field(default_factory=dict)

    corrects_momentum = True

    def compensate(self, name: str, grad: Tensor) -> Tensor:
        """v after this step's gradient."""
        if name not in self.velocity:
            self.velocity[name], self.accumulated[name] = torch.zeros_like(grad), torch.zeros_like(grad)
        u, v = self.velocity[name], self.accumulated[name]
        if self.nesterov:
            u.add_(grad).mul_(self.momentum)
            v.add_(u).add_(grad)
        else:
            u.mul_(self.momentum).add_(grad)
            v.add_(u)
        return v

    def retain(self, name: str, tensor: Tensor, sent: Sent) -> None:
        """Take what was sent out of v, and mask u there."""
        self.accumulated[name].sub_(sent.own)
        if not self.masking:
            return
        if sent.indices is None:
            self.velocity[name].zero_()
        else:
            self.velocity[name].view(-1)[sent.indices] = 0.0
