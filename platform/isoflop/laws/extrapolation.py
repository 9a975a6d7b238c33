"""How well a law predicts sizes it has not seen: leave the largest out, with a growing cut (rollout), against baselines.

Random folds measure interpolation; they are reported apart and are no evidence for extrapolation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from isoflop.core.errors import UserError
from isoflop.core.expressions import Array
from isoflop.laws.base import LawForm
from isoflop.laws.bootstrap import bootstrap
from isoflop.laws.engine import Box, NotEstimable, check_estimable, fit_groups
from isoflop.laws.objective import Objective
from isoflop.laws.table import GroupData

LEVEL = 0.95  # of prediction intervals, unless somebody says otherwise


@dataclass(frozen=True)
class Cut:
    """One held-out set.

    Attributes:
        held_out: sizes left out (the largest ones); n_train, n_test: rows.
        decades: log10(largest held-out size / largest training size), the extrapolation factor.
        rmse, bias: of prediction minus observation; relative: mean of prediction/observation - 1.
        coverage: share of held-out rows inside their prediction interval, when a bootstrap with enough resamples was asked for.
    """

    held_out: list[float]
    n_train: int
    n_test: int
    decades: float
    rmse: float
    bias: float
    relative: float
    coverage: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)


def splits(data: GroupData, along: str, smallest: int = 2) -> list[tuple[np.ndarray, np.ndarray]]:
    """(train, test) masks that hold out the largest 1, 2, … levels of a variable, ``smallest`` levels staying at least."""
    if along not in data.x:
        raise UserError(f"along: {along!r} is no variable of the data; allowed: {', '.join(data.x)}")
    levels = np.unique(data.x[along])
    if len(levels) > 12:  # continuous sizes: eight cuts at equal shares of the rows
        levels = np.unique(np.quantile(data.x[along], np.linspace(0, 1, 9)))
        masks = [(data.x[along] <= edge) for edge in levels[1:-1]][::-1]
    else:
        masks = [(data.x[along] <= levels[-1 - c]) for c in range(1, len(levels) - smallest + 1)]
    return [(m, ~m) for m in masks if m.any() and (~m).any()]


def judge(
    data: GroupData, along: str, train: np.ndarray, test: np.ndarray, predicted: Array, coverage: float | None = None
) -> Cut:
    """Errors of predictions for the held-out rows."""
    observed, sizes = data.y[test], data.x[along]
    difference = predicted - observed
    return Cut(
        held_out=[float(v) for v in np.unique(sizes[test])][:12],
        n_train=int(train.sum()),
        n_test=int(test.sum()),
        decades=float(np.log10(sizes[test].max() / sizes[train].max())) if sizes[train].max() > 0 else math.nan,
        rmse=float(np.sqrt(np.mean(difference**2))),
        bias=float(np.mean(difference)),
        relative=float(np.mean(predicted / observed - 1)),
        coverage=coverage,
    )


@np.errstate(all="ignore")
def rollout(
    form: LawForm,
    data: GroupData,
    box: Box,
    objective: Objective,
    along: str,
    resamples: int = 0,
    level: float = LEVEL,
    seed: int = 0,
    cuts: int | None = None,
) -> list[Cut]:
    """Leave-largest-out with a growing cut; cuts whose rest cannot be fitted are left out. All cuts are one batch of fits.

    ``cuts``: at most this many, the smallest held-out sets first.
    """
    usable, parts = [], []
    for train, test in splits(data, along)[:cuts]:
        part = data.take(train)
        try:
            check_estimable(form, part, box)
        except NotEstimable:
            continue
        usable.append((train, test))
        parts.append(part)
    if not parts:
        return []
    optima = fit_groups(form, parts, box, objective, seed=seed)
    draws = bootstrap(form, parts, optima, box, objective, resamples, seed=seed) if resamples else [None] * len(parts)
    found = []
    for (train, test), part, best, drawn in zip(usable, parts, optima, draws, strict=True):
        at = {v: a[test] for v, a in data.x.items()}
        covered = None
        if drawn is not None and drawn.enough(level):
            noise = part.y - form.evaluate(part.x, best.p)
            rng = np.random.default_rng(seed)
            new = form.evaluate(at, drawn.p) + rng.choice(noise, size=(len(drawn.p), int(test.sum())))
            low, high = np.nanpercentile(new, [50 * (1 - level), 50 * (1 + level)], axis=0)
            covered = float(np.mean((data.y[test] >= low) & (data.y[test] <= high)))
        found.append(judge(data, along, train, test, form.evaluate(at, best.p), covered))
    return found


def interpolation_error(
    form: LawForm, data: GroupData, box: Box, objective: Objective, folds: int = 5, seed: int = 0
) -> float:
    """RMSE of random K-fold cross-validation: interpolation only."""
    fold = np.random.default_rng(seed).permutation(np.arange(data.n) % folds)
    parts, kept = [], []
    for k in range(folds):
        part = data.take(fold != k)
        try:
            check_estimable(form, part, box)
        except NotEstimable:
            return math.nan
        parts.append(part)
        kept.append(fold == k)
    errors = []
    for mask, best in zip(kept, fit_groups(form, parts, box, objective, seed=seed), strict=True):
        errors.append(form.evaluate({v: a[mask] for v, a in data.x.items()}, best.p) - data.y[mask])
    return float(np.sqrt(np.mean(np.concatenate(errors) ** 2)))


Baseline = Callable[[GroupData, str, np.ndarray, np.ndarray], Array]


def carry_forward(data: GroupData, along: str, train: np.ndarray, test: np.ndarray) -> Array:
    """Each held-out row gets the value of the largest training size, at the nearest other variables."""
    return _nearest(data, along, train, test)[0]


def nearest_with_shift(data: GroupData, along: str, train: np.ndarray, test: np.ndarray) -> Array:
    """Carry-forward plus the mean trend per ln(size) between the two largest training sizes."""
    value, top = _nearest(data, along, train, test)
    x = data.x[along]
    below = train & (x < top)
    if not below.any() or x[below].max() <= 0:  # no trend per ln(size)
        return value
    second = below & (x == x[below].max())
    first = train & (x == top)
    pairs = _match(data, along, first, second)
    trend = float(np.mean(data.y[first] - data.y[second][pairs])) / math.log(top / x[second][0])
    return value + trend * np.log(x[test] / top)


def _nearest(data: GroupData, along: str, train: np.ndarray, test: np.ndarray) -> tuple[Array, float]:
    x = data.x[along]
    top = float(x[train].max())
    largest = train & (x == top)
    return data.y[largest][_match(data, along, test, largest)], top


def _match(data: GroupData, along: str, rows: np.ndarray, candidates: np.ndarray) -> np.ndarray:
    """For each row the candidate that is nearest in the logarithms of the other variables."""
    others = [np.log(a) if np.all(a > 0) else a for v, a in data.x.items() if v != along]
    if not others:
        return np.zeros(int(rows.sum()), dtype=np.int64)
    points = np.stack(others, axis=1)
    distance = np.sum((points[rows][:, None] - points[candidates][None]) ** 2, axis=2)
    return np.argmin(distance, axis=1)


BASELINES: dict[str, Baseline] = {"carry-forward": carry_forward, "nearest + trend": nearest_with_shift}


@np.errstate(all="ignore")
def baseline_rollout(
    name: str, data: GroupData, along: str, cuts: Sequence[tuple[np.ndarray, np.ndarray]]
) -> list[Cut]:
    """The same cuts for a baseline that is no law."""
    return [judge(data, along, train, test, BASELINES[name](data, along, train, test)) for train, test in cuts]
