"""Bisection on a rising quantity: the largest setting that is still allowed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Literal

Number = float | int


@dataclass(frozen=True)
class Crossing:
    """Where a search ended.

    Attributes:
        x, y: the largest x found whose y is at most the target.
        status: ``inside`` the bracket; ``all`` of it is allowed; ``none`` of it is, and x is its lower end.
        evaluations: values of x that were tried.
        dip: how far y fell anywhere while x rose; 0 where it only rose.
    """

    x: Number
    y: float
    status: Literal["inside", "all", "none"]
    evaluations: int
    dip: float


def largest_allowed(
    f: Callable[[Number], float],
    target: float,
    low: Number,
    high: Number,
    tolerance: Number,
    slack: float = 0.0,
    scan: int = 17,
) -> Crossing:
    """The largest x in [low, high] with f(x) <= target, for an f that rises up to small dips.

    What is returned is allowed, and an x at most ``tolerance`` above it was tried and is not. Where the values tried fall by
    more than ``slack`` while x rises, there may be several crossings: ``scan`` points over the bracket are tried too, and
    the first crossing counts, so that nothing that was tried below the result exceeds the target.

    Args:
        f: called once per x.
        low, high: the bracket; with two ints, x stays whole.
        tolerance: widest bracket to end with; at least 1 for whole x.

    Raises:
        ValueError: an empty bracket, or a tolerance that no bracket can reach.
    """
    whole = isinstance(low, int) and isinstance(high, int)
    if not low <= high or tolerance <= 0 or (whole and tolerance < 1):
        raise ValueError(f"cannot search [{low}, {high}] to {tolerance}")
    seen: dict[Number, float] = {}

    def at(x: Number) -> float:
        if x not in seen:
            seen[x] = float(f(x))
        return seen[x]

    def result(x: Number, status: Literal["inside", "all", "none"]) -> Crossing:
        return Crossing(x, seen[x], status, len(seen), _dip(seen))

    def halve(inner: Number, outer: Number) -> Number:
        while outer - inner > tolerance:
            middle = (inner + outer) // 2 if whole else (inner + outer) / 2
            if not inner < middle < outer:  # neighbours in floating point
                break
            inner, outer = (middle, outer) if at(middle) <= target else (inner, middle)
        return inner

    if at(low) > target:
        return result(low, "none")
    if at(high) <= target and _dip(seen) <= slack:
        return result(high, "all")
    found = halve(low, high) if seen[high] > target else high
    if _dip(seen) > slack:
        for k in range(1, scan):
            at(low + (high - low) * k // scan if whole else low + (high - low) * k / scan)
        tried = sorted(seen)
        cell = next(((a, b) for a, b in pairwise(tried) if seen[b] > target), None)
        if cell is None:
            return result(high, "all")
        found = halve(*cell)
    return result(found, "inside")


def _dip(seen: dict[Number, float]) -> float:
    values = [seen[x] for x in sorted(seen)]
    return max((top - value for top, value in zip(accumulate(values, max), values, strict=True)), default=0.0)
