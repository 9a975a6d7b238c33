"""From scores to a set of documents: the best ones up to a share, a budget or a threshold.

Shape suffixes: N documents, K kept documents.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

UNITS = ("tokens", "documents")


@dataclass(frozen=True)
class Budget:
    """How much is kept; exactly one of the three.

    Attributes:
        fraction: share of the pool, in the unit of ``select``.
        amount: tokens or documents.
        threshold: every document whose score is larger.
    """

    fraction: float | None = None
    amount: float | None = None
    threshold: float | None = None

    def __post_init__(self) -> None:
        if sum(value is not None for value in (self.fraction, self.amount, self.threshold)) != 1:
            raise ValueError("a budget is one of fraction, amount and threshold")


def select(scores_N: np.ndarray, tokens_N: np.ndarray, budget: Budget, unit: str = "tokens") -> np.ndarray:
    """Numbers of the kept documents, best first, (K,).

    Documents are taken in order of their scores, of equal ones the earlier, until the next would exceed the budget: kept
    ≤ budget < kept + next. So a larger budget keeps what a smaller one keeps and more, and nothing depends on chance.

    Args:
        tokens_N: length of each document.
        unit: what a fraction or an amount counts, ``tokens`` or ``documents``.

    Raises:
        ValueError: an unknown unit, or scores that are not finite.
    """
    if unit not in UNITS:
        raise ValueError(f"unit {unit!r} is none of {', '.join(UNITS)}")
    if not np.isfinite(scores_N).all():
        raise ValueError("scores that are not finite cannot be ordered")
    order_N = np.argsort(-scores_N, kind="stable")
    if budget.threshold is not None:
        return order_N[: int((scores_N > budget.threshold).sum())]
    sizes_N = tokens_N if unit == "tokens" else np.ones_like(tokens_N)
    total = int(sizes_N.sum())
    # a share of 1 is everything, whatever float products give
    most = budget.amount if budget.fraction is None else total if budget.fraction >= 1 else budget.fraction * total
    assert most is not None
    return order_N[: int(np.searchsorted(np.cumsum(sizes_N[order_N]), most, side="right"))]
