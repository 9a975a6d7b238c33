"""Counting the operations of a live model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


def flops_of(call: Callable[[], Any]) -> tuple[int, Any]:
    """FLOPs of a call by ``torch.utils.flop_counter``, and its value."""
    # The counter knows matrix products; the math backend expresses attention as such on every device.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        value = call()
    return counter.get_total_flops(), value
