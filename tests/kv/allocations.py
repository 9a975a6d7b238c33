"""What a pass allocates, counted by the tensors that operations return: the same on every machine, and no matter of time."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Allocations(TorchDispatchMode):
    """Counts inside the block.

    Attributes:
        largest: numbers of the largest tensor that an operation made; views of what is there are none.
        large: operations that wrote at least ``least`` numbers, by name.
    """

    def __init__(self, least: int = 0) -> None:
        super().__init__()
        self.largest = 0
        self.large: Counter[str] = Counter()
        self._least = least

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for tensor in tree_leaves(found):
            if not isinstance(tensor, Tensor):
                continue
            if tensor.untyped_storage().data_ptr() not in given:
                self.largest = max(self.largest, tensor.numel())
            if tensor.numel() >= self._least:
                self.large[func.overloadpacket.__name__] += 1
        return found
