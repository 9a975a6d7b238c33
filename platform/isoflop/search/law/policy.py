"""What the planner is given and gives: candidates, its knobs, choices, and what is known of a target.

Shapes: M candidates, O observations per candidate, T quantities, K axes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from isoflop.core.expressions import Array, Mask


@dataclass(frozen=True)
class Pool:
    """Candidates: what they would observe and cost.

    Attributes:
        x: (M, O, K); group: (M, O); cost: (M,); keys: (M,) equal for equal places.
        room: boolean (M,), may be run at all; ran: (M,), has run or is under way (updated as a batch is chosen).
    """

    x: Array
    group: np.ndarray
    cost: Array
    keys: list[Any]
    room: Mask
    ran: Mask

    def __len__(self) -> int:
        return len(self.cost)

    @property
    def price(self) -> Array:
        """Costs in units of their median: only ratios matter."""
        return self.cost / float(np.median(self.cost))


@dataclass(frozen=True)
class Policy:
    """Knobs of the planner.

    Attributes:
        gamma: power of the cost in the score (1 is right for many small steps, less looks further than one run; between .6 and
            .8 greedy designs come within 10 % of the best possible ones, without a limit on the number of runs); pilot_gamma:
            the same for the pilot.
        pilot_factor: pilot runs per parameter; pilot_share: of the budget, at most.
        explore: share of runs where forms disagree, when several compete.
        check_share: of the budget for the check, which the search fits no law with; 0: none.
        replicates: the same place may be run again.
        criterion: ``V`` narrows the target; ``D`` the parameters' volume (a baseline).
    """

    gamma: float = 0.7
    pilot_gamma: float = 0.4
    pilot_factor: float = 2.5
    pilot_share: float = 0.3
    explore: float = 0.2
    check_share: float = 0.1
    replicates: bool = True
    criterion: str = "V"


CHECK = "check"
"""Role of the run that no law of the search is fitted with."""
NO_WIDTH = 1e-9
"""Below this an interval is a point: every draw lies on the end of the range."""


@dataclass
class Choice:
    """A chosen candidate with the reason."""

    index: int
    role: str
    score: float = math.nan


@dataclass(frozen=True)
class TargetState:
    """What is known of the target.

    Attributes:
        labels, mean, sd: per quantity; low, high: 95 % interval; between: share of the variance between hypotheses.
        log: quantities are logarithms.
        at_low, at_high: boolean (T,), the interval reaches the end of the range in which an optimum was looked for: beyond
            it nothing is known, and the interval has one side only.
    """

    labels: list[str]
    mean: Array
    sd: Array
    low: Array
    high: Array
    between: Array
    log: bool
    at_low: Mask
    at_high: Mask

    @property
    def half_width(self) -> float:
        """The widest half interval, as far as the range goes."""
        return float(np.max(0.5 * (self.high - self.low)))

    @property
    def two_sided_half_width(self) -> float:
        """The same over quantities that have an interval; inf where every one of them lies on the end of its range."""
        inside = ~(self.one_sided & (self.high - self.low < NO_WIDTH))
        return float(np.max(0.5 * (self.high - self.low)[inside])) if inside.any() else math.inf

    @property
    def one_sided(self) -> Mask:
        """Boolean (T,): an interval that ends where the range does."""
        return self.at_low | self.at_high
