"""``frontier(fit or table, cost, budget)``: the inference-optimal configuration at each budget, with uncertainty."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from isoflop.core.errors import UserError
from isoflop.core.expressions import Array, parse
from isoflop.frontier.optimum import (
    BudgetSpace,
    CostModel,
    at_points,
    check_spent,
    make_space,
    numeric,
    optimum,
    refine,
    spend,
)
from isoflop.frontier.result import Choice, Frontier, FrontierPoint, Frontiers, Measured
from isoflop.laws.allocation import looks_rounded
from isoflop.laws.fitting import fit as fit_law
from isoflop.laws.inference import estimate_from_rows, parameter_rows
from isoflop.laws.result import Fit, GroupedFit
from isoflop.laws.table import Tabular, as_table, column, of_group, where

_RUNNERS_UP = 4
_FEWEST_REPEATS = 3  # degrees of freedom from which repeats tell the noise


def frontier(
    fit_or_table: Fit | GroupedFit | Tabular,
    cost: str = "2*N*(Q+V)",
    q: float | None = None,
    budget: float | Sequence[float] | None = None,
    sizes: Sequence[float] | None = None,
    tokens: Sequence[float] | None = None,
    limits: Mapping[str, tuple[float, float]] | None = None,
    held: Mapping[str, float] | None = None,
    constants: Mapping[str, float] | None = None,
    **fit_options: Any,
) -> Frontier | Frontiers:
    """The best configuration under each budget.

    Args:
        fit_or_table: a fit, a grouped fit (gives ``Frontiers``), or a table, fitted with ``fit_options`` first.
        cost: formula in the law's variables, ``Q`` and ``constants``; same units as the fit (with N in billions the budget is
            in billions of FLOPs too: map ``N=params_b*1e9`` to work in FLOPs).
        q: text tokens Q; by default the mean of the table's own column Q, in the rows of each group. Needed where the cost
            names Q and no row says it.
        budget: one or several; default: seven from the cheapest to the dearest row of the data.
        sizes, tokens: the menu for the discrete choice (first and second variable); default: the levels in the data.
        limits: allowed range per variable for the continuous optimum; default: the data's range for the searched variable.
        held: variables kept at a value.
        constants: values of other names in the cost.

    Raises:
        UserError: for a cost with Q where nothing says Q, a budget below the cheapest configuration, unknown names, or a fit that is rounded or unusable.
    """
    if isinstance(fit_or_table, (Fit, GroupedFit)):
        table, fitted = None, fit_or_table
    else:
        table = as_table(fit_or_table)
        fitted = fit_law(table, **fit_options)
        table = where(table, fit_options.get("where"))
    options: dict[str, Any] = {
        "cost": cost, "budget": budget, "sizes": sizes, "tokens": tokens,
        "limits": limits, "held": held, "constants": constants,
    }  # fmt: skip
    fits = list(fitted) if isinstance(fitted, GroupedFit) else [fitted]
    asks_q = "Q" in parse(cost, "cost").names and not any("Q" in f.form.variable_names for f in fits)
    texts = [q if q is not None or not asks_q else measured_q(table, f.key) for f in fits]
    found = [_frontier(f, q=tokens_, **options) for f, tokens_ in zip(fits, texts, strict=True)]
    return Frontiers(found) if isinstance(fitted, GroupedFit) else found[0]


def measured_q(table: pa.Table | None, key: Mapping[str, Any]) -> float | None:
    """Mean text tokens per answer in the rows of a group; None when no row says."""
    if table is None or "Q" not in table.column_names:
        return None
    values = column(table, "Q", "Q")[of_group(table, key)]
    values = values[np.isfinite(values)]
    return float(np.mean(values)) if len(values) else None


def _frontier(
    fit: Fit,
    cost: str,
    q: float | None,
    budget: float | Sequence[float] | None,
    sizes: Sequence[float] | None,
    tokens: Sequence[float] | None,
    limits: Mapping[str, tuple[float, float]] | None,
    held: Mapping[str, float] | None,
    constants: Mapping[str, float] | None,
) -> Frontier:
    model = CostModel.with_text(cost, fit.form.variable_names, q, constants)
    for name, values in zip(fit.form.variable_names, (sizes, tokens), strict=False):
        if values is not None and not (len(values) and all(0 < float(v) < math.inf for v in values)):
            raise UserError(f"menu of {name}: {list(values)!r}; allowed: positive numbers")
    if tokens is not None and limits is None and len(fit.form.variable_names) > 1:
        limits = {fit.form.variable_names[1]: (float(min(tokens)), float(max(tokens)))}
    space = make_space(fit, model, limits, held)
    menu = _menu(fit, space, sizes, tokens)
    prices = model(menu)
    budgets = _budgets(budget, prices)
    for v, (low, high) in (limits or {}).items():
        inside = (menu[v] >= low) & (menu[v] <= high) | (v in space.held)
        menu, prices = {name: a[inside] for name, a in menu.items()}, prices[inside]
    observed = _Observed.of(fit, menu)
    points = [_point(fit, model, space, menu, prices, observed, b) for b in budgets]
    return Frontier(fit.law, cost, dict(model.constants), points, dict(fit.key), fit.data_hash)


def _budgets(budget: float | Sequence[float] | None, prices: Array) -> list[float]:
    prices = prices[np.isfinite(prices) & (prices > 0)]
    if not len(prices):
        raise UserError("cost: no configuration at hand has a positive, finite cost")
    cheapest = float(np.min(prices))
    if budget is None:
        return [float(b) for b in np.geomspace(cheapest, float(np.max(prices)), 7)]
    asked = [float(b) for b in np.atleast_1d(np.asarray(budget, dtype=np.float64))]
    if not asked:
        raise UserError("budget = []: at least one budget is needed, or leave it out")
    for b in asked:
        if not math.isfinite(b) or b < cheapest * (1 - 1e-12):
            raise UserError(f"budget = {b:g} is below the cheapest configuration at hand, which costs {cheapest:.6g}")
    return asked


def _menu(
    fit: Fit, space: BudgetSpace, sizes: Sequence[float] | None, tokens: Sequence[float] | None
) -> dict[str, Array]:
    """All combinations of levels, one array (C,) per variable."""
    asked = dict(zip(fit.form.variable_names, (sizes, tokens), strict=False))
    levels = []
    for name in fit.form.variable_names:
        given = asked.get(name)
        if name in space.held:
            levels.append(np.array([space.held[name]]))
        elif given is not None:
            levels.append(np.asarray(list(given), dtype=np.float64))
        elif fit.data is not None:
            levels.append(np.unique(fit.data.x[name]))
        else:
            levels.append(np.asarray(fit.record["data"]["ranges"][name], dtype=np.float64))
    grid = np.meshgrid(*levels, indexing="ij")
    return {v: g.ravel() for v, g in zip(fit.form.variable_names, grid, strict=True)}


@np.errstate(all="ignore")
def _point(
    fit: Fit,
    cost: CostModel,
    space: BudgetSpace,
    menu: dict[str, Array],
    prices: Array,
    observed: _Observed | None,
    budget: float,
) -> FrontierPoint:
    p = parameter_rows(fit)
    spender, searched, by_formula = optimum(fit, cost, space, budget, p)
    check_spent(cost, space, budget, float(spender[0]))
    check, formula_holds = None, bool(by_formula[0])
    if space.searched is not None:
        guess = numeric(fit, cost, space, budget, p[:1])[1]
        found = np.array([refine(fit, cost, space, budget, float(guess[0]))])
        size = spend(cost, space, budget, found)
        if formula_holds:
            check = abs(float(searched[0] / found[0]) - 1)
            ours = at_points(fit, space, spender[:1], searched[:1], p[:1])[0]
            theirs = at_points(fit, space, size, found, p[:1])[0]
            formula_holds = bool(ours <= theirs * (1 + 1e-6))
        if not formula_holds:
            spender, searched = np.append(size, spender[1:]), np.append(found, searched[1:])
    error = at_points(fit, space, spender, searched, p)
    values = {space.spender: spender} | ({} if space.searched is None else {space.searched: searched})
    notes = _notes(fit, values, space, check if formula_holds else None)
    choices = _choices(fit, menu, prices, budget, p)
    if not choices:
        notes.append("no configuration at hand lies within limits and budget")
    ranges = fit.record["data"]["ranges"]
    return FrontierPoint(
        budget=budget,
        continuous={v: estimate_from_rows(fit, values[v]) for v in fit.form.variable_names if v in values},
        error=estimate_from_rows(fit, error),
        closed_form=formula_holds,
        check=check,
        discrete=choices,
        extrapolation={v: _decades(float(values[v][0]), *ranges[v]) for v in values},
        notes=notes,
        measured=observed.best(menu, prices, budget, choices[0].x if choices else {}) if observed else None,
    )


@dataclass(frozen=True)
class _Observed:
    """Rows of a fit by configuration of the menu: weighted means (C,), rows (C,), and one row's variance at weight 1."""

    mean: Array
    rows: np.ndarray
    weight: Array
    variance: float | None

    @classmethod
    def of(cls, fit: Fit, menu: dict[str, Array]) -> _Observed | None:
        """None where the fit has no rows at hand."""
        if fit.data is None:
            return None
        good = fit.data.w > 0
        spelled = [np.array([f"{v:.9g}" for v in a]) for a in (fit.data.x[v][good] for v in menu)]
        place = {key: i for i, key in enumerate(zip(*([f"{v:.9g}" for v in a] for a in menu.values()), strict=True))}
        at = np.array([place.get(key, -1) for key in zip(*spelled, strict=True)], dtype=np.int64)
        y, w, at = fit.data.y[good][at >= 0], fit.data.w[good][at >= 0], at[at >= 0]
        count = len(next(iter(menu.values())))
        rows = np.bincount(at, minlength=count)
        weight = np.asarray(np.bincount(at, w, count), dtype=np.float64)
        with np.errstate(all="ignore"):
            mean = np.bincount(at, w * y, count) / weight
        spare = int((rows[rows > 0] - 1).sum())
        variance = float(np.sum(w * (y - mean[at]) ** 2)) / spare if spare >= _FEWEST_REPEATS else None
        return cls(mean, rows, weight, variance)

    def best(self, menu: dict[str, Array], prices: Array, budget: float, choice: dict[str, float]) -> Measured | None:
        """The affordable configuration whose rows have the least mean, the cheaper one of equals."""
        able = np.flatnonzero((prices <= budget * (1 + 1e-12)) & (self.rows > 0))
        if not len(able):
            return None
        i = int(able[np.lexsort((prices[able], self.mean[able]))[0]])
        found = Measured(
            {v: float(a[i]) for v, a in menu.items()}, float(prices[i]), float(self.mean[i]), int(self.rows[i]), None
        )
        same = (
            np.logical_and.reduce([a == choice[v] for v, a in menu.items()]) if choice else np.zeros(len(prices), bool)
        )
        for k in np.flatnonzero(same & (self.rows > 0)):
            found.choice_error = float(self.mean[k])
            if self.variance is not None:
                found.noise = math.sqrt(self.variance * (1 / self.weight[i] + 1 / self.weight[k]))
        return found


def _choices(fit: Fit, menu: dict[str, Array], prices: Array, budget: float, p: Array) -> list[Choice]:
    affordable = np.flatnonzero(prices <= budget * (1 + 1e-12))
    if not len(affordable):
        return []
    x = {v: a[affordable] for v, a in menu.items()}
    y_RC = fit.form.evaluate(x, p)
    order = np.argsort(y_RC[0], kind="stable")[: 1 + _RUNNERS_UP]
    wins = np.bincount(np.argmin(y_RC[1:], axis=1), minlength=len(affordable)) / max(1, len(p) - 1)
    return [
        Choice(
            x={v: float(a[i]) for v, a in x.items()},
            cost=float(prices[affordable[i]]),
            error=estimate_from_rows(fit, y_RC[:, i]),
            probability=float(wins[i]) if len(p) > 1 else None,
        )
        for i in order
    ]


def _decades(value: float, low: float, high: float) -> float:
    if not (value > 0 and low > 0 and math.isfinite(value)):
        return math.inf
    return max(0.0, math.log10(value) - math.log10(high), math.log10(low) - math.log10(value))


def _notes(fit: Fit, values: dict[str, Array], space: BudgetSpace, check: float | None) -> list[str]:
    notes = []
    for v, a in values.items():
        low, high = fit.record["data"]["ranges"][v]
        far = _decades(float(a[0]), low, high)
        if far > 0.01:
            notes.append(
                f"{v} = {a[0]:.4g} lies {far:.2g} decades outside the data ({low:g} … {high:g}): an extrapolation"
            )
    for v, a in values.items():
        low, high = space.limits[v]
        if a[0] <= low * (1 + 1e-9) or a[0] >= high * (1 - 1e-9):
            notes.append(f"{v} = {a[0]:.4g} is the end of its allowed range")
    if check is not None and check > 1e-3:
        notes.append(f"closed form and numeric search differ by {check:.2g}: the optimum is flat")
    shape = [float(fit.p[i]) for i in fit.form.nonlinear if fit.box.free[i] and fit.p[i] != 0]
    if shape and looks_rounded(*shape):
        notes.append(
            f"parameters {', '.join(f'{v:g}' for v in shape)} look rounded: the optimum depends on their digits"
        )
    if fit.status not in ("converged", "parameter at bound"):
        notes.append(f"the fit ended with: {fit.status}")
    return notes
