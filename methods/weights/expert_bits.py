"""Bits for each expert of a mixture: the integer programme of MC-MoE (arXiv 2410.06270, equation 6), solved exactly.

Shape suffixes: E experts, B widths of the menu.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def significance_costs(
    counts_E: Sequence[float],
    masses_E: Sequence[float],
    errors_EB: Sequence[Sequence[float]],
    alpha: float,
    beta: float,
    gamma: float,
) -> NDArray[np.float64]:
    """φ^α · w^β · ε^γ of every expert and width, (E, B).

    An expert that calibration never selected would cost nothing at any width. It counts as selected half a time, with the
    mean weight of a selection, and as hurt as much as the others are on average.

    Args:
        counts_E: how often each was selected.
        masses_E: sums of its routing probabilities over those tokens, before they are normalised.
        errors_EB: ε, the error of the block's output where only this expert has this width.
    """
    counts, masses, errors = (np.array(values, dtype=np.float64) for values in (counts_E, masses_E, errors_EB))
    unseen = counts == 0
    if unseen.all():
        raise ValueError("calibration selected no expert")
    masses[unseen] = 0.5 * masses.sum() / counts.sum()
    errors[unseen] = errors[~unseen].mean(0)
    counts[unseen] = 0.5
    shares, weights = counts / counts.sum(), masses / masses.sum()
    found: NDArray[np.float64] = (shares**alpha * weights**beta)[:, None] * errors**gamma
    return found


def least_total(experts: int, widths: Sequence[int], floors: bool) -> int:
    """Bits that the experts of a layer need together.

    Args:
        widths: the most bits first.
        floors: at least one expert has the widest, and one the next.
    """
    return widths[0] + widths[1] + (experts - 2) * widths[-1] if floors else experts * widths[-1]


def solve(costs_EB: NDArray[np.float64], widths: Sequence[int], total: int, floors: bool) -> tuple[int, ...]:
    """The width of each expert: least summed cost, at most ``total`` bits; among equal sums the one of fewer bits.

    A dynamic programme over the experts; its table has an entry for every total, and for which of the two floors are met.

    Args:
        costs_EB: of each expert at each width, in the order of ``widths``.
        widths: the most bits first.
        floors: see ``least_total``.

    Raises:
        ValueError: nothing fits.
    """
    marks = [1, 2, *[0] * (len(widths) - 2)] if floors else [0] * len(widths)
    best = np.full((4, total + 1), np.inf)
    best[0, 0] = 0.0
    came: list[NDArray[np.int64]] = []
    for costs_B in costs_EB:
        found = np.full_like(best, np.inf)
        chosen = np.full((4, total + 1, 2), -1, dtype=np.int64)  # the option, and which floors were met before
        for option, (width, mark, cost) in enumerate(zip(widths, marks, costs_B, strict=True)):
            for met in range(4 if width <= total else 0):
                sums = best[met, : total + 1 - width] + cost
                place = found[met | mark, width:]
                better = sums < place
                place[better] = sums[better]
                chosen[met | mark, width:][better] = option, met
        best = found
        came.append(chosen)
    met = 3 if floors else 0
    left = int(np.argmin(best[met]))
    if not np.isfinite(best[met, left]):
        raise ValueError(f"{total} bits are too few for {len(costs_EB)} experts")
    choice = []
    for chosen in reversed(came):
        option, before = (int(value) for value in chosen[met, left])
        choice.append(widths[option])
        met, left = before, left - widths[option]
    return tuple(reversed(choice))


def dealt(widths_E: Sequence[int], order: Sequence[int]) -> tuple[int, ...]:
    """The same widths, the most bits to the first expert of ``order``."""
    found = [0] * len(widths_E)
    for expert, width in zip(order, sorted(widths_E, reverse=True), strict=True):
        found[expert] = width
    return tuple(found)
