"""How the search went: the Pareto front of a sweep's objectives, and the hypervolume after each trial."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import pyarrow as pa

from isoflop.core.numbers import short
from isoflop.core.text import safe_line
from isoflop.dashboards.report import charts
from isoflop.dashboards.report.charts import Json
from isoflop.search.hypervolume import front, share
from isoflop.sweep.blocks import Objective
from isoflop.sweep.configs import COSTS, Config, Cost, by_scene, varying_costs
from isoflop.sweep.rows import objective_values
from isoflop.sweep.spec import SweepSpec

LEAD = (
    "A trial is on the Pareto front where no other is better in one objective and as good in all. Hypervolume, as Optuna "
    "computes it, is the share of the box between the best and the worst values of this sweep that is dominated by what had "
    "finished by then (costs on a log scale): a search that is flat finds nothing better any more. The box is this sweep's "
    "own, so shares of two sweeps do not compare."
)
_FEWEST = 3
_LOGGED = {c.key for c in COSTS}
_UNITS = {c.key: c.unit for c in COSTS}


def groups(spec: SweepSpec, table: pa.Table, configs: Sequence[Config]) -> tuple[list[Json], str]:
    """Groups of panels, and why there is none where there is none.

    Args:
        table: finished rows of the sweep.
        configs: the same rows as configurations.
    """
    found: list[Json] = []
    if len(spec.objectives) > 1:
        titles, values = _trials(spec, table)
        if len(values) >= _FEWEST:
            found.append(charts.group("objectives of the search", _objectives(spec.objectives, titles, values)))
    panels = [panel for scene, own in by_scene(configs).items() if (panel := _cost_history(scene, own, table))]
    found.append(charts.group("error and cost", panels))
    return found, f"no task has {_FEWEST} finished configurations that differ in error and in cost"


def _trials(spec: SweepSpec, table: pa.Table) -> tuple[list[str], list[tuple[float, ...]]]:
    """Title and objective values of every trial all of whose jobs finished, in the order in which they did."""
    expected = len(spec.tasks) * spec.repeats
    rows: dict[str, list[dict[str, Any]]] = {}
    for row in table.drop_columns(["scores", "shard_sizes", "traces"]).to_pylist():
        rows.setdefault(row["trial_id"], []).append(row)
    whole = [own for own in rows.values() if len(own) == expected]
    whole.sort(key=lambda own: max(r["finished"] for r in own))
    titles, values = [], []
    for own in whole:
        value = objective_values(spec.objectives, own)
        if value is not None:
            titles.append(_title(own[0]))
            values.append(value)
    return titles, values


def _title(row: Mapping[str, Any]) -> str:
    knobs = ", ".join(f"{k} {v}" for k, v in json.loads(row["knobs"] or "{}").items())
    return safe_line(f"trial {row['trial_number']}: {row['method']}{f' ({knobs})' if knobs else ''} on {row['model']}")


def _objectives(
    objectives: Sequence[Objective], titles: Sequence[str], values: Sequence[tuple[float, ...]]
) -> list[Json]:
    """A Pareto front per pair of objectives, then the history of all of them together."""
    pairs = [
        _front((objectives[i], objectives[j]), titles, [(v[i], v[j]) for v in values])
        for i, j in combinations(range(len(objectives)), 2)
    ]
    names = ", ".join(_name(o) for o in objectives)
    logged = [tuple(_scaled(v, o.metric) for v, o in zip(row, objectives, strict=True)) for row in values]
    curve = share(logged, [o.direction for o in objectives])
    return pairs if curve is None else [*pairs, _history(f"hypervolume of {names}", curve, titles)]


def _scaled(value: float, metric: str) -> float:
    return float(np.log10(value)) if metric in _LOGGED and value > 0 else value


def _front(pair: tuple[Objective, Objective], titles: Sequence[str], values: Sequence[tuple[float, float]]) -> Json:
    """The second objective to the right, the first upwards, so that error stands upright as everywhere else."""
    up, right = pair
    best = set(front(values, [up.direction, right.direction]))
    points = [charts.point(v[1], v[0], t) for v, t in zip(values, titles, strict=True)]
    content = [
        charts.series("other trials", 0, [p for i, p in enumerate(points) if i not in best], hollow=True),
        charts.series("Pareto front", 1, [points[i] for i in sorted(best, key=lambda i: values[i][1])]),
    ]
    title = f"{_name(up)} against {_name(right)}"
    axes = [
        charts.axis(_label(o), _UNITS.get(o.metric, ""), log=charts.spread([v[k] for v in values]))
        for k, o in ((1, right), (0, up))
    ]
    text = f"{len(best)} of {len(values)} trials are on the front."
    return charts.panel(title, charts.xy(title, axes[0], axes[1], [s for s in content if s["points"]]), text)


def _name(objective: Objective) -> str:
    return objective.metric + (f" of {objective.task}" if objective.task else "")


def _label(objective: Objective) -> str:
    return f"{_name(objective)} ({objective.direction})"


def _cost_history(scene: str, configs: Sequence[Config], table: pa.Table) -> Json | None:
    """Hypervolume of error and the first cost that varies, over the configurations as they finished."""
    cost = next(iter(varying_costs(configs)), None)
    known = [c for c in configs if cost is not None and c.costs.get(cost.key, 0) > 0]
    if cost is None or len(known) < _FEWEST:
        return None
    finished = dict(zip(table["job_id"].to_pylist(), table["finished"].to_pylist(), strict=True))
    known.sort(key=lambda c: max(finished[j] for j in c.jobs))
    values = [(c.error, float(np.log10(c.costs[cost.key]))) for c in known]
    curve = share(values, ["minimize", "minimize"])
    return None if curve is None else _history(_cost_title(scene, cost), curve, [c.title for c in known])


def _cost_title(scene: str, cost: Cost) -> str:
    return f"{scene}: hypervolume of error and {cost.label}"


def _history(title: str, curve: Sequence[float], titles: Sequence[str]) -> Json:
    points = [charts.point(i, v, t) for i, (v, t) in enumerate(zip(curve, titles, strict=True), start=1)]
    line = charts.series("hypervolume", 0, points, line=True, dots=len(points) <= 100, step=True)
    last = next(i for i, v in enumerate(curve, start=1) if v >= curve[-1] * (1 - 1e-9))
    chart = charts.xy(title, charts.axis("finished trials"), charts.axis("hypervolume, share of the box"), [line])
    text = f"{short(curve[-1])} of the box in the end, reached with trial {last} of {len(curve)}: {titles[last - 1]}."
    return charts.panel(title, chart, text)
