"""Two kinds of runs compared pair by pair: the difference of their errors, or of another column, with an interval.

Runs of the same task, options and seed score the same examples in the same order, so that the noise of examples cancels
in the difference. Rows are paired where the columns in ``match`` agree; each pair gives one mean difference, and pairs
of the same repeat share a seed. The interval is Student's over repeats, each with the mean of its pairs: a bootstrap
over so few would cover far less than it says (three repeats: about 80 % instead of 95 %). Examples of a repeat need no
resampling then, since their noise is part of what differs between repeats.

A single repeat says nothing of others: its interval resamples examples and holds for that seed alone. Of other columns
(a metric, a cost) rows hold one number, so that a single repeat leaves the interval unbounded.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from scipy import stats

from isoflop.core.errors import UserError
from isoflop.frontier.query import sql

ERROR = "error"
DRAWS = 2000
LEVEL = 0.95
STUDENT, EXAMPLES, UNBOUNDED = "student", "examples", "unbounded"
"""Kinds of intervals: over repeats; over the examples of a single repeat; none."""


@dataclass(frozen=True)
class Paired:
    """Mean of ``error(a) - error(b)``, or of another column, over all pairs; negative where a is better, or has less.

    Attributes:
        a, b: mean errors, or means of that column.
        difference, low, high: the mean difference with its 95 % interval.
        pairs: row pairs; ``repeats``: different repeats among them.
        cells: one entry per value of the matched columns: those values, ``a``, ``b``, ``difference``, ``pairs``.
        interval: its kind.
    """

    a: float
    b: float
    difference: float
    low: float
    high: float
    pairs: int
    repeats: int
    cells: list[dict[str, Any]]
    interval: str = STUDENT

    @property
    def verdict(self) -> str:
        """``better`` when the whole interval lies below 0, ``worse`` above, else ``not separated``."""
        return "better" if self.high < 0 else "worse" if self.low > 0 else "not separated"


def paired(
    table: pa.Table,
    a: str,
    b: str,
    match: Mapping[str, float] | Sequence[str] = ("model", "task"),
    seed: int = 0,
    y: str = ERROR,
) -> Paired:
    """Compare the rows that fulfil the SQL condition ``a`` with those that fulfil ``b``.

    Args:
        table: ledger rows with ``scores``; only finished ones count.
        match: columns that must agree besides ``task`` and ``repeat``; with a number, numeric columns may differ by that
            share, and the nearest row is taken; with ``.inf`` text may differ, too (``model: .inf`` compares models).

        y: what is compared: ``error``, example by example, or a number of the rows: a column, or an entry of the footprint,
            of the metrics or of the knobs.

    Raises:
        UserError: a condition is wrong, nothing can be paired, or a row has no number ``y``.
    """
    tolerances = dict(match) if isinstance(match, Mapping) else dict.fromkeys(match, 0.0)
    left, right = _rows(table, a), _rows(table, b)
    pairs = [(row, other) for row in left if (other := _partner(row, right, tolerances)) is not None]
    if not pairs:
        raise UserError(
            f"nothing to compare: {len(left)} rows where {a}, {len(right)} where {b}, and none agree in task, repeat, {', '.join(tolerances)}"
        )
    values = [(_number(row, y), _number(other, y)) for row, other in pairs]
    if y == ERROR:
        differences = [(row["repeat"], _difference(row, other)) for row, other in pairs]
    else:
        gaps = [mine - theirs for mine, theirs in values]
        differences = [(row["repeat"], np.array([gap])) for (row, _), gap in zip(pairs, gaps, strict=True)]
    repeats = len({repeat for repeat, _ in differences})
    kind = STUDENT if repeats > 1 else EXAMPLES if y == ERROR else UNBOUNDED
    low, high = _over_examples([d for _, d in differences], seed) if kind == EXAMPLES else over_repeats(differences)
    return Paired(
        a=float(np.mean([mine for mine, _ in values])),
        b=float(np.mean([theirs for _, theirs in values])),
        difference=float(np.mean([d.mean() for _, d in differences])),
        low=low,
        high=high,
        pairs=len(pairs),
        repeats=repeats,
        cells=_cells(pairs, values, list(tolerances)),
        interval=kind,
    )


def _rows(table: pa.Table, condition: str) -> list[dict[str, Any]]:
    return sql(f"SELECT * FROM results WHERE status = 'ok' AND ({condition})", table).to_pylist()


def _partner(
    row: Mapping[str, Any], others: Sequence[Mapping[str, Any]], tolerances: Mapping[str, float]
) -> Mapping[str, Any] | None:
    best, least = None, math.inf
    for other in others:
        if other["task"] != row["task"] or other["repeat"] != row["repeat"] or other["job_id"] == row["job_id"]:
            continue
        distance = 0.0
        for column, tolerance in tolerances.items():
            mine, theirs = cell_of(row, column), cell_of(other, column)
            if mine == theirs or (math.isinf(tolerance) and isinstance(mine, str)):
                continue
            if not tolerance or not isinstance(mine, (int, float)) or not isinstance(theirs, (int, float)):
                distance = math.inf
                break
            gap = abs(mine - theirs) / max(abs(mine), abs(theirs))
            distance = math.inf if gap > tolerance else distance + gap
        if distance < least:
            best, least = other, distance
    return best


def cell_of(row: Mapping[str, Any], column: str) -> Any:
    """A column, or an entry of the footprint, of the metrics or of the knobs."""
    if column in row:
        return row[column]
    knobs = json.loads(row.get("knobs") or "{}")
    if column in knobs:
        value = knobs[column]
        return json.dumps(value) if isinstance(value, list) else value
    for name in ("footprint", "metrics"):
        found = dict(row.get(name) or ())
        if column in found:
            return found[column]
    raise UserError(f"no column {column!r}, neither among the rows' columns nor in their footprint, metrics or knobs")


def _number(row: Mapping[str, Any], y: str) -> float:
    value = cell_of(row, y)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise UserError(
            f"y = {y!r} is {value!r} in job {row['job_id']}; allowed: a column, metric or cost that is a number"
        )
    return float(value)


def _difference(row: Mapping[str, Any], other: Mapping[str, Any]) -> np.ndarray:
    mine, theirs = (np.asarray(r["scores"] or (), dtype=float) for r in (row, other))
    if mine.shape != theirs.shape or not len(mine):  # no pairing by example: the means alone
        return np.array([row["error"] - other["error"]])
    return mine - theirs


def _over_examples(differences: Sequence[np.ndarray], seed: int) -> tuple[float, float]:
    """Percentile interval of the mean of the pairs of one repeat: examples are drawn, the same for all its pairs."""
    rng = np.random.default_rng(seed)
    sums: dict[int, np.ndarray] = {}  # examples -> sum over pairs
    for d in differences:
        sums[len(d)] = sums.get(len(d), 0.0) + d
    means = np.zeros(DRAWS)
    for size, summed in sorted(sums.items()):
        means += np.array([summed[rng.integers(0, size, size)].mean() for _ in range(DRAWS)]) / len(differences)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def over_repeats(differences: Sequence[tuple[int, np.ndarray]]) -> tuple[float, float]:
    """Student's interval of the mean of the pairs' differences, whose independent draws are the repeats.

    Repeats weigh by their pairs, as in the mean; with as many pairs in each that is the plain interval of their means.
    """
    sums: dict[int, list[float]] = {}
    for repeat, d in differences:
        sums.setdefault(repeat, []).append(float(d.mean()))
    count = len(sums)
    if count < 2:
        return -math.inf, math.inf
    mean = float(np.mean([gap for gaps in sums.values() for gap in gaps]))
    share = count / sum(map(len, sums.values()))
    errors = np.array([share * sum(gap - mean for gap in gaps) for gaps in sums.values()])
    half = float(stats.t.ppf((1 + LEVEL) / 2, count - 1)) * math.sqrt(float(errors @ errors) / (count * (count - 1)))
    return mean - half, mean + half


def _cells(
    pairs: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]],
    values: Sequence[tuple[float, float]],
    columns: list[str],
) -> list[dict[str, Any]]:
    found: dict[tuple[Any, ...], list[tuple[float, float]]] = {}
    for (row, _), both in zip(pairs, values, strict=True):
        key = (row["task"], *(_rounded(cell_of(row, c)) for c in columns))
        found.setdefault(key, []).append(both)
    cells = []
    for key, errors in sorted(found.items(), key=lambda item: tuple(map(str, item[0]))):
        mine, theirs = np.mean(errors, axis=0)
        cells.append(
            dict(zip(("task", *columns), key, strict=True))
            | {"a": float(mine), "b": float(theirs), "difference": float(mine - theirs), "pairs": len(errors)}
        )
    return cells


def _rounded(value: Any) -> Any:
    return float(f"{value:.3g}") if isinstance(value, float) else value
