"""One form in one basin: its posterior, what it predicts, what it misses; and how noisy runs are.

Shapes: C cells, M places, P parameters of all blocks, R parameter draws, K axes.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from isoflop.core.expressions import Array
from isoflop.search.law.contenders import Block
from isoflop.search.law.misfit import Surface

REJECT_BEND = 0.001
REJECT = 0.002  # p-values below which a form is said not to fit; small, since a search looks after every run


@dataclass
class Hypothesis:
    """One form in one basin, with its Gaussian posterior.

    Attributes:
        label: the form's name; basin: 0 for the best.
        blocks: laws; u: coordinates (P,) of all blocks in order, then of the misfit's waves where there is a surface (0 at
            the mode, since the surface holds what is expected); cov: (P, P).
        weight: posterior weight; bic, sse: over all rows.
    """

    label: str
    basin: int
    blocks: tuple[Block, ...]
    u: Array
    cov: Array = field(default_factory=lambda: np.empty((0, 0)))
    weight: float = 1.0
    bic: float = math.nan
    sse: float = math.nan
    surface: Surface | None = None

    @cached_property
    def slices(self) -> list[slice]:
        """Where each block's parameters stand in ``u``."""
        ends = np.cumsum([0, *(len(b.form.names) for b in self.blocks)])
        return [slice(int(a), int(b)) for a, b in itertools.pairwise(ends)]

    @property
    def own(self) -> int:
        """Number of the law's own parameters, which come first in ``u``."""
        return self.slices[-1].stop

    def predict(self, u_RP: Array, x_MK: Array, group_M: np.ndarray) -> Array:
        """Predictions (R, M) of parameter draws."""
        if len(self.blocks) == 1:
            out = self.blocks[0].predict(u_RP[:, : self.own], x_MK, group_M)
        else:
            out = np.empty((len(u_RP), len(x_MK)))
            for block, part in zip(self.blocks, self.slices, strict=True):
                mine = np.flatnonzero(group_M == block.groups[0])
                if len(mine):
                    out[:, mine] = block.predict(u_RP[:, part], x_MK[mine], group_M[mine])
        if self.surface is None:
            return out
        out = out + self.surface.at(x_MK, group_M)
        waves = u_RP[:, self.own :]
        return out + waves @ self.surface.waves.at(x_MK, group_M).T if waves.any() else out

    def law(self, x_MK: Array, group_M: np.ndarray) -> Array:
        """The form alone at the posterior mode (M,)."""
        return replace(self, surface=None).predict(self.u[None], x_MK, group_M)[0]

    def jacobian(self, x_MK: Array, group_M: np.ndarray) -> Array:
        """Sensitivities (M, P) at the posterior mode."""
        own = self._law_jacobian(x_MK, group_M)
        return own if self.surface is None else np.column_stack([own, self.surface.waves.at(x_MK, group_M)])

    def _law_jacobian(self, x_MK: Array, group_M: np.ndarray) -> Array:
        if len(self.blocks) == 1:
            return self.blocks[0].jacobian(self.u[: self.own], x_MK, group_M)
        out = np.zeros((len(x_MK), self.own))
        for block, part in zip(self.blocks, self.slices, strict=True):
            mine = np.flatnonzero(group_M == block.groups[0])
            if len(mine):
                out[mine, part] = block.jacobian(self.u[part], x_MK[mine], group_M[mine])
        return out

    def clip(self, u_RP: Array) -> Array:
        """Draws back into the bounds."""
        low = np.concatenate([*(b.low for b in self.blocks), np.full(self._waves, -np.inf)])
        high = np.concatenate([*(b.high for b in self.blocks), np.full(self._waves, np.inf)])
        return np.clip(u_RP, low, high)

    @property
    def _waves(self) -> int:
        return 0 if self.surface is None else len(self.surface.waves)

    @property
    def prior_mean(self) -> Array:
        """(P,)."""
        return np.concatenate([*(b.prior_mean for b in self.blocks), np.zeros(self._waves)])

    @property
    def prior_sd(self) -> Array:
        """(P,)."""
        return np.concatenate([*(b.prior_sd for b in self.blocks), np.ones(self._waves)])


@dataclass(frozen=True)
class Noise:
    """Variance of a new row: sigma^2 exp(level + slope (ln cost - centre)) + tau^2.

    Attributes:
        sigma2: posterior mean; dof: degrees of freedom behind it.
        level, slope, centre: the relative variance q against ln cost.
        tau2: variance of the form's misfit between places, 0 unless lack of fit is significant.
    """

    sigma2: float
    dof: float
    level: float = 0.0
    slope: float = 0.0
    centre: float = 0.0
    tau2: float = 0.0

    def relative(self, log_cost: Array) -> Array:
        """q at given costs."""
        return np.exp(self.level + self.slope * (log_cost - self.centre))


@dataclass(frozen=True)
class LackOfFit:
    """Two F tests of the best form; nan where the rows do not allow one.

    Attributes:
        f, p: against the scatter between repeats of a place, with dof_model and dof_pure degrees of freedom.
        bend_f, bend_p: against the form bent by squares and products of ln axes, which needs no repeats.
    """

    f: float = math.nan
    p: float = math.nan
    dof_model: int = 0
    dof_pure: int = 0
    bend_f: float = math.nan
    bend_p: float = math.nan

    @property
    def tested(self) -> bool:
        """There are rows enough for a test."""
        return not (math.isnan(self.p) and math.isnan(self.bend_p))

    @property
    def rejected(self) -> bool:
        """The form does not fit."""
        return self.p < REJECT or self.bend_p < REJECT_BEND
