"""Softmaxes with caps and sinks, and what they must give, by hand.

Shape suffixes: H query heads, S keys and, where there are sinks, one more.
"""

from __future__ import annotations

import torch
from torch import Tensor

from isoflop.kernels.softmax import Softmax

KINDS = ("plain", "cap", "sinks", "both")


def a_softmax(kind: str, scaling: float, heads: int) -> Softmax:
    """One of ``KINDS``, strong enough to be seen."""
    sinks_H = torch.linspace(-1.0, 2.0, heads)
    return Softmax(scaling, 0.7 if kind in ("cap", "both") else None, sinks_H if kind in ("sinks", "both") else None)


def logits_by_hand(q_BHTD: Tensor, k_BGND: Tensor, softmax: Softmax, first: int = 0) -> Tensor:
    """Unmasked, (B, H, T, S), the sinks' last; ``first`` is the number of the first query head."""
    heads = q_BHTD.shape[1]
    logits = q_BHTD @ k_BGND.repeat_interleave(heads // k_BGND.shape[1], dim=1).transpose(-1, -2) * softmax.scaling
    if softmax.cap is not None:
        logits = softmax.cap * torch.tanh(logits / softmax.cap)
    if softmax.sinks_H is None:
        return logits
    sinks = softmax.sinks_H[first : first + heads, None, None].to(logits.dtype)
    return torch.cat((logits, sinks.expand(*logits.shape[:3], 1)), dim=-1)


def softmax_by_hand(q_BHTD: Tensor, k_BGND: Tensor, softmax: Softmax, first: int = 0) -> Tensor:
    """Weights, (B, H, T, S)."""
    return logits_by_hand(q_BHTD, k_BGND, softmax, first).softmax(-1)
