"""What every occupant of a hook tells of itself: what must be stored besides the model, and what it stores for the model."""

from __future__ import annotations

from abc import ABC
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


class Occupant(ABC):  # noqa: B024
    """Base class of what methods put into hooks; the hook's own file says what else is asked of it."""

    @property
    def stored(self) -> Mapping[str, float]:
        """Bytes of the model's parameters that the occupant holds in a form of its own, by their names in the module.

        Known while it is in place. Parameters that nobody needs because of it count 0.
        """
        return {}

    def tensors(self) -> Sequence[Tensor]:
        """All that must stay resident besides the model to serve it (weights of a compressor, codebooks); each once."""
        return ()

    def held_bytes(self, dense_bits: int) -> float:
        """Bytes of ``tensors`` as they would be stored, float32 at ``dense_bits`` per element as in the model itself."""
        return sum(tensor_bytes(tensor, dense_bits) for tensor in self.tensors())

    def at_work(self, model: Any) -> AbstractContextManager[Any]:
        """What the occupant itself needs in the model while it is in place: taps, values of parameters; by default nothing."""
        return nullcontext()


def tensor_bytes(tensor: Tensor, dense_bits: int) -> float:
    """Bytes of a dense tensor: float32 counts ``dense_bits`` per element, every other type what it takes."""
    bits = dense_bits if tensor.dtype is torch.float32 else 8 * tensor.element_size()
    return tensor.numel() * bits / 8
