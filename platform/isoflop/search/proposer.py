"""Proposers: what to try next.

A proposer is asked for trials and told their outcomes. It keeps nothing on disk: after a restart the driver rebuilds it
by telling it every finished trial of the ledger again, so there is no second storage that could disagree, lock or tear.
"""

from __future__ import annotations

import inspect
import itertools
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, cast

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.study import StudyDirection
from optuna.trial import TrialState

from isoflop.core.errors import UserError, unknown
from isoflop.core.hashing import derive_seed
from isoflop.search.space import Config, Param, Space, Value, values_key
from isoflop.search.tpe import RememberingTPESampler, UnconstrainedStorage

optuna.logging.set_verbosity(optuna.logging.WARNING)
warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)

SAMPLERS = ("grid", "random", "qmc", "tpe", "gp", "cmaes", "nsga2")
PRUNERS = ("none", "median", "hyperband", "wilcoxon")
Outcome = Literal["complete", "pruned", "failed"]

# Samplers whose cost per ask grows with the study or that repeat themselves within a batch (GP costs seconds at
# a few hundred trials; its parallel asks are near-duplicates).
_MAX_TRIALS = {"gp": 500}
_DEAR = ("tpe", "gp", "cmaes", "nsga2")  # they learn: one ask costs milliseconds to seconds
_NO_TRIAL = optuna.trial.create_trial(state=TrialState.FAIL)
_PATIENCE = 20  # repeated points in a row before random draws take over


@dataclass(frozen=True)
class Proposal:
    """A point to try. ``number`` counts trials of the sweep from 0 and survives restarts."""

    number: int
    config: Config


@dataclass(frozen=True)
class Tell:
    """The outcome of a trial.

    Attributes:
        values: one per objective; empty unless ``outcome`` is "complete".
        steps: intermediate value per step, for pruners.
        attributes: what was measured beside the values (sizes, costs), for samplers that fit laws.
    """

    number: int
    config: Config
    outcome: Outcome
    values: tuple[float, ...] = ()
    steps: Mapping[int, float] = field(default_factory=dict)
    attributes: Mapping[str, Any] = field(default_factory=dict)


class Proposer(ABC):
    """Life cycle: ``tell`` past trials, then any order of ``ask``, ``report``/``should_prune`` and ``tell``."""

    @abstractmethod
    def ask(self, count: int) -> list[Proposal]:
        """Up to ``count`` new points; fewer (finally none) when the space is used up or while more are ``pending``."""

    @abstractmethod
    def tell(self, result: Tell) -> None:
        """Record an outcome, of a proposal or of a trial from an earlier session."""

    @abstractmethod
    def reserve(self, number: int, config: Config) -> None:
        """A trial of an earlier session is unfinished and runs again: do not propose it; its ``tell`` will come."""

    def should_prune(self, number: int, step: int, value: float) -> bool:
        """Report an intermediate value; True when the trial is hopeless."""
        return False

    def size(self) -> int | None:
        """How many points there are in all, or None when unknown."""
        return None

    @property
    def reason(self) -> str | None:
        """Why nothing more is proposed, where there is more to say than that the space is used up."""
        return None

    @property
    def pending(self) -> bool:
        """Whether points that were asked for are still being thought about."""
        return False

    def start(self) -> None:  # noqa: B027 - most have nothing to start
        """Bring processes up; otherwise the first ask does."""

    def wait(self, seconds: float) -> None:  # noqa: B027 - most answer at once
        """Nothing else is to be done: wait until something of what is pending can be asked for."""

    def close(self) -> None:  # noqa: B027 - most have nothing to end
        """Let go of processes."""


class Numbers:
    """Trial numbers: the smallest free one next, so that a resumed sweep counts on where an earlier session left gaps."""

    def __init__(self) -> None:
        self._used: set[int] = set()
        self._next = 0

    def __len__(self) -> int:
        return len(self._used)

    def add(self, number: int) -> None:
        """A trial of an earlier session has this number."""
        self._used.add(number)

    def peek(self) -> int:
        """The number that :meth:`take` would give."""
        while self._next in self._used:
            self._next += 1
        return self._next

    def take(self) -> int:
        """A number for a new trial."""
        number = self.peek()
        self._used.add(number)
        return number


class GridProposer(Proposer):
    """Every point once, in order. Enumerated here: Optuna's grid sampler slows down with each tell."""

    def __init__(self, space: Space) -> None:
        self._size = sum(1 for _ in space.grid())
        self._points = space.grid()
        self._known: set[str] = set()
        self._numbers = Numbers()

    def ask(self, count: int) -> list[Proposal]:
        fresh = (config for config in self._points if values_key(config) not in self._known)
        return [Proposal(self._numbers.take(), config) for config in itertools.islice(fresh, count)]

    def tell(self, result: Tell) -> None:
        self.reserve(result.number, result.config)

    def reserve(self, number: int, config: Config) -> None:
        self._known.add(values_key(config))
        self._numbers.add(number)

    def size(self) -> int | None:
        return self._size


class OptunaProposer(Proposer):
    """One of Optuna's samplers on an in-memory study.

    Args:
        space: what may be proposed.
        sampler: name as in the YAML, or a sampler.
        pruner: name as in the YAML.
        directions: "minimize" or "maximize" per objective.
        seed: the sweep's seed. Random search then proposes the same points in the same order again, however often the
            sweep was interrupted, and so does QMC where no knob is conditional.
        options: keyword arguments of the Optuna class.
    """

    def __init__(
        self,
        space: Space,
        sampler: str | optuna.samplers.BaseSampler,
        pruner: str,
        directions: Sequence[str],
        seed: int,
        options: Mapping[str, Any] | None = None,
        pruner_options: Mapping[str, Any] | None = None,
    ) -> None:
        self._space = space
        self._name = sampler if isinstance(sampler, str) else type(sampler).__name__
        self._seed = seed
        self._options = dict(options or {})
        self._sampler = make_sampler(sampler, seed, self._options) if isinstance(sampler, str) else sampler
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
        self._max_trials = _MAX_TRIALS.get(self._name)
        # Random search learns nothing: a study of its trials would only cost memory and time.
        self._forgetful = self._name == "random" and pruner == "none"

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
                misses = 0 if self._name == "qmc" and key in self._past else misses + 1
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
        too_many = self._max_trials is not None and len(self._numbers) >= self._max_trials
        if self._name != "random" and misses < _PATIENCE and not too_many:
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
            return cast(Value, sampler.sample_independent(study, _NO_TRIAL, param.name, distribution))

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
            params[param.name], distributions[param.name] = value, distribution
            return value

        try:
            self._space.walk(choose)
        except (LookupError, KeyError):
            return None, {}
        return params, distributions


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


def make_sampler(name: str, seed: int, options: Mapping[str, Any]) -> optuna.samplers.BaseSampler:
    """Optuna's own sampler by its short name. Raises UserError for options that it does not take."""
    classes = {
        "random": optuna.samplers.RandomSampler,
        "qmc": optuna.samplers.QMCSampler,
        "tpe": RememberingTPESampler,
        "gp": optuna.samplers.GPSampler,
        "cmaes": optuna.samplers.CmaEsSampler,
        "nsga2": optuna.samplers.NSGAIISampler,
    }
    defaults: dict[str, dict[str, Any]] = {
        "qmc": {"warn_independent_sampling": False, "warn_asynchronous_seeding": False},
        "cmaes": {"warn_independent_sampling": False},
        "gp": {"warn_independent_sampling": False},
    }
    arguments = {**defaults.get(name, {}), **options, "seed": seed}
    return _construct(classes[name], name, arguments)


def make_pruner(name: str, options: Mapping[str, Any]) -> optuna.pruners.BasePruner:
    """Optuna's own pruner by its short name."""
    classes = {
        "none": optuna.pruners.NopPruner,
        "median": optuna.pruners.MedianPruner,
        "hyperband": optuna.pruners.HyperbandPruner,
        "wilcoxon": optuna.pruners.WilcoxonPruner,
    }
    return _construct(classes[name], name, dict(options))


def _construct(cls: Any, name: str, arguments: dict[str, Any]) -> Any:
    allowed = [p for p in inspect.signature(cls).parameters if p not in ("self", "seed")]
    for key in arguments:
        if key != "seed" and key not in allowed:
            raise unknown(f"option of {name}", key, allowed, "search")
    try:
        return cls(**arguments)
    except (TypeError, ValueError) as error:
        raise UserError(f"search: {name}: {error}") from None


def make_proposer(
    space: Space,
    sampler: str,
    pruner: str = "none",
    directions: Sequence[str] = ("minimize",),
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
    pruner_options: Mapping[str, Any] | None = None,
    apart: bool = False,
) -> Proposer:
    """The proposer that a sweep's ``search`` block asks for; with ``apart``, a dear one in a process of its own."""
    if sampler == "grid" and pruner == "none":
        return GridProposer(space)
    if sampler == "grid":
        return PrunedGrid(space, pruner, directions, seed, pruner_options)
    if apart and sampler in _DEAR and pruner == "none":  # a pruner is asked about running trials, and answers at once
        from isoflop.search.process import ProposerProcess

        return ProposerProcess(space, sampler, tuple(directions), seed, dict(options or {}))
    return OptunaProposer(space, sampler, pruner, directions, seed, options, pruner_options)


class PrunedGrid(OptunaProposer):
    """The grid in order, with an Optuna pruner watching it."""

    def __init__(
        self,
        space: Space,
        pruner: str,
        directions: Sequence[str],
        seed: int,
        pruner_options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(space, "random", pruner, directions, seed, pruner_options=pruner_options)
        self._grid: Iterator[Config] = space.grid()
        self._size = sum(1 for _ in space.grid())

    def ask(self, count: int) -> list[Proposal]:
        fresh = (config for config in self._grid if values_key(config) not in self._known)
        return [self._propose(config) for config in itertools.islice(fresh, count)]
