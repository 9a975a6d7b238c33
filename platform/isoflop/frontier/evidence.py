"""What measured configurations tell of each other: joint draws of their errors, from examples and repeats that they share.

Two sources of chance are drawn, each where rows know it:

* **examples**, jointly for all configurations (each draw weighs the same examples), with Dirichlet weights over the n that were
  scored *and one that was not* (Rubin's Bayesian bootstrap with Gaffke's extra observation). What the unseen example would have
  said is set by the question, by up to ``reach``, which is what one was seen to say of these two: agreement on a handful of examples
  is no certainty, and a third configuration that is far off does not blur the two. Of 0/1 scores
  this makes the probability of being better that of a sign test with a flat prior, 1 - 2**-(k+1) where all k examples that differ
  agree, and the one of being as good the rule of succession. Other scores may differ by next to nothing; the same bound holds for
  them, with k = n.
* **repeats** (other seeds): Student's t with R - 1 degrees of freedom about the mean, jointly for all configurations.

Both are added where both are known. An example then counts twice, once in what differs between repeats: the intervals are wide
rather than narrow, which covers repeats that score the same examples as well as repeats with examples of their own. Repeats that
agree in every score are copies, and count once. Configurations without a repeat in common are drawn independently.

Shapes: D draws, C configurations, n examples, R repeats.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from isoflop.core.expressions import Array

DRAWS = 4000
_CHUNK = 2_000_000  # weights at a time


@dataclass(frozen=True)
class Candidate:
    """A configuration with all that was measured of it.

    Attributes:
        title: method and settings, for people; method: its name; chain: the settings that are more or less of one method on one model.
        cost: mean cost of an answer; costs: by repeat.
        errors: by repeat; scores: per example, by repeat, where rows have them.
        uncompressed: its model as it is.
        ratio: uncompressed over compressed; None where that is not known.
    """

    title: str
    method: str
    chain: str
    model: str
    cost: float
    errors: Mapping[int, float]
    scores: Mapping[int, Array] = field(default_factory=dict)
    costs: Mapping[int, float] = field(default_factory=dict)
    uncompressed: bool = False
    ratio: float | None = None


@dataclass(frozen=True)
class Evidence:
    """Joint draws of the candidates' mean errors.

    Attributes:
        error: means (C,), over the repeats that all have.
        draws: (D, C), without the unseen example's share.
        unseen: its weight (D, C), 0 where no examples are known.
        reach: how far apart it may put each two candidates, (C, C).
        surest: (C, C), the most that can be said for one against another with so many examples or rows.
        log_costs: of draws (D, C), where costs differ between repeats; else the means.
        told: what it rests on, e.g. "120 paired examples"; unknown: why nothing is known; notes: what a reader must know.
    """

    error: Array
    draws: Array
    unseen: Array
    reach: Array
    surest: Array
    log_costs: Array
    told: str = ""
    unknown: str = ""
    notes: tuple[str, ...] = ()

    def best(self) -> Array:
        """Probability of each candidate's having the least error, (C,): the mean of what it is with the unseen example wholly for
        the candidate and wholly against it. Equals share."""
        found = np.zeros(len(self.error))
        for c in range(len(found)):
            others, reach = np.delete(self.draws, c, axis=1), np.delete(self.reach[c], c)
            if not others.shape[1]:
                return np.ones(1)
            own = self.draws[:, c]
            for side in (-1.0, 1.0):
                seen = others - side * self.unseen[:, c, None] * reach
                least = seen.min(axis=1)
                equals = 1 + (seen == least[:, None]).sum(axis=1)
                found[c] += 0.5 * float(np.mean((own < least) + (own == least) / equals))
        found = np.minimum(found, self.surest.min(axis=1))
        return found / max(1.0, float(found.sum()))

    def at_most(self, a: int, b: int, margin: float) -> float:
        """Probability that the error of ``a`` exceeds that of ``b`` by no more than ``margin``, the unseen example against ``a``."""
        gap = self.draws[:, a] - self.draws[:, b] + self.reach[a, b] * self.unseen[:, a]
        return min(float(np.mean(gap <= margin + 1e-12)), float(self.surest[a, b]))

    def shaken(self, groups: Sequence[int], seed: int) -> Array:
        """Draws (D, C) in which the unseen example speaks for or against each group of candidates, by chance."""
        rng = np.random.default_rng([seed, 1])
        sides = rng.choice((-0.5, 0.5), size=(len(self.draws), max(groups, default=0) + 1))
        return np.asarray(self.draws + self.reach.max() * self.unseen * sides[:, list(groups)])


def gather(candidates: Sequence[Candidate], seed: int = 0, draws: int = DRAWS) -> Evidence:
    """The evidence of candidates of one task, of at least one."""
    shared = sorted(set.intersection(*(set(c.errors) for c in candidates)))
    if not shared:
        return _apart(candidates, seed, draws)
    most = max(len(c.errors) for c in candidates)
    notes = [f"only {len(shared)} of {most} repeats are of all configurations compared"] if len(shared) < most else []
    blocks = _blocks(candidates, shared)
    if blocks and len(shared) > 1 and all(np.array_equal(b, blocks[0]) for b in blocks):
        notes.append(f"the {len(shared)} repeats agree in every score: they count as one")
        shared, blocks = shared[:1], blocks[:1]
    if not blocks and any(c.scores for c in candidates):
        notes.append("configurations do not have the same examples: their means alone are compared")
    errors = np.array([[c.errors[r] for c in candidates] for r in shared], dtype=np.float64)
    rng = np.random.default_rng(seed)
    count = len(candidates)
    found, unseen = np.broadcast_to(errors.mean(axis=0), (draws, count)).copy(), np.zeros((draws, count))
    examples = sum(len(b) for b in blocks)
    if blocks and examples >= 2:
        moved, weight = over_examples(blocks, rng, draws)
        found += moved
        unseen += weight[:, None]
    if len(shared) > 1:
        found += _over_repeats(errors, rng, draws)
    known = len(shared) > 1 or examples >= 2
    return Evidence(
        error=errors.mean(axis=0),
        draws=_equals_equal(found, errors, blocks),
        unseen=unseen,
        reach=_reaches(blocks, count),
        surest=np.ones((count, count))
        if _right_or_wrong(blocks)
        else _surest(np.full(count, max([len(shared), *map(len, blocks)]))),
        log_costs=_log_costs(candidates, shared, rng, draws),
        told=_told(len(shared), examples) if known else "",
        unknown="" if known else _few(examples),
        notes=tuple(notes),
    )


def _few(examples: int) -> str:
    what = "one example" if examples == 1 else "one row per configuration, without scores of examples"
    return f"there is {what}, which says nothing of chance"


def _told(repeats: int, examples: int) -> str:
    if not examples:
        return f"{repeats} repeats"
    return f"{examples // repeats if repeats > 1 else examples} paired examples" + (
        f" in each of {repeats} repeats" if repeats > 1 else ""
    )


def _apart(candidates: Sequence[Candidate], seed: int, draws: int) -> Evidence:
    """Of candidates that share no repeat: each drawn for itself."""
    own = [gather([c], seed + 1 + k, draws) for k, c in enumerate(candidates)]
    unknown = next((e.unknown for e in own if e.unknown), "")
    rows = np.array([len(c.errors) for c in candidates])
    scored = all(e.reach.any() for e in own)
    graded = scored and _right_or_wrong([s for c in candidates for s in c.scores.values()])
    carried = [max([n, *map(len, c.scores.values())]) for n, c in zip(rows, candidates, strict=True)]
    return Evidence(
        error=np.array([e.error[0] for e in own]),
        draws=np.concatenate([e.draws for e in own], axis=1),
        unseen=np.concatenate([e.unseen for e in own], axis=1),
        reach=np.full((len(own), len(own)), max(float(e.reach.max()) for e in own)),
        surest=np.ones((len(own), len(own))) if graded else _surest(np.array(carried) if scored else rows),
        log_costs=np.concatenate([e.log_costs for e in own], axis=1),
        told="" if unknown else f"{_between(rows)} unpaired rows each",
        unknown=unknown,
    )


def _between(rows: Array) -> str:
    low, high = int(rows.min()), int(rows.max())
    return str(low) if low == high else f"{low} to {high}"


def _blocks(candidates: Sequence[Candidate], shared: Sequence[int]) -> list[Array]:
    """Scores (n, C) per repeat; none where not every candidate scored the same number of examples in it."""
    blocks = []
    for repeat in shared:
        columns = [np.asarray(c.scores.get(repeat, ()), dtype=np.float64) for c in candidates]
        if len({len(column) for column in columns}) != 1 or not len(columns[0]):
            return []
        block = np.stack(columns, axis=1)
        if not np.isfinite(block).all():
            return []
        blocks.append(block)
    return blocks


def over_examples(blocks: Sequence[Array], rng: np.random.Generator, draws: int) -> tuple[Array, Array]:
    """Deviations (D, C) of the mean over examples, and the unseen one's weight (D,).

    Repeats with as many examples share their weights: that is right where they score the same ones, and no harm elsewhere.
    """
    by_size: dict[int, list[Array]] = {}
    for block in blocks:
        by_size.setdefault(len(block), []).append(block)
    moved, unseen = np.zeros((draws, blocks[0].shape[1])), np.zeros(draws)
    for n, alike in sorted(by_size.items()):
        share, scores = len(alike) / len(blocks), np.mean(alike, axis=0)
        level = scores.mean()  # at which the unseen example puts all of them; the question moves it from there
        step = max(1, _CHUNK // (n + 1))
        for first in range(0, draws, step):
            part = slice(first, min(draws, first + step))
            weights = rng.standard_exponential((part.stop - part.start, n + 1))
            weights /= weights.sum(axis=1, keepdims=True)
            moved[part] += share * (weights[:, :n] @ (scores - level) + level - scores.mean(axis=0))
            unseen[part] += share * weights[:, n]
    return moved, unseen


def _over_repeats(errors_RC: Array, rng: np.random.Generator, draws: int) -> Array:
    """Deviations (D, C): Student's t about the mean over repeats, with the repeats' own covariance."""
    count = len(errors_RC)
    normal = rng.standard_normal((draws, count)) @ (errors_RC - errors_RC.mean(axis=0))
    wide = np.sqrt((count - 1) / rng.chisquare(count - 1, draws))
    return np.asarray(normal * wide[:, None] / np.sqrt(count * (count - 1)))


def _right_or_wrong(blocks: Sequence[Array]) -> bool:
    """Whether scores are right or wrong: the unseen example then says in every draw what n examples carry, without a further bound."""
    return bool(blocks) and all(bool(np.isin(b, (0.0, 1.0)).all()) for b in blocks)


def reach_of(blocks: Sequence[Array]) -> float:
    """How far apart an example can put two candidates: 1 for scores that are right or wrong, else what was seen."""
    scores = np.concatenate(blocks)
    if _right_or_wrong(blocks):
        return 1.0
    apart = float(np.max(scores.max(axis=1) - scores.min(axis=1)))
    return apart or float(scores.max() - scores.min()) or float(np.abs(scores).max())


def _reaches(blocks: Sequence[Array], count: int) -> Array:
    """``reach_of`` each two candidates, (C, C). Those that agree in all that was scored may differ by as much as any two do."""
    if not blocks:
        return np.zeros((count, count))
    most, scores_nC = reach_of(blocks), np.concatenate(blocks)
    if _right_or_wrong(blocks):
        return np.full((count, count), most)
    apart = np.stack([np.abs(scores_nC - scores_nC[:, [c]]).max(axis=0) for c in range(count)])
    return np.where(apart > 0, apart, most)


def _surest(rows: Array) -> Array:
    """(C, C): what a sign test with a flat prior could say at most."""
    fewest = np.minimum(rows[:, None], rows[None, :])
    most = 1 - 0.5 ** (fewest + 1.0)
    np.fill_diagonal(most, 1.0)
    return np.asarray(most)


def _equals_equal(draws_DC: Array, errors_RC: Array, blocks: Sequence[Array]) -> Array:
    """Candidates that agree in everything stay equal in every draw, whatever the order of sums."""
    everything = np.concatenate([errors_RC, *blocks])
    _, first, place = np.unique(everything, axis=1, return_index=True, return_inverse=True)
    return np.asarray(draws_DC[:, first[place.ravel()]])


def _log_costs(candidates: Sequence[Candidate], shared: Sequence[int], rng: np.random.Generator, draws: int) -> Array:
    """(D, C): the logarithm of costs, with what differs between repeats, as seconds do."""
    means = np.log([c.cost for c in candidates])
    costs = [[c.costs.get(r, c.cost) for c in candidates] for r in shared]
    if len(shared) < 2 or np.ptp(costs, axis=0).max() <= 1e-9 * np.max(costs):
        return np.broadcast_to(means, (draws, len(candidates))).copy()
    return np.asarray(means + _over_repeats(np.log(np.maximum(costs, 1e-300)), rng, draws))
