"""Rate curves: error against bytes, and how two codecs compare over a whole range of them.

A curve joins its points by straight lines in the logarithm of the rate, in which rate-distortion curves are close to
straight. Everything here is done on these lines: the error at a rate, the hull, where two curves cross, and
Bjøntegaard's difference, which fitted cubics would let swing between few points.

Sharing images between two settings reaches the straight line in the rate itself, which lies above the line in its
logarithm: read a curve between its points as what a setting in between would reach, not as what a mixture does.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from isoflop.core.errors import UserError

_TINY = 1e-12
"""Gaps between curves below this share of the largest error are rounding, and count as none."""


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
            UserError: there is no point, a rate is not positive, or a number is not finite.
        """
        at: dict[float, list[float]] = {}
        for rate, error in points:
            at.setdefault(float(rate), []).append(float(error))
        rates = sorted(at)
        if not rates or not all(0 < rate < np.inf for rate in rates):
            raise UserError(f"a rate curve needs points with rates above 0; got rates {rates}")
        errors = np.array([float(np.mean(at[rate])) for rate in rates])
        if not np.isfinite(errors).all():
            raise UserError(f"a rate curve needs finite errors; got {errors.tolist()} at rates {rates}")
        return cls(np.array(rates), errors)

    def at(self, rate: float) -> float:
        """The error at a rate; nan outside of the measured ones."""
        if not self.rates[0] <= rate <= self.rates[-1]:
            return float("nan")
        return float(np.interp(np.log(rate), np.log(self.rates), self.errors))

    def hull(self) -> RateCurve:
        """The lower convex hull, up to the least error: the points that no line between two others passes below."""
        kept: list[tuple[float, float]] = []
        for point in zip(np.log(self.rates).tolist(), self.errors.tolist(), strict=True):
            while len(kept) > 1 and _turn(kept[-2], kept[-1], point) <= 0:
                kept.pop()
            kept.append(point)
        least = min(range(len(kept)), key=lambda place: kept[place][1])
        stays = np.isin(np.log(self.rates), [place for place, _ in kept[: least + 1]])
        return RateCurve(self.rates[stays], self.errors[stays])

    def crossings(self, other: RateCurve) -> list[float]:
        """Rates at which this curve passes from above to below the other one or back, on the range that both cover.

        Between two points of either curve the gap is a straight line, whose zero is found exactly. Curves that run together
        for a while and part on the other side cross in the (geometric) middle of that stretch; curves that touch do not.
        """
        rates, gaps = self._gaps(other)
        sides = [place for place in range(len(gaps)) if gaps[place] != 0]
        found = []
        for a, b in pairwise(sides):
            if gaps[a] * gaps[b] > 0:
                continue
            if b == a + 1:
                share = gaps[a] / (gaps[a] - gaps[b])
                found.append(float(rates[a] ** (1 - share) * rates[b] ** share))
            else:
                found.append(float(np.sqrt(rates[a + 1] * rates[b - 1])))
        return found

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

    def _gaps(self, other: RateCurve) -> tuple[np.ndarray, np.ndarray]:
        """Points of both curves on the range that both cover, and this curve's error less the other's there."""
        low, high = max(self.rates[0], other.rates[0]), min(self.rates[-1], other.rates[-1])
        rates = np.union1d(self.rates, other.rates)
        rates = rates[(rates >= low) & (rates <= high)]
        gaps = np.array([self.at(rate) - other.at(rate) for rate in rates.tolist()])
        gaps[np.abs(gaps) <= _TINY * max(np.abs(self.errors).max(), np.abs(other.errors).max())] = 0.0
        return rates, gaps

    def _falling(self) -> RateCurve:
        best = np.minimum.accumulate(self.errors)
        kept = np.concatenate([[True], self.errors[1:] < best[:-1]])
        return RateCurve(self.rates[kept], self.errors[kept])

    def _log_rates(self, errors: np.ndarray) -> np.ndarray:
        return np.interp(errors, self.errors[::-1], np.log(self.rates)[::-1])


def _turn(a: tuple[float, float], b: tuple[float, float], c: tuple[float, float]) -> float:
    """Positive where the way from a over b to c turns left."""
    return (b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0])
