"""The numerical heart of a fit: scale the data, search globally by variable projection, polish all starts together.

Sizes are divided by their geometric means first, so that the answer does not depend on units, amplitudes are of the size of
y, and exponents and amplitudes decorrelate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from isoflop.core.errors import UserError
from isoflop.core.expressions import Array
from isoflop.laws.base import Bounds, LawForm
from isoflop.laws.objective import Objective
from isoflop.laws.solver import CONVERGED, ITERATION_LIMIT, STATUS_NAMES, Batch, Index, Solution, solve
from isoflop.laws.table import GroupData
from isoflop.laws.varpro import candidates, rank, spread_best

AT_BOUND = "parameter at bound"
_LONG = 3000


class NotEstimable(UserError):
    """The data cannot estimate a parameter at all: too few points, or one level on an axis."""

    def __init__(self, message: str, parameter: str) -> None:
        super().__init__(message)
        self.parameter = parameter


@dataclass(frozen=True)
class Box:
    """Bounds (P,) in natural units and which parameters are held at a value (low = high)."""

    low: Array
    high: Array

    @property
    def free(self) -> np.ndarray:
        """Boolean (P,): not held."""
        return self.low < self.high


@dataclass
class Optimum:
    """The best of all starts for one group.

    Attributes:
        p: natural parameters (P,); p_scaled: the same for scaled sizes.
        loss: ``Objective.loss``; status: in words; at_bound: names of parameters on a bound.
        starts, at_best: number of polished starts and how many reached the best loss to 1e-6 relative.
        minima: other distinct minima within 5 % of the best loss: (loss, natural parameters).
        spare: scaled parameters of promising cells, for resamples to start from.
    """

    p: Array
    p_scaled: Array
    loss: float
    status: str
    at_bound: list[str]
    starts: int
    at_best: int
    minima: list[tuple[float, Array]]
    spare: Array
    iterations: int
    scales: dict[str, float] = field(default_factory=dict)


def make_box(form: LawForm, bounds: Mapping[str, Bounds] | None, fixed: Mapping[str, float] | None) -> Box:
    """The form's bounds with the user's on top. Raises UserError for unknown names and empty ranges."""
    low = np.array([p.low for p in form.parameters], dtype=np.float64)
    high = np.array([p.high for p in form.parameters], dtype=np.float64)
    for name, (first, last) in (bounds or {}).items():
        i = form.position(name)
        if not first <= last:
            raise UserError(f"bounds of {name}: {first:g} … {last:g} is empty; allowed: low <= high")
        low[i], high[i] = first, last
    for name, value in (fixed or {}).items():
        low[form.position(name)] = high[form.position(name)] = float(value)
    return Box(low, high)


def may_rescale(form: LawForm, box: Box) -> bool:
    """Scaling sizes is only allowed while the bounds of unit-dependent parameters are signs (0 or infinity)."""
    for name in form.natural:
        i = form.position(name)
        default = (box.low[i], box.high[i]) == (form.parameters[i].low, form.parameters[i].high)
        if not default and not all(b == 0 or not np.isfinite(b) for b in (box.low[i], box.high[i])):
            return False
    return True


def scale_group(form: LawForm, data: GroupData, box: Box) -> None:
    """Set ``data.scales`` to the weighted geometric means of the sizes (1 where the form does not allow it)."""
    rescale = may_rescale(form, box)
    for variable in form.variables:
        if rescale and variable.rescale and variable.positive:
            data.scales[variable.name] = float(np.exp(np.mean(np.log(data.x[variable.name]))))
        else:
            data.scales[variable.name] = 1.0


def check_estimable(form: LawForm, data: GroupData, box: Box) -> None:
    """Raise NotEstimable when no fit can be meaningful; the message names a parameter."""
    used = data.w > 0
    free = int(box.free.sum())
    if not used.any():
        raise NotEstimable(f"law {form.name!r}: no finite rows to fit", form.names[0])
    for variable in form.variables:
        values = np.unique(data.x[variable.name][used])
        if len(values) > 1:
            continue
        tree = form.expression
        touched = [
            i
            for i in range(len(form.names))
            if box.free[i] and variable.name in tree.graph.names(tree.graph.diff(tree.root, form.names[i]))
        ]
        own = [i for i in touched if _belongs(form, i, variable.name)]
        if own:
            name = form.names[own[-1]]
            raise NotEstimable(
                f"law {form.name!r}: {name} cannot be estimated: {variable.name} has one distinct value ({values[0]:g}); "
                f"give at least two, or fix {name}",
                name,
            )
    points = np.unique(np.stack([data.x[v][used] for v in form.variable_names], axis=1), axis=0)
    if used.sum() <= free or len(points) < free:
        names = [form.names[i] for i in range(len(form.names)) if box.free[i]]
        count = f"{used.sum()} points" if used.sum() <= free else f"{len(points)} distinct points"
        raise NotEstimable(
            f"law {form.name!r}: {names[0]} cannot be estimated: {count} for {free} free parameters "
            f"({', '.join(names)}); give at least {free + 1}, or fix some",
            names[0],
        )


def _belongs(form: LawForm, i: int, variable: str) -> bool:
    """Parameter i acts through this variable: its derivative holds the variable in a way that parameters' values cannot undo.

    A power's exponent brings a logarithm of its own size into its derivative; a semilog slope is that logarithm.
    """
    tree = form.expression
    graph = tree.graph
    log = graph.unary("log", graph.name(variable))
    slope = graph.diff(tree.root, form.names[i])
    factors, stack = set[int](), [slope]
    while stack:
        node = stack.pop()
        kind, *args = graph.nodes[node]
        if kind in ("mul", "neg"):
            stack.extend(args)
        else:
            factors.add(node)
    return log in factors or (form.parameters[i].linear and graph.name(variable) in factors)


def fit_groups(
    form: LawForm, groups: Sequence[GroupData], box: Box, objective: Objective, starts: int | None = None, seed: int = 0
) -> list[Optimum]:
    """Fit every group globally; all starts of all groups are one batch."""
    points, first, owner = [], [], []
    for g, data in enumerate(groups):
        scale_group(form, data, box)
        theta, cube = candidates(form, box.low, box.high, form.search_points, seed)
        x = scaled(data)
        w = data.w / data.y**2 if objective.log else data.w
        score, p = rank(form, x, data.y, w, theta, box.low, box.high)
        cells = spread_best(score, cube, (starts or form.starts) + 4)
        if not cells:
            raise NotEstimable(
                f"law {form.name!r}: no finite prediction in the search range; check units and bounds", form.names[0]
            )
        points.append(p[cells])
        first.append(p[cells[: starts or form.starts]])
        owner.append(np.full(len(first[-1]), g, dtype=np.int64))
    batch = make_batch(form, groups, np.concatenate(owner))
    solution = solve(batch, np.concatenate(first), box.low, box.high, objective)
    _continue(batch, solution, box, objective)
    solution.p = form.canonical(solution.p)
    return [_best(form, data, box, solution, np.flatnonzero(batch.g == g), points[g]) for g, data in enumerate(groups)]


def _continue(batch: Batch, solution: Solution, box: Box, objective: Objective) -> None:
    """Curved valleys take many steps: go on with each group's few best starts that ran out of iterations."""
    for g in np.unique(batch.g):
        mine = np.flatnonzero(batch.g == g)
        best = mine[np.argsort(solution.loss[mine], kind="stable")[:4]]
        rows = best[solution.status[best] == ITERATION_LIMIT]
        if not len(rows):
            continue
        again = solve(batch.take(rows), solution.p[rows], box.low, box.high, objective, max_iter=_LONG)
        solution.p[rows], solution.loss[rows], solution.status[rows] = again.p, again.loss, again.status
        solution.iterations[rows] += again.iterations


def scaled(data: GroupData) -> dict[str, Array]:
    """Variables divided by their scales."""
    return {v: a / data.scales[v] for v, a in data.x.items()}


def make_batch(form: LawForm, groups: Sequence[GroupData], owner: Index) -> Batch:
    """Pad the groups to one rectangle (weight 0, first row repeated) and point each problem at its group."""
    n = max(d.n for d in groups)
    padded = [np.concatenate([np.arange(d.n), np.zeros(n - d.n, dtype=np.int64)]) for d in groups]
    x = {v: np.stack([scaled(d)[v][i] for d, i in zip(groups, padded, strict=True)]) for v in form.variable_names}
    y = np.stack([d.y[i] for d, i in zip(groups, padded, strict=True)])
    w = np.stack([np.concatenate([d.w, np.zeros(n - d.n)]) for d in groups])
    return Batch(form, x, y, w, owner, owner, owner)


def _best(form: LawForm, data: GroupData, box: Box, solution: Solution, mine: Index, spare: Array) -> Optimum:
    loss, p = solution.loss[mine], solution.p[mine]
    order = np.argsort(loss, kind="stable")
    top = int(order[0])
    if not np.isfinite(loss[top]):
        raise NotEstimable(
            f"law {form.name!r}: no start gave a finite objective; check units and bounds", form.names[0]
        )
    floor = 1e-24 * float(np.sum(data.w * data.y**2)) + 1e-300
    natural = form.to_natural(p, data.scales)
    near = loss <= loss[top] * (1 + 1e-6) + floor
    minima: list[tuple[float, Array]] = []
    for i in order[1:]:
        if loss[i] > loss[top] * 1.05 + floor:
            break
        known = [p[top], *(q for _, q in minima)]
        if all(np.max(np.abs(p[i] - q) / (np.abs(q) + 1e-3)) > 0.02 for q in known):
            minima.append((float(loss[i]), p[i]))
    at_bound = bound_names(form, box, p[top])
    code = int(solution.status[mine][top])
    status = AT_BOUND if code == CONVERGED and at_bound else STATUS_NAMES[code]
    scale = {v: np.float64(s) for v, s in data.scales.items()}
    return Optimum(
        p=natural[top],
        p_scaled=p[top],
        loss=float(loss[top]),
        status=status,
        at_bound=at_bound,
        starts=len(mine),
        at_best=int(near.sum()),
        minima=[(value, form.to_natural(q[None], scale)[0]) for value, q in minima],
        spare=spare,
        iterations=int(solution.iterations[mine].sum()),
        scales=dict(data.scales),
    )


def bound_names(form: LawForm, box: Box, p: Array) -> list[str]:
    """Free parameters that lie on a bound."""
    edge = on_bound(box, p)
    return [n for i, n in enumerate(form.names) if box.free[i] and edge[i]]


def on_bound(box: Box, p: Array) -> np.ndarray:
    """Boolean, shape of p (…, P): equal to a finite bound to rounding."""
    low, high = np.nan_to_num(box.low, neginf=-1e308), np.nan_to_num(box.high, posinf=1e308)
    at_low = np.isfinite(box.low) & (p <= low + 1e-12 * (1 + np.abs(low)))
    at_high = np.isfinite(box.high) & (p >= high - 1e-12 * (1 + np.abs(high)))
    return np.asarray(at_low | at_high)
