"""Methods against each other under one budget: who is best where, where curves cross, and what a wrong choice costs.

Each method has its own fitted law (a grouped fit). Bootstrap samples of the laws are independent, so sample r of one method
is paired with sample r of another.
"""

from __future__ import annotations

import html
import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from isoflop.core.errors import UserError
from isoflop.core.expressions import Array
from isoflop.core.result import Result
from isoflop.frontier.optimum import BudgetSpace, CostModel, at_points, check_spent, make_space, optimum
from isoflop.laws.inference import estimate_from_draws, estimate_from_rows, parameter_rows
from isoflop.laws.render import WIDTH, number, span
from isoflop.laws.result import Estimate, Fit, GroupedFit

_SAME_COST = (
    "every method is charged {cost}: compute that a compressor itself needs is not in it, so one with overhead looks too good; "
    "give costs={{method: formula}} (costs.measured_cost fits a formula to measured FLOPs or seconds)"
)


@dataclass(frozen=True)
class Crossing:
    """A budget at which two methods change places; ``share`` of the bootstrap pairs in which they cross at all."""

    below: str
    above: str
    budget: Estimate
    share: float | None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "better_below": self.below,
            "better_above": self.above,
            "budget": self.budget.to_dict(),
            "share": self.share,
        }


@dataclass
class MethodComparison(Result):
    """Predicted error of every method at every budget.

    Attributes:
        budgets (K,); methods; error: per method K estimates; probability: per method, chance of being the best (K,).
        crossings: where the best of two methods changes; extra_compute: per method, budget needed for the best method's error,
            as a share on top of the budget (inf when out of reach).
        notes: what a reader must know.
    """

    budgets: list[float]
    methods: list[str]
    error: dict[str, list[Estimate]]
    probability: dict[str, list[float | None]]
    crossings: list[Crossing]
    extra_compute: dict[str, list[float]]
    cost: str
    notes: list[str] = field(default_factory=list)

    def best(self, i: int) -> str:
        """The method of least predicted error at budget i."""
        return min(self.methods, key=lambda m: self.error[m][i].value)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; an unreachable extra compute becomes None."""
        return {
            "cost": self.cost,
            "budgets": self.budgets,
            "best": [self.best(i) for i in range(len(self.budgets))],
            "methods": {
                m: {
                    "error": [e.to_dict() for e in self.error[m]],
                    "probability": self.probability[m],
                    "extra_compute": [v if math.isfinite(v) else None for v in self.extra_compute[m]],
                }
                for m in self.methods
            },
            "crossings": [c.to_dict() for c in self.crossings],
            "notes": self.notes,
        }

    def to_arrow(self) -> pa.Table:
        """One row per budget and method."""
        rows = [
            {
                "budget": b,
                "method": m,
                "error": self.error[m][i].value,
                "low": (self.error[m][i].interval or (None, None))[0],
                "high": (self.error[m][i].interval or (None, None))[1],
                "probability_best": self.probability[m][i],
                "extra_compute": self.extra_compute[m][i],
            }
            for i, b in enumerate(self.budgets)
            for m in self.methods
        ]
        return pa.Table.from_pylist(rows)

    def __str__(self) -> str:
        width = max(10, *(len(m) + 2 for m in self.methods))
        lines = [f"{'budget':>12}  " + "".join(f"{m:>{width}}" for m in self.methods) + "  best"]
        for i, b in enumerate(self.budgets):
            lines.append(
                f"{number(b):>12}  "
                + "".join(f"{self.error[m][i].value:>{width}.4f}" for m in self.methods)
                + f"  {self.best(i)}"
            )
        for c in self.crossings:
            lines.append(f"{c.below} is better below {number(c.budget.value)} {span(c.budget)}, {c.above} above")
        for note in self.notes:
            lines += textwrap.wrap(f"! {note}", WIDTH, subsequent_indent="  ")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"


def compare_methods(
    grouped: GroupedFit,
    cost: str = "2*N*(Q+V)",
    q: float | None = None,
    budgets: Sequence[float] | None = None,
    limits: Mapping[str, tuple[float, float]] | None = None,
    held: Mapping[str, float] | None = None,
    constants: Mapping[str, float] | None = None,
    costs: Mapping[str, str] | None = None,
    points: int = 25,
) -> MethodComparison:
    """Each method at its own optimum under every budget.

    Args:
        grouped: laws per method (``fit(table, by="method")``).
        cost: formula for all; ``costs``: per method, when a method costs extra (the ranking carries a note
            when none is given: a compressor's own compute is then in nobody's cost).
        budgets: default: ``points`` of them across the budgets that all methods' data span.
    """
    named = {" / ".join(str(v) for v in f.key.values()): f for f in grouped}
    if len(named) < 2:
        raise UserError("compare_methods: at least two groups are needed (fit with by='method')")
    setups = {m: _setup(f, (costs or {}).get(m, cost), q, limits, held, constants) for m, f in named.items()}
    asked = np.asarray(budgets, dtype=np.float64) if budgets is not None else _common_budgets(named, setups, points)
    curves = {m: _curve(f, *setups[m], asked) for m, f in named.items()}
    methods = list(named)
    error = {m: [estimate_from_rows(named[m], curves[m][:, i]) for i in range(len(asked))] for m in methods}
    return MethodComparison(
        budgets=[float(b) for b in asked],
        methods=methods,
        error=error,
        probability=_probabilities(curves, methods, len(asked)),
        crossings=_crossings(named, curves, asked, methods),
        extra_compute=_prices(named, setups, curves, asked, methods),
        cost=cost,
        notes=[] if costs else [_SAME_COST.format(cost=cost)],
    )


def extra_compute(
    fit: Fit,
    choice: Mapping[str, float],
    budget: float,
    cost: str = "2*N*(Q+V)",
    q: float | None = None,
    limits: Mapping[str, tuple[float, float]] | None = None,
    constants: Mapping[str, float] | None = None,
) -> Estimate:
    """The price of a wrong choice: how much more budget it needs, as a share, to reach the error of the optimum.

    ``choice`` holds variables other than the size at given values (``{"V": 576}``); 0.5 means half as much again, inf that
    this choice never gets there.
    """
    model, space = _setup(fit, cost, q, limits, None, constants)
    _, wrong = _setup(fit, cost, q, limits, choice, constants)
    p = parameter_rows(fit)
    check_spent(model, space, budget, float(optimum(fit, model, space, budget, p[:1])[0][0]))
    target = _best_error(fit, model, space, budget, p)
    grid = np.geomspace(budget * 1e-3, budget * 1e6, 400)
    reached = np.stack([_best_error(fit, model, wrong, b, p) for b in grid], axis=1)
    needed = np.array([_first_below(grid, row, t) for row, t in zip(reached, target, strict=True)])
    return estimate_from_rows(fit, np.maximum(needed / budget - 1, 0.0))  # less is no price: the budget was not spent


def _setup(
    fit: Fit,
    cost: str,
    q: float | None,
    limits: Mapping[str, tuple[float, float]] | None,
    held: Mapping[str, float] | None,
    constants: Mapping[str, float] | None,
) -> tuple[CostModel, BudgetSpace]:
    model = CostModel.with_text(cost, fit.form.variable_names, q, constants)
    return model, make_space(fit, model, limits, held)


def _best_error(fit: Fit, cost: CostModel, space: BudgetSpace, budget: float, p: Array) -> Array:
    spender, searched, _ = optimum(fit, cost, space, budget, p)
    return np.nan_to_num(at_points(fit, space, spender, searched, p), nan=np.inf)


def _curve(fit: Fit, cost: CostModel, space: BudgetSpace, budgets: Array) -> Array:
    """(1 + R, K): the estimate first, then the bootstrap samples."""
    p = parameter_rows(fit)
    return np.stack([_best_error(fit, cost, space, float(b), p) for b in budgets], axis=1)


def _common_budgets(
    named: Mapping[str, Fit], setups: Mapping[str, tuple[CostModel, BudgetSpace]], points: int
) -> Array:
    low, high = 0.0, math.inf
    for m, fit in named.items():
        ranges = fit.record["data"]["ranges"]
        cost, space = setups[m]
        ends = [float(cost({v: space.held.get(v, ranges[v][k]) for v in fit.form.variable_names})) for k in (0, 1)]
        low, high = max(low, ends[0]), min(high, ends[1])
    if not low < high:
        raise UserError("compare_methods: the methods' data span no common range of budgets; give budgets=")
    return np.geomspace(low, high, points)


def _paired(curves: Mapping[str, Array], methods: Sequence[str]) -> Array:
    """(methods, R, K) bootstrap curves, cut to the smallest number of samples."""
    count = min(len(curves[m]) for m in methods) - 1
    return np.stack([curves[m][1 : 1 + count] for m in methods])


def _probabilities(curves: Mapping[str, Array], methods: list[str], k: int) -> dict[str, list[float | None]]:
    draws = _paired(curves, methods)
    if draws.shape[1] == 0:
        return {m: [None] * k for m in methods}
    winner = np.argmin(draws, axis=0)
    return {m: [float(v) for v in np.mean(winner == i, axis=0)] for i, m in enumerate(methods)}


def _crossings(
    named: Mapping[str, Fit], curves: Mapping[str, Array], budgets: Array, methods: list[str]
) -> list[Crossing]:
    out = []
    for i, a in enumerate(methods):
        for b in methods[i + 1 :]:
            point = _first_crossing(curves[a][0] - curves[b][0], budgets)
            if point is None:
                continue
            below, above = (a, b) if curves[a][0, 0] < curves[b][0, 0] else (b, a)
            count = min(len(curves[a]), len(curves[b])) - 1
            if count == 0:
                out.append(
                    Crossing(below, above, Estimate(point, verdict="no interval: the fits have no bootstrap"), None)
                )
                continue
            draws = [
                _first_crossing(x - y, budgets)
                for x, y in zip(curves[a][1 : count + 1], curves[b][1 : count + 1], strict=True)
            ]
            found = np.array([d for d in draws if d is not None])
            share = len(found) / count
            # samples without a crossing in the range are open on one side: the interval must not hide them
            values = np.concatenate([found, np.full(count - len(found), np.inf)])
            samples = named[a].samples
            assert samples is not None
            out.append(Crossing(below, above, estimate_from_draws(point, values, samples, named[a].level), share))
    return out


def _first_crossing(difference: Array, budgets: Array) -> float | None:
    change = np.flatnonzero(np.sign(difference[1:]) * np.sign(difference[:-1]) < 0)
    if not len(change):
        return None
    i = int(change[0])
    z = np.log(budgets)
    share = difference[i] / (difference[i] - difference[i + 1])
    return float(np.exp(z[i] + share * (z[i + 1] - z[i])))


def _prices(
    named: Mapping[str, Fit],
    setups: Mapping[str, tuple[CostModel, BudgetSpace]],
    curves: Mapping[str, Array],
    budgets: Array,
    methods: list[str],
) -> dict[str, list[float]]:
    """Per method and budget: how much more it needs for the error of the best method there."""
    best = np.min(np.stack([curves[m][0] for m in methods]), axis=0)
    grid = np.geomspace(budgets[0], budgets[-1] * 1e4, 300)
    out = {}
    for m in methods:
        cost, space = setups[m]
        line = np.array([_best_error(named[m], cost, space, float(b), named[m].p[None])[0] for b in grid])
        out[m] = [
            max(0.0, _first_below(grid, line, t) / b - 1) if curves[m][0, i] > t else 0.0
            for i, (b, t) in enumerate(zip(budgets, best, strict=True))
        ]
    return out


def _first_below(grid: Array, line: Array, target: float) -> float:
    """The first budget at which a falling curve reaches a target, log-linearly interpolated; inf when it never does."""
    hit = np.flatnonzero(line <= target)
    if not len(hit):
        return math.inf
    i = int(hit[0])
    if i == 0 or not math.isfinite(line[i - 1]):
        return float(grid[i])
    share = (line[i - 1] - target) / (line[i - 1] - line[i])
    return float(np.exp(np.log(grid[i - 1]) + share * (np.log(grid[i]) - np.log(grid[i - 1]))))
