"""Two kinds of runs compared pair by pair: the difference of their errors, or of another column, with an interval.

Runs of the same task, options and seed score the same examples in the same order, so that the noise of examples cancels
in the difference. Rows are paired where the columns in ``match`` agree; each pair gives one mean difference, and pairs
of the same repeat share a seed. The interval is Student's over repeats, each with the mean of its pairs: a bootstrap
over so few would cover far less than it says (three repeats: about 80 % instead of 95 %). Examples of a repeat need no
resampling then, since their noise is part of what differs between repeats.

A single repeat says nothing of others, or is all there is to know, where nothing is random but the choice of examples (a checkpoint
as it is, greedy answers). Its interval is over examples and holds for that seed alone: the Bayesian bootstrap of ``evidence``,
with an unseen example that speaks against either end. Of right and wrong answers that is the sign test at 5 %: a difference is
separated from 0 where six examples differ and agree, or correspondingly more. Where rows hold one number instead of scores (also
any other column: a metric, a cost) a single repeat leaves the interval unbounded.
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
from isoflop.frontier.evidence import over_examples, reach_of
from isoflop.frontier.query import sql

ERROR = "error"
DRAWS = 10_000
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
        examples: different examples that it is over, where it is over examples.
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
    examples: int = 0

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
    blocks = [_scores(row, other) for row, other in pairs] if y == ERROR and repeats == 1 else []
    scored = {(row["task"], len(b)) for (row, _), b in zip(pairs, blocks, strict=True)} if blocks else set()
    kind = STUDENT if repeats > 1 else EXAMPLES if blocks and all(n > 1 for _, n in scored) else UNBOUNDED
    if kind == EXAMPLES:
        low, high = _interval([row["task"] for row, _ in pairs], blocks, seed)
    else:
        low, high = over_repeats(differences)
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
        examples=sum(n for _, n in scored) if kind == EXAMPLES else 0,
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


def _scores(row: Mapping[str, Any], other: Mapping[str, Any]) -> np.ndarray:
    """Of the same examples, (n, 2); none where rows do not have the same ones."""
    mine, theirs = (np.asarray(r["scores"] or (), dtype=float) for r in (row, other))
    return np.stack((mine, theirs), axis=1) if mine.shape == theirs.shape else np.empty((0, 2))


def _difference(row: Mapping[str, Any], other: Mapping[str, Any]) -> np.ndarray:
    scores_N2 = _scores(row, other)
    if not len(scores_N2):  # no pairing by example: the means alone
        return np.array([row["error"] - other["error"]])
    return np.asarray(scores_N2[:, 0] - scores_N2[:, 1])


def _interval(tasks: Sequence[str], blocks: Sequence[np.ndarray], seed: int) -> tuple[float, float]:
    """Over examples: drawn together for all pairs of a task, which score the same ones, and apart for different tasks."""
    rng = np.random.default_rng(seed)
    groups: dict[tuple[str, int], list[np.ndarray]] = {}
    for task, block in zip(tasks, blocks, strict=True):
        groups.setdefault((task, len(block)), []).append(block)
    means, unseen = np.zeros(DRAWS), np.zeros(DRAWS)
    for _, group in sorted(groups.items(), key=lambda item: item[0]):
        share, scores_N2 = len(group) / len(blocks), np.mean(group, axis=0)
        moved_D2, weight_D = over_examples(group, rng, DRAWS)
        means += share * (scores_N2[:, 0].mean() - scores_N2[:, 1].mean() + moved_D2[:, 0] - moved_D2[:, 1])
        unseen += share * reach_of(group) * weight_D
    return (
        float(np.quantile(means - unseen, (1 - LEVEL) / 2)),
        float(np.quantile(means + unseen, (1 + LEVEL) / 2)),
    )


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
