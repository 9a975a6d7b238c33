"""The target "which group is best": not variance, but what it may change in a choice.

Shapes: R parameter draws, T quantities.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from scipy.special import ndtr

from isoflop.core.errors import UserError
from isoflop.core.expressions import Array
from isoflop.search.law.targets import NO_ENDS, BoundTarget, Budgeted, Curve, Predictor, Setting, log, suffix

_EVEN = math.sqrt(2 * math.pi)


@dataclass(frozen=True, kw_only=True)
class BestMethod(Budgeted):
    r"""Which group is best at one budget, or at several (then also where they cross).

    Quantities are ln error*_g - ln error*_best for every other group g. Their variances count by how much they can change
    the choice: the expected opportunity cost of d ~ N(d, s^2) is s phi(d/s) - d Phi(-d/s), whose derivative with respect
    to s^2 is phi(d/s)/(2 s).

    Attributes:
        budget: one or several; confidence: probability of the right choice at which the search may stop.
    """

    kind: ClassVar[str] = "best-method"
    budget: float | tuple[float, ...]
    confidence: float = 0.95

    def bind(self, setting: Setting) -> BoundTarget:
        if len(setting.groups) < 2:
            raise UserError("target: the best of one method is known; give at least two groups")
        budgets = self.budget if isinstance(self.budget, tuple) else (self.budget,)
        return _Best(self, setting, self.curves(setting, budgets))


class _Best:
    log = True
    ends = NO_ENDS

    def __init__(self, target: BestMethod, setting: Setting, curves: list[Curve]) -> None:
        self._curves, self._setting = curves, setting
        self._groups = range(len(setting.groups))
        self.confidence = target.confidence
        self.labels = [f"error*({c.budget:.3g}){suffix(setting, g)}" for c in curves for g in self._groups]

    def values(self, hypothesis: Predictor, u_RP: Array) -> Array:
        """ln error* of every group, per budget (R, budgets × groups)."""
        parts = []
        for curve in self._curves:
            part = log(np.stack([curve.optimum(hypothesis, u_RP, g)[1] for g in self._groups], axis=1))
            parts.append(part)
        return np.concatenate(parts, axis=1)

    def contrasts(self, mean_T: Array) -> Array:
        """(T', T): every other group minus the best, per budget."""
        size = len(self._groups)
        rows = []
        for b in range(len(self._curves)):
            best = int(np.argmin(mean_T[b * size : (b + 1) * size]))
            for g in self._groups:
                if g != best:
                    row = np.zeros(len(mean_T))
                    row[b * size + g], row[b * size + best] = 1.0, -1.0
                    rows.append(row)
        return np.array(rows)

    def weights(self, mean_T: Array, sd_T: Array) -> Array:
        """Of contrasts with these means and standard deviations."""
        sd = np.maximum(sd_T, 1e-9)
        ratio = np.minimum(np.abs(mean_T) / sd, 6.0)  # never quite nothing: estimates of sd err
        raw = np.exp(-0.5 * ratio**2) / (2 * _EVEN * sd)
        return raw / raw.sum()

    def choice(self, draws_RT: Array, weight_R: Array) -> dict[str, tuple[str, float]]:
        """Per budget: the group that is most probably best, and that probability."""
        out, size = {}, len(self._groups)
        for b, curve in enumerate(self._curves):
            wins = np.bincount(np.argmin(draws_RT[:, b * size : (b + 1) * size], axis=1), weight_R, size)
            best = int(np.argmax(wins))
            out[f"{curve.budget:g}"] = (self._setting.groups[best], float(wins[best] / wins.sum()))
        return out


def opportunity_cost(mean: Array, sd: Array) -> Array:
    """E max(0, -d) for d ~ N(mean, sd^2), mean >= 0: what choosing the apparently best one costs on average."""
    s = np.maximum(sd, 1e-300)
    ratio = mean / s
    return s * np.exp(-0.5 * ratio**2) / _EVEN - mean * ndtr(-ratio)
