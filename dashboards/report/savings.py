"""What a configuration saves, decided example by example.

The rule. How probably one configuration is *worse* than another is told by the evidence that answers rest on, too
(:func:`isoflop.frontier.evidence.gather`): the examples that both scored, and the repeats that both have. It counts as worse where
that is likelier than :data:`LIKELY`; else the two are *as good*, and the text says over how many examples and how probably not, so
that two repeats or a handful of examples make no equality. Where nothing is known of chance (one row each, or no repeat in common),
mean errors decide, without any tolerance, and the text says so. Then

- a configuration is *enough* for a task where it is not worse than the one of least mean error (:func:`enough`);
- what it saves is measured against the cheapest uncompressed model that is not worse than it. Models that cannot be told
  apart from it count as not worse, so that noise makes this reference cheaper and the saving smaller;
- it saves the ratio of their costs only where it is not itself worse than that reference. Where it is worse, no such factor is
  stated, but by how much the reference is better; and where an uncompressed model in between costs more than it, and is worse,
  that one is named, which is a saving without a loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from isoflop.core.numbers import short, with_interval
from isoflop.frontier.answers import chance
from isoflop.frontier.evidence import Candidate, gather
from isoflop.sweep.configs import Config

LIKELY = 0.8
"""A probability of being worse above which two configurations are not called as good."""
_SHOWN = 0.975  # above which it is worse without a doubt
_LEVEL = 0.95
_FAR = 4.0  # standard errors of one repeat's examples: no draws are needed to see it
Price = Callable[[Config], float | None]


@dataclass(frozen=True)
class Gap:
    """Error of one configuration minus that of another.

    Attributes:
        low, high: a 95 % interval; None where nothing is known of chance.
        probability: that the first is worse; None likewise.
        told: what that rests on; unknown: why nothing is known.
    """

    difference: float
    low: float | None = None
    high: float | None = None
    probability: float | None = None
    told: str = ""
    unknown: str = "no shared examples"

    @property
    def worse(self) -> bool:
        """Whether the first counts as worse than the second."""
        return self.difference > 0 if self.probability is None else self.probability > LIKELY

    @property
    def shown(self) -> bool:
        """Whether that leaves no doubt."""
        return self.probability is None or self.probability > _SHOWN

    @property
    def text(self) -> str:
        """The difference in words, and what they are worth."""
        if self.low is None or self.high is None:
            return f"{short(self.difference)}, of means: {self.unknown}"
        between = with_interval(self.difference, self.low, self.high)
        return f"{between} over {self.told}, worse with probability {chance(self.probability)}"


class Pairing:
    """Configurations compared on the examples and repeats that they share; every comparison is made once.

    Args:
        table: finished rows with their ``scores``.
    """

    def __init__(self, table: pa.Table) -> None:
        self._scores = table["scores"].combine_chunks()
        self._errors = table["error"].to_pylist()
        self._place = {job: i for i, job in enumerate(table["job_id"].to_pylist())}
        self._repeats = table["repeat"].to_pylist()
        self._gaps: dict[tuple[tuple[str, ...], tuple[str, ...]], Gap] = {}

    def worse(self, a: Config, b: Config) -> bool:
        """Whether ``a`` counts as worse than ``b``."""
        plain = self._plain(self._shared(a, b))
        return self.gap(a, b).worse if plain is None else plain

    def gap(self, a: Config, b: Config) -> Gap:
        """The error of ``a`` minus that of ``b``, and how sure it is."""
        key = (a.jobs, b.jobs)
        if key not in self._gaps:
            self._gaps[key] = self._compare(a, b)
        return self._gaps[key]

    def _compare(self, a: Config, b: Config) -> Gap:
        shared = self._shared(a, b)
        if not shared:
            return Gap(a.error - b.error)
        found = gather([self._candidate(a, [i for i, _ in shared]), self._candidate(b, [j for _, j in shared])])
        difference = float(found.error[0] - found.error[1])
        if found.unknown:
            return Gap(difference, unknown=found.unknown)
        apart, unseen = found.draws[:, 0] - found.draws[:, 1], found.reach[0, 1] * found.unseen[:, 0]
        ends = (0.5 - _LEVEL / 2, 0.5 + _LEVEL / 2)
        low, high = np.quantile(np.concatenate([apart - unseen, apart + unseen]), ends).tolist()
        return Gap(difference, low, high, float(found.best()[1]), found.told)

    def _candidate(self, c: Config, rows: Sequence[int]) -> Candidate:
        errors = {self._repeats[i]: float(self._errors[i]) for i in rows}
        return Candidate(
            c.title,
            c.method,
            c.variant,
            c.model,
            1.0,
            errors,
            {self._repeats[i]: s for i in rows if len(s := self._of(i))},
        )

    def _shared(self, a: Config, b: Config) -> list[tuple[int, int]]:
        """Rows of both with the same task, options and repeat."""
        if a.scene != b.scene:
            return []
        others = {self._repeats[i]: i for i in map(self._place.__getitem__, b.jobs)}
        found = [(i, others.get(self._repeats[i])) for i in map(self._place.__getitem__, a.jobs)]
        return [(i, j) for i, j in found if j is not None and i != j]

    def _plain(self, shared: Sequence[tuple[int, int]]) -> bool | None:
        """Whether the first is worse; None where that takes draws, as where the examples of a repeat leave a doubt."""
        pairs = [(self._of(i), self._of(j)) for i, j in shared]
        if len(pairs) != 1 or len(pairs[0][0]) != len(pairs[0][1]) or len(pairs[0][0]) < 2:
            return None
        d = pairs[0][0] - pairs[0][1]
        distance, error = float(d.mean()), float(d.std()) / math.sqrt(len(d))
        if distance <= -_FAR * error:
            return False
        return True if distance > _FAR * error else None

    def _of(self, row: int) -> np.ndarray:
        values = self._scores[row].values
        return np.zeros(0) if values is None else np.asarray(values, dtype=float)


def enough(configs: Sequence[Config], key: str, pairing: Pairing) -> Config:
    """The cheapest configuration that is not worse than the one of least mean error."""
    ranked = sorted((c for c in configs if key in c.costs), key=lambda c: (c.costs[key], c.error))
    best = min(ranked, key=lambda c: c.error)
    return next(c for c in ranked if c is best or not pairing.worse(c, best))


@dataclass(frozen=True)
class Comparison:
    """A configuration against what is uncompressed: words, and the saving that they state (0 where they state none)."""

    text: str
    factor: float = 0.0


def against_uncompressed(choice: Config, configs: Sequence[Config], price: Price, pairing: Pairing) -> Comparison:
    """How much a choice saves, by the rule above; among configurations of its own task and options."""
    own = price(choice)
    if choice.uncompressed:
        return Comparison("; it is uncompressed")
    dense = [(p, c) for c in configs if c.uncompressed and c.scene == choice.scene and (p := price(c)) is not None]
    if not dense or not own:
        return Comparison("")
    dense.sort(key=lambda pair: (pair[0], pair[1].error))
    reached = next((i for i, (_, c) in enumerate(dense) if not pairing.worse(c, choice)), None)
    if reached is None:
        cost, other = min(dense, key=lambda pair: pair[1].error)
        at = f"{other.model}: {short(other.error)} at {short(cost / own)} × the cost"
        return Comparison(f"; no uncompressed model reaches that error (the best, {at})", cost / own)
    cost, other = dense[reached]
    gap = pairing.gap(choice, other)
    if gap.worse:
        between = [(p, c) for p, c in dense[:reached] if p > own]
        return _worse(own, cost, other, gap, between)
    detail = f"{other.model}, error {short(other.error)}; difference to it {gap.text}"
    return Comparison(f"; {_factor(cost / own)} the cheapest uncompressed model that is as good ({detail})", cost / own)


def _worse(own: float, cost: float, other: Config, gap: Gap, between: Sequence[tuple[float, Config]]) -> Comparison:
    """The words where the cheapest uncompressed model that is not worse is better."""
    how = "is better" if gap.shown else "is probably better"
    better = f"uncompressed {other.model} at {short(cost / own)} × the cost {how}, error {short(other.error)}"
    if not between:
        return Comparison(f"; no saving at equal error: {better} (difference to it {gap.text})")
    price, lesser = min(between, key=lambda pair: pair[1].error)
    words = f"{_factor(price / own)} uncompressed {lesser.model}, which is worse, error {short(lesser.error)}"
    return Comparison(f"; {words}; {better} (difference to it {gap.text})", price / own)


def _factor(ratio: float) -> str:
    if abs(ratio - 1) < 0.005:
        return "as dear as"
    return f"{short(ratio)} × cheaper than" if ratio > 1 else f"{short(1 / ratio)} × dearer than"
