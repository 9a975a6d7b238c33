"""The configurations of one budget: levels of units (matrices, halves of blocks), and how offspring move among them.

EvoPress (arXiv 2410.14649, section 3) exchanges levels between units of one size, one for one. Its code can also exchange
between all units (``--group_rule none``): some go up, then others go down until the budget holds. Here what that leaves of
the budget is filled again, so that every configuration stores exactly as much as the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from isoflop.methods.weights.filling import fewest_steps

Levels = tuple[int, ...]
"""The level of each unit."""

_FLIPS = 3
_CHANGES = 10
"""Levels that offspring may differ from their parent in where sizes differ, as in the published code."""


@dataclass(frozen=True)
class LevelSpace:
    """The configurations of one budget.

    Attributes:
        low, high: bounds of each unit's level.
        groups: units among which levels move; each group keeps what it stores.
        sizes: what a level more stores in each unit; empty: the same in all.
    """

    low: Levels
    high: Levels
    groups: tuple[tuple[int, ...], ...]
    sizes: tuple[int, ...] = ()

    def stored(self, group: Sequence[int], levels: Sequence[int]) -> int:
        """What the units of a group store above nothing: the sum of level times size."""
        return sum(self._size(i) * levels[i] for i in group)

    def costs(self, group: Sequence[int]) -> list[list[float]]:
        """What each level of each unit of a group stores above its lowest, from the lowest up."""
        return [[float(self._size(i) * step) for step in range(self.high[i] - self.low[i] + 1)] for i in group]

    def mutate(self, levels: Levels, rng: np.random.Generator) -> Levels:
        """One to three exchanges: the smaller of two draws, so that one is the most likely."""
        flips = int(rng.integers(1, _FLIPS + 1, 2).min())
        if self._even():
            for _ in range(flips):
                levels = self.switch(levels, rng)
            return levels
        group = self._drawn(self.groups, rng)
        return self._traded(group, levels, flips, rng)

    def switch(self, levels: Levels, rng: np.random.Generator) -> Levels:
        """One level down in one unit and one up in another of its group; the same levels where nothing can move.

        Groups are drawn in proportion to their units, units evenly among those that can move.
        """
        groups = [group for group in self.groups if self._exchanging(group, levels)]
        if not groups:
            return levels
        group = self._drawn(groups, rng)
        down = int(rng.choice(self._exchanging(group, levels)))
        up = int(rng.choice([i for i in self._ups(group, levels) if i != down]))
        changed = list(levels)
        changed[down] -= 1
        changed[up] += 1
        return tuple(changed)

    def shuffle(self, levels: Levels, rng: np.random.Generator) -> Levels:
        """A configuration that keeps nothing but what every group stores: levels drawn anew, then moved until they add up."""
        fresh = list(levels)
        for group in self.groups:
            for i in group:
                fresh[i] = int(rng.integers(self.low[i], self.high[i] + 1))
            wanted = self.stored(group, levels)
            while self.stored(group, fresh) < wanted:
                fresh[int(rng.choice(self._ups(group, fresh)))] += 1
            self._lower(group, fresh, wanted, rng)
            self._fill(group, fresh, wanted, rng)
        return tuple(fresh)

    def _traded(self, group: Sequence[int], levels: Levels, flips: int, rng: np.random.Generator) -> Levels:
        """Some units up, then random ones down until the group stores no more than before, then what is left filled.

        The same levels where nothing can move, or where more than ``_CHANGES`` would.
        """
        wanted, changed = self.stored(group, levels), list(levels)
        for _ in range(flips):
            ups = self._ups(group, changed)
            if ups:
                changed[int(rng.choice(ups))] += 1
        self._lower(group, changed, wanted, rng)
        self._fill(group, changed, wanted, rng)
        moved = sum(abs(a - b) for a, b in zip(changed, levels, strict=True))
        return tuple(changed) if moved <= _CHANGES else levels

    def _fill(self, group: Sequence[int], levels: list[int], wanted: int, rng: np.random.Generator) -> None:
        """Change as few levels as possible, at random, so that the group stores what is wanted."""
        need = wanted - self.stored(group, levels)
        if not need:
            return
        room: dict[int, tuple[int, int]] = {}
        for i in group:
            downs, ups = room.get(self._size(i), (0, 0))
            room[self._size(i)] = (downs + levels[i] - self.low[i], ups + self.high[i] - levels[i])
        for size, steps in fewest_steps(room, need).items():
            units = [i for i in group if self._size(i) == size]
            for _ in range(abs(steps)):
                movable = self._ups(units, levels) if steps > 0 else self._downs(units, levels)
                levels[int(rng.choice(movable))] += 1 if steps > 0 else -1

    def _lower(self, group: Sequence[int], levels: list[int], wanted: int, rng: np.random.Generator) -> None:
        """Random units down until the group stores no more than wanted."""
        while self.stored(group, levels) > wanted:
            levels[int(rng.choice(self._downs(group, levels)))] -= 1

    def _drawn(self, groups: Sequence[tuple[int, ...]], rng: np.random.Generator) -> tuple[int, ...]:
        """A group, in proportion to its units."""
        sizes = np.array([len(group) for group in groups], dtype=float)
        return groups[rng.choice(len(groups), p=sizes / sizes.sum())]

    def _exchanging(self, group: tuple[int, ...], levels: Levels) -> list[int]:
        """Units of a group that can go down while another goes up."""
        ups = self._ups(group, levels)
        return [i for i in self._downs(group, levels) if len(ups) > 1 or ups not in ([], [i])]

    def _ups(self, units: Sequence[int], levels: Sequence[int]) -> list[int]:
        return [i for i in units if levels[i] < self.high[i]]

    def _downs(self, units: Sequence[int], levels: Sequence[int]) -> list[int]:
        return [i for i in units if levels[i] > self.low[i]]

    def _even(self) -> bool:
        """Within each group a level more stores the same in all units."""
        return all(len({self._size(i) for i in group}) <= 1 for group in self.groups)

    def _size(self, unit: int) -> int:
        return self.sizes[unit] if self.sizes else 1
