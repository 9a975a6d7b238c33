"""What a configuration saves, decided example by example.

The rule. One configuration is *worse* than another where the mean difference of their errors, over the repeats and
examples that both have, lies above 0 with its whole 95 % interval (:func:`isoflop.frontier.paired.paired`). Two
configurations that share no examples are compared by their mean errors alone, without any tolerance: noise that cannot
be cancelled must not make a claim. Neither worse than the other: they are *as good*. Then

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
import pyarrow.compute as pc

from isoflop.core.numbers import short, with_interval
from isoflop.frontier.paired import over_repeats, paired
from isoflop.sweep.configs import Config

_COLUMNS = ["job_id", "task", "repeat", "status", "error", "scores"]
_DOUBT = (1.0, 4.0)  # standard errors: the interval ends at about 2, and resampling takes a while
Price = Callable[[Config], float | None]


@dataclass(frozen=True)
class Gap:
    """Error of one configuration minus that of another; without an interval where they share no examples."""

    difference: float
    low: float | None = None
    high: float | None = None

    @property
    def worse(self) -> bool:
        """Whether the first is worse than the second."""
        return (self.difference if self.low is None else self.low) > 0

    @property
    def text(self) -> str:
        """The difference in words."""
        if self.low is None:
            return f"{short(self.difference)}, of means: no shared examples"
        return f"{with_interval(self.difference, self.low, self.high)} on the same examples"


class Pairing:
    """Configurations compared on the examples that they share; every comparison is made once.

    Args:
        table: finished rows with their ``scores``.
    """

    def __init__(self, table: pa.Table) -> None:
        self._rows = table.select(_COLUMNS)
        self._place = {job: i for i, job in enumerate(table["job_id"].to_pylist())}
        self._repeats = table["repeat"].to_pylist()
        self._examples = pc.list_value_length(table["scores"]).to_pylist()
        self._gaps: dict[tuple[tuple[str, ...], tuple[str, ...]], Gap] = {}

    def worse(self, a: Config, b: Config) -> bool:
        """Whether ``a`` is worse than ``b``."""
        plain = self._plain(self._shared(a, b))
        return self.gap(a, b).worse if plain is None else plain

    def gap(self, a: Config, b: Config) -> Gap:
        """The error of ``a`` minus that of ``b``, with its interval."""
        key = (a.jobs, b.jobs)
        if key not in self._gaps:
            self._gaps[key] = self._compare(a, b)
        return self._gaps[key]

    def _compare(self, a: Config, b: Config) -> Gap:
        shared = self._shared(a, b)
        if not shared:
            return Gap(a.error - b.error)
        rows = pa.concat_tables([self._rows.slice(i, 1) for pair in shared for i in pair])
        rows = rows.append_column("side", pa.array(["a", "b"] * len(shared)))
        found = paired(rows, "side = 'a'", "side = 'b'", ())
        return Gap(found.difference, found.low, found.high)

    def _shared(self, a: Config, b: Config) -> list[tuple[int, int]]:
        """Rows of both with the same task, options, repeat and number of examples."""
        if a.scene != b.scene:
            return []
        others = {self._repeats[i]: i for i in map(self._place.__getitem__, b.jobs)}
        found = [(i, others.get(self._repeats[i])) for i in map(self._place.__getitem__, a.jobs)]
        counts = self._examples
        return [(i, j) for i, j in found if j is not None and i != j and counts[i] and counts[i] == counts[j]]

    def _plain(self, shared: Sequence[tuple[int, int]]) -> bool | None:
        """Whether the interval lies above 0; None where that takes resampling, of a single repeat that leaves a doubt."""
        if not shared:
            return None
        differences = [self._scores(i) - self._scores(j) for i, j in shared]
        if len(differences) > 1:
            return over_repeats([(self._repeats[i], d) for (i, _), d in zip(shared, differences, strict=True)])[0] > 0
        (d,) = differences
        distance, error = float(d.mean()), float(d.std()) / math.sqrt(len(d))
        if distance <= _DOUBT[0] * error:
            return False
        return True if distance > _DOUBT[1] * error else None

    def _scores(self, row: int) -> np.ndarray:
        return np.asarray(self._rows["scores"][row].values, dtype=float)


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
    better = f"uncompressed {other.model} at {short(cost / own)} × the cost is better, error {short(other.error)}"
    if not between:
        return Comparison(f"; no saving at equal error: {better} (difference to it {gap.text})")
    price, lesser = min(between, key=lambda pair: pair[1].error)
    words = f"{_factor(price / own)} uncompressed {lesser.model}, which is worse, error {short(lesser.error)}"
    return Comparison(f"; {words}; {better} (difference to it {gap.text})", price / own)


def _factor(ratio: float) -> str:
    if abs(ratio - 1) < 0.005:
        return "as dear as"
    return f"{short(ratio)} × cheaper than" if ratio > 1 else f"{short(1 / ratio)} × dearer than"
