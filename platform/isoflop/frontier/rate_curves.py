"""Rate curves: error against bytes, and how two codecs compare over a whole range of them.

A curve joins its points by straight lines in the logarithm of the rate, in which rate-distortion curves are close to
straight. Bjøntegaard's difference is taken on these lines instead of on fitted cubics, which swing between few points.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import Any

import numpy as np
import pyarrow as pa

from isoflop.core.errors import UserError
from isoflop.frontier.query import sql


@dataclass(frozen=True)
class RateCurve:
    """Points of one codec.

    Attributes:
        rates: ascending, each once; bytes, or anything else that is paid.
        errors: at these rates, to be minimised.
    """

    rates: np.ndarray
    errors: np.ndarray

    @classmethod
    def of(cls, points: Iterable[tuple[float, float]]) -> RateCurve:
        """From (rate, error) pairs in any order; errors at equal rates are averaged.

        Raises:
            UserError: there is no point, or a rate is not positive.
        """
        at: dict[float, list[float]] = {}
        for rate, error in points:
            at.setdefault(float(rate), []).append(float(error))
        if not at or min(at) <= 0:
            raise UserError(f"a rate curve needs points with rates above 0; got rates {sorted(at)}")
        rates = sorted(at)
        return cls(np.array(rates), np.array([float(np.mean(at[rate])) for rate in rates]))

    def at(self, rate: float) -> float:
        """The error at a rate; nan outside of the measured ones."""
        if not self.rates[0] <= rate <= self.rates[-1]:
            return float("nan")
        return float(np.interp(np.log(rate), np.log(self.rates), self.errors))

    def hull(self) -> RateCurve:
        """The lower convex hull in rate and error: what sharing images among the settings reaches, rises left out."""
        kept: list[tuple[float, float]] = []
        for point in zip(self.rates.tolist(), self.errors.tolist(), strict=True):
            while len(kept) > 1 and _turn(kept[-2], kept[-1], point) <= 0:
                kept.pop()
            kept.append(point)
        falling = [kept[0]]
        for point in kept[1:]:
            if point[1] < falling[-1][1]:
                falling.append(point)
        return RateCurve.of(falling)

    def crossings(self, other: RateCurve) -> list[float]:
        """Rates at which this curve passes from above to below the other one or back, on the range that both cover."""
        grid = np.union1d(self.rates, other.rates)
        low, high = max(self.rates[0], other.rates[0]), min(self.rates[-1], other.rates[-1])
        grid = grid[(grid >= low) & (grid <= high)]
        gaps = [(rate, self.at(rate) - other.at(rate)) for rate in grid.tolist()]
        gaps = [(rate, gap) for rate, gap in gaps if gap != 0]
        return [
            float(np.exp(np.log(a) + (np.log(b) - np.log(a)) * gap_a / (gap_a - gap_b)))
            for (a, gap_a), (b, gap_b) in pairwise(gaps)
            if gap_a * gap_b < 0
        ]

    def extra_rate(self, other: RateCurve) -> float:
        """Bjøntegaard's rate difference: how much more rate this curve takes than the other for equal errors.

        The mean difference of log rates over the errors that both reach, as a share: -0.2 is a fifth less; nan when there are
        no such errors. Settings that take more rate for no less error are left out first.
        """
        a, b = self._falling(), other._falling()
        low, high = max(a.errors[-1], b.errors[-1]), min(a.errors[0], b.errors[0])
        if not low < high:
            return float("nan")
        errors = np.union1d(a.errors, b.errors)
        errors = np.union1d(errors[(errors >= low) & (errors <= high)], [low, high])
        gap = a._log_rates(errors) - b._log_rates(errors)
        return float(np.expm1(np.trapezoid(gap, errors) / (high - low)))

    def _falling(self) -> RateCurve:
        best = np.minimum.accumulate(self.errors)
        kept = np.concatenate([[True], self.errors[1:] < best[:-1]])
        return RateCurve(self.rates[kept], self.errors[kept])

    def _log_rates(self, errors: np.ndarray) -> np.ndarray:
        return np.interp(errors, self.errors[::-1], np.log(self.rates)[::-1])


def rate_curves(
    table: pa.Table, rate: str = "footprint['codec_bytes']", error: str = "error", by: Sequence[str] = ("method",)
) -> dict[tuple[Any, ...], RateCurve]:
    """Curves of the finished rows, repeats averaged point by point.

    Args:
        table: ledger rows of one model and task.
        rate, error: SQL expressions, for example ``footprint['codec_payload_bytes']`` and ``metrics['psnr']``.
        by: SQL expressions that tell curves apart, for example ``knobs->>'tail_drop'``.
    """
    names = ", ".join(f"{expression} as by_{place}" for place, expression in enumerate(by))
    found = sql(
        f"select {names}, knobs, avg({rate}) as rate, avg({error}) as error from results where status = 'ok' "
        f"group by all having avg({rate}) > 0 order by all",
        table,
    ).to_pylist()
    points: dict[tuple[Any, ...], list[tuple[float, float]]] = {}
    for row in found:
        key = tuple(row[f"by_{place}"] for place in range(len(by)))
        points.setdefault(key, []).append((row["rate"], row["error"]))
    return {key: RateCurve.of(pairs) for key, pairs in points.items()}


def compare_curves(curves: Mapping[tuple[Any, ...], RateCurve]) -> list[dict[str, Any]]:
    """One entry per pair: ``a``, ``b``, ``extra_rate`` of a over b, and the rates at which they cross."""
    return [
        {"a": a, "b": b, "extra_rate": curves[a].extra_rate(curves[b]), "crossings": curves[a].crossings(curves[b])}
        for a, b in combinations(curves, 2)
    ]


def _turn(a: tuple[float, float], b: tuple[float, float], c: tuple[float, float]) -> float:
    """Positive where the way from a over b to c turns left."""
    return (b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0])
