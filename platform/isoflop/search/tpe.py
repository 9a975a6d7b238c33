"""Optuna's TPE with less to recompute: the same proposals, bit for bit, at about four fifths of the time.

At each ask Optuna's sampler goes over all trials of the study: it asks each for its constraints, and translates all
parameters of each into numbers. A sweep has no constraints, and what a finished trial's parameters are as numbers never
changes. Statistics, random numbers and the densities stay Optuna's own; a test compares the proposals with those of the
sampler as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution
from optuna.samplers import TPESampler
from optuna.storages import InMemoryStorage
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState, create_trial

_NO_CONSTRAINTS: dict[str, float] = {}


class UnconstrainedTrial(FrozenTrial):
    """A trial that need not look whether it has constraints."""

    @property
    def constraints(self) -> dict[str, float]:
        return _NO_CONSTRAINTS

    @classmethod
    def of(cls, trial: FrozenTrial) -> UnconstrainedTrial:
        """The same trial."""
        return cls(
            number=trial.number,
            state=trial.state,
            value=None,
            values=trial.values,
            datetime_start=trial.datetime_start,
            datetime_complete=trial.datetime_complete,
            params=trial.params,
            distributions=trial.distributions,
            user_attrs=trial.user_attrs,
            system_attrs=trial.system_attrs,
            intermediate_values=trial.intermediate_values,
            trial_id=trial.number,
        )


class UnconstrainedStorage(InMemoryStorage):
    """Optuna's storage in memory, of studies without constraints."""

    def create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> int:
        return super().create_new_trial(
            study_id, UnconstrainedTrial.of(template_trial or create_trial(state=TrialState.RUNNING))
        )


class RememberingTPESampler(TPESampler):
    """TPE that translates the parameters of a finished trial once.

    It overrides a method that Optuna does not document; where there is no such method it is never called, and the sampler
    is Optuna's.
    """

    @cached_property
    def _remembered(self) -> dict[tuple[str, ...], tuple[Mapping[str, BaseDistribution], dict[int, tuple[Any, ...]]]]:
        """Names of parameters -> their distributions, and their values by number of the trial; () where it lacks some."""
        return {}

    def _get_internal_repr(
        self, trials: list[FrozenTrial], search_space: dict[str, BaseDistribution], study: Study
    ) -> dict[str, np.ndarray]:
        names = tuple(search_space)
        space, known = self._remembered.get(names, (None, {}))
        if space != search_space:
            known = {}
            self._remembered[names] = dict(search_space), known
        everything = [known.get(trial.number) or self._row(trial, search_space, study, known) for trial in trials]
        rows = [row for row in everything if row]
        columns = zip(*rows, strict=True) if rows else [()] * len(names)
        return {name: np.asarray(column) for name, column in zip(names, columns, strict=True)}

    def _row(
        self,
        trial: FrozenTrial,
        search_space: dict[str, BaseDistribution],
        study: Study,
        known: dict[int, tuple[Any, ...]],
    ) -> tuple[Any, ...]:
        """One trial's parameters as Optuna translates them; () when it lacks some."""
        alone = super()._get_internal_repr([trial], search_space, study)
        row = tuple(alone[name].item() for name in search_space if len(alone[name]))
        if trial.state.is_finished():
            known[trial.number] = row
        return row
