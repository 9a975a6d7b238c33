"""What combining methods gains over each alone: joint frontiers, and the cost of an error with and without combining.

Rows of a composition name their parts in ``method`` (``mqt+zipcache``). A configuration is a model, methods with their
knobs and a task; its error is the mean over repeats. For an error that people accept, the cost of a set of
methods is that of its cheapest configuration whose mean error is not above it.

Shapes: C configurations, R repeats, E examples.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from isoflop.core.errors import UserError
from isoflop.frontier.paired import cell_of
from isoflop.frontier.raw import non_dominated

DRAWS = 1000
LEVEL = 0.95
ROUNDING = 1e-6
"""Errors are means of 32-bit scores: a tie with the accepted error must not be lost to rounding."""


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
    """The joint frontier of a sweep with compositions, for one cost; ``left_out`` names what lacks a repeat."""

    cost: str
    configurations: list[Configuration]
    gains: list[Gain]
    left_out: list[str] = field(default_factory=list)

    @property
    def frontier(self) -> list[Configuration]:
        """The efficient configurations, cheapest first."""
        return sorted((c for c in self.configurations if c.efficient), key=lambda c: (c.model, c.task, c.cost))


def compose(table: pa.Table, cost: str, margins: Sequence[float] = (0.01, 0.02, 0.05, 0.1), seed: int = 0) -> Composed:
    """Joint frontiers of error and cost, and what each composition gains over its parts.

    Configurations are compared on the same repeats: one that lacks a repeat that another of its model and task has is
    left out, and named in ``Composed.left_out``.

    Args:
        table: ledger rows with ``scores``; only finished ones count.
        cost: a column, or a name in the rows' footprint (``bytes``, ``flops``).
        margins: accepted errors, as distances from the uncompressed model's error (method ``none``), or from the
            least error where there is none.

    Raises:
        UserError: no finished row, a cost that a row lacks, or a configuration that has a repeat twice.
    """
    configurations: list[Configuration] = []
    gains: list[Gain] = []
    left_out: list[str] = []
    for (model, task), rows in _grouped(table).items():
        group = _Group(rows, cost)
        left_out += [f"{method} {knobs} on {model}, {task}" for method, knobs in group.incomplete]
        unbeaten_C = non_dominated(np.stack([group.costs_C, group.errors_C], axis=1))
        for c, (method, knobs) in enumerate(group.keys):
            cost_c, error_c = float(group.costs_C[c]), float(group.errors_C[c])
            named = (model, task, method, group.parts[c], knobs)
            configurations.append(Configuration(*named, cost_c, error_c, group.repeats, bool(unbeaten_C[c])))
        compositions = sorted({m for m, _ in group.keys if "+" in m})
        draws_SC = group.draws(seed) if compositions else np.empty((0, len(group.keys)))
        for method in compositions:
            gains += [Gain(model, task, method, *numbers) for numbers in _gains(group, method, margins, draws_SC)]
    return Composed(cost, configurations, gains, left_out)


def efficient(table: pa.Table, costs: Sequence[str]) -> list[dict[str, Any]]:
    """Configurations that no other of the same model and task beats in error and in every cost at once.

    Returns:
        Entries with ``model``, ``task``, ``method``, ``knobs``, ``error`` and each cost, by their names.
    """
    found = []
    for (model, task), rows in _grouped(table).items():
        groups = [_Group(rows, cost) for cost in costs]
        points_CK = np.stack([groups[0].errors_C, *(group.costs_C for group in groups)], axis=1)
        for c in np.flatnonzero(non_dominated(points_CK)).tolist():
            method, knobs = groups[0].keys[c]
            named = {"model": model, "task": task, "method": method, "knobs": knobs, "error": float(points_CK[c, 0])}
            found.append(named | {cost: float(group.costs_C[c]) for cost, group in zip(costs, groups, strict=True)})
    return found


def _grouped(table: pa.Table) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """Finished rows by model and task with their options, in order. Raises UserError where there are none."""
    rows = [row for row in table.to_pylist() if row["status"] == "ok"]
    if not rows:
        raise UserError("no finished row to compare")
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda r: (r["model"], r["task"])):
        spec = json.loads(row.get("spec") or "{}")
        named = (
            _with_options(row["model"], spec.get("model_options")),
            _with_options(row["task"], spec.get("task_options")),
        )
        found.setdefault(named, []).append(row)
    plain = [(model.partition(" ")[0], task.partition(" ")[0]) for model, task in found]
    if len(set(plain)) == len(plain):  # options are named only where they tell two things apart
        return dict(zip(plain, found.values(), strict=True))
    return found


def _with_options(name: str, options: Mapping[str, Any] | None) -> str:
    return " ".join([name, *(f"{k}={v}" for k, v in sorted((options or {}).items()))])


class _Group:
    """The configurations of one model and task that have all of its repeats, with the scores of each."""

    def __init__(self, rows: Sequence[Mapping[str, Any]], cost: str) -> None:
        by_key: dict[tuple[str, str], dict[int, Mapping[str, Any]]] = {}
        for row in rows:
            own = by_key.setdefault((row["method"], row["knobs"] or "{}"), {})
            if row["repeat"] in own:
                raise UserError(f"repeat {row['repeat']} of {row['method']} on {row['model']} stands twice in the rows")
            own[row["repeat"]] = row
        self.repeats = max(len(own) for own in by_key.values())
        whole = next(set(own) for own in by_key.values() if len(own) == self.repeats)
        self.incomplete = [key for key, own in by_key.items() if set(own) != whole]
        self.keys = [key for key in by_key if key not in self.incomplete]
        self.parts = [_parts(method) for method, _ in self.keys]
        kept = [[by_key[key][repeat] for repeat in sorted(whole)] for key in self.keys]
        self.costs_C = np.array([np.mean([_cost(row, cost) for row in own]) for own in kept])
        self._scores = [_matrix([own[r] for own in kept]) for r in range(self.repeats)]  # per repeat, (C, E) or (C, 1)
        self.errors_C = np.mean([scores_CE.mean(1) for scores_CE in self._scores], axis=0)

    def draws(self, seed: int) -> np.ndarray:
        """Resampled mean errors (DRAWS, C): repeats are drawn, then the examples of each, the same for all."""
        rng = np.random.default_rng(seed)
        found = np.empty((DRAWS, len(self.keys)))
        for draw in range(DRAWS):
            total_C = np.zeros(len(self.keys))
            for repeat in rng.integers(0, self.repeats, self.repeats):
                scores_CE = self._scores[repeat]
                size = scores_CE.shape[1]
                weights_E = np.bincount(rng.integers(0, size, size), minlength=size)
                total_C += scores_CE @ weights_E / size
            found[draw] = total_C / self.repeats
        return found


def _gains(
    group: _Group, method: str, margins: Sequence[float], draws_SC: np.ndarray
) -> list[tuple[float, float, float, float, float, float]]:
    parts = _parts(method)
    own_C = np.array([m == method for m, _ in group.keys])
    others_C = np.array([p < parts for p in group.parts])
    dense_C = np.array([not p for p in group.parts])
    measured_1C = group.errors_C[None]
    found = []
    for margin in margins:
        (accepted,), (cost,), (alone,) = _cheapest(group.costs_C, measured_1C, dense_C, own_C, others_C, margin)
        _, costs_S, alone_S = _cheapest(group.costs_C, draws_SC, dense_C, own_C, others_C, margin)
        factors_S = _over(alone_S, costs_S)
        known = factors_S[np.isfinite(factors_S)]
        sure = len(known) >= LEVEL * len(factors_S)
        low, high = np.quantile(known, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]) if sure else (math.nan, math.nan)
        factor = float(_over(np.array([alone]), np.array([cost]))[0])
        found.append((float(accepted), float(cost), float(alone), factor, float(low), float(high)))
    return found


def _cheapest(
    costs_C: np.ndarray,
    errors_SC: np.ndarray,
    dense_C: np.ndarray,
    own_C: np.ndarray,
    others_C: np.ndarray,
    margin: float,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The accepted error, and the least cost within it of the composition and of its parts, (S,) each; NaN for none."""
    base_S = (errors_SC[:, dense_C] if dense_C.any() else errors_SC).min(1)
    accepted_S = base_S + margin
    within_SC = errors_SC <= accepted_S[:, None] + ROUNDING
    costs_SC = np.where(within_SC, costs_C, np.inf)
    least = [costs_SC[:, chosen].min(1, initial=np.inf) for chosen in (own_C, others_C)]
    return accepted_S, *(np.where(np.isfinite(part), part, np.nan) for part in least)


def _over(alone_S: np.ndarray, cost_S: np.ndarray) -> np.ndarray:
    """``alone / cost``; NaN where either is missing or the cost is 0."""
    return np.divide(alone_S, cost_S, out=np.full(len(cost_S), np.nan), where=cost_S > 0)


def _matrix(rows: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """Scores of the same examples (C, E); means (C, 1) where the rows do not have the same examples."""
    scores = [np.asarray(row["scores"] or [row["error"]], dtype=float) for row in rows]
    if len({len(s) for s in scores}) == 1:
        return np.stack(scores)
    return np.array([[s.mean()] for s in scores])


def _cost(row: Mapping[str, Any], name: str) -> float:
    value = cell_of(row, name)
    if value is None:
        raise UserError(f"{name} is missing in a row of {row['method']} on {row['model']}")
    return float(value)


def _parts(method: str) -> frozenset[str]:
    return frozenset() if method == "none" else frozenset(method.split("+"))
