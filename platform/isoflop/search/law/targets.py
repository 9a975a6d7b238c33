r"""What one wants to know, as functions of the law's parameters.

A target turns parameter draws u (R, P) of a hypothesis into quantities t (R, T) and says how much each of them matters.
Positive quantities (V*, N*, errors) are taken as logarithms: their standard deviation is a relative error.

Budgets are inference budgets: along the curve cost(x) = budget one axis (the spender, a model's size) follows from the
other, and the optimum is the least predicted error on that curve. Draws whose optimum lies on a limit stay there.

Shapes: R parameter draws, T quantities, M places, S points of an iso-cost curve, K axes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import numpy as np

from isoflop.core.errors import UserError, unknown
from isoflop.core.expressions import Array
from isoflop.frontier.optimum import BudgetSpace, CostModel, spend

_CURVE = 48  # points of an iso-cost curve; a parabola refines the best of them


class Predictor(Protocol):
    """What a target needs of a hypothesis."""

    def predict(self, u_RP: Array, x_MK: Array, group_M: np.ndarray) -> Array:
        """Predictions (R, M)."""
        ...


@dataclass(frozen=True)
class Setting:
    """What targets are asked about: axes with their ranges, names of groups.

    Attributes:
        axes: names; low, high: swept range per axis (K,).
        groups: one name per law.
    """

    axes: tuple[str, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    groups: tuple[str, ...]

    def group(self, name: str | None) -> list[int]:
        """Positions of one group, or of all. Raises UserError for an unknown name."""
        if name is None:
            return list(range(len(self.groups)))
        if name not in self.groups:
            raise unknown("group", name, self.groups, "target")
        return [self.groups.index(name)]


@dataclass(frozen=True, kw_only=True)
class Target:
    """Base of all targets; frozen, so that a study's question cannot drift.

    Attributes:
        width: half-width of the 95 % interval that is narrow enough: relative for logarithms, absolute otherwise; None
            never stops by width.
    """

    kind: ClassVar[str] = ""
    width: float | None = None

    def bind(self, setting: Setting) -> BoundTarget:
        """Resolve names and curves. Raises UserError for what the setting does not have."""
        raise NotImplementedError


class BoundTarget(Protocol):
    """A target on known axes and groups."""

    labels: list[str]

    @property
    def log(self) -> bool:
        """Whether quantities are logarithms."""
        ...

    def values(self, hypothesis: Predictor, u_RP: Array) -> Array:
        """Quantities (R, T)."""
        ...

    def weights(self, mean_T: Array, sd_T: Array) -> Array:
        """How much variance of each quantity counts (T,)."""
        ...

    @property
    def ends(self) -> tuple[float, float]:
        """Ends of the range in which an optimum is looked for, in the unit of the quantities; infinite for all others."""
        ...


NO_ENDS = (-math.inf, math.inf)


@dataclass(frozen=True, kw_only=True)
class Budgeted(Target):
    """Shared by targets along iso-cost curves.

    Attributes:
        cost: inference cost, an expression of axes and constants; constants: e.g. ``{"Q": 50}``.
        spender: the axis that takes up the budget (default: the first axis in the cost).
        limits: allowed range of the other axis (default: the swept range).
    """

    cost: str = "2*N*(Q+V)"
    constants: Mapping[str, float] = field(default_factory=lambda: {"Q": 50.0})
    spender: str | None = None
    limits: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    def curves(self, setting: Setting, budgets: Sequence[float]) -> list[Curve]:
        """One iso-cost curve per budget."""
        model = CostModel.build(self.cost, setting.axes, self.constants)
        free = [a for a in setting.axes if a in model.expression.names]
        spender = self.spender or free[0]
        if spender not in free:
            raise unknown("spender", spender, free, "target")
        others = [a for a in setting.axes if a != spender]
        if len(others) > 1:
            raise UserError(
                f"target: axes {', '.join(others)} are free beside {spender}; a budget leaves one axis to choose"
            )
        for name in self.limits:
            if name not in setting.axes:
                raise unknown("axis", name, setting.axes, "target: limits")
        return [Curve.build(model, setting, spender, others[0] if others else None, b, self.limits) for b in budgets]


@dataclass(frozen=True)
class Curve:
    """Places (S, K) of equal inference cost, with ln of the searched axis (S,)."""

    budget: float
    x: Array
    z: Array
    searched: int | None
    spender: int

    @classmethod
    def build(
        cls,
        model: CostModel,
        setting: Setting,
        spender: str,
        searched: str | None,
        budget: float,
        limits: Mapping[str, tuple[float, float]],
    ) -> Curve:
        """Refuses a budget that nothing meets."""
        if not budget > 0:
            raise UserError(f"target: budget = {budget!r} must be a positive number")
        ranges = {a: (lo, hi) for a, lo, hi in zip(setting.axes, setting.low, setting.high, strict=True)}
        low, high = limits.get(searched, ranges[searched]) if searched else (1.0, 1.0)
        z = np.linspace(math.log(low), math.log(high), _CURVE if high > low else 1)
        size = limits.get(spender, (1e-12, 1e30))
        space = BudgetSpace(spender, searched, {spender: size, **({searched: (low, high)} if searched else {})}, {})
        spent = spend(model, space, budget, np.exp(z))
        keep = np.isfinite(spent)
        if not keep.any():
            raise UserError(f"target: budget = {budget:g}: no configuration within the limits costs that much")
        x = np.empty((int(keep.sum()), len(setting.axes)))
        for k, axis in enumerate(setting.axes):
            x[:, k] = spent[keep] if axis == spender else np.exp(z[keep])
        place = setting.axes.index(searched) if searched else None
        return cls(float(budget), x, z[keep], place, setting.axes.index(spender))

    def optimum(self, hypothesis: Predictor, u_RP: Array, group: int) -> tuple[Array, Array]:
        """ln of the searched axis at the least predicted error (R,), and that error (R,)."""
        return self.least(hypothesis.predict(u_RP, self.x, np.full(len(self.x), group)))

    def least(self, y_RS: Array) -> tuple[Array, Array]:
        """The same from predictions along the curve."""
        y = np.where(np.isfinite(y_RS), y_RS, np.inf)
        best = np.argmin(y, axis=1)
        rows = np.arange(len(y))
        if len(self.z) < 3:
            return self.z[best], y[rows, best]
        inner = np.clip(best, 1, len(self.z) - 2)
        left, mid, right = (y[rows, inner + k] for k in (-1, 0, 1))
        bend = left - 2 * mid + right
        with np.errstate(all="ignore"):
            shift = 0.5 * (left - right) / bend
        ok = (best == inner) & np.isfinite(shift) & (np.abs(shift) <= 1)
        shift = np.where(ok, shift, 0.0)
        value = np.where(ok, mid - 0.25 * (left - right) * shift, y[rows, best])
        step = self.z[1] - self.z[0]
        return self.z[best] + shift * step, value

    def spent(self, z_R: Array) -> Array:
        """ln of the spender at given ln of the searched axis (R,)."""
        return np.interp(z_R, self.z, np.log(self.x[:, self.spender]))


def log(values: Array) -> Array:
    """Logarithms of what should be positive."""
    return np.log(np.maximum(values, 1e-12))


@dataclass
class _Even:
    """A bound target whose quantities count alike."""

    labels: list[str]
    groups: list[int]
    log: ClassVar[bool] = True

    @property
    def ends(self) -> tuple[float, float]:
        return NO_ENDS

    def weights(self, mean_T: Array, sd_T: Array) -> Array:
        return np.full(len(mean_T), 1.0 / len(mean_T))


@dataclass
class _Allocations(_Even):
    curve: Curve
    spender: bool

    def values(self, hypothesis: Predictor, u_RP: Array) -> Array:
        z = [self.curve.optimum(hypothesis, u_RP, g)[0] for g in self.groups]
        return np.stack([self.curve.spent(c) for c in z] if self.spender else z, axis=1)

    @property
    def ends(self) -> tuple[float, float]:
        reach = self.curve.spent(self.curve.z) if self.spender else self.curve.z
        return float(np.min(reach)), float(np.max(reach))


@dataclass
class _Errors(_Even):
    curves: list[Curve]

    def values(self, hypothesis: Predictor, u_RP: Array) -> Array:
        x, ends = np.concatenate([c.x for c in self.curves]), np.cumsum([len(c.x) for c in self.curves])[:-1]
        best = []
        for g in self.groups:
            y = np.split(hypothesis.predict(u_RP, x, np.full(len(x), g)), ends, axis=1)
            best += [c.least(part)[1] for c, part in zip(self.curves, y, strict=True)]
        return log(np.stack(best, axis=1))


@dataclass
class _Predictions(_Even):
    x: Array

    def values(self, hypothesis: Predictor, u_RP: Array) -> Array:
        parts = [hypothesis.predict(u_RP, self.x, np.full(len(self.x), g)) for g in self.groups]
        return log(np.concatenate(parts, axis=1))


@dataclass(frozen=True, kw_only=True)
class OptimalAllocation(Budgeted):
    """The best choice at a budget: ``of`` = the searched axis (V*) or the spender (N*), in logarithms.

    Attributes:
        budget: inference cost; of: an axis; group: one group, or all (default).
    """

    kind: ClassVar[str] = "allocation"
    budget: float
    of: str | None = None
    group: str | None = None

    def bind(self, setting: Setting) -> BoundTarget:
        curve = self.curves(setting, [self.budget])[0]
        spender = setting.axes[curve.spender]
        if curve.searched is None:
            raise UserError(
                f"target: with {spender} alone there is nothing to allocate; give an axis that it trades against"
            )
        of = self.of or setting.axes[curve.searched]
        if of not in setting.axes:
            raise unknown("axis", of, setting.axes, "target: of")
        groups = setting.group(self.group)
        labels = [f"{of}*({self.budget:g}){suffix(setting, g)}" for g in groups]
        return _Allocations(labels, groups, curve, of == spender)


@dataclass(frozen=True, kw_only=True)
class Frontier(Budgeted):
    """The least error over a range of budgets, in logarithms: ``points`` budgets from ``low`` to ``high``, log-spaced."""

    kind: ClassVar[str] = "frontier"
    low: float
    high: float
    points: int = 8
    group: str | None = None

    def bind(self, setting: Setting) -> BoundTarget:
        if not 0 < self.low <= self.high:
            raise UserError(f"target: low = {self.low:g}, high = {self.high:g}; allowed: 0 < low <= high")
        if self.points < 1:
            raise UserError(f"target: points = {self.points}; allowed: 1 or more")
        budgets = np.geomspace(self.low, self.high, self.points)
        curves = self.curves(setting, [float(b) for b in budgets])
        groups = setting.group(self.group)
        labels = [f"error*({c.budget:.3g}){suffix(setting, g)}" for g in groups for c in curves]
        return _Errors(labels, groups, curves)


@dataclass(frozen=True, kw_only=True)
class PredictionAt(Target):
    """The predicted error at given places, in logarithms; outside the swept range it is an extrapolation.

    Attributes:
        at: value, or values of equal number, per axis.
    """

    kind: ClassVar[str] = "prediction"
    at: Mapping[str, float | Sequence[float]]
    group: str | None = None

    def bind(self, setting: Setting) -> BoundTarget:
        for name in self.at:
            if name not in setting.axes:
                raise unknown("axis", name, setting.axes, "target: at")
        for name in setting.axes:
            if name not in self.at:
                raise UserError(f"target: at: a value for {name} is needed")
        columns = [np.atleast_1d(np.asarray(self.at[a], dtype=np.float64)) for a in setting.axes]
        try:
            x = np.stack(np.broadcast_arrays(*columns), axis=1)
        except ValueError:
            raise UserError("target: at: the axes have lists of different lengths") from None
        groups = setting.group(self.group)
        labels = [f"error({_place(setting, row)}){suffix(setting, g)}" for g in groups for row in x]
        return _Predictions(labels, groups, x)


@dataclass(frozen=True, kw_only=True)
class Exponents(Target):
    """The law's own numbers, by name (default: every exponent of every contender; of a hand-made setting alpha and beta)."""

    kind: ClassVar[str] = "exponents"
    names: tuple[str, ...] = ()
    group: str | None = None

    def bind(self, setting: Setting) -> BoundTarget:
        return _Exponents(self, setting)


class _Exponents:
    """Exponents live in hypotheses, which differ in what parameters they have; absent ones do not count."""

    log = False
    ends = NO_ENDS

    def __init__(self, target: Exponents, setting: Setting) -> None:
        self._names = target.names or ("alpha", "beta")
        self._groups = setting.group(target.group)
        self.labels = [f"{n}{suffix(setting, g)}" for g in self._groups for n in self._names]

    def values(self, hypothesis: Any, u_RP: Array) -> Array:
        columns = []
        for g in self._groups:
            for name in self._names:
                columns.append(self._column(hypothesis, u_RP, g, name))
        return np.stack(columns, axis=1)

    def _column(self, hypothesis: Any, u_RP: Array, group: int, name: str) -> Array:
        for block, part in zip(hypothesis.blocks, hypothesis.slices, strict=True):
            if group not in block.groups:
                continue
            natural = block.natural(u_RP[:, part])
            for candidate in (name, f"{name}_{block.groups.index(group)}"):
                if candidate in block.form.names:
                    return np.asarray(natural[:, block.form.names.index(candidate)])
        return np.full(len(u_RP), np.nan)

    def weights(self, mean_T: Array, sd_T: Array) -> Array:
        return np.full(len(mean_T), 1.0 / len(mean_T))


def suffix(setting: Setting, group: int) -> str:
    """The group's name where there are several."""
    return f" {setting.groups[group]}" if len(setting.groups) > 1 else ""


def _place(setting: Setting, row: Array) -> str:
    return ", ".join(f"{a}={v:g}" for a, v in zip(setting.axes, row, strict=True))
