"""Which weights a pruner keeps: exact counts, by score, over a matrix, a row or N of every M inputs.

Shape suffixes: O outputs (rows), I inputs (columns).
"""

from __future__ import annotations

import torch
from torch import Tensor

UNSTRUCTURED = "unstructured"
PATTERNS = (UNSTRUCTURED, "1:2", "2:4", "4:8")


def pattern_of(name: str) -> tuple[int, int] | None:
    """(N, M) of a pattern's name, or None for unstructured."""
    if name == UNSTRUCTURED:
        return None
    n, m = name.split(":")
    return int(n), int(m)


def keep_highest(score_OI: Tensor, sparsity: float, by_row: bool) -> Tensor:
    """Mask of what is kept when exactly ⌊sparsity · n⌋ weights of each comparison group go, the lowest scores first.

    Args:
        by_row: a comparison group is one row; otherwise the whole matrix. Among equal scores the first goes.
    """
    groups = score_OI if by_row else score_OI.flatten()[None]
    removed = int(sparsity * groups.shape[1] + 1e-9)
    order = groups.argsort(dim=1, stable=True)[:, :removed]
    keep = torch.ones_like(groups, dtype=torch.bool).scatter_(1, order, False)
    return keep.view(score_OI.shape)


def keep_pattern(score_OI: Tensor, pattern: tuple[int, int]) -> Tensor:
    """Mask that keeps the N highest scores in every M inputs of a row."""
    n, m = pattern
    groups = score_OI.unflatten(1, (-1, m))
    order = groups.argsort(dim=-1, stable=True)[..., : m - n]
    return torch.ones_like(groups, dtype=torch.bool).scatter_(-1, order, False).flatten(1)
