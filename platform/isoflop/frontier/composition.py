"""What combining methods gains over each alone: joint frontiers, and the cost of an error with and without combining.

Rows of a composition name their parts in ``method`` (``mqt+zipcache``). A configuration is a model, methods with their
knobs and a task; its error is the mean over repeats. For an error that people accept, the cost of a set of
methods is that of its cheapest configuration whose mean error is not above it.

Shapes: C configurations, R repeats, E examples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from isoflop.core.errors import UserError
from isoflop.frontier.paired import cell_of
from isoflop.frontier.raw import non_dominated

DRAWS = 1000
LEVEL = 0.95


@dataclass(frozen=True)
class Configuration:
    """One configuration, averaged over its repeats.

    Attributes:
        method: ``mqt+zipcache`` for a composition; ``parts`` its methods.
        knobs: as JSON.
        cost, error: means over the repeats.
        efficient: no other configuration has at most this cost and this error.
    """

    model: str
    task: str
    method: str
    parts: frozenset[str]
    knobs: str
    cost: float
    error: float
    repeats: int
    efficient: bool


@dataclass(frozen=True)
class Gain:
    """A composition against the best of what it is made of, at one accepted error.

    Attributes:
        method: the composition.
        accepted: the error.
        cost: of its cheapest configuration within the error, NaN where it has none.
        alone: of the cheapest configuration of its proper parts (each method, every smaller composition, nothing).
        factor: ``alone / cost``: above 1 the combination is cheaper; ``low`` and ``high`` its 95 % interval over
            repeats and examples, NaN where fewer than 95 % of the resamples have both.
    """

    model: str
    task: str
    method: str
    accepted: float
    cost: float
    alone: float
    factor: float
    low: float
    high: float


@dataclass(frozen=True)
class Composed:
    """The joint frontier of a sweep with compositions, for one cost."""

    cost: str
    configurations: list[Configuration]
    gains: list[Gain]

    @property
    def frontier(self) -> list[Configuration]:
        """The efficient configurations, cheapest first."""
        return sorted((c for c in self.configurations if c.efficient), key=lambda c: (c.model, c.task, c.cost))


def compose(table: pa.Table, cost: str, margins: Sequence[float] = (0.01, 0.02, 0.05, 0.1), seed: int = 0) -> Composed:
    """Joint frontiers of error and cost, and what each composition gains over its parts.

    Args:
        table: ledger rows with ``scores``; only finished ones count.
        cost: a column, or a name in the rows' footprint (``bytes``, ``flops``).
        margins: accepted errors, as distances from the uncompressed model's error (method ``none``), or from the
            least error where there is none.

    Raises:
        UserError: no finished row, or the cost is in none of them.
    """
    configurations: list[Configuration] = []
    gains: list[Gain] = []
    for (model, task), rows in _grouped(table).items():
        group = _Group(rows, cost)
        unbeaten_C = non_dominated(np.stack([group.costs_C, group.errors()], axis=1))
        for c, (method, knobs) in enumerate(group.keys):
            cost_c, error_c, repeats = float(group.costs_C[c]), float(group.errors()[c]), len(group.repeats[c])
            named = (model, task, method, group.parts[c], knobs)
            configurations.append(Configuration(*named, cost_c, error_c, repeats, bool(unbeaten_C[c])))
        for method in sorted({m for m, _ in group.keys if "+" in m}):
            gains += [Gain(model, task, method, *numbers) for numbers in _gains(group, method, margins, seed)]
    return Composed(cost, configurations, gains)


def efficient(table: pa.Table, costs: Sequence[str]) -> list[dict[str, Any]]:
    """Configurations that no other of the same model and task beats in error and in every cost at once.

    Returns:
        Entries with ``model``, ``task``, ``method``, ``knobs``, ``error`` and each cost, by their names.
    """
    found = []
    for (model, task), rows in _grouped(table).items():
        groups = [_Group(rows, cost) for cost in costs]
        errors_C = groups[0].errors()
        points_CK = np.stack([errors_C, *(group.costs_C for group in groups)], axis=1)
        for c in np.flatnonzero(non_dominated(points_CK)).tolist():
            method, knobs = groups[0].keys[c]
            named = {"model": model, "task": task, "method": method, "knobs": knobs, "error": float(errors_C[c])}
            found.append(named | {cost: float(group.costs_C[c]) for cost, group in zip(costs, groups, strict=True)})
    return found


def _grouped(table: pa.Table) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """Finished rows by model and task, in order. Raises UserError where there are none."""
    rows = [row for row in table.to_pylist() if row["status"] == "ok"]
    if not rows:
        raise UserError("no finished row to compare")
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda r: (r["model"], r["task"])):
        found.setdefault((row["model"], row["task"]), []).append(row)
    return found


class _Group:
    """The configurations of one model and task, with the scores of every repeat."""

    def __init__(self, rows: Sequence[Mapping[str, Any]], cost: str) -> None:
        by_key: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
        for row in rows:
            by_key.setdefault((row["method"], row["knobs"] or "{}"), []).append(row)
        self.keys = list(by_key)
        self.parts = [_parts(method) for method, _ in self.keys]
        self.repeats = [{row["repeat"]: _scores(row) for row in by_key[key]} for key in self.keys]
        self.costs_C = np.array([np.mean([_cost(row, cost) for row in by_key[key]]) for key in self.keys])

    def errors(
        self, draw: Mapping[int, np.ndarray] | None = None, weights: Mapping[int, int] | None = None
    ) -> np.ndarray:
        """Mean error (C,) of every configuration; of resampled examples ``draw`` and repeats ``weights`` if given."""
        found = np.empty(len(self.keys))
        for c, scores in enumerate(self.repeats):
            means = [
                s.mean() if draw is None or len(s) != len(draw[r]) else s[draw[r]].mean() for r, s in scores.items()
            ]
            counts = [1 if weights is None else weights.get(r, 0) for r in scores]
            found[c] = np.average(means, weights=counts) if sum(counts) else math.nan
        return found

    def draws(self, seed: int) -> list[np.ndarray]:
        """Resampled mean errors: repeats are drawn, then the examples of each, the same for all configurations."""
        rng = np.random.default_rng(seed)
        repeats = sorted({r for scores in self.repeats for r in scores})
        sizes = {r: max(len(s[r]) for s in self.repeats if r in s) for r in repeats}
        found = []
        for _ in range(DRAWS):
            chosen = rng.choice(repeats, len(repeats)).tolist()
            draw = {r: rng.integers(0, sizes[r], sizes[r]) for r in repeats}
            found.append(self.errors(draw, {r: chosen.count(r) for r in repeats}))
        return found


def _gains(
    group: _Group, method: str, margins: Sequence[float], seed: int
) -> list[tuple[float, float, float, float, float, float]]:
    parts = _parts(method)
    own = np.array([m == method for m, _ in group.keys])
    others = np.array([p < parts for p in group.parts])
    dense = np.array([not p for p in group.parts])
    errors, draws = group.errors(), group.draws(seed)

    def costs(errors_C: np.ndarray, margin: float) -> tuple[float, float]:
        base = errors_C[dense].min() if dense.any() else errors_C.min()
        within = errors_C <= base + margin
        return _least(group.costs_C, within & own), _least(group.costs_C, within & others)

    found = []
    for margin in margins:
        cost, alone = costs(errors, margin)
        factors = np.array([b / a for a, b in (costs(draw, margin) for draw in draws)])
        known = factors[np.isfinite(factors)]
        sure = len(known) >= LEVEL * len(factors)
        low, high = np.quantile(known, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]) if sure else (math.nan, math.nan)
        base = float(errors[dense].min() if dense.any() else errors.min())
        found.append((base + margin, cost, alone, alone / cost, float(low), float(high)))
    return found


def _cost(row: Mapping[str, Any], name: str) -> float:
    value = cell_of(row, name)
    if value is None:
        raise UserError(f"{name} is missing in a row of {row['method']} on {row['model']}")
    return float(value)


def _least(costs_C: np.ndarray, chosen_C: np.ndarray) -> float:
    return float(costs_C[chosen_C].min()) if chosen_C.any() else math.nan


def _parts(method: str) -> frozenset[str]:
    return frozenset() if method == "none" else frozenset(method.split("+"))


def _scores(row: Mapping[str, Any]) -> np.ndarray:
    return np.asarray(row["scores"] or [row["error"]], dtype=float)
