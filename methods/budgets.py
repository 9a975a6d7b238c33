"""Budget sampler: how much of an ordered code an elastic method trains with at each step (prefix dropout).

A method that is trained once and served at every budget trains on prefixes of random length. Which lengths, and how
often, decides where it is good; the budgets of training and the one of a run are therefore two things.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from isoflop.core.hashing import derive_seed

KINDS = ("uniform", "log-uniform", "full", "own")
"""uniform: even numbers up to the largest, and the largest, equally often; log-uniform: every number, P(m) ~ log(1 + 1/m); full: always
the largest; own: always the budget of the run, one training per budget."""


@dataclass(frozen=True)
class BudgetSampler:
    """Draws the budget of a training step.

    Args:
        kind: one of ``KINDS``.
        largest: the whole code.
        own: budget of the run.
    """

    kind: str
    largest: int
    own: int

    @property
    def elastic(self) -> bool:
        """The training does not depend on the budget of the run."""
        return self.kind != "own"

    def support(self) -> list[int]:
        """All budgets that can be drawn."""
        if self.kind == "uniform":
            return [*range(2, self.largest, 2), self.largest]  # an odd code is trained to its end, too
        if self.kind == "log-uniform":
            return list(range(1, self.largest + 1))
        return [self.largest if self.kind == "full" else self.own]

    def draw(self, step: int, seed: int) -> int:
        """The budget of one step, for the whole batch; depends on the arguments and on nothing else."""
        support = self.support()
        u = np.random.default_rng([derive_seed("budget", self.kind, seed), step]).random()
        if self.kind == "log-uniform":
            return int((self.largest + 1) ** u)
        return support[int(u * len(support))]
