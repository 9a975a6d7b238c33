"""Which units stay: by a percentile of their scores, or as many as a budget of reader tokens allows.

Both rules are nested: what a smaller rate keeps, a larger one keeps too.

Shape suffixes: U units.
"""

from __future__ import annotations

import math

import numpy as np


def above_percentile(score_U: np.ndarray, tokens_U: np.ndarray, rate: float) -> np.ndarray:
    """Units whose score exceeds a percentile of the scores of all tokens, (U,) of bool (LLMLingua-2, section 4.2).

    Each score counts once per token of the unit. The percentile is the whole number below ``100 (1 - rate) + 1``, so that
    with different scores slightly less than ``rate`` of the tokens stays. Scores of exactly 1 are forced: they stay also
    where the percentile itself is 1. Where no score exceeds it (all units equal), the best units stay in their order
    for as long as they fit into ``rate`` of the tokens.
    """
    if not len(score_U):
        return np.zeros(0, dtype=bool)
    counts_U = np.maximum(tokens_U, 1)
    percent = min(100, math.floor(100 * (1 - rate) + 1 + 1e-9))  # 1 - .8 is a little less than .2
    threshold = np.percentile(np.repeat(score_U, counts_U), percent)
    kept_U = (score_U > threshold) | ((threshold == 1.0) & (score_U == 1.0))
    if kept_U.any():
        return kept_U
    return within_budget(np.where(score_U == score_U.max(), 1.0, -np.inf), counts_U, rate * counts_U.sum())


def within_budget(
    score_U: np.ndarray, tokens_U: np.ndarray, budget: float, forced_U: np.ndarray | None = None
) -> np.ndarray:
    """The units of the highest scores up to the first that does not fit, (U,) of bool; equal scores in their order.

    Args:
        budget: reader tokens.
        forced_U: units that stay whatever they cost; they use up the budget first.
    """
    forced_U = np.zeros(len(score_U), dtype=bool) if forced_U is None else forced_U
    order_U = np.lexsort((np.arange(len(score_U)), -score_U, ~forced_U))
    fits_U = np.cumsum(tokens_U[order_U]) <= budget + 1e-9
    kept_U = forced_U.copy()
    kept_U[order_U[fits_U & np.isfinite(score_U[order_U])]] = True
    return kept_U


def at_least_percentile(score_U: np.ndarray, rate: float) -> np.ndarray:
    """Units whose score is at least the percentile ``100 (1 - rate)`` of the units' scores, (U,) of bool."""
    if not len(score_U):
        return np.zeros(0, dtype=bool)
    return score_U >= np.percentile(score_U, min(100.0, max(0.0, 100 * (1 - rate))))
