r"""The best division of what is left: how often every candidate should still run, all at once instead of one by one.

Greedy gains per cost see one run ahead. When money, or a number of runs, is given, the remaining design can be solved as a
whole: over n >= 0 (fractions of runs allowed) with use @ n <= 1,

    minimise  sum_k p_k tr(W J_k (Lambda_k + sum_m n_m H_km^T R_m^-1 H_km)^-1 J_k^T)       (V: the target's variance)
    maximise  sum_k p_k ln det(Lambda_k + sum_m n_m H_km^T R_m^-1 H_km)                    (D: the parameters' information)

a convex problem, solved by multiplicative updates of the shares of the price (Silvey, Titterington, Torsney 1978):
s_m <- s_m (d_m / price_m)^power, d_m being the derivative, power 1/2 for V and 1 for D; n_m = s_m / price_m. With several
limits the price is a mixture of them, whose weights a_r <- a_r (use @ n)_r grow for the limit that is exceeded: at the fixed
point every limit is kept and those with a_r > 0 are used up.

Shapes: M candidates, O observations per candidate, P parameters, T quantities, R limits, K hypotheses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from isoflop.core.expressions import Array

_ROUNDS = 80
_WIDE = 12  # rounds over all candidates; the others only over those that still matter
_KEPT = 96
_SETTLED = 1e-3  # relative change of the objective's derivative over prices at which the shares are near enough


@dataclass(frozen=True)
class Linear:
    """One linearised hypothesis.

    Attributes:
        weight: posterior weight; precision: Lambda (P, P), of what is known; h: H / sqrt(R), whitened sensitivities
            (M, O, P); slope: sqrt(W) J (T, P); None for D.
    """

    weight: float
    precision: Array
    h: Array
    slope: Array | None

    def only(self, keep: np.ndarray) -> Linear:
        """Some of the candidates."""
        return Linear(self.weight, self.precision, self.h[keep], self.slope)

    def derivative(self, n_M: Array) -> Array:
        """What one more run of each candidate would take off (V) or add (D), to first order, after n runs (M,)."""
        cov = self._cov(n_M)
        moved = self.h @ cov
        if self.slope is None:
            return np.asarray(np.einsum("mop,mop->m", moved, self.h))
        return np.asarray(np.sum((moved @ self.slope.T) ** 2, axis=(1, 2)))

    def variance(self, n_M: Array) -> float:
        """The target's weighted variance after n runs."""
        assert self.slope is not None
        return float(np.einsum("tp,pq,tq->", self.slope, self._cov(n_M), self.slope))

    def _cov(self, n_M: Array) -> Array:
        m, o, p = self.h.shape
        flat = self.h.reshape(m * o, p)
        return np.asarray(np.linalg.inv(self.precision + (flat * np.repeat(n_M, o)[:, None]).T @ flat))


def best_counts(
    problems: Sequence[Linear], use_RM: Array, most: float = np.inf, rounds: int = _ROUNDS, prune: bool = True
) -> Array:
    """Runs of every candidate (M,) in the best design within the limits.

    Args:
        problems: linearised hypotheses, with the same candidates.
        use_RM: share of what is left of each limit that one run takes.
        most: runs that a candidate may have (1 where repeats are not allowed).
        rounds: updates; 80 come within about a percent of the optimal variance, some thousands to rounding.
        prune: go on with the largest shares after the first rounds.
    """
    count = use_RM.shape[1]
    price_weight = np.full(len(use_RM), 1 / len(use_RM))
    share = np.full(count, 1 / count)
    live = np.arange(count)
    power = 0.5 if problems[0].slope is not None else 1.0
    for k in range(rounds):
        if prune and k == _WIDE and len(live) > _KEPT:
            keep = np.sort(np.argsort(-share)[:_KEPT])
            live, share, use_RM = live[keep], share[keep], use_RM[:, keep]
            problems = [p.only(keep) for p in problems]
        price = price_weight @ use_RM
        share = _within(share, price * most)
        n = share / price
        worth = np.asarray(sum(p.weight * p.derivative(n) for p in problems)) / price
        level = float(share @ worth) / max(float(share.sum()), 1e-300)
        used = use_RM @ n
        price_weight = price_weight * used
        price_weight /= max(float(price_weight.sum()), 1e-300)
        new = share * (worth / max(level, 1e-300)) ** power
        settled = float(np.abs(new - share).sum()) < _SETTLED / rounds and float(used.max()) < 1 + _SETTLED
        share = new
        if settled:
            break
    price = price_weight @ use_RM
    out = np.zeros(count)
    out[live] = _within(share, price * most) / price
    return out / max(1.0, float((use_RM @ out[live]).max()))


def _within(share_M: Array, top_M: Array) -> Array:
    """Shares scaled to sum to 1, none above its top: what is cut off goes to the others in proportion."""
    share = share_M / max(float(share_M.sum()), 1e-300)
    if not np.isfinite(top_M).any():
        return share
    if float(top_M.sum()) <= 1:
        return top_M.copy()
    full = np.zeros(len(share), dtype=bool)
    while True:
        rest = max(0.0, 1.0 - float(top_M[full].sum()))
        free = np.where(full, 0.0, np.maximum(share, 1e-12))
        share = np.where(full, top_M, free * (rest / float(free.sum())))
        over = ~full & (share > top_M * (1 + 1e-9))
        if not over.any():
            return share
        full |= over
