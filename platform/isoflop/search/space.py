"""The space that a sweep searches: models × methods × the knobs of each method.

A point of the space is a flat :data:`Config`: ``{"model": "tiny-llava/d24", "method": "quecc", "quecc.k": 2}``. Knobs
exist only below their method (and below their ``when`` condition), so that samplers see a conditional space, as in
Optuna's define-by-run. One function, :meth:`SearchSpace.walk`, draws a point by asking a ``choose`` callback for each choice;
the grid, Optuna's samplers and the rebuilding of a study from past rows are three callbacks to it.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from isoflop.core.errors import UserError
from isoflop.core.knobs import KnobValue, grid_value, same

Value = KnobValue
Config = dict[str, Value]
MAX_GRID = 1_000_000  # points; more is a mistake in the YAML
_MOST_ROUNDING = 1e6  # steps; a grid whose numbers are larger than so many of them is not blurred any further
_MAX_COUNT = 20_000  # points of a space that a sampler searches: beyond this it counts as endless


@dataclass(frozen=True)
class Param:
    """One choice: a finite list of ``values``, or a range of whole or real numbers.

    Attributes:
        name: ``model``, ``method``, ``<label>.<knob>`` or the name of a zip block.
        values: the allowed values, or None for a range.
        when: other parameter -> its values under which this one exists; otherwise it keeps ``default``.
        spelling: low end and step of the grid whose values have one spelling, whoever draws them; the knob's own grid where
            it has one, else that of the range. See :func:`isoflop.core.knobs.grid_value`.
    """

    name: str
    values: tuple[Value, ...] | None = None
    low: float = 0
    high: float = 0
    step: float | None = None
    log: bool = False
    integer: bool = False
    when: tuple[tuple[str, tuple[Value, ...]], ...] = ()
    default: Value | None = None
    spelling: tuple[float, float] | None = None

    def spelled(self, value: Value) -> Value:
        """``value`` in the spelling that enters configurations, where it differs from an allowed one by rounding only.

        A third step of .1 is .3 whoever added it up: an Optuna sampler, a list in the YAML, a row of an earlier version.
        """
        if self.values is not None:
            sizes = [abs(v) for v in self.values if isinstance(v, (int, float))]
            known = value in self.values
            return value if known else next((v for v in self.values if same(v, value, max(sizes, default=0))), value)
        near = self._near(value)
        return value if near is None else near

    def _near(self, value: Value) -> Value | None:
        """The value of the grid that differs from this one by rounding only; None without one, or without a grid."""
        grid = self.spelling or (None if self.step is None else (self.low, self.step))
        if grid is None or isinstance(value, (str, bool, tuple)) or not math.isfinite(value):
            return None
        low, step = grid
        near = grid_value(low, step, round((value - low) / step), self.integer)
        return near if same(near, value, min(max(abs(low), step), step * _MOST_ROUNDING)) else None

    def grid(self) -> Sequence[Value]:
        """All values; UserError for a continuous range."""
        if self.values is not None:
            return self.values
        if self.integer:
            return range(math.ceil(self.low), math.floor(self.high) + 1, int(self.step or 1))
        if self.step is None:
            raise UserError(
                f"{self.name}: a grid cannot list the real numbers from {self.low:g} to {self.high:g}; give a list or a step"
            )
        count = math.floor((self.high - self.low) / self.step + 1e-9) + 1
        if count > MAX_GRID:
            raise UserError(f"{self.name}: {count:,} steps from {self.low:g} to {self.high:g}; allowed: {MAX_GRID:,}")
        return tuple(grid_value(self.low, self.step, i, False) for i in range(count))

    def contains(self, value: Value) -> bool:
        """Whether ``value`` could have been drawn from this parameter, in any spelling."""
        value = self.spelled(value)
        if self.values is not None:
            return value in self.values
        if isinstance(value, (str, bool, tuple)) or not self.low <= value <= self.high:
            return False
        if self.integer:
            return float(value).is_integer() and int(value) in self.grid()
        if self.step is None:
            return True
        steps = (value - self.low) / self.step
        return self._near(value) is not None and abs(steps - round(steps)) < 1e-6


@dataclass(frozen=True)
class Zip:
    """Parameters that move together: row i gives each of them its i-th value."""

    name: str
    rows: tuple[tuple[tuple[str, Value], ...], ...]

    @property
    def paths(self) -> frozenset[str]:
        """The parameters it sets."""
        return frozenset(path for path, _ in self.rows[0])


@dataclass(frozen=True)
class Branch:
    """One entry under ``methods``: a method, or several that are composed."""

    label: str
    params: tuple[Param, ...] = ()


Exclusion = tuple[tuple[str, tuple[Value, ...]], ...]
Choose = Callable[[Param], Value]


@dataclass(frozen=True)
class SearchSpace:
    """Models × branches, with coupled (``zips``) and forbidden (``excludes``) combinations."""

    models: tuple[str, ...]
    branches: tuple[Branch, ...]
    zips: tuple[Zip, ...] = ()
    excludes: tuple[Exclusion, ...] = ()
    by_label: Mapping[str, Branch] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "by_label", {b.label: b for b in self.branches})

    def walk(self, choose: Choose) -> Config:
        """Draw one point; ``choose`` is asked for each choice in a fixed order, conditional ones only where they exist."""
        config: Config = {}
        drawn: set[str] = set()

        def draw(param: Param) -> None:
            for zipped in self.zips:
                if param.name in zipped.paths and zipped.name not in drawn:
                    drawn.add(zipped.name)
                    index = choose(Param(zipped.name, tuple(range(len(zipped.rows)))))
                    assert isinstance(index, int)
                    pending.update(dict(zipped.rows[index]))
            if param.name in pending:
                config[param.name] = pending[param.name]
            elif param.values is not None and len(param.values) == 1:
                config[param.name] = param.values[0]
            else:
                config[param.name] = param.spelled(choose(param))

        pending: Config = {}
        draw(Param("model", self.models))
        draw(Param("method", tuple(b.label for b in self.branches)))
        for param in self.by_label[str(config["method"])].params:
            if all(config.get(name) in allowed for name, allowed in param.when):
                draw(param)
            elif param.default is not None:
                config[param.name] = param.default
        return config

    def excluded(self, config: Config) -> bool:
        """Whether an ``exclude`` block forbids this point."""
        return any(all(config.get(path) in values for path, values in rule) for rule in self.excludes)

    def spelled(self, config: Config) -> Config:
        """The point with every value in the spelling of this space; see :meth:`Param.spelled`."""
        branch = self.by_label.get(str(config.get("method")))
        params = {p.name: p for p in branch.params} if branch else {}
        return {name: params[name].spelled(v) if name in params else v for name, v in config.items()}

    def grid(self) -> Iterator[Config]:
        """Every allowed point, each once, in the order of the YAML (the last knob moves fastest)."""
        seen: set[str] = set()
        prefix: list[int] = []
        while True:
            sizes: list[int] = []

            def choose(param: Param, sizes: list[int] = sizes) -> Value:
                values = param.grid()
                depth = len(sizes)
                sizes.append(len(values))
                if depth == len(prefix):
                    prefix.append(0)
                return values[prefix[depth]]

            config = self.walk(choose)
            key = values_key(config)
            if key not in seen and not self.excluded(config):
                seen.add(key)
                yield config
            while prefix and prefix[-1] + 1 >= sizes[len(prefix) - 1]:
                prefix.pop()
            if not prefix:
                return
            prefix[-1] += 1

    def size(self, limit: int = _MAX_COUNT) -> int | None:
        """Number of points, or None when a knob is continuous or there are more than ``limit``."""
        try:
            count = sum(1 for _ in itertools.islice(self.grid(), limit + 1))
        except UserError:
            return None
        return count if count <= limit else None

    def contains(self, config: Config) -> bool:
        """Whether the point belongs to the space as it is now (a YAML may have changed since a row was written)."""
        branch = self.by_label.get(str(config.get("method")))
        if branch is None or config.get("model") not in self.models or self.excluded(config):
            return False
        if set(config) != {"model", "method"} | {p.name for p in branch.params}:
            return False
        for zipped in self.zips:
            coupled = zipped.paths & set(config)
            if coupled and not any(all(config[p] == v for p, v in row if p in coupled) for row in zipped.rows):
                return False
        zipped_paths = {path for z in self.zips for path in z.paths}
        for param in branch.params:
            active = all(config.get(name) in allowed for name, allowed in param.when)
            good = param.contains(config[param.name]) if active else config[param.name] == param.default
            if param.name not in zipped_paths and not good:
                return False
        return True


def values_key(config: Config) -> str:
    """One spelling per point, for finding duplicates."""
    return json.dumps(config, sort_keys=True)
