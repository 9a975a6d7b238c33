"""How much cheaper one method gets to an error than another: a curve of error over cost per method, read at one error.

A chain is one method at its settings on one model, from the dearest to the cheapest, with the uncompressed model among them: every
method can leave the model as it is. Along a chain the error may only grow as the cost falls (isotonic regression, which
averages what noise has put in the wrong order); between two of its points the error is a straight line over the logarithm of
the cost. Beyond its cheapest point nothing is claimed: a chain that is still good enough there is cheaper *by at least* so much.

Shapes: D draws, K points of a chain.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from isoflop.core.errors import UserError, unknown
from isoflop.core.expressions import Array
from isoflop.core.numbers import short
from isoflop.frontier.answers import Answer, Asked, no_reference, only_reference, reference, row_of
from isoflop.frontier.evidence import Candidate, Evidence, gather

Mask = np.ndarray[Any, np.dtype[np.bool_]]
_NAMES = ("method", "versus", "target_error", "speed_up", "low", "high", "at_least", "high_open")


def speed_up(
    candidates: Sequence[Candidate], asked: Asked, margin: float = 0.0, versus: str | None = None
) -> list[Answer]:
    """How much cheaper each method is than the uncompressed model, or than the method ``versus``, at the same error.

    That error is the uncompressed one's plus ``margin``.

    Returns:
        An answer per method, whose values hold ``method``, ``versus``, ``target_error``, ``speed_up``, ``low``, ``high`` (None where
        chance is unknown), ``at_least`` (the cheapest setting is still good enough) and ``high_open`` (so it is in the upper end).

    Raises:
        UserError: ``versus`` is no method of the candidates, or the only one.
    """
    dense = reference(candidates)
    if dense is None:
        return [no_reference("speed-up", asked, dict.fromkeys(_NAMES))]
    measured = [dense, *(c for c in candidates if not c.uncompressed)]
    families = _families(measured)
    if not families:
        return [only_reference("speed-up", asked, dict.fromkeys(_NAMES), dense)]
    rivals = _rivals(families, measured, versus)
    found = gather(measured, asked.seed)
    curves = _Curves.of(measured, families, found, margin, asked.seed)
    rows = [row_of(c, asked, float(e), None) for c, e in zip(measured, found.error, strict=True)]
    answers = []
    for name in families:
        for rival in rivals:
            if rival != name:
                answers.append(_answer(asked, name, rival, margin, curves, found))
                answers[-1].candidates = rows
    if not answers:
        raise UserError(f"versus = {versus!r}: {asked.where} has no other method to compare with it")
    return answers


def _families(measured: Sequence[Candidate]) -> dict[str, list[int]]:
    """Places of the candidates of each chain, the uncompressed one (the first) among them."""
    found: dict[str, list[int]] = {}
    for i, c in enumerate(measured):
        if i:
            found.setdefault(c.chain, [0]).append(i)
    return found


def _rivals(families: dict[str, list[int]], measured: Sequence[Candidate], versus: str | None) -> list[str | None]:
    """The chains to compare with; None is the uncompressed model."""
    if versus is None:
        return [None]
    of_method = {name: measured[own[-1]].method for name, own in families.items()}
    found: list[str | None] = [name for name, method in of_method.items() if versus in (name, method)]
    if not found:
        raise unknown("method to compare with", versus, {*families, *of_method.values()})
    return found


@dataclass(frozen=True)
class _Curves:
    """What each chain costs at the error that is asked for: the measured means first, then a row per draw.

    Attributes:
        target: that error (1 + D,); dense: the uncompressed model's log cost (1 + D,).
        reached: per chain its log cost (1 + D,), at most the uncompressed one's, since every method can leave the model as it is; and
            whether it is that of its cheapest setting, below which nothing was measured.
        idle: chains of which no setting takes less than the uncompressed model.
    """

    target: Array
    dense: Array
    reached: dict[str, tuple[Array, Mask]]
    idle: frozenset[str]

    @classmethod
    def of(
        cls, measured: Sequence[Candidate], families: dict[str, list[int]], found: Evidence, margin: float, seed: int
    ) -> _Curves:
        group = {i: k + 1 for k, own in enumerate(families.values()) for i in own if i}
        shaken = found.shaken([group.get(i, 0) for i in range(len(measured))], seed)
        errors = np.vstack([found.error, shaken])
        means = np.log([c.cost for c in measured])
        costs = np.vstack([means, found.log_costs])
        dense, target = costs[:, 0], errors[:, 0] + margin
        reached = {}
        for name, own in families.items():
            cost, end = log_cost_at(target, errors[:, own], costs[:, own])
            reached[name] = np.minimum(cost, dense), end & (cost < dense - 1e-9)
        idle = frozenset(name for name, own in families.items() if means[own[1:]].min() >= means[0])
        return cls(target, dense, reached, idle)

    def at(self, name: str | None) -> tuple[Array, Mask]:
        """Of a chain, or of the uncompressed model."""
        return self.reached[name] if name else (self.dense, np.zeros(len(self.dense), dtype=bool))


def _answer(asked: Asked, name: str, rival: str | None, margin: float, curves: _Curves, found: Evidence) -> Answer:
    (cost, end), (other, other_end) = curves.at(name), curves.at(rival)
    times = np.exp(other - cost)
    target = float(curves.target[0])
    low = high = None
    open_end = False
    over = rival or "uncompressed"
    aim = f"equal error{f' + {margin:g}' if margin else ''} ({short(target)})"
    at_least = bool(end[0] and not other_end[0])
    words = f"effective speed-up of {name} over {over} in {asked.cost}, at {aim}: "
    words += f"{'at least ' if at_least else ''}{short(float(times[0]))}×"
    if found.unknown:
        words += f"; its interval is unknown: {found.unknown}"
    else:
        low, high = map(float, np.quantile(times[1:], [(1 - asked.level) / 2, (1 + asked.level) / 2]))
        open_end = bool(np.mean(end[1:]) > (1 - asked.level) / 2)
        words += f" [{short(low)}, {short(high)}{' or more' if open_end else ''}], {100 * asked.level:g} % interval over {found.told}"
    notes = list(found.notes)
    notes += [f"no setting of {n} takes less than uncompressed" for n in (name, rival) if n in curves.idle]
    if other_end[0]:
        notes.append(
            f"{rival} is good enough at its cheapest setting: it may be cheaper still, and the speed-up smaller"
        )
    values: dict[str, Any] = {
        "method": name, "versus": over, "target_error": target, "speed_up": float(times[0]), "low": low, "high": high,
        "at_least": at_least, "high_open": open_end,
    }  # fmt: skip
    return Answer("speed-up", dict(asked.key), f"{asked.where}: {words}", values, [], found.unknown, notes)


def log_cost_at(error_D: Array, errors_DK: Array, log_costs_DK: Array) -> tuple[Array, Mask]:
    """The logarithm of the least cost at which a chain's error is no more than ``error_D``, per draw.

    Returns:
        (D,), ``inf`` where the chain's error is everywhere larger; and whether its cheapest point is still good enough.
    """
    order = np.argsort(-log_costs_DK, axis=1, kind="stable")
    x = np.take_along_axis(log_costs_DK, order, axis=1)
    y = growing(np.take_along_axis(errors_DK, order, axis=1))
    good = y <= error_D[:, None] + 1e-12
    count = good.sum(axis=1)  # errors grow along the chain, so that these are its first ones
    rows, last = np.arange(len(x)), x.shape[1] - 1
    left, right = np.clip(count - 1, 0, last), np.clip(count, 0, last)
    rise = y[rows, right] - y[rows, left]
    with np.errstate(all="ignore"):
        share = np.where(rise > 0, (error_D - y[rows, left]) / rise, 0.0)
    found = x[rows, left] + np.clip(share, 0.0, 1.0) * (x[rows, right] - x[rows, left])
    return np.where(count == 0, np.inf, found), count > last


def growing(errors_DK: Array) -> Array:
    """The closest series (least squares) that never falls, per row: isotonic regression by its minimax formula."""
    sums = np.concatenate([np.zeros((len(errors_DK), 1)), np.cumsum(errors_DK, axis=1)], axis=1)
    count = errors_DK.shape[1]
    found = np.empty_like(errors_DK)
    for k in range(count):
        ends = np.arange(k + 1, count + 1)
        best = np.full(len(errors_DK), -np.inf)
        for first in range(k + 1):
            means = (sums[:, ends] - sums[:, [first]]) / (ends - first)
            best = np.maximum(best, means.min(axis=1))
        found[:, k] = best
    return found
