"""Pareto fronts and hypervolume as Optuna computes them, on outcomes that have been measured."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Literal

import numpy as np
import optuna

Direction = Literal["minimize", "maximize"]


def history(
    values: Sequence[Sequence[float]], directions: Sequence[Direction], reference: Sequence[float]
) -> list[float]:
    """The hypervolume after each trial: how much of the space between the reference point and perfection is dominated.

    By ``optuna.visualization.plot_hypervolume_history``, whose figure holds the numbers; Optuna has no other public way.

    Args:
        values: per finished trial, in the order in which they finished, a finite value per objective (two or more).
        directions: per objective.
        reference: per objective the worst value that counts; a trial that is worse in any adds nothing.

    Returns:
        One number per trial, in the product of the objectives' units; it never falls.
    """
    study = _study(values, directions)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        figure = optuna.visualization.plot_hypervolume_history(study, list(reference))
    return [float(v) for v in figure.data[0].y]


def front(values: Sequence[Sequence[float]], directions: Sequence[Direction]) -> list[int]:
    """Positions of the trials that no other trial dominates (``study.best_trials``), ascending."""
    return sorted(t.number for t in _study(values, directions).best_trials)


def share(values: Sequence[Sequence[float]], directions: Sequence[Direction]) -> list[float] | None:
    """:func:`history` in the box from the best to the worst value of each objective, as a share of that box (0 … 1).

    A common scale for objectives of different units, known only when all trials are: it compares moments of one search, and
    no two searches. None where an objective has one value only, which is a box without volume.
    """
    array = np.asarray(values, dtype=float)
    if array.ndim != 2 or len(array) < 2:
        return None
    signs = np.array([1.0 if d == "minimize" else -1.0 for d in directions])
    losses = array * signs
    low, high = losses.min(axis=0), losses.max(axis=0)
    if np.any(high <= low):
        return None
    scaled = (losses - low) / (high - low)
    return history(scaled.tolist(), ["minimize"] * len(signs), [1.0] * len(signs))


def _study(values: Sequence[Sequence[float]], directions: Sequence[Direction]) -> optuna.Study:
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)  # or every study is announced
    try:
        study = optuna.create_study(directions=list(directions))
    finally:
        optuna.logging.set_verbosity(before)  # the caller's studies are not ours to silence
    study.add_trials([optuna.trial.create_trial(values=[float(v) for v in row]) for row in values])
    return study
