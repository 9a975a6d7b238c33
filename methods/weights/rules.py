"""Which weights a pruner keeps: exact counts, by score, over a matrix, a row or N of every M inputs.

Shape suffixes: O outputs (rows), I inputs (columns).
"""

from __future__ import annotations

import torch
from torch import Tensor

from isoflop.methods.selection import sortable

UNSTRUCTURED = "unstructured"
PATTERNS = (UNSTRUCTURED, "1:2", "2:4", "4:8")


def pattern_of(name: str) -> tuple[int, int] | None:
    """(N, M) of a pattern's name, or None for unstructured."""
    if name == UNSTRUCTURED:
        return None
    n, m = name.split(":")
    return int(n), int(m)


def keep_highest(score_OI: Tensor, sparsity: float, by_row: bool, ties_OI: Tensor | None = None) -> Tensor:
    """Mask of what is kept when exactly ⌊sparsity · n⌋ weights of each comparison group go, the lowest scores first.

    Args:
        by_row: a comparison group is one row; otherwise the whole matrix.
        ties_OI: among equal scores the lowest of these goes; among equals in both the first.
    """
    shape = score_OI.shape if by_row else (1, score_OI.numel())
    groups = score_OI.reshape(shape)
    removed = int(sparsity * groups.shape[1] + 1e-9)
    order = _ascending(groups, None if ties_OI is None else ties_OI.reshape(shape))[:, :removed]
    keep = torch.ones_like(groups, dtype=torch.bool).scatter_(1, order, False)
    return keep.view(score_OI.shape)


def keep_pattern(score_OI: Tensor, pattern: tuple[int, int], ties_OI: Tensor | None = None) -> Tensor:
    """Mask that keeps the N highest scores in every M inputs of a row; ``ties_OI`` as in :func:`keep_highest`."""
    n, m = pattern
    groups = score_OI.unflatten(1, (-1, m))
    order = _ascending(groups, None if ties_OI is None else ties_OI.unflatten(1, (-1, m)))[..., : m - n]
    return torch.ones_like(groups, dtype=torch.bool).scatter_(-1, order, False).flatten(1)


def _ascending(score: Tensor, ties: Tensor | None) -> Tensor:
    """Indices that sort the last dimension by ``score``, then by ``ties``, then by place."""
    score = sortable(score)
    if ties is None:
        return score.argsort(dim=-1, stable=True)
    by_ties = ties.argsort(dim=-1, stable=True)
    return by_ties.gather(-1, score.gather(-1, by_ties).argsort(dim=-1, stable=True))
