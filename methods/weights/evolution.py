"""EvoPress's search: offspring of a parent, selected in steps on more and more data (arXiv 2410.14649, section 3).

Knows nothing of models: a configuration is one level per unit (matrix, half of a block), ``space`` says how it changes, and
what serves and scores it is handed in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from isoflop.methods.weights.space import Levels

_TRIES = 100


@dataclass(frozen=True)
class SelectionStep:
    """One step of selection: how many survive, judged on how many examples."""

    survivors: int
    examples: int


def selections(steps: int, survivors: int, examples: int, growth: int) -> tuple[SelectionStep, ...]:
    """``survivors`` in the first step and a quarter of them in each further one, one in the last; examples grow by ``growth``.

    With 3 steps and 16 (8) survivors these are the 16, 4, 1 (8, 2, 1) of the paper's searches for bits (sparsity).
    """
    return tuple(
        SelectionStep(1 if step == steps - 1 else max(1, survivors // 4**step), examples * growth**step)
        for step in range(steps)
    )


class Judge(Protocol):
    """Scores configurations.

    Attributes:
        tokens: scored positions so far, over all configurations: what a search costs.
    """

    tokens: int

    def scores(self, candidates: Sequence[Levels], examples: int, rng: np.random.Generator) -> list[float]:
        """The fitness of each on the same ``examples`` drawn from the calibration set; all of it, when it holds no more.

        Lower is better.
        """


Propose = Callable[[Levels, np.random.Generator], Levels]


@dataclass
class Search:
    """A finished search.

    Attributes:
        levels: what was found.
        fitness: of the configuration that was best, at the start and after each generation, on the examples of the last step of
            selection; they differ from one generation to the next unless that step sees the whole set.
        tokens: scored positions until then.
        moved: exchanges of levels between it and the start.
    """

    levels: Levels
    fitness: list[float] = field(default_factory=list)
    tokens: list[float] = field(default_factory=list)
    moved: list[float] = field(default_factory=list)

    def note(self, start: Levels, fitness: float, tokens: int) -> None:
        """Record a generation."""
        self.fitness.append(fitness)
        self.tokens.append(float(tokens))
        self.moved.append(sum(abs(a - b) for a, b in zip(self.levels, start, strict=True)) / 2)


def evolve(
    starts: Sequence[Levels],
    propose: Propose,
    judge: Judge,
    plan: Sequence[SelectionStep],
    generations: int,
    offspring: int,
    rng: np.random.Generator,
) -> Search:
    """A (1 + offspring) search.

    Each generation's offspring are distinct and differ from the parent. They pass through the steps of ``plan``; the
    parent joins at the last and is scored on the same examples. Where a space is so small that distinct offspring are
    hard to draw, a generation has fewer.

    Args:
        starts: configurations of the budget; the fittest on the first step's examples is the first parent.
        propose: an offspring of a parent.
    """
    parent = _fittest(starts, judge.scores(starts, plan[0].examples, rng), 1)[0][0] if len(starts) > 1 else starts[0]
    start, search = parent, Search(parent)
    search.note(start, judge.scores([parent], plan[-1].examples, rng)[0], judge.tokens)
    for _ in range(generations):
        candidates = distinct(search.levels, propose, offspring, rng)
        scores: list[float] = []
        for step, selection in enumerate(plan):
            if step == len(plan) - 1:
                candidates = [*candidates, search.levels]
            scores = judge.scores(candidates, selection.examples, rng)
            candidates, scores = _fittest(candidates, scores, selection.survivors)
        search.levels = candidates[0]
        search.note(start, scores[0], judge.tokens)
    return search


def distinct(parent: Levels, propose: Propose, count: int, rng: np.random.Generator) -> list[Levels]:
    """Up to ``count`` different proposals other than the parent, in the order in which they were drawn."""
    found: dict[Levels, None] = {}
    for _ in range(_TRIES * count):
        if len(found) == count:
            break
        levels = propose(parent, rng)
        if levels != parent:
            found[levels] = None
    return list(found)


def _fittest(candidates: Sequence[Levels], scores: Sequence[float], count: int) -> tuple[list[Levels], list[float]]:
    """The ``count`` of lowest score, best first; among equals the earlier; what is no number comes last."""
    order = sorted(range(len(candidates)), key=lambda i: (math.isnan(scores[i]), scores[i]))[:count]
    return [candidates[i] for i in order], [scores[i] for i in order]
