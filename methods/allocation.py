"""The exact allocator: one option for each item, so that the summed score is least within a budget.

Items are what a method gives different amounts of compression to (matrices, layers, experts, gradients), options are
their levels. A dynamic program over items keeps, for every total cost, the least score; totals that cost more and score
no better than another are dropped. The table of SPDY (arXiv 2201.13096, algorithm 1) and of layer-wise compression in
general (L-GreCo, arXiv 2210.17357) holds the same values, one per unit of cost; this one holds those that can occur, so that costs
may be numbers of any kind.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_SLACK = 1e-9
"""Relative; sums of costs that are no whole numbers are rounded differently in different orders."""


@dataclass(frozen=True)
class Allocation:
    """Attributes: choice: the option of each item; cost, score: their sums."""

    choice: tuple[int, ...]
    cost: float
    score: float


def allocate(
    costs: Sequence[Sequence[float]],
    scores: Sequence[Sequence[float]],
    budget: float,
    steps: int | None = None,
    least: float = 0.0,
) -> Allocation:
    """The options of least summed score whose summed cost is at most ``budget``.

    Exact unless ``steps`` is given. Among equal scores the cheaper choice wins.

    Args:
        costs: of each item's options, at least 0; whole numbers keep the table short (one row per distinct total).
        scores: of each item's options, finite; whatever is to be minimised and adds up.
        steps: costs are rounded up to this many parts of the budget, which bounds the table where costs are real
            numbers (errors, say); the budget still holds, and the score is that of a budget smaller by items/steps at worst.
        least: what the choice must cost; at ``least = budget`` it uses the budget up, also where more does not score better.
            Not with ``steps``, which do not keep totals exact.

    Raises:
        ValueError: even the cheapest options exceed the budget, no choice costs between ``least`` and the budget, or an item
            has no options.
    """
    _check(costs, scores)
    if least and steps is not None:
        raise ValueError("steps round costs: they allow no least")
    cheapest = sum(min(options) for options in costs)
    limit = budget * (1 + _SLACK)
    if cheapest > limit:
        raise ValueError(f"a budget of {budget:g} is less than the cheapest options cost together, {cheapest:g}")
    used = [np.asarray(options, dtype=np.float64) for options in costs]
    if steps is not None:
        unit = budget / steps if budget > 0 else 1.0
        used, limit = [np.ceil(options / unit - _SLACK) for options in used], float(steps)
        if sum(options.min() for options in used) > limit:
            raise ValueError(f"{steps} steps are too coarse for a budget of {budget:g} and {len(costs)} items")
    choice = _program(used, [np.asarray(options, dtype=np.float64) for options in scores], limit, least * (1 - _SLACK))
    if choice is None:
        raise ValueError(f"no choice costs from {least:g} to {budget:g}")
    return Allocation(
        choice,
        sum(options[i] for options, i in zip(costs, choice, strict=True)),
        sum(options[i] for options, i in zip(scores, choice, strict=True)),
    )


def _check(costs: Sequence[Sequence[float]], scores: Sequence[Sequence[float]]) -> None:
    if [len(options) for options in costs] != [len(options) for options in scores]:
        raise ValueError("each option needs one cost and one score")
    if not all(len(options) for options in costs):
        raise ValueError("an item has no options")
    if any(cost < 0 for options in costs for cost in options):
        raise ValueError("costs are at least 0")
    if not all(np.isfinite(options).all() for options in scores):
        raise ValueError("scores are finite")


def _program(
    costs: list[NDArray[np.float64]], scores: list[NDArray[np.float64]], limit: float, least: float
) -> tuple[int, ...] | None:
    """The options of least score; ``limit`` bounds the total from above, ``least`` from below. None: there are none."""
    # what the items behind must cost at least, and can cost at most; totals that leave less or need more are hopeless
    rest = np.cumsum([0.0] + [options.min() for options in reversed(costs)])[::-1]
    more = np.cumsum([0.0] + [options.max() for options in reversed(costs)])[::-1]
    total, score = np.zeros(1), np.zeros(1)
    came: list[tuple[NDArray[np.intp], NDArray[np.intp]]] = []
    for number, (item_costs, item_scores) in enumerate(zip(costs, scores, strict=True)):
        totals = (total[:, None] + item_costs).ravel()
        sums = (score[:, None] + item_scores).ravel()
        order = np.lexsort((sums, totals))
        order = order[totals[order] + rest[number + 1] <= limit * (1 + _SLACK)]
        if least > 0:
            order = order[totals[order] + more[number + 1] >= least * (1 - _SLACK)]
        kept = order[_improving(sums[order]) if least <= 0 else _first(totals[order])]
        if not len(kept):
            return None
        total, score = totals[kept], sums[kept]
        came.append(tuple(np.divmod(kept, len(item_costs))))
    place = int(np.argmin(score))
    choice = []
    for before, option in reversed(came):
        choice.append(int(option[place]))
        place = int(before[place])
    return tuple(reversed(choice))


def _improving(sums: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Where a sum is less than all before it."""
    best = np.minimum.accumulate(sums)
    return np.concatenate(([True], sums[1:] < best[:-1]))[: len(sums)]


def _first(totals: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Where an ascending total is not that of the place before: the best of those that cost the same."""
    return np.concatenate(([True], np.diff(totals) > 0))[: len(totals)]
