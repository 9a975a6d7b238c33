"""Knob importance as Optuna sees it, on rows that have run: fANOVA over a study rebuilt from them."""

from __future__ import annotations

import random
import warnings
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

FEWEST_ROWS = 8
MOST_ROWS = 500
"""Points that are judged. The time grows with their square: 64 trees of a leaf per point, each leaf against each split. With
three knobs of continuous values 500 take seconds, 2,000 take minutes."""
MOST_CHOICES = 6
"""Unordered values that Optuna gets as such. It gives each a column, and integrates over every product of their splits, so
that each further value may double the time."""


def importances(points: Sequence[Mapping[str, Any]], target: Sequence[float], seed: int = 0) -> dict[str, float]:
    """Share of the variance of ``target`` that each setting explains, by fANOVA (Hutter et al., ICML 2014).

    Args:
        points: settings by name; those that every point has and that vary are judged.
        target: one value per point; smaller is better or worse, it does not matter here.

    Settings with many unordered values are judged by the rank of each value's mean target. Of all ways to part the values
    in two, that order holds the one that explains most (Breiman et al., Classification and Regression Trees, 1984).

    Of more than :data:`MOST_ROWS` points so many are judged, drawn at random: every n-th of a grid could hold one value of a knob.

    Returns:
        Setting -> share, the largest first; shares sum to 1. Empty with fewer than eight points, or fewer than two
        settings that vary, of which nothing can be told apart.
    """
    names = [n for n in (points[0] if points else {}) if all(n in p and p[n] is not None for p in points)]
    points = _ranked([{n: p[n] for n in names} for p in points], target)
    space = {n: found for n in names if (found := _distribution([p[n] for p in points])) is not None}
    if len(points) < FEWEST_ROWS or len(space) < 2 or min(target) == max(target):
        return {}
    judged = sorted(random.Random(seed).sample(range(len(points)), min(len(points), MOST_ROWS)))
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study()
    for index in judged:
        params = {n: _as(d, points[index][n]) for n, d in space.items()}
        value = float(target[index])
        study.add_trial(optuna.trial.create_trial(params=params, distributions=dict(space), value=value))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        evaluator = optuna.importance.FanovaImportanceEvaluator(seed=seed)
        return dict(optuna.importance.get_param_importances(study, evaluator=evaluator))


def _distribution(values: Sequence[Any]) -> BaseDistribution | None:
    """The narrowest distribution that holds the values; None for a setting that does not vary."""
    if len(set(values)) < 2:
        return None
    if all(isinstance(v, int) and not isinstance(v, bool) for v in values):
        return IntDistribution(min(values), max(values))
    if all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values):
        return FloatDistribution(float(min(values)), float(max(values)))
    return CategoricalDistribution(sorted({str(v) for v in values}))


def _ranked(points: Sequence[dict[str, Any]], target: Sequence[float]) -> list[dict[str, Any]]:
    """The points with the values of settings of many choices replaced by their ranks."""
    ranked = [dict(point) for point in points]
    for name in points[0] if points else ():
        distribution = _distribution([point[name] for point in points])
        if not isinstance(distribution, CategoricalDistribution) or len(distribution.choices) <= MOST_CHOICES:
            continue
        targets: dict[str, list[float]] = {}
        for point, value in zip(points, target, strict=True):
            targets.setdefault(str(point[name]), []).append(value)
        order = sorted(targets, key=lambda choice: (fmean(targets[choice]), choice))
        for point in ranked:
            point[name] = order.index(str(point[name]))
    return ranked


def _as(distribution: BaseDistribution, value: Any) -> Any:
    return str(value) if isinstance(distribution, CategoricalDistribution) else value
