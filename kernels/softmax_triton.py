"""Caps inside Triton kernels, whose logits are in bits: exp2 is what the hardware has."""

# mypy: disallow-untyped-defs=False
# (kernels are written in Triton's language, whose values have no Python types)

from __future__ import annotations

import triton
import triton.language as tl

from isoflop.kernels.softmax import Softmax

LOG2_E = 1.4426950408889634


def factors(softmax: Softmax) -> tuple[float, float]:
    """What products are multiplied by, and what ``capped`` is called with behind it; see there."""
    if softmax.cap is None:
        return softmax.scaling * LOG2_E, 0.0
    return 2 * softmax.scaling / softmax.cap * LOG2_E, softmax.cap * LOG2_E


@triton.jit
def capped(doubled, cap):
    """Logits in bits, cap · tanh(x), of twice x in bits: 1 - 2 / (exp(2x) + 1), which ends at -1 and 1 and overflows to them."""
    return cap - 2.0 * cap / (tl.exp2(doubled) + 1.0)
