"""Competing law forms on common axes, for one group or several that share parameters.

Every contender is brought to the same coordinates: sizes divided by fixed scales, amplitudes as logarithms. In these a weak
Gaussian prior keeps a pilot's fit finite (a floor of zero is a logarithm far down, not a bound), and the same coordinates
carry the covariance from which gains are computed.

Shared parameters (several groups, one exponent) make one wide form: y = sum_g 1_g f(x; p_g), where a shared parameter is the
same number in every f. It is an ordinary ``LawForm`` with indicator variables, so that variable projection applies.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from isoflop.core.errors import UserError, unknown
from isoflop.core.expressions import Array, Mask
from isoflop.laws.base import LawForm, Parameter, Variable, resolve_form

_AMPLITUDE_SD = math.log(1e4) / 4  # a quarter of four decades
_SMALLEST = 1e-9


@dataclass(frozen=True)
class Contender:
    """A form with the axes that its variables stand for.

    Attributes:
        form: the law; axes: per variable of the form, the axis it reads.
    """

    form: LawForm
    axes: tuple[str, ...]

    @property
    def label(self) -> str:
        """Name for people."""
        return self.form.name


LawChoice = str | LawForm | tuple[str | LawForm, Mapping[str, str]]


def make_contender(choice: LawChoice, axes: Sequence[str]) -> Contender:
    """A form by name, expression or object, alone or with ``{variable: axis}``.

    Raises:
        UserError: for an unknown form, variable or axis.
    """
    law, mapping = choice if isinstance(choice, tuple) else (choice, {})
    form = resolve_form(law, [*mapping, *axes])
    for name, axis in mapping.items():
        if name not in form.variable_names:
            raise unknown(f"variable of law {form.name!r}", name, form.variable_names, "map")
        if axis not in axes:
            raise unknown("axis", axis, axes, f"law {form.name!r}: map {name}")
    reads = tuple(mapping.get(v, v) for v in form.variable_names)
    for axis in reads:
        if axis not in axes:
            raise unknown(f"axis of law {form.name!r}", axis, axes)
    return Contender(form, reads)


def shared_form(form: LawForm, groups: int, shared: Sequence[str]) -> LawForm:
    """One form for several groups: parameters in ``shared`` are common, the others exist once per group.

    Variables ``group_0`` … (0 or 1) say which group a row belongs to.
    """
    for name in shared:
        form.position(name)
    indicators = [f"group_{g}" for g in range(groups)]

    def own(text: str, g: int) -> str:
        for p in form.names:
            if p not in shared:
                text = re.sub(rf"\b{p}\b", f"{p}_{g}", text)
        return text

    def copies(p: Parameter) -> list[Parameter]:
        return [p] if p.name in shared else [replace(p, name=f"{p.name}_{g}") for g in range(groups)]

    natural = {}
    for name, text in form.natural.items():
        if name in shared:
            natural[name] = text
        else:
            natural |= {f"{name}_{g}": own(text, g) for g in range(groups)}
    return LawForm(
        name=form.name,
        formula=" + ".join(f"{i}*({own(form.formula, g)})" for g, i in enumerate(indicators)),
        variables=(*form.variables, *(Variable(i, positive=False, rescale=False) for i in indicators)),
        parameters=tuple(c for p in form.parameters for c in copies(p)),
        natural=natural,
        search_points=max(form.search_points, 400),
        starts=form.starts,
        source=form.source,
    )


@dataclass(frozen=True)
class Block:
    """A contender's law for some groups, in search coordinates.

    Attributes:
        form: possibly a shared form; axes: positions of its (non-indicator) variables among the axes.
        scales: per such variable, what its axis is divided by.
        groups: the groups that it covers; y_scale: typical size of y.
    """

    form: LawForm
    axes: tuple[int, ...]
    scales: tuple[float, ...]
    groups: tuple[int, ...]
    y_scale: float

    @cached_property
    def log(self) -> Mask:
        """Boolean (P,): coordinates that are logarithms."""
        return np.array([q.low >= 0 and (q.linear or q.scale == "log") for q in self.form.parameters], dtype=bool)

    @cached_property
    def prior_mean(self) -> Array:
        """(P,) in search coordinates."""
        return np.array([self._prior(i)[0] for i in range(len(self.form.names))])

    @cached_property
    def prior_sd(self) -> Array:
        """(P,): quarters of the search ranges."""
        return np.array([self._prior(i)[1] for i in range(len(self.form.names))])

    def _prior(self, i: int) -> tuple[float, float]:
        q = self.form.parameters[i]
        if q.linear:
            return (math.log(0.4 * self.y_scale), _AMPLITUDE_SD) if self.log[i] else (0.0, 3 * self.y_scale)
        low, high = max(q.search[0], q.low), min(q.search[1], q.high)
        if self.log[i]:
            return 0.5 * (math.log(low) + math.log(high)), (math.log(high) - math.log(low)) / 4
        return (math.sqrt(low * high) if low > 0 else 0.5 * (low + high)), max((high - low) / 4, 1e-12)

    @cached_property
    def low(self) -> Array:
        """Bounds (P,) in search coordinates."""
        floor = math.log(_SMALLEST * self.y_scale)
        return np.array(
            [
                (floor if q.linear else math.log(max(q.low, 1e-300))) if log else q.low
                for q, log in zip(self.form.parameters, self.log, strict=True)
            ]
        )

    @cached_property
    def high(self) -> Array:
        """Bounds (P,) in search coordinates."""
        with np.errstate(all="ignore"):
            return np.array(
                [np.log(q.high) if log else q.high for q, log in zip(self.form.parameters, self.log, strict=True)]
            )

    def inputs(self, x_MK: Array, group_M: np.ndarray) -> dict[str, Array]:
        """The form's variables for places (M, K axes)."""
        variables = self.form.variable_names
        count = len(self.axes)
        out = {
            name: x_MK[..., axis] / scale
            for name, axis, scale in zip(variables[:count], self.axes, self.scales, strict=True)
        }
        for name, g in zip(variables[count:], self.groups, strict=False):
            out[name] = (group_M == g).astype(np.float64)
        return out

    def scaled(self, u_RP: Array) -> Array:
        """Parameters for scaled sizes from search coordinates."""
        return np.where(self.log, np.exp(np.where(self.log, u_RP, 0.0)), u_RP)

    def coordinates(self, p_RP: Array) -> Array:
        """Inverse of ``scaled``, clipped to the bounds."""
        with np.errstate(all="ignore"):
            u = np.where(self.log, np.log(np.maximum(p_RP, 1e-300)), p_RP)
        return np.clip(u, self.low, self.high)

    def natural(self, u_RP: Array) -> Array:
        """Parameters in the axes' own units."""
        names = self.form.variable_names[: len(self.axes)]
        return self.form.to_natural(self.scaled(u_RP), dict(zip(names, map(np.float64, self.scales), strict=True)))

    def predict(self, u_RP: Array, x_MK: Array, group_M: np.ndarray) -> Array:
        """(R, M)."""
        return self.form.evaluate(self.inputs(x_MK, group_M), self.scaled(u_RP))

    def jacobian(self, u_P: Array, x_MK: Array, group_M: np.ndarray) -> Array:
        """Derivatives (M, P) with respect to search coordinates."""
        p = self.scaled(u_P)
        return self.form.jacobian(self.inputs(x_MK, group_M), p) * np.where(self.log, p, 1.0)


def make_blocks(
    contender: Contender,
    axes: Sequence[str],
    scales: Sequence[float],
    groups: int,
    shared: Sequence[str],
    y_scale: float,
) -> tuple[Block, ...]:
    """One block per group, or a single wide one when parameters are shared."""
    positions = tuple(axes.index(a) for a in contender.axes)
    units = tuple(
        scales[p] if v.positive and v.rescale else 1.0 for p, v in zip(positions, contender.form.variables, strict=True)
    )
    if groups > 1 and shared:
        common = [n for n in shared if n in contender.form.names]
        wide = shared_form(contender.form, groups, common)
        return (Block(wide, positions, units, tuple(range(groups)), y_scale),)
    return tuple(Block(contender.form, positions, units, (g,), y_scale) for g in range(groups))


def has_exponents(form: LawForm) -> bool:
    """Whether a form has any: a logarithm has none."""
    return any(not p.linear and p.scale == "linear" for p in form.parameters)


def exponents_of(form: LawForm) -> tuple[str, ...]:
    """Parameters that are neither linear nor searched on a log scale: what ``share="exponents"`` means."""
    found = tuple(p.name for p in form.parameters if not p.linear and p.scale == "linear")
    if not found:
        raise UserError(f"law {form.name!r} has no exponents; share its parameters by name")
    return found
