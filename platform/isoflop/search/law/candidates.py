"""Candidate configurations of a search space: all of them when it is finite and small, else a sample that keeps its corners.

Best designs sit on corners and on few inner places, which they repeat. An endless space is therefore sampled as corners,
fresh random points, places that were run before (repeats), and their neighbours.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import numpy as np
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from isoflop.core.errors import UserError
from isoflop.search.distributions import chosen, distribution_of, stored
from isoflop.search.space import Param, SearchSpace

Config = dict[str, Any]
_FINITE = 2048  # configurations that are all looked at in every ask
_CORNERS = 64
_FRESH = 160
_AGAIN = 48


def config_key(config: Mapping[str, Any]) -> str:
    """One spelling per configuration."""
    return json.dumps(config, sort_keys=True, default=str)


class Source(Protocol):
    """Where candidates come from.

    Attributes:
        distributions: Optuna's, for every parameter that may occur.
        finite: all configurations, or None.
    """

    distributions: dict[str, BaseDistribution]
    finite: list[Config] | None

    def draw(self, rng: np.random.Generator, past: Sequence[Config]) -> list[Config]:
        """Candidates for one ask."""
        ...

    def to_params(self, config: Config) -> dict[str, Any]:
        """A configuration as Optuna parameters."""
        ...

    def to_config(self, params: Mapping[str, Any]) -> Config | None:
        """Optuna parameters as a configuration; None for one that the space cannot express."""
        ...


class _Flat:
    """Sources whose configurations are their parameters."""

    def to_params(self, config: Config) -> dict[str, Any]:
        return config

    def to_config(self, params: Mapping[str, Any]) -> Config | None:
        return dict(params)


class BoxSource(_Flat):
    """The product of Optuna distributions."""

    def __init__(self, distributions: Mapping[str, BaseDistribution]) -> None:
        self.distributions = dict(distributions)
        self._values = {n: _values(d) for n, d in self.distributions.items()}
        size = math.prod(len(v) if v is not None else _FINITE + 1 for v in self._values.values())
        self.finite: list[Config] | None = None
        if size <= _FINITE:
            names = list(self._values)
            self.finite = [
                dict(zip(names, row, strict=True)) for row in itertools.product(*(self._values[n] or [] for n in names))
            ]
        self._corners = self._make_corners()

    def _make_corners(self) -> list[Config]:
        names = list(self.distributions)
        ends = [_ends(d) for d in self.distributions.values()]
        if math.prod(map(len, ends)) > _CORNERS:
            return []
        return [dict(zip(names, row, strict=True)) for row in itertools.product(*ends)]

    def draw(self, rng: np.random.Generator, past: Sequence[Config]) -> list[Config]:
        if self.finite is not None:
            return self.finite
        fresh = [{n: _draw(d, rng) for n, d in self.distributions.items()} for _ in range(_FRESH)]
        again = list(past[-_AGAIN:])
        near = [self._neighbour(c, rng) for c in again]
        return [*self._corners, *again, *fresh, *near]

    def _neighbour(self, config: Config, rng: np.random.Generator) -> Config:
        """A configuration with its numbers moved by about a tenth of their ranges."""
        return {n: _nudge(d, config[n], rng) if n in config else _draw(d, rng) for n, d in self.distributions.items()}


class ListSource(_Flat):
    """A given list of configurations, not necessarily with the same parameters; categorical unless distributions are given."""

    def __init__(self, configs: Sequence[Config], distributions: Mapping[str, BaseDistribution] | None = None) -> None:
        if not configs:
            raise UserError("law sampler: candidates: the list is empty")
        given = dict(distributions or {})
        self.finite: list[Config] | None = [
            {n: _spelled(given[n], v) if n in given else v for n, v in c.items()} for c in configs
        ]
        configs = self.finite
        names = sorted({n for c in configs for n in c})
        self.distributions: dict[str, BaseDistribution] = {
            n: CategoricalDistribution(tuple(dict.fromkeys(c[n] for c in configs if n in c))) for n in names
        } | dict(distributions or {})

    def draw(self, rng: np.random.Generator, past: Sequence[Config]) -> list[Config]:
        assert self.finite is not None
        return self.finite


class SpaceSource:
    """A sweep's space with its conditional, coupled and excluded knobs."""

    def __init__(self, space: SearchSpace) -> None:
        self.space = space
        size = space.size(_FINITE)
        self.finite: list[Config] | None = list(space.grid()) if size is not None else None
        self.distributions = _distributions(space)
        self._zipped = {path: z for z in space.zips for path in z.paths}

    def to_params(self, config: Config) -> dict[str, Any]:
        """Choices that lead to the configuration: coupled parameters by the row of their block."""
        params: dict[str, Any] = {}
        for name, value in config.items():
            if name not in self._zipped:
                params[name] = stored(value)
                continue
            block = self._zipped[name]
            params[block.name] = next(
                i for i, row in enumerate(block.rows) if all(config.get(p, v) == v for p, v in row)
            )
        return params

    def to_config(self, params: Mapping[str, Any]) -> Config | None:
        try:
            return self.space.walk(lambda p: chosen(p, params[p.name]))
        except KeyError:
            return None

    def draw(self, rng: np.random.Generator, past: Sequence[Config]) -> list[Config]:
        if self.finite is not None:
            return self.finite
        out: list[Config] = list(past[-_AGAIN:])
        for i in range(_FRESH + _CORNERS):
            config = self.space.walk(partial(_choose, rng, i < _CORNERS))
            if not self.space.excluded(config):
                out.append(config)
        return out


def _distributions(space: SearchSpace) -> dict[str, BaseDistribution]:
    """Every choice that some walk of the space makes."""
    params = [Param("model", space.models), Param("method", tuple(b.label for b in space.branches))]
    params += [p for b in space.branches for p in b.params]
    params += [Param(z.name, tuple(range(len(z.rows)))) for z in space.zips]
    return {p.name: distribution_of(p) for p in params}


def _choose(rng: np.random.Generator, edge: bool, param: Param) -> Any:
    if param.values is not None:
        return param.values[int(rng.integers(len(param.values)))]
    if edge:
        end = param.low if rng.random() < 0.5 else param.high
        return int(end) if param.integer else float(end)
    if param.integer or param.step is not None:
        if param.log:
            return round(math.exp(rng.uniform(math.log(param.low), math.log(param.high))))
        values = param.grid()
        return values[int(rng.integers(len(values)))]
    if param.log:
        return float(math.exp(rng.uniform(math.log(param.low), math.log(param.high))))
    return float(rng.uniform(param.low, param.high))


def _spelled(d: BaseDistribution, value: Any) -> Any:
    """A value as a trial of the distribution would have it: one spelling, whatever number type it came in."""
    return value if isinstance(d, CategoricalDistribution) else d.to_external_repr(d.to_internal_repr(value))


def _values(d: BaseDistribution) -> list[Any] | None:
    """All values of a small finite distribution."""
    if isinstance(d, CategoricalDistribution):
        return list(d.choices)
    if isinstance(d, IntDistribution):
        values = range(d.low, d.high + 1, d.step)
        return list(values) if len(values) <= _FINITE else None
    if isinstance(d, FloatDistribution) and d.step is not None:
        count = math.floor((d.high - d.low) / d.step + 1e-9) + 1
        return [d.low + i * d.step for i in range(count)] if count <= _FINITE else None
    return None


def _ends(d: BaseDistribution) -> list[Any]:
    if isinstance(d, CategoricalDistribution):
        return list(d.choices)
    assert isinstance(d, (IntDistribution, FloatDistribution))
    return [d.low] if d.low == d.high else [d.low, d.high]


def _draw(d: BaseDistribution, rng: np.random.Generator) -> Any:
    if isinstance(d, CategoricalDistribution):
        return d.choices[int(rng.integers(len(d.choices)))]
    assert isinstance(d, (IntDistribution, FloatDistribution))
    return _at(d, float(rng.random()))


def _at(d: IntDistribution | FloatDistribution, unit: float) -> Any:
    """The value at a place in [0, 1] of the distribution's scale."""
    low, high = (math.log(d.low), math.log(d.high)) if d.log else (d.low, d.high)
    value = low + unit * (high - low)
    value = math.exp(value) if d.log else value
    if d.step is not None and not (isinstance(d, IntDistribution) and d.log):
        value = d.low + round((value - d.low) / d.step) * d.step
    value = min(max(value, d.low), d.high)
    return round(value) if isinstance(d, IntDistribution) else float(value)


def _nudge(d: BaseDistribution, value: Any, rng: np.random.Generator) -> Any:
    if isinstance(d, CategoricalDistribution):
        return value if rng.random() < 0.8 else _draw(d, rng)
    assert isinstance(d, (IntDistribution, FloatDistribution))
    if d.low == d.high:
        return value
    low, high = (math.log(d.low), math.log(d.high)) if d.log else (d.low, d.high)
    place = ((math.log(value) if d.log else value) - low) / (high - low)
    return _at(d, min(1.0, max(0.0, place + 0.1 * float(rng.standard_normal()))))
