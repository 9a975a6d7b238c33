"""Choices of a space as Optuna's distributions."""

from __future__ import annotations

from typing import cast

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from isoflop.search.space import Param, Value


def distribution_of(param: Param) -> BaseDistribution:
    """Optuna's distribution of a choice."""
    if param.values is not None:
        return CategoricalDistribution(param.values)
    if param.integer:
        step = 1 if param.log else int(param.step or 1)
        return IntDistribution(int(param.low), int(param.high), log=param.log, step=step)
    return FloatDistribution(param.low, param.high, log=param.log, step=None if param.log else param.step)


def suggest(trial: optuna.Trial, param: Param) -> Value:
    """Draw a choice of a space in a trial."""
    if param.values is not None:
        return cast(Value, trial.suggest_categorical(param.name, param.values))
    if param.integer:
        step = 1 if param.log else int(param.step or 1)  # Optuna allows no step on a log scale
        return trial.suggest_int(param.name, int(param.low), int(param.high), log=param.log, step=step)
    return trial.suggest_float(param.name, param.low, param.high, log=param.log, step=None if param.log else param.step)
