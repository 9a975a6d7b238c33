"""Proposers on a study of Optuna's, kept in memory."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.study import StudyDirection
from optuna.trial import TrialState

from isoflop.core.hashing import derive_seed
from isoflop.search.distributions import chosen, distribution_of, stored, suggest
from isoflop.search.proposer import Numbers, Proposal, Proposer, Tell
from isoflop.search.pruners import make_pruner
from isoflop.search.quiet import hushed
from isoflop.search.space import Config, Param, SearchSpace, Value, values_key
from isoflop.search.tpe import UnconstrainedStorage

optuna.logging.set_verbosity(optuna.logging.WARNING)

_NO_TRIAL = optuna.trial.create_trial(state=TrialState.FAIL)
_PATIENCE = 20  # repeated points in a row before random draws take over


@dataclass(frozen=True)
class Habits:
    """What a sampler needs besides being asked.

    Attributes:
        per_trial: it learns nothing, and is seeded anew for each trial: an interrupted sweep then proposes the same points again.
        sequence: it proposes one fixed sequence of points, which begins anew after a restart.
        most: trials after which its asks have become too dear, and random draws relieve it.
    """

    per_trial: bool = False
    sequence: bool = False
    most: int | None = None


class OptunaProposer(Proposer):
    """One of Optuna's samplers on an in-memory study.

    Args:
        space: what may be proposed.
        sampler: built with the sweep's seed. Random search then proposes the same points in the same order again, however
            often the sweep was interrupted, and so does QMC where no knob is conditional.
        pruner: name as in the YAML, with its options.
        directions: "minimize" or "maximize" per objective.
        seed: the sweep's.
        habits: how the sampler has to be treated.
    """

    @hushed()
    def __init__(
        self,
        space: SearchSpace,
        sampler: optuna.samplers.BaseSampler,
        pruner: str,
        directions: Sequence[str],
        seed: int,
        pruner_options: Mapping[str, Any] | None = None,
        habits: Habits | None = None,
    ) -> None:
        self._space = space
        self._seed = seed
        self._sampler = sampler
        self._habits = habits or Habits()
        self._study = optuna.create_study(
            storage=UnconstrainedStorage(),
            study_name="isoflop",  # Hyperband draws a trial's bracket from the study's name, which else is random
            sampler=self._sampler,
            pruner=make_pruner(pruner, pruner_options or {}),
            directions=[StudyDirection[d.upper()] for d in directions],
        )
        self._open: dict[int, optuna.Trial] = {}
        self._known: set[str] = set()
        self._past: set[str] = set()  # of earlier sessions, as far as the sampler has not come by them again
        self._numbers = Numbers()
        self._size = space.size()
        # Random search learns nothing: a study of its trials would only cost memory and time.
        self._forgetful = self._habits.per_trial and pruner == "none"

    @hushed()
    def ask(self, count: int) -> list[Proposal]:
        out: list[Proposal] = []
        misses = 0
        # On small finite spaces every sampler repeats points; give up once they are all known, or after many misses.
        while len(out) < count and misses < 200 and not self._used_up():
            number = self._numbers.peek()
            self._study.sampler = self._sampler_for(number, misses)
            trial, config = self._draw()
            key = values_key(config)
            if key in self._known or self._space.excluded(config):
                if trial is not None:
                    self._study.tell(trial, state=TrialState.FAIL)
                # a fixed sequence begins anew after a restart: what it proposed then is no sign that it repeats itself
                misses = 0 if self._habits.sequence and key in self._past else misses + 1
                self._past.discard(key)
                continue
            misses = 0
            self._known.add(key)
            self._numbers.take()
            if trial is not None:
                self._open[number] = trial
            out.append(Proposal(number, config))
        if not out and self._size is not None and not self._used_up():
            out = self._first_unseen(count)
        return out

    def reserve(self, number: int, config: Config) -> None:
        self._numbers.add(number)
        if self._space.contains(config):
            self._known.add(values_key(config))
            self._past.add(values_key(config))

    @hushed()
    def tell(self, result: Tell) -> None:
        state = {"complete": TrialState.COMPLETE, "pruned": TrialState.PRUNED, "failed": TrialState.FAIL}[
            result.outcome
        ]
        trial = self._open.pop(result.number, None)
        if trial is not None:
            self._study.tell(trial, list(result.values) or None, state)
            return
        self.reserve(result.number, result.config)
        if self._forgetful:
            return
        params, distributions = self._replay(result.config)
        if params is None:
            return  # a point of an earlier YAML that this space cannot express
        self._study.add_trial(
            optuna.trial.create_trial(
                state=state,
                params=params,
                distributions=distributions,
                values=list(result.values) or None,
                intermediate_values=dict(result.steps),
                user_attrs=dict(result.attributes),
            )
        )

    @hushed()
    def should_prune(self, number: int, step: int, value: float) -> bool:
        trial = self._open.get(number)
        if trial is None or len(self._study.directions) > 1:
            return False
        trial.report(value, step)
        return trial.should_prune()

    def size(self) -> int | None:
        return self._size

    def _sampler_for(self, number: int, misses: int) -> optuna.samplers.BaseSampler:
        """The sweep's sampler; a freshly seeded random one where that is better.

        Random search is seeded per trial number, so that an interrupted sweep proposes the same points again. A
        sampler that only repeats itself, or whose asks have become too dear, is relieved by random draws.
        """
        too_many = self._habits.most is not None and len(self._numbers) >= self._habits.most
        if not self._habits.per_trial and misses < _PATIENCE and not too_many:
            return self._sampler
        return optuna.samplers.RandomSampler(derive_seed(self._seed, number, misses))

    def _draw(self) -> tuple[optuna.Trial | None, Config]:
        """A point of the sampler; with the open trial of the study, where there is a use for it."""
        if not self._forgetful:
            trial = self._study.ask()
            return trial, self._space.walk(partial(suggest, trial))
        sampler, study = self._study.sampler, self._study

        def choose(param: Param) -> Value:
            distribution = distribution_of(param)
            if distribution.single():
                return param.grid()[0]
            return chosen(param, sampler.sample_independent(study, _NO_TRIAL, param.name, distribution))

        return None, self._space.walk(choose)

    def _used_up(self) -> bool:
        return self._size is not None and len(self._known) >= self._size

    def _first_unseen(self, count: int) -> list[Proposal]:
        """The rest of a small space in order, once the sampler only repeats itself."""
        out: list[Proposal] = []
        for config in self._space.grid():
            if len(out) == count:
                break
            if values_key(config) in self._known:
                continue
            out.append(self._propose(config))
        return out

    def _propose(self, config: Config) -> Proposal:
        """Open a trial for a point that no sampler chose."""
        self._known.add(values_key(config))
        number = self._numbers.take()
        params, distributions = self._replay(config)
        self._study.enqueue_trial(params or {})
        self._open[number] = self._study.ask(distributions)
        return Proposal(number, config)

    def _replay(self, config: Config) -> tuple[dict[str, Any] | None, dict[str, BaseDistribution]]:
        """The choices that lead to ``config``, as Optuna parameters."""
        params: dict[str, Any] = {}
        distributions: dict[str, BaseDistribution] = {}

        def choose(param: Param) -> Value:
            value: Value | None
            zipped = next((z for z in self._space.zips if z.name == param.name), None)
            if zipped is None:
                value = config.get(param.name)
            else:
                fits = [i for i, row in enumerate(zipped.rows) if all(config.get(p, v) == v for p, v in row)]
                value = fits[0] if fits else None
            if value is None or not param.contains(value):
                raise LookupError(param.name)
            distribution = distribution_of(param)
            params[param.name], distributions[param.name] = stored(value), distribution
            return value

        try:
            self._space.walk(choose)
        except (LookupError, KeyError):
            return None, {}
        return params, distributions


class PrunedGrid(OptunaProposer):
    """The grid in order, with an Optuna pruner watching it."""

    def __init__(
        self,
        space: SearchSpace,
        pruner: str,
        directions: Sequence[str],
        seed: int,
        pruner_options: Mapping[str, Any] | None = None,
    ) -> None:
        random = optuna.samplers.RandomSampler(seed)  # never asked; the study wants one
        super().__init__(space, random, pruner, directions, seed, pruner_options, Habits(per_trial=True))
        self._grid: Iterator[Config] = space.grid()
        self._size = sum(1 for _ in space.grid())

    @hushed()
    def ask(self, count: int) -> list[Proposal]:
        fresh = (config for config in self._grid if values_key(config) not in self._known)
        return [self._propose(config) for config in itertools.islice(fresh, count)]
