"""Whole levels of units of different sizes: how much of a budget they can store, and the fewest changes that store it.

A unit that goes up a level stores its size more. All that matters here is how many levels units of each size have
together, so that the arithmetic takes one number per size, however many units there are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction


def most_within(counts: Mapping[int, int], room: int) -> int:
    """The largest sum of sizes that is at most ``room``, taking each size (key) up to its count (value) of times.

    One bit per reachable sum, in units of the sizes' greatest common divisor.
    """
    unit = math.gcd(*counts)
    mask = (1 << (room // unit + 1)) - 1
    reached = 1
    for size, count in counts.items():
        taken = 1
        while count > 0:  # 1, 2, 4, … times, and what is missing to the count, make every number up to it
            taken = min(taken, count)
            reached |= (reached << (taken * size // unit)) & mask
            count -= taken
            taken *= 2
    return (reached.bit_length() - 1) * unit


def fewest_steps(room: Mapping[int, tuple[int, int]], need: int) -> dict[int, int]:
    """Steps up (or down, below 0) per size whose sizes add up to ``need``, as few as possible.

    Args:
        room: by size, the steps that are possible downwards and upwards.

    Raises:
        ValueError: no steps add up to it.
    """
    radius, most = 1, sum(downs + ups for downs, ups in room.values())
    while True:
        found = _within(room, need, min(radius, most))
        if found is not None:
            return found
        if radius >= most:
            raise ValueError(f"no levels of units of sizes {', '.join(map(str, room))} add up to {need}")
        radius *= 2


def _within(room: Mapping[int, tuple[int, int]], need: int, radius: int) -> dict[int, int] | None:
    """The fewest steps that add up to ``need``, if at most ``radius`` of them do."""
    ways: dict[int, tuple[int, tuple[int, ...]]] = {0: (0, ())}  # sum so far -> steps taken, and the way there
    left = sorted(room, reverse=True)
    for number, size in enumerate(left):
        largest = left[number + 1] if number + 1 < len(left) else 0
        downs, ups = room[size]
        onward: dict[int, tuple[int, tuple[int, ...]]] = {}
        for done, (taken, way) in ways.items():
            free = radius - taken
            for steps in range(-min(downs, free), min(ups, free) + 1):
                total, count = done + size * steps, taken + abs(steps)
                hopeful = abs(need - total) <= largest * (radius - count)
                if hopeful and (total not in onward or count < onward[total][0]):
                    onward[total] = (count, (*way, steps))
        ways = onward
    return dict(zip(left, ways[need][1], strict=True)) if need in ways else None


def shares(counts: Mapping[int, int], level: float, low: int, high: int) -> dict[int, int]:
    """Summed levels of the units of each size whose average over all weights is ``level``, or as little below as sizes allow.

    Each size gets its own average rounded down, then what is left of the budget goes to where it takes the fewest steps.

    Args:
        counts: units of each size.
        level: the average, between ``low`` and ``high``, which bound every unit. Read as the decimal number that it is
            printed as, so that 2.3 is 23/10.
    """
    average = Fraction(repr(float(level)))
    sums = {size: math.floor(average * count) for size, count in counts.items()}
    budget = math.floor(average * sum(size * count for size, count in counts.items()))
    least = sum(size * count * low for size, count in counts.items())
    total = least + most_within({size: count * (high - low) for size, count in counts.items()}, budget - least)
    room = {size: (sums[size] - count * low, count * high - sums[size]) for size, count in counts.items()}
    steps = fewest_steps(room, total - sum(size * levels for size, levels in sums.items()))
    return {size: levels + steps[size] for size, levels in sums.items()}
