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
PREFIX_KINDS = ("every", "powers", "full")
"""every: all numbers up to the largest equally often; powers: powers of two below the largest, and the largest, equally often."""


@dataclass(frozen=True)
class BudgetSampler:
    """Draws the budget of a training step.

    Args:
        kind: one of ``KINDS`` or ``PREFIX_KINDS``.
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
        if self.kind in ("log-uniform", "every"):
            return list(range(1, self.largest + 1))
        if self.kind == "powers":
            return [*(2**n for n in range((self.largest - 1).bit_length())), self.largest]
        return [self.largest if self.kind == "full" else self.own]

    def draw(self, step: int, seed: int) -> int:
        """The budget of one step, for the whole batch; depends on the arguments and on nothing else."""
        return self.draw_each(step, seed, 1)[0]

    def draw_each(self, step: int, seed: int, count: int) -> list[int]:
        """Budgets of a step, one for each of ``count`` examples; the first is what ``draw`` gives."""
        u_B = np.random.default_rng([derive_seed("budget", self.kind, seed), step]).random(count)
        if self.kind == "log-uniform":
            return [int((self.largest + 1) ** u) for u in u_B.tolist()]
        support = self.support()
        return [support[int(u * len(support))] for u in u_B.tolist()]
