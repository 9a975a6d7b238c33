"""What a fit minimises: sums (never means) of weighted squared or Huber terms, on residuals of y or of ln y."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from isoflop.core.errors import UserError, unknown
from isoflop.core.expressions import Array

OBJECTIVES = ("squared", "squared-log", "huber", "huber-log")


@dataclass(frozen=True)
class Objective:
    """Sum over points of w * rho(r).

    Attributes:
        kind: one of ``OBJECTIVES``; ``-log`` takes r = ln f - ln y, the others r = f - y.
        delta: where Huber's term turns linear, in units of r: rho = r^2/2 up to delta, delta (|r| - delta/2) beyond.
    """

    kind: str = "squared"
    delta: float = 1e-3

    def __post_init__(self) -> None:
        if self.kind not in OBJECTIVES:
            raise unknown("objective", self.kind, OBJECTIVES)
        if not self.delta > 0:
            raise UserError(f"delta = {self.delta!r} must be a positive number")

    @property
    def log(self) -> bool:
        """Residuals are taken on ln y."""
        return self.kind.endswith("-log")

    @property
    def robust(self) -> bool:
        """Huber terms instead of squares."""
        return self.kind.startswith("huber")

    def squares(self) -> Objective:
        """The least-squares objective on the same residuals."""
        return Objective("squared-log" if self.log else "squared", self.delta)

    def residual(self, f: Array, y: Array) -> Array:
        """r; inf where the law is not positive and the logarithm is asked for."""
        if not self.log:
            return f - y
        with np.errstate(all="ignore"):
            return np.where(f > 0, np.log(f / y), np.inf)

    def rho(self, r: Array, delta: float | None = None) -> Array:
        """The term of one residual."""
        d = self.delta if delta is None else delta
        if not self.robust:
            return 0.5 * r * r
        size = np.abs(r)
        return np.where(size <= d, 0.5 * r * r, d * (size - 0.5 * d))

    def loss(self, r: Array, w: Array) -> Array:
        """The value that is reported: the weighted sum of squares, or the weighted sum of Huber terms (last axis)."""
        factor = 1.0 if self.robust else 2.0
        return factor * np.sum(w * self.rho(r), axis=-1)
