"""From a trial's parameters to a law's axes, groups and costs.

An axis is given as a number, the name of a parameter, an expression of parameters (``"params_b*1e9"``), a table
(``{"model": {"d24": 13920, "d48": 25216}}``) or a function of the configuration. Costs are given the same way, with the
axes as further names.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from isoflop.core.errors import UserError, unknown
from isoflop.core.expressions import Array, Expression, parse

Config = Mapping[str, Any]
_DOTTED = re.compile(r"[A-Za-z_][A-Za-z0-9_]*(?:\.[A-Za-z_][A-Za-z0-9_]*)+")
AxisSpec = float | int | str | Mapping[str, Mapping[Any, float]] | Callable[[Config], float]


class Reader:
    """One number per configuration.

    Raises:
        UserError: when built from something else, or from a table of several parameters.
    """

    def __init__(self, what: str, spec: AxisSpec) -> None:
        self._what, self._spec = what, spec
        self._aliases: dict[str, str] = {}
        self._expression: Expression | None = None
        self._table: tuple[str, Mapping[Any, float]] | None = None
        if isinstance(spec, str):
            if any(c in spec for c in "+*/( ") or re.search(r"\s-|-\s", spec):
                plain = _DOTTED.sub(self._alias, spec)
                self._expression = parse(plain, what)
        elif isinstance(spec, Mapping):
            if len(spec) != 1:
                raise UserError(f"{what}: a table names one parameter with its values, not {len(spec)}")
            ((name, table),) = spec.items()
            if not isinstance(table, Mapping):
                raise UserError(f"{what}: {name} must be followed by a table of value: number, not {table!r}")
            self._table = (name, table)
        elif isinstance(spec, bool) or not (isinstance(spec, (int, float)) or callable(spec)):
            raise UserError(f"{what}: {spec!r}; allowed: a number, a parameter, an expression, a table or a function")

    @property
    def names(self) -> frozenset[str]:
        """Parameters (or axes) that it reads; empty for numbers and functions."""
        if self._expression is not None:
            return frozenset(self._aliases.get(n, n) for n in self._expression.names)
        if self._table is not None:
            return frozenset({self._table[0]})
        return frozenset({self._spec}) if isinstance(self._spec, str) else frozenset()

    def __call__(self, config: Config) -> float:
        """The number; nan where a conditional parameter is absent."""
        if self._table is not None:
            name, table = self._table
            if name not in config:
                return math.nan
            if config[name] not in table:
                raise unknown(f"value of {name}", config[name], table, self._what)
            return float(table[config[name]])
        if self._expression is not None:
            real = {n: self._aliases.get(n, n) for n in self._expression.names}
            if any(n not in config for n in real.values()):
                return math.nan
            return float(self._expression({n: self._number(r, config[r]) for n, r in real.items()}))
        if isinstance(self._spec, str):
            return self._number(self._spec, config[self._spec]) if self._spec in config else math.nan
        if callable(self._spec):
            return float(self._spec(config))
        assert isinstance(self._spec, (int, float))
        return float(self._spec)

    def _alias(self, found: re.Match[str]) -> str:
        """A knob such as ``mqt.k`` under a name that formulas allow."""
        name = re.sub(r"\W", "_", found[0])
        self._aliases[name] = found[0]
        return name

    def _number(self, name: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float, np.number)):
            raise UserError(f"{self._what}: {name} = {value!r} is not a number; give a table of its values")
        return float(value)


@dataclass
class Mapper:
    """Configurations to places, groups and modelled costs.

    Attributes:
        axes: readers by axis name; by: parameters whose values name the group.
        outputs: names of a trial's values when it has several (tasks): each has its own law.
        cost: reader of parameters and axes, or None (every run costs 1).
        setup: further costs of a run by key; a key that an earlier run has paid for is free.
    """

    axes: dict[str, Reader]
    by: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    cost: Reader | None = None
    setup: Callable[[Config], Mapping[str, float]] | None = None
    constants: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def build(
        cls,
        axes: Mapping[str, AxisSpec],
        by: Sequence[str] = (),
        outputs: Sequence[str] = (),
        cost: AxisSpec | None = None,
        constants: Mapping[str, float] | None = None,
        setup: Callable[[Config], Mapping[str, float]] | None = None,
    ) -> Mapper:
        """Check and compile."""
        if not axes:
            raise UserError("law sampler: axes: at least one is needed, e.g. {'N': 'params', 'V': 'tokens'}")
        readers = {name: Reader(f"axes: {name}", spec) for name, spec in axes.items()}
        price = None if cost is None else Reader("cost", cost)
        return cls(readers, tuple(by), tuple(outputs), price, setup, dict(constants or {}))

    @property
    def names(self) -> tuple[str, ...]:
        """Axes in order."""
        return tuple(self.axes)

    def parameters(self) -> frozenset[str]:
        """Parameters that must exist in a search space."""
        read = frozenset().union(*(r.names for r in self.axes.values())) | frozenset(self.by)
        if self.cost is not None:
            read |= self.cost.names - frozenset(self.axes) - frozenset(self.constants)
        return read

    def place(self, config: Config) -> Array:
        """Axes of a configuration (K,)."""
        return np.array([reader(config) for reader in self.axes.values()])

    def label(self, config: Config) -> str:
        """The group's name without the output."""
        return "/".join(str(config.get(name, "-")) for name in self.by)

    def base_cost(self, config: Config) -> float:
        """Modelled cost without set-up."""
        if self.cost is None:
            return 1.0
        values = {**config, **dict(zip(self.names, self.place(config).tolist(), strict=True)), **self.constants}
        return self.cost(values)

    def setup_costs(self, config: Config) -> Mapping[str, float]:
        """Set-up cost per key."""
        return self.setup(config) if self.setup is not None else {}


class Pricing:
    """Modelled costs until runs are measured; then a line of ln measured on ln modelled, pulled towards slope 1."""

    _SLOPE_SD = 0.2

    def __init__(self) -> None:
        self._model: list[float] = []
        self._measured: list[float] = []

    def observe(self, modelled: float, measured: float) -> None:
        """A finished run's two costs."""
        if modelled > 0 and measured > 0 and math.isfinite(measured):
            self._model.append(math.log(modelled))
            self._measured.append(math.log(measured))

    def __len__(self) -> int:
        return len(self._model)

    def __call__(self, modelled: Array) -> Array:
        """Expected costs in the unit of the measurements, or the modelled ones as long as there are none."""
        if not self._model:
            return modelled
        x, y = np.array(self._model), np.array(self._measured)
        centre = x.mean()
        z, gap = x - centre, (y - x) - (y - x).mean()
        noise = max(float(np.var(gap)), 1e-4)
        slope = 1.0 + float(z @ gap) / (float(z @ z) + noise / self._SLOPE_SD**2)
        return np.exp(y.mean() + slope * (np.log(modelled) - centre))
