"""Simulated scaling studies with a known truth: laws, heteroscedastic noise, a grid of candidate runs and their costs.

Noise is what an evaluation on a finite test set of a network trained from one seed has: binomial scatter of 10,000 examples,
plus seed scatter that falls with size as N^-0.2 (.004 at the middle size). For losses: log-noise that grows with the loss,
.004 at the floor to .02 far above it. Samplers see neither; they see one value per run.

Shapes: M candidate runs, K axes, T quantities.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from isoflop.core.errors import UserError
from isoflop.core.expressions import Array, parse
from isoflop.laws.table import Tabular, as_table, column
from isoflop.search.law import BestMethod, Frontier, OptimalAllocation, PredictionAt, Target
from isoflop.search.law.contenders import LawChoice

SIZES = 1e7 * 2.0 ** np.arange(8)
TOKENS = 2.0 ** np.arange(10)
CENTRE = float(np.sqrt(SIZES[0] * SIZES[-1]))
Truth = Callable[[Array, np.ndarray], Array]


@dataclass(frozen=True)
class Measured:
    """Outcomes of a sweep that has run: places (M, K), repeats of each, mean measured costs (M,)."""

    x: Array
    outcomes: tuple[tuple[float, ...], ...]
    cost: Array


@dataclass(frozen=True)
class World:
    """A study that can be run as often as one likes.

    Attributes:
        axes: names; levels: values per axis; groups: methods.
        truth: expected value at (places (M, K), groups (M,)).
        cost: of a run, an expression of the axes; loss: noise of losses instead of error rates.
        laws: contenders that every strategy's rows are judged with; target: the question.
        limit: candidates must not exceed this cost.
        measured: outcomes of a real sweep, from which runs are drawn instead of being simulated.
    """

    name: str
    axes: tuple[str, ...]
    levels: tuple[tuple[float, ...], ...]
    truth: Truth
    cost: str
    laws: tuple[LawChoice, ...]
    target: Target
    groups: tuple[str, ...] = ("all",)
    loss: bool = False
    limit: float = float("inf")
    share: tuple[str, ...] = ()
    measured: Measured | None = None

    def sd(self, x_MK: Array, group_M: np.ndarray) -> Array:
        """Standard deviation of one run's value."""
        y = self.truth(x_MK, group_M)
        if self.loss:
            return y * np.exp(np.interp(y, [1.8, 4.5], np.log([0.004, 0.02])))
        seeds = 0.004 * (x_MK[:, 0] / CENTRE) ** -0.2
        return np.sqrt(np.clip(y * (1 - y), 0.01, 1) / 10_000 + seeds**2)


def product_truth(x: Array, group: np.ndarray) -> Array:
    """E + A N^-alpha V^-beta; V*(Q=50) = 33.3 at every budget."""
    return np.asarray(0.08 + 0.6 * (x[:, 0] / 1e7) ** -0.25 * x[:, 1] ** -0.1)


def additive_truth(x: Array, group: np.ndarray) -> Array:
    """A loss E + A N^-alpha + B D^-beta."""
    return np.asarray(1.69 + 406.4 * x[:, 0] ** -0.34 + 410.7 * x[:, 1] ** -0.28)


def additive_error(x: Array, group: np.ndarray) -> Array:
    """An error rate that is additive in N and V."""
    return np.asarray(0.08 + 0.3 * (x[:, 0] / 1e7) ** -0.35 + 0.25 * x[:, 1] ** -0.3)


def broken_truth(x: Array, group: np.ndarray) -> Array:
    """A power law in N whose exponent doubles past 1e8 (one smooth break)."""
    z = x[:, 0] / 1e8
    return np.asarray(0.05 + 0.4 * z**-0.15 * (1 + z ** (1 / 0.3)) ** (-0.2 * 0.3) * x[:, 1] ** -0.08)


def saturating_truth(x: Array, group: np.ndarray) -> Array:
    """Tokens stop helping beyond a few dozen."""
    return np.asarray(0.08 + 0.5 * (x[:, 0] / 1e7) ** -0.25 * (0.6 + 0.4 / (1 + (x[:, 1] / 12) ** 1.5)))


_METHODS = ((0.640, 0.29, 0.100), (0.600, 0.25, 0.105), (0.620, 0.25, 0.085), (0.550, 0.21, 0.090))


def four_methods(x: Array, group: np.ndarray) -> Array:
    """Product laws with a common floor; the best at the target's budget is among the worst of small models."""
    a, alpha, beta = (np.array(c)[group] for c in zip(*_METHODS, strict=True))
    return np.asarray(0.08 + a * (x[:, 0] / 1e7) ** -alpha * x[:, 1] ** -beta)


_Q50 = "2*N*(50+V)"
_GRID = (tuple(SIZES), tuple(TOKENS))
_BUDGET = 2.0 * CENTRE * 90
_ADDITIVE: LawChoice = ("chinchilla", {"D": "V"})


def _world(name: str, truth: Truth, laws: tuple[LawChoice, ...], target: Target, **rest: Any) -> World:
    return World(name, ("N", "V"), _GRID, truth, _Q50, laws, target, **rest)


def _frontier() -> Frontier:
    return Frontier(low=2 * SIZES[0] * 300, high=2 * SIZES[-1] * 80, points=8)


def worlds() -> dict[str, World]:
    """All cases by name."""
    tokens = tuple(2e8 * 2.0 ** np.arange(10))
    losses = Frontier(low=6 * SIZES[1] * 4e8, high=6 * SIZES[-2] * 2.5e10, points=8, cost="6*N*D", constants={})
    far = {"N": 8 * SIZES[-1], "V": 64.0}
    both: tuple[LawChoice, ...] = ("product", _ADDITIVE)
    few = tuple(4.0 ** np.arange(5))
    limit = 2 * SIZES[4] * 114
    out = [
        _world("product-allocation", product_truth, ("product",), OptimalAllocation(budget=_BUDGET)),
        _world("product-frontier", product_truth, both, _frontier()),
        World(
            "additive-frontier",
            ("N", "D"),
            (tuple(SIZES), tokens),
            additive_truth,
            "6*N*D",
            ("chinchilla", ("product", {"V": "D"})),
            losses,
            loss=True,
        ),
        _world("extrapolation", product_truth, both, PredictionAt(at=far)),
        World(
            "best-of-four",
            ("N", "V"),
            (tuple(SIZES), few),
            four_methods,
            _Q50,
            ("product",),
            BestMethod(budget=limit),
            groups=("m0", "m1", "m2", "m3"),
            limit=limit * 1.0001,
            share=("E",),
        ),
        _world("wrong-broken", broken_truth, ("product",), _frontier()),
        _world("wrong-saturating", saturating_truth, ("product",), _frontier()),
        _world("wrong-additive", additive_error, ("product",), _frontier()),
    ]
    return {w.name: w for w in out}


class Lab:
    """Runs of one world under one seed: the k-th repeat of a candidate has the same outcome for every strategy.

    Attributes:
        x, group, cost: candidates (M, K), (M,), (M,); params: as Optuna parameters (indices per axis, and the method).
    """

    def __init__(self, world: World, seed: int) -> None:
        self.world, self.seed = world, seed
        if world.measured is not None:
            self._from_measured(world, world.measured)
            return
        mesh = np.meshgrid(np.arange(len(world.groups)), *(np.arange(len(v)) for v in world.levels), indexing="ij")
        index = np.stack([m.ravel() for m in mesh], axis=1)
        x = np.stack([np.array(v)[index[:, k + 1]] for k, v in enumerate(world.levels)], axis=1)
        cost = np.asarray(parse(world.cost, "cost")(dict(zip(world.axes, x.T, strict=True))))
        keep = cost <= world.limit
        self.x, self.group, self.cost = x[keep], index[keep, 0], cost[keep]
        self.params = [self._params(row) for row in index[keep]]
        self._place = {tuple(p.values()): i for i, p in enumerate(self.params)}
        self._mean, self._sd = world.truth(self.x, self.group), world.sd(self.x, self.group)
        self._repeats = np.zeros(len(self.x), dtype=np.int64)

    def _from_measured(self, world: World, measured: Measured) -> None:
        self.x, self.cost = measured.x, measured.cost
        self.group = np.zeros(len(self.x), dtype=np.int64)
        index = [[levels.index(v) for v, levels in zip(row, world.levels, strict=True)] for row in self.x.tolist()]
        self.params = [self._params(np.array([0, *row])) for row in index]
        self._place = {tuple(p.values()): i for i, p in enumerate(self.params)}
        self._repeats = np.zeros(len(self.x), dtype=np.int64)

    def _params(self, row: np.ndarray) -> dict[str, Any]:
        out: dict[str, Any] = {f"i{a}": int(i) for a, i in zip(self.world.axes, row[1:], strict=True)}
        return {"method": self.world.groups[row[0]], **out} if len(self.world.groups) > 1 else out

    def __len__(self) -> int:
        return len(self.x)

    @property
    def total(self) -> float:
        """Cost of every candidate once."""
        return float(self.cost.sum())

    def index(self, params: dict[str, Any]) -> int | None:
        """The candidate with these parameters."""
        first = self.params[0]
        return self._place.get(tuple(params[n] for n in first))

    def left(self, i: int) -> bool:
        """Whether candidate i can be run once more: a real sweep has only the repeats that were made."""
        return self.world.measured is None or self._repeats[i] < len(self.world.measured.outcomes[i])

    def run(self, i: int) -> float:
        """One more outcome of candidate i."""
        k = int(self._repeats[i])
        self._repeats[i] += 1
        if self.world.measured is not None:
            outcomes = self.world.measured.outcomes[i]
            return outcomes[int(np.random.default_rng([self.seed, i]).permutation(len(outcomes))[k])]
        rng = np.random.default_rng([self.seed, i, k])
        return float(self._mean[i] + self._sd[i] * rng.standard_normal())


def truth_of(world: World, bound: Any) -> Array:
    """The target's true quantities (T,)."""
    return np.asarray(bound.values(_Truth(world.truth), np.zeros((1, 1)))[0])


class _Truth:
    """A world's truth, as a hypothesis without parameters."""

    def __init__(self, truth: Truth) -> None:
        self._truth = truth

    def predict(self, u_RP: Array, x_MK: Array, group_M: np.ndarray) -> Array:
        return self._truth(x_MK, np.asarray(group_M))[None]


def measured_worlds(table: Tabular, q: float = 50.0) -> dict[str, World]:
    """Allocation and frontier of a reference sweep: columns N, V, error, and flops where costs were measured.

    Raises:
        UserError: for a missing column, or fewer than 8 cells.
    """
    source = as_table(table)
    n, v, y = (column(source, c, "reference") for c in ("N", "V", "error"))
    cost = column(source, "flops", "reference") if "flops" in source.column_names else 2 * n * (q + v)
    good = np.isfinite(n) & np.isfinite(v) & np.isfinite(y) & np.isfinite(cost) & (cost > 0)
    x, label = np.unique(np.stack([n, v], axis=1)[good], axis=0, return_inverse=True)
    label = label.ravel()
    if len(x) < 8:
        raise UserError(f"reference: {len(x)} cells; at least 8 are needed")
    outcomes = tuple(tuple(y[good][label == i].tolist()) for i in range(len(x)))
    mean = np.bincount(label, cost[good]) / np.bincount(label)
    levels = tuple(tuple(sorted(set(x[:, k].tolist()))) for k in range(2))
    budgets = 2 * x[:, 0] * (q + x[:, 1])
    low, middle, high = (float(np.quantile(budgets, p)) for p in (0.1, 0.5, 0.9))
    constants = {"Q": q}
    targets: dict[str, Target] = {
        "real-allocation": OptimalAllocation(budget=middle, constants=constants),
        "real-frontier": Frontier(low=low, high=high, points=6, constants=constants),
    }
    laws: tuple[LawChoice, ...] = ("product", _ADDITIVE, "semilog")
    return {
        name: World(name, ("N", "V"), levels, _unknown, "cost", laws, t, measured=Measured(x, outcomes, mean))
        for name, t in targets.items()
    }


def _unknown(x: Array, group: np.ndarray) -> Array:
    raise AssertionError("a measured world has no formula")
