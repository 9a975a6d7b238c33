"""The raw frontier: which rows no other row beats, over any number of objectives, with hypervolume and uncertainty.

No law is involved. Two objectives are a sort and a running minimum, three a sweep over a staircase, more a filter over blocks in
order of their sum; large tables are thinned by a grid of minima first.
Ties are kept: rows with equal values do not dominate each other.

Shapes: M rows, K objectives, S simulations.
"""

from __future__ import annotations

import bisect
import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from isoflop.core.errors import UserError
from isoflop.core.expressions import Array, parse
from isoflop.core.result import Result
from isoflop.laws.render import number
from isoflop.laws.table import Tabular, as_table, column

Direction = Literal["min", "max"]
_BLOCK = 4096
_LARGE = 50_000


@dataclass
class ParetoSet(Result):
    """The rows on the frontier.

    Attributes:
        objectives: column or expression -> direction.
        rows: positions in the table, sorted by the first objective; table: those rows, with expressions as columns and
            ``pareto_probability`` when standard errors were given.
        n: rows considered; dropped: rows with missing objectives.
        hypervolume: volume dominated up to ``reference`` (None when no reference point was given for more than two objectives).
        probability: chance of every considered row being on the frontier, (n,), or None.
    """

    objectives: dict[str, Direction]
    rows: np.ndarray
    table: pa.Table
    n: int
    dropped: int
    hypervolume: float | None
    reference: dict[str, float] | None
    probability: Array | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        rows = [
            {k: (None if isinstance(v, float) and not math.isfinite(v) else v) for k, v in r.items()}
            for r in self.table.to_pylist()
        ]
        return {
            "objectives": self.objectives,
            "n": self.n,
            "dropped": self.dropped,
            "hypervolume": self.hypervolume,
            "reference": self.reference,
            "rows": rows,
        }

    def to_arrow(self) -> pa.Table:
        """The rows on the frontier."""
        return self.table

    def __str__(self) -> str:
        names = list(self.objectives)
        head = f"{len(self)} of {self.n} rows are on the frontier of " + ", ".join(
            f"{o} ({d})" for o, d in self.objectives.items()
        )
        lines = [head, "".join(f"{n[:18]:>20}" for n in names)]
        for row in self.table.slice(0, 20).to_pylist():
            lines.append("".join(f"{number(float(row[n])):>20}" for n in names))
        return "\n".join(lines + (["…"] if len(self) > 20 else []))

    def _repr_html_(self) -> str:
        names = self.table.column_names[:12]
        head = "".join(f"<th>{html.escape(n)}</th>" for n in names)
        rows = self.table.select(names).slice(0, 50).to_pylist()
        body = "".join(
            "<tr>" + "".join(f"<td>{html.escape(_cell(v))}</td>" for v in r.values()) + "</tr>" for r in rows
        )
        return f"<div><p>{len(self)} of {self.n} rows</p><table><tr>{head}</tr>{body}</table></div>"


def pareto(
    table: Tabular,
    objectives: Mapping[str, Direction] | Sequence[str] = ("flops", "error"),
    stderr: Mapping[str, str] | None = None,
    reference: Mapping[str, float] | None = None,
    simulations: int = 400,
    seed: int = 0,
) -> ParetoSet:
    """The Pareto set of a table.

    Args:
        objectives: columns or expressions (``"2*N*(Q+V)"``), with ``min`` or ``max``; a plain list minimises all.
        stderr: objective -> column of its standard error; every row then gets the probability of being on the frontier, by
            simulation with independent normal errors.
        reference: the worst corner of the hypervolume; default for two objectives: the worst value of each.
    """
    goals: dict[str, Direction] = {}
    for name in objectives:
        goals[name] = objectives[name] if isinstance(objectives, Mapping) else "min"
    if not goals:
        raise UserError("pareto: at least one objective is needed")
    for name, direction in goals.items():
        if direction not in ("min", "max"):
            raise UserError(f"pareto: direction of {name!r} is {direction!r}; allowed: min, max")
    source = as_table(table)
    columns = [_objective(source, name) for name in goals]
    signs = np.array([1.0 if d == "min" else -1.0 for d in goals.values()])
    finite = np.ones(source.num_rows, dtype=bool)
    for values in columns:
        finite &= np.isfinite(values)
    kept = np.flatnonzero(finite) if not finite.all() else None
    points = np.empty((source.num_rows if kept is None else len(kept), len(columns)))
    for k, values in enumerate(columns):
        np.multiply(values if kept is None else values[kept], signs[k], out=points[:, k])
    if not len(points):
        raise UserError(f"pareto: no row has all of {', '.join(goals)}")
    mask = non_dominated(points)
    chosen = np.flatnonzero(mask)
    chosen = chosen[np.lexsort(points[chosen].T[::-1])]
    rows = chosen if kept is None else kept[chosen]
    corner = _corner(points, goals, signs, reference)
    volume = None if corner is None else hypervolume(points[chosen], corner)
    found = source.take(pa.array(rows))
    for k, name in enumerate(goals):
        if name not in found.column_names:
            found = found.append_column(name, pa.array(columns[k][rows]))
    probability = None
    if stderr:
        errors = np.stack([_errors(source, name, stderr.get(name)) for name in goals], axis=1)
        probability = membership(points, errors if kept is None else errors[kept], simulations, seed)
        found = found.append_column("pareto_probability", pa.array(probability[chosen]))
    shown = None if corner is None else {n: float(c * s) for n, c, s in zip(goals, corner, signs, strict=True)}
    return ParetoSet(goals, rows, found, len(points), source.num_rows - len(points), volume, shown, probability)


def _objective(table: pa.Table, name: str) -> Array:
    if (
        name in table.column_names
        and pa.types.is_float64(table.schema.field(name).type)
        and table[name].null_count == 0
    ):
        chunks = table[name]
        return chunks.chunk(0).to_numpy(zero_copy_only=False) if chunks.num_chunks == 1 else chunks.to_numpy()
    return column(table, name, "pareto")


def _errors(table: pa.Table, name: str, source: str | None) -> Array:
    return np.zeros(table.num_rows) if source is None else np.nan_to_num(column(table, source, f"stderr of {name}"))


def _corner(
    points: Array, goals: Mapping[str, str], signs: Array, reference: Mapping[str, float] | None
) -> Array | None:
    if reference is None:
        return points.max(axis=0) if points.shape[1] <= 2 else None
    missing = [n for n in goals if n not in reference]
    if missing:
        raise UserError(f"pareto: the reference point lacks {missing[0]!r}")
    return np.array([float(reference[n]) for n in goals]) * signs


def non_dominated(points_MK: Array) -> np.ndarray:
    """Boolean (M,): no other row is at most equal everywhere and smaller somewhere (all objectives minimised)."""
    m, k = points_MK.shape
    mask = np.zeros(m, dtype=bool)
    if k == 1:
        return np.asarray(points_MK[:, 0] == points_MK[:, 0].min())
    if m > _LARGE:
        kept = _prefilter(points_MK)
        mask[kept] = _exact(points_MK[kept])
        return mask
    return _exact(points_MK)


def _exact(points_MK: Array) -> np.ndarray:
    """The method for the number of objectives."""
    return {2: _staircase, 3: _sweep}.get(points_MK.shape[1], _blocks)(points_MK)


def _blocks(points_MK: Array) -> np.ndarray:
    """Any number of objectives: blocks in order of the objectives' sum, each against the front so far and itself."""
    m, k = points_MK.shape
    mask = np.zeros(m, dtype=bool)
    spread = np.maximum(points_MK.std(axis=0), 1e-300)
    order = np.argsort(
        (points_MK / spread).sum(axis=1), kind="stable"
    )  # nobody is dominated by a row with a larger sum
    front = np.empty((0, k))
    for first in range(0, m, _BLOCK):
        rows = order[first : first + _BLOCK]
        block = points_MK[rows]
        alive = ~_dominated_by(block, front)
        rows, block = rows[alive], block[alive]
        alive = ~_dominated_by(block, block)
        mask[rows[alive]] = True
        front = np.concatenate([front, block[alive]])
    return mask


def _staircase(points: Array) -> np.ndarray:
    """Two objectives: sort by the first, and keep what improves on the running minimum of the second."""
    x, y = points[:, 0], points[:, 1]
    order = np.lexsort((y, x))
    best = np.minimum.accumulate(y[order])
    on = np.empty(len(order), dtype=bool)
    on[0] = True
    on[1:] = y[order][1:] < best[:-1]
    # equal rows do not dominate each other: a run of equals shares the fate of its first
    repeat = np.r_[False, (x[order][1:] == x[order][:-1]) & (y[order][1:] == y[order][:-1])]
    first = np.maximum.accumulate(np.where(repeat, 0, np.arange(len(order))))
    mask = np.zeros(len(x), dtype=bool)
    mask[order[on[first]]] = True
    return mask


def _sweep(points: Array) -> np.ndarray:
    """Three objectives: rows in order of the first, against a staircase of the other two."""
    order = np.lexsort((points[:, 2], points[:, 1], points[:, 0]))
    ordered = points[order]
    repeat = np.r_[False, (ordered[1:] == ordered[:-1]).all(axis=1)].tolist()
    steps_y: list[float] = []  # rising, while steps_z falls
    steps_z: list[float] = []
    on, alive = np.zeros(len(order), dtype=bool), False
    for i, (y, z) in enumerate(zip(ordered[:, 1].tolist(), ordered[:, 2].tolist(), strict=True)):
        if not repeat[i]:
            place = bisect.bisect_right(steps_y, y)
            alive = place == 0 or steps_z[place - 1] > z
            if alive:
                first = bisect.bisect_left(steps_y, y)
                last = place
                while last < len(steps_z) and steps_z[last] >= z:
                    last += 1
                steps_y[first:last] = [y]
                steps_z[first:last] = [z]
        on[i] = alive
    mask = np.zeros(len(order), dtype=bool)
    mask[order[on]] = True
    return mask


def _prefilter(points_MK: Array) -> np.ndarray:
    """Rows that no cell's minimum below and left of theirs beats: a superset of the frontier, found without comparing rows.

    All objectives but the last are binned at quantiles; the last one's minimum per cell, accumulated over cells that are
    strictly smaller in every binned objective, dominates whatever is not below it.
    """
    m, k = points_MK.shape
    bins = {2: 1024, 3: 384, 4: 64}.get(k, 16)
    flat, shape = np.zeros(m, dtype=np.int64), []
    for j in range(k - 1):
        values = points_MK[:, j]
        sample = np.sort(values[:: max(1, m // 65_536)])
        edges = np.unique(sample[np.linspace(0, len(sample) - 1, bins).astype(np.int64)])
        shape.append(len(edges) + 1)
        flat = flat * shape[-1] + np.searchsorted(edges, values, side="right")
    last = points_MK[:, -1]
    lowest = np.full(int(np.prod(shape)), np.inf)
    np.minimum.at(lowest, flat, last)
    before = lowest.reshape(shape)
    for axis in range(k - 1):
        before = np.minimum.accumulate(before, axis=axis)
    shifted = np.full([n + 1 for n in shape], np.inf)
    shifted[(slice(1, None),) * (k - 1)] = before
    strictly = shifted[(slice(0, -1),) * (k - 1)].ravel()
    return np.flatnonzero(last < strictly[flat])


def _dominated_by(block: Array, others: Array) -> np.ndarray:
    """Boolean per row of ``block``: some row of ``others`` dominates it."""
    out = np.zeros(len(block), dtype=bool)
    first, step = 0, 16  # the first few, which have the smallest sums, dominate most rows
    while first < len(others):
        alive = np.flatnonzero(~out)
        if not len(alive):
            break
        part = others[first : first + step]
        first, step = first + step, min(step * 8, max(16, 2_000_000 // len(alive)))
        at_most = np.ones((len(alive), len(part)), dtype=bool)
        smaller = np.zeros((len(alive), len(part)), dtype=bool)
        for k in range(block.shape[1]):
            a, b = block[alive, k, None], part[None, :, k]
            at_most &= b <= a
            smaller |= b < a
        out[alive] = (at_most & smaller).any(axis=1)
    return out


def hypervolume(front_MK: Array, reference_K: Array) -> float:
    """Volume between a non-dominated set and a reference corner (all objectives minimised); slices along the last objective."""
    points = front_MK[np.all(front_MK < reference_K, axis=1)]
    if not len(points):
        return 0.0
    if points.shape[1] == 1:
        return float(reference_K[0] - points.min())
    if points.shape[1] == 2:
        points = points[np.argsort(points[:, 0], kind="stable")]
        y = np.minimum.accumulate(points[:, 1])
        right = np.append(points[1:, 0], reference_K[0])
        return float(np.sum((right - points[:, 0]) * (reference_K[1] - y)))
    points = points[np.argsort(points[:, -1], kind="stable")]
    depth = np.diff(np.append(points[:, -1], reference_K[-1]))
    if points.shape[1] == 3:
        return float(np.sum(depth * _growing_area(points[:, :2], reference_K[:2])))
    total = 0.0
    for i, thick in enumerate(depth):
        if thick > 0:
            head = points[: i + 1, :-1]
            total += thick * hypervolume(head[non_dominated(head)], reference_K[:-1])
    return total


def _growing_area(points_M2: Array, corner: Array) -> Array:
    """Area dominated up to the corner by the first 1, 2, … points, (M,): a staircase that grows point by point."""
    xs, ys = [-math.inf, float(corner[0])], [float(corner[1]), -math.inf]  # x rises, y falls
    area, areas = 0.0, []
    for x, y in points_M2.tolist():
        first = bisect.bisect_left(xs, x)
        if ys[first - 1] > y and not (xs[first] == x and ys[first] <= y):
            last, left, height = first, x, ys[first - 1]
            while ys[last] >= y:
                area += (xs[last] - left) * (height - y)
                left, height = xs[last], ys[last]
                last += 1
            area += (xs[last] - left) * (height - y)
            xs[first:last] = [x]
            ys[first:last] = [y]
        areas.append(area)
    return np.array(areas)


def membership(points_MK: Array, stderr_MK: Array, simulations: int = 400, seed: int = 0) -> Array:
    """Probability of each row being non-dominated when every objective has an independent normal error, (M,)."""
    rng = np.random.default_rng(seed)
    hits = np.zeros(len(points_MK))
    for _ in range(simulations):
        hits += non_dominated(points_MK + stderr_MK * rng.standard_normal(points_MK.shape))
    return hits / simulations


def best_under_budget(table: Tabular, cost: str, error: str, budgets: Sequence[float]) -> pa.Table:
    """For each budget the row of least error that costs no more; raises UserError when none does."""
    source = as_table(table)
    price = (
        column(source, cost, "cost")
        if cost in source.column_names
        else parse(cost, "cost")({n: column(source, n, "cost") for n in parse(cost, "cost").names})
    )
    value = column(source, error, "error")
    order = np.argsort(price, kind="stable")
    order = order[np.isfinite(price[order]) & np.isfinite(value[order])]
    if not len(order):
        raise UserError(f"no row has both {cost!r} and {error!r}")
    running = np.minimum.accumulate(value[order])
    first = np.flatnonzero(np.r_[True, running[1:] < running[:-1]])
    rows = []
    for b in budgets:
        count = int(np.searchsorted(price[order], b, side="right"))
        if count == 0:
            raise UserError(f"budget = {b:g} is below the cheapest row, which costs {price[order[0]]:.6g}")
        rows.append(int(order[first[np.searchsorted(first, count - 1, side="right") - 1]]))
    found = source.take(pa.array(rows))
    return found.add_column(0, "budget", pa.array([float(b) for b in budgets]))


def _cell(value: Any) -> str:
    return number(value) if isinstance(value, float) else str(value)
