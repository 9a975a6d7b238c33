"""Counting the operations of a live model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


def flops_of(call: Callable[[], Any]) -> tuple[int, Any]:
    """FLOPs of a call by the formulas of ``torch.utils.flop_counter``, and its value."""
    # they know matrix products; the math backend expresses attention as such on every device
    with _Counting() as counter, sdpa_kernel(SDPBackend.MATH):
        value = call()
    return counter.flops, value


class _Counting(TorchDispatchMode):
    """The sum that torch's ``FlopCounterMode`` gives, without its bookkeeping per module.

    That takes longer than the operators themselves where a decoder reads token after token (twice, on SmolLM2-135M).
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        formula = flop_registry.get(func._overloadpacket) or _ADDED.get(func.name())
        if formula is None and func not in _WHOLE:
            with self:
                value = func.decompose(*args, **kwargs)  # into what there is a formula for, where it has parts
            if value is not NotImplemented:
                return value
            _WHOLE.add(func)
        value = func(*args, **kwargs)
        if formula is not None:
            self.flops += int(formula(*args, **kwargs, out_val=value))
        return value


def _grouped(a: Tensor, b: Tensor, *_: Any, **__: Any) -> int:
    """Of ``grouped_mm``: matrices of a stack, or rows or columns of one matrix by groups, which together are all of it."""
    stacked = a.shape[0] if a.dim() == b.dim() == 3 else 1
    return int(2 * stacked * a.shape[-2] * a.shape[-1] * b.shape[-1])


_ADDED: dict[str, Callable[..., int]] = {"aten::_grouped_mm": _grouped, "transformers::grouped_mm_fallback": _grouped}
"""By operator, what torch has no formula for; it is what experts of a mixture are multiplied with."""
_WHOLE: set[Any] = set()
"""Operators without parts."""
