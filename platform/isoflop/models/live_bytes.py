"""Bytes of the tensors that are alive at once: the same on every machine, whatever allocators do, and no matter of time."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class LiveBytes(TorchDispatchMode):
    """Counts storages that operations inside the block make, from the first tensor on one to the end of the last.

    Attributes:
        now: bytes alive.
        peak: the most that were, since ``forget_peak``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._held: dict[int, tuple[int, int]] = {}  # storage: tensors on it, bytes

    def forget_peak(self) -> None:
        """From now on ``peak`` is of what follows."""
        self.peak = self.now

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        found = func(*args, **kwargs)
        for tensor in _tensors(found):
            self._note(tensor, args, kwargs)
        return found

    def _note(self, tensor: Tensor, args: Any, kwargs: Any) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        tensors, size = self._held.get(key, (0, 0))
        if not tensors:
            if any(key == given.untyped_storage()._cdata for given in _tensors((args, kwargs))):
                return  # a view of what was there before
            size = storage.nbytes()
            self.now += size
            self.peak = max(self.peak, self.now)
        self._held[key] = tensors + 1, size
        weakref.finalize(tensor, self._end, key).atexit = False

    def _end(self, key: int) -> None:
        tensors, size = self._held.get(key, (0, 0))
        if tensors > 1:
            self._held[key] = tensors - 1, size
        elif tensors == 1:
            del self._held[key]
            self.now -= size


def _tensors(values: Any) -> Iterator[Tensor]:
    """Those among an operator's arguments or results; torch's own walk over trees costs a small operator more than it takes itself."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, list | tuple):
        for value in values:
            yield from _tensors(value)
    elif isinstance(values, dict):
        yield from _tensors(list(values.values()))
