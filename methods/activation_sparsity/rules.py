"""Which units of a token stay: one implementation of the rules that sparsify activations.

Shape suffixes: F units; … any leading dimensions (batch, tokens).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from isoflop.methods.selection import sortable


def at_least(score_F: Tensor, threshold: float) -> Tensor:
    """Units whose score, which is not negative, reaches a threshold; 0 keeps all of them."""
    return score_F >= threshold


def nonzero(score_F: Tensor) -> Tensor:
    """Units that are not exactly zero."""
    return score_F != 0


def top_of_each(score_F: Tensor, count: int) -> Tensor:
    """The ``count`` units of each token with the largest scores, those of score zero left out; of equals the first."""
    order_F = sortable(score_F).argsort(dim=-1, descending=True, stable=True)[..., :count]
    return torch.zeros_like(score_F, dtype=torch.bool).scatter_(-1, order_F, True) & nonzero(score_F)


def units_kept(share: float, units: int) -> int:
    """How many of ``units`` a share means: rounded, one at least."""
    return max(1, min(units, round(share * units)))


def just_above(value: float) -> float:
    """The next larger number in float32: the smallest threshold that removes scores of ``value``."""
    return float(torch.nextafter(torch.tensor(value, dtype=torch.float32), torch.tensor(math.inf)))
