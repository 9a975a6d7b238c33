"""Bytes of the tensors that are alive at once: the same on every machine, whatever allocators do, and no matter of time."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


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
        found = func(*args, **(kwargs or {}))
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for tensor in tree_leaves(found):
            if isinstance(tensor, Tensor):
                self._note(tensor, given)
        return found

    def _note(self, tensor: Tensor, given: set[int]) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in given and key not in self._held:  # a view of what was there before
            return
        tensors, size = self._held.get(key, (0, storage.nbytes()))
        self._held[key] = tensors + 1, size
        if tensors == 0:
            self.now += size
            self.peak = max(self.peak, self.now)
        weakref.finalize(tensor, self._end, key).atexit = False

    def _end(self, key: int) -> None:
        tensors, size = self._held.get(key, (0, 0))
        if tensors > 1:
            self._held[key] = tensors - 1, size
        elif tensors == 1:
            del self._held[key]
            self.now -= size
