"""Choices of a space as Optuna's distributions, and their values as Optuna can store them.

Optuna stores no lists: a list is given to it as its JSON text.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import cast

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from isoflop.search.space import Param, Value

Stored = bool | int | float | str


def stored(value: Value) -> Stored:
    """A value as Optuna can store it."""
    return json.dumps(value) if isinstance(value, tuple) else value


def chosen(param: Param, value: Stored) -> Value:
    """The value of a choice that Optuna stores as ``value``."""
    if isinstance(value, str) and param.values is not None:
        return next((v for v in param.values if isinstance(v, tuple) and stored(v) == value), value)
    return value


def stored_values(values: Sequence[Value]) -> tuple[Stored, ...]:
    """All values of a choice as Optuna can store them."""
    return tuple(stored(v) for v in values)


def distribution_of(param: Param) -> BaseDistribution:
    """Optuna's distribution of a choice."""
    if param.values is not None:
        return CategoricalDistribution(stored_values(param.values))
    if param.integer:
        step = 1 if param.log else int(param.step or 1)
        return IntDistribution(int(param.low), int(param.high), log=param.log, step=step)
    return FloatDistribution(param.low, param.high, log=param.log, step=None if param.log else param.step)


def suggest(trial: optuna.Trial, param: Param) -> Value:
    """Draw a choice of a space in a trial."""
    if param.values is not None:
        return chosen(param, cast(Stored, trial.suggest_categorical(param.name, stored_values(param.values))))
    if param.integer:
        step = 1 if param.log else int(param.step or 1)  # Optuna allows no step on a log scale
        return trial.suggest_int(param.name, int(param.low), int(param.high), log=param.log, step=step)
    return trial.suggest_float(param.name, param.low, param.high, log=param.log, step=None if param.log else param.step)
