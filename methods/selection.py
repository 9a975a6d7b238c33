"""Choosing tokens: the best by a score, or a random subset that depends on the example alone.

Shape suffixes: B batch, P places to choose from, V places that are chosen.
"""

from __future__ import annotations

import torch
from torch import Tensor


def sortable(scores: Tensor) -> Tensor:
    """The scores as they are; what is no number has no place among them.

    Sorting puts NaN somewhere: a job would choose anything and end "ok".

    Raises:
        ArithmeticError: some are NaN.
    """
    bad = int(scores.isnan().sum()) if scores.is_floating_point() else 0
    if bad:
        raise ArithmeticError(f"{bad} of {scores.numel()} scores by which to choose are no numbers (NaN)")
    return scores


def top_places(score_BP: Tensor, count: int) -> Tensor:
    """Places of the ``count`` largest scores, ascending, (B, V); of equal scores the earlier place wins."""
    return sortable(score_BP).argsort(dim=-1, descending=True, stable=True)[:, :count].sort(dim=-1).values


def random_subset(ids_B: Tensor, patches: int, count: int, draw: int) -> Tensor:
    """``count`` of ``patches`` numbers per example, sorted, (B, V): the places of the smallest hashes of (draw, id, place)."""
    places_P = torch.arange(patches, device=ids_B.device)
    score_BP = mix(mix(ids_B + mix(torch.tensor(draw, device=ids_B.device)))[:, None] + places_P)
    return score_BP.argsort(dim=-1, stable=True)[:, :count].sort(dim=-1).values


def mix(x: Tensor) -> Tensor:
    """A bijection of 64-bit integers whose outputs look independent, the same on every device (finaliser of SplitMix64)."""
    x = x + _signed(0x9E3779B97F4A7C15)
    x = (x ^ shifted(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ shifted(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ shifted(x, 31)


def shifted(x: Tensor, bits: int) -> Tensor:
    """``x`` shifted right and filled with zeros; torch shifts int64 arithmetically."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(constant: int) -> int:
    return constant - (1 << 64) if constant >= 1 << 63 else constant
