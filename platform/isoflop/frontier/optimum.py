"""The best configuration that a law supports at a budget: continuous, discrete, closed form where there is one.

The cost is a formula in the law's own variables (so both see the same units) and in named constants such as Q. With the
cost spent in full one variable follows from the others; the rest is a one-dimensional search over the other variable, done
for the estimate and for every bootstrap sample of the law's parameters at once.

Shapes: R bootstrap samples, K points on an iso-cost curve, C configurations.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import brentq, minimize_scalar

from isoflop.core.errors import UserError, unknown
from isoflop.core.expressions import Array, Expression, parse
from isoflop.laws.result import Fit

_CURVE = 512
_SMALLEST, _LARGEST = 1e-12, 1e30  # of the spender, unless limits say otherwise


@dataclass(frozen=True)
class CostModel:
    """A cost formula with its constants.

    Attributes:
        expression: in the law's variables and the constants.
        constants: e.g. ``{"Q": 50}``.
    """

    expression: Expression
    constants: dict[str, float]

    @classmethod
    def build(cls, text: str, variables: Sequence[str], constants: Mapping[str, float]) -> CostModel:
        """Parse and check: every name is a variable of the law or a constant, and at least one is a variable."""
        parsed = parse(text, "cost")
        for name in sorted(parsed.names - set(variables)):
            if name not in constants:
                raise unknown("name in cost", name, [*variables, *constants])
        if not parsed.names & set(variables):
            raise UserError(f"cost: {text!r} contains no variable of the law; allowed: {', '.join(variables)}")
        return cls(parsed, {k: float(v) for k, v in constants.items() if k in parsed.names})

    @classmethod
    def with_text(
        cls, text: str, variables: Sequence[str], q: float | None, constants: Mapping[str, float] | None = None
    ) -> CostModel:
        """:meth:`build` with the text tokens Q among the constants, unless the law has a variable of that name.

        Raises:
            UserError: for a cost in Q when nobody says what it is. Nothing would be the wrong guess: with no text at all, one
                image token costs twice the answer, and V* is 1.
        """
        if q is not None and not (q >= 0 and math.isfinite(q)):
            raise UserError(f"q = {q:g}; allowed: a number of text tokens, 0 or more")
        known = {**({} if q is None or "Q" in variables else {"Q": q}), **(constants or {})}
        if "Q" not in known and "Q" in parse(text, "cost").names - set(variables):
            raise UserError(
                f"cost {text!r} needs Q, the text tokens per answer, and no row says it: give --q "
                "(0 only where nothing but the image is read)"
            )
        return cls.build(text, variables, known)

    def __call__(self, values: Mapping[str, Array | float]) -> Array:
        """Cost of configurations (arrays broadcast)."""
        return self.expression({**values, **self.constants})


@dataclass(frozen=True)
class BudgetSpace:
    """What may be chosen: the variable that takes up the budget, the one that is searched, and limits.

    Attributes:
        spender: the variable solved from the cost (the model's size).
        searched: the other free variable, or None.
        limits: allowed range per free variable.
        held: variables at a fixed value.
    """

    spender: str
    searched: str | None
    limits: dict[str, tuple[float, float]]
    held: dict[str, float]


def make_space(
    fit: Fit, cost: CostModel, limits: Mapping[str, tuple[float, float]] | None, held: Mapping[str, float] | None
) -> BudgetSpace:
    """Free variables of the problem. The searched variable's limits default to the range of its data."""
    names, held = fit.form.variable_names, {k: float(v) for k, v in (held or {}).items()}
    for given in [*(limits or {}), *held]:
        if given not in names:
            raise unknown(f"variable of law {fit.law!r}", given, names)
    free = [v for v in names if v not in held]
    spender = next((v for v in free if v in cost.expression.names), None)
    if spender is None:
        raise UserError(f"cost: {cost.expression.text!r} contains no free variable; free: {', '.join(free) or 'none'}")
    others = [v for v in free if v != spender]
    if len(others) > 1:
        raise UserError(
            f"frontier: variables {', '.join(others)} are free beside {spender}; hold all but one of them (held=…)"
        )
    ranges = fit.record["data"]["ranges"]
    chosen = {}
    for v in free:
        low, high = (limits or {}).get(v, (_SMALLEST, _LARGEST) if v == spender else tuple(ranges[v]))
        if not 0 < low <= high:
            raise UserError(f"limits of {v}: {low:g} … {high:g}; allowed: 0 < low <= high")
        chosen[v] = (float(low), float(high))
    return BudgetSpace(spender, others[0] if others else None, chosen, held)


def spend(cost: CostModel, space: BudgetSpace, budget: float, other_K: Array) -> Array:
    """The spender's value at which the cost equals the budget, for each value of the searched variable; nan when none."""
    low, high = space.limits[space.spender]
    values: dict[str, Array | float] = dict(space.held)
    if space.searched is not None:
        values[space.searched] = other_K

    def at(z: Array) -> Array:
        return np.broadcast_to(cost({**values, space.spender: np.exp(z)}), other_K.shape)

    a, b = np.full(other_K.shape, math.log(low)), np.full(other_K.shape, math.log(high))
    below, above = at(a), at(b)
    slope = np.log(above / below) / (b - a) if high > low else np.full(other_K.shape, 1.0)
    linear = np.abs(slope - 1) < 1e-9  # cost proportional to the size, the usual case: solved exactly
    z = np.where(linear, np.log(budget / below) + a, np.nan)
    if not linear.all():
        line = _on_line(below, above, low, high, budget)  # a fixed part and one that grows with the size
        solved = np.abs(at(line) / budget - 1) < 1e-9
        z = np.where(linear | ~solved, z, line)
        solved |= linear
        if not solved.all():
            for _ in range(80):
                middle = 0.5 * (a + b)
                less = at(middle) < budget
                a, b = np.where(less, middle, a), np.where(less, b, middle)
            z = np.where(solved, z, 0.5 * (a + b))
    possible = (below <= budget) & (budget <= above)
    return np.where(possible, np.exp(z), np.where(budget > above, high, np.nan))


def _on_line(below: Array, above: Array, low: float, high: float, budget: float) -> Array:
    """Where a straight line through the costs at both limits meets the budget, as a logarithm; low's where it does not."""
    slope = (above - below) / (high - low) if high > low else np.ones_like(below)
    size = (budget - (below - slope * low)) / slope
    return np.log(np.where(np.isfinite(size) & (size > 0), size, low))


def optimum(
    fit: Fit, cost: CostModel, space: BudgetSpace, budget: float, p_RP: Array
) -> tuple[Array, Array, np.ndarray]:
    """(spender, searched, by_formula) (R,): the closed form wherever it holds, the numeric search elsewhere.

    The formulas know no limits of the spender: a row whose spender would leave them is searched.
    """
    formula = closed_form(fit, cost, space, budget, p_RP)
    low, high = space.limits[space.spender]
    nowhere = np.zeros(len(p_RP), dtype=bool)
    holds = nowhere if formula is None else (formula[0] > low * (1 + 1e-9)) & (formula[0] < high * (1 - 1e-9))
    if formula is not None and holds.all():
        return *formula, holds
    search = numeric(fit, cost, space, budget, p_RP)
    if formula is None:
        return *search, holds
    return np.where(holds, formula[0], search[0]), np.where(holds, formula[1], search[1]), holds


def check_spent(cost: CostModel, space: BudgetSpace, budget: float, spender: float) -> None:
    """Refuse an optimum that does not exist: nothing allowed is affordable, or the cost never uses the budget up."""
    low, high = space.limits[space.spender]
    if not math.isfinite(spender):
        raise UserError(
            f"budget = {budget:g}: no configuration within the limits ({space.spender}: {low:g} … {high:g}) is affordable"
        )
    if (low, high) == (_SMALLEST, _LARGEST) and spender >= high:
        raise UserError(
            f"budget = {budget:g}: cost {cost.expression.text!r} does not use it up at any {space.spender} below {high:g}; "
            "the cost must grow with it; check cost, budget and units, or give limits"
        )


def closed_form(
    fit: Fit, cost: CostModel, space: BudgetSpace, budget: float, p_RP: Array
) -> tuple[Array, Array] | None:
    """(spender, searched) (R,) by formula, when law and cost allow it; None otherwise.

    * product law and cost k N (Q + V): V* = beta Q/(alpha - beta) if alpha > beta, else the largest V.
    * chinchilla law and cost k N D: N* = G (C/k)^(beta/(alpha+beta)), G = (alpha A/(beta B))^(1/(alpha+beta)).
    """
    form = fit.form
    if space.held or space.searched is None:
        return None
    low, high = space.limits[space.searched]
    if form.name == "product":
        q = cost.constants.get("Q", 0.0)
        if _proportional(cost, lambda n, v: n * (q + v), form.variable_names) is None:
            return None
        alpha, beta = p_RP[:, form.position("alpha")], p_RP[:, form.position("beta")]
        with np.errstate(all="ignore"):
            v = np.where(alpha > beta, beta * q / (alpha - beta), high)
        v = np.clip(v, low, high)
        return spend(cost, space, budget, v), v
    if form.name == "chinchilla":
        k = _proportional(cost, lambda n, d: n * d, form.variable_names)
        if k is None:
            return None
        alpha, beta, a, b = (p_RP[:, form.position(n)] for n in ("alpha", "beta", "A", "B"))
        with np.errstate(all="ignore"):
            g = (alpha * a / (beta * b)) ** (1 / (alpha + beta))
            d = (budget / k) ** (alpha / (alpha + beta)) / g
        d = np.clip(d, low, high)
        return spend(cost, space, budget, d), d
    return None


def _proportional(cost: CostModel, shape: object, names: tuple[str, ...]) -> float | None:
    """The factor between a cost and a two-variable shape, or None when they are not proportional."""
    rng = np.random.default_rng(0)
    x, y = np.exp(rng.uniform(-3, 9, 16)), np.exp(rng.uniform(-3, 9, 16))
    ratio = np.broadcast_to(cost({names[0]: x, names[1]: y}), x.shape) / shape(x, y)  # type: ignore[operator]
    return float(ratio[0]) if np.allclose(ratio, ratio[0], rtol=1e-10) else None


def numeric(fit: Fit, cost: CostModel, space: BudgetSpace, budget: float, p_RP: Array) -> tuple[Array, Array]:
    """(spender, searched) (R,) by search along the iso-cost curve: a grid, then a parabola through the best three points."""
    if space.searched is None:
        n = spend(cost, space, budget, np.zeros(1))
        return np.broadcast_to(n, (len(p_RP),)), np.full(len(p_RP), np.nan)
    low, high = space.limits[space.searched]
    z_K = np.linspace(math.log(low), math.log(high), _CURVE)
    n_K = spend(cost, space, budget, np.exp(z_K))
    x = {space.spender: n_K, space.searched: np.exp(z_K), **{h: np.full(_CURVE, v) for h, v in space.held.items()}}
    y_RK = np.nan_to_num(fit.form.evaluate(x, p_RP), nan=np.inf)
    best = np.argmin(y_RK, axis=1)
    inner = np.clip(best, 1, _CURVE - 2)
    rows = np.arange(len(p_RP))
    left, mid, right = (y_RK[rows, inner + k] for k in (-1, 0, 1))
    with np.errstate(all="ignore"):
        shift = 0.5 * (left - right) / (left - 2 * mid + right)
    ok = (best == inner) & np.isfinite(shift) & (np.abs(shift) <= 1)
    z = z_K[best] + np.where(ok, shift, 0.0) * (z_K[1] - z_K[0])
    return spend(cost, space, budget, np.exp(z)), np.exp(z)


def refine(fit: Fit, cost: CostModel, space: BudgetSpace, budget: float, searched: float) -> float:
    """The searched variable's optimum to full precision near a first guess (one parameter vector)."""
    assert space.searched is not None
    low, high = (math.log(v) for v in space.limits[space.searched])

    def error(z: float) -> float:
        n = spend(cost, space, budget, np.array([math.exp(z)]))
        x = {
            space.spender: n,
            str(space.searched): np.array([math.exp(z)]),
            **{h: np.array([v]) for h, v in space.held.items()},
        }
        value = float(fit.form.evaluate(x, fit.p)[0])
        return value if math.isfinite(value) else math.inf

    centre, half = math.log(searched), (high - low) * 4 / _CURVE
    a, b = max(low, centre - half), min(high, centre + half)
    if b <= a:
        return searched
    found = minimize_scalar(error, bounds=(a, b), method="bounded", options={"xatol": 1e-12})
    z = _stationary(error, a, b, float(found.x))
    edge = min((low, high), key=error)
    return math.exp(edge if error(edge) <= error(z) else z)


def _stationary(error: object, a: float, b: float, guess: float) -> float:
    """A zero of the numerical slope around a minimum; more digits than a comparison of values can give."""

    def slope(z: float) -> float:
        h = 1e-4
        return float(error(z - 2 * h) - 8 * error(z - h) + 8 * error(z + h) - error(z + 2 * h)) / (12 * h)  # type: ignore[operator]

    lo, hi = max(a, guess - 0.02), min(b, guess + 0.02)
    if not math.isfinite(slope(lo)) or not math.isfinite(slope(hi)) or slope(lo) * slope(hi) >= 0:
        return guess
    return float(brentq(slope, lo, hi, xtol=1e-12))


def at_points(fit: Fit, space: BudgetSpace, spender_R: Array, searched_R: Array, p_RP: Array) -> Array:
    """The law at one point per parameter row, (R,)."""
    x = {space.spender: spender_R[:, None], **{h: np.full((len(p_RP), 1), v) for h, v in space.held.items()}}
    if space.searched is not None:
        x[space.searched] = searched_R[:, None]
    values: dict[str, Array] = {**x, **{n: p_RP[:, i, None] for i, n in enumerate(fit.form.names)}}
    return np.asarray(np.broadcast_to(fit.form.expression(values), (len(p_RP), 1))[:, 0])
