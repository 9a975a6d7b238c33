"""``LawSampler``: an Optuna sampler that proposes the runs after which a law's answer is known, per unit of cost.

Usable in any study::

    sampler = LawSampler(
        axes={"N": {"model": {"d24": 13920, "d48": 25216, "d96": 55488}}, "V": "tokens"},
        laws=["product", ("chinchilla", {"D": "V"})],
        target=OptimalAllocation(budget=2e7, constants={"Q": 50}),
        cost="2*N*(50+V)", budget=1e10, seed=0,
    )
    study = optuna.create_study(sampler=sampler)
    study.optimize(objective, callbacks=[sampler.stop_when_known])
    print(sampler.report(study))

The study's values are what the law predicts (an error), minimised or not. A sampler holds no truth of its own: everything
but the runs under way is rebuilt from the study's trials, so that a study can be loaded, extended by hand, or resumed.
"""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, RandomSampler
from optuna.search_space import IntersectionSearchSpace
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from isoflop.core.errors import UserError, unknown
from isoflop.search.law.axes import AxisSpec, Mapper
from isoflop.search.law.belief import Belief
from isoflop.search.law.candidates import BoxSource, Config, ListSource, Source, SpaceSource, config_key
from isoflop.search.law.contenders import LawChoice, exponents_of, has_exponents, make_contender
from isoflop.search.law.forecast import Forecast, make_forecast
from isoflop.search.law.planner import Planner
from isoflop.search.law.policy import CHECK, Choice, Policy, Pool
from isoflop.search.law.reading import ROLE, Attributes, Pending, Reader
from isoflop.search.law.report import Milestone, Report, make_report, make_steps
from isoflop.search.law.stopping import stop_reason
from isoflop.search.law.targets import BoundTarget, Exponents, Setting, Target
from isoflop.search.space import SearchSpace

_STARTUP = 4  # random trials before an unknown space is inferred
_MAX_ASK = 4096


class LawSampler(BaseSampler):
    """Proposes runs by how much they narrow a target per cost.

    Args:
        axes: per axis of the laws, how to read it from a trial's parameters (see :mod:`isoflop.search.law.axes`); a finished
            trial's user attribute of the axis' name, a measurement, takes precedence.
        target: what one wants to know.
        laws: competing forms: names, expressions, ``LawForm`` objects, or ``(law, {variable: axis})``.
        by: parameters (a method, a task) whose values have a law each.
        share: parameters that these laws have in common: names, or ``"exponents"``; default: none.
        outputs: names of the study's values when it has several, each with its own law.
        space: distributions, or a sweep's space; default: inferred from the study's trials after a few random ones.
        candidates: the configurations that may be proposed; default: all of the space.
        cost: of a run, an expression of axes, parameters and constants, a table or a function; default: 1.
        cost_attr: user attribute that holds a finished trial's measured cost.
        se_attr, examples_attr: user attributes with the value's standard error, or the number of 0/1 examples behind it.
        setup: further costs by key, paid once (a stage that later runs find warm).
        budget: for the sum of costs, in the unit of the measured (else of the modelled) cost.
        max_runs: runs that there may be, whatever they cost: a batch queue's or a person's limit.
        policy: the planner's knobs.
        noise: ``auto`` or ``constant``.
        seed: of everything random.
    """

    def __init__(
        self,
        axes: Mapping[str, AxisSpec],
        target: Target,
        laws: Sequence[LawChoice] = ("product",),
        *,
        by: Sequence[str] = (),
        share: Sequence[str] | str = (),
        outputs: Sequence[str] = (),
        space: Mapping[str, BaseDistribution] | SearchSpace | None = None,
        candidates: Sequence[Config] | None = None,
        cost: AxisSpec | None = None,
        constants: Mapping[str, float] | None = None,
        cost_attr: str | None = None,
        se_attr: str | None = None,
        examples_attr: str | None = None,
        setup: Callable[[Mapping[str, Any]], Mapping[str, float]] | None = None,
        budget: float | None = None,
        max_runs: int | None = None,
        policy: Policy | None = None,
        noise: str = "auto",
        seed: int | None = None,
    ) -> None:
        if not isinstance(target, Target):
            raise UserError(f"law sampler: target = {target!r}; allowed: one of the target classes")
        if budget is not None and not budget > 0:
            raise UserError(f"law sampler: budget = {budget!r} must be a positive number")
        if max_runs is not None and not max_runs >= 1:
            raise UserError(f"law sampler: max_runs = {max_runs!r}; allowed: 1 or more")
        if noise not in ("auto", "constant"):
            raise unknown("noise", noise, ("auto", "constant"), "law sampler")
        if not laws:
            raise UserError("law sampler: laws: at least one is needed")
        self._mapper = Mapper.build(axes, by, outputs, cost, constants, setup)
        self._contenders = [make_contender(law, self._mapper.names) for law in laws]
        self._share = share
        for name in () if isinstance(share, str) else share:
            if not any(name in c.form.names for c in self._contenders):
                raise unknown("parameter", name, {n for c in self._contenders for n in c.form.names}, "share")
        if isinstance(share, str) and share != "exponents":
            raise unknown("share", share, ("exponents",), "law sampler")
        self._target = self._named(target) if isinstance(target, Exponents) else target
        self._attributes = Attributes(cost_attr, se_attr, examples_attr)
        self._budget, self._max_runs, self._policy, self._noise = budget, max_runs, policy or Policy(), noise
        self._rng = np.random.default_rng(seed)
        self._random = RandomSampler(seed=None if seed is None else int(self._rng.integers(2**31)))
        self._lock = threading.RLock()
        self._given = _source(space, candidates)
        self._intersection = IntersectionSearchSpace()
        self._source: Source | None = None
        self._pending: dict[int, Pending] = {}
        self._over: dict[int, Pending] = {}
        if self._given is not None:
            self._prepare(self._given)

    # Optuna's interface

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """The given space; else what all trials so far have in common, once there are a few."""
        if self._given is not None:
            return self._given.distributions
        with self._lock:
            space = self._intersection.calculate(study)
            done = sum(t.state == TrialState.COMPLETE for t in study.get_trials(deepcopy=False))
            if done < _STARTUP or not self._mapper.parameters() <= set(space):
                return {}
            if self._source is None or self._source.distributions != space:
                self._prepare(BoxSource(space))
            return dict(space)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """The next run; the cheapest there is, without a role, when none is affordable."""
        if self._source is None or not search_space:
            return {}
        with self._lock:
            self._sync(study)
            chosen = self._choose(1)
            if not chosen:  # Optuna takes no for an answer only from callbacks: the cheapest run, not one at random
                cheapest = self._cheapest()
                return {} if cheapest is None else self._source.to_params(cheapest)
            config, pending = chosen[0]
            self._pending[trial.number] = pending
            study._storage.set_trial_system_attr(trial._trial_id, ROLE, pending.role)
            return self._source.to_params(config)

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Random: parameters that no law reads, or an unknown space."""
        return self._random.sample_independent(study, trial, param_name, param_distribution)

    def after_trial(self, study: Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None) -> None:
        """The run is over: its fantasy goes; its rows are read with the next proposal."""
        with self._lock:
            if (over := self._pending.pop(trial.number, None)) is not None:
                self._over[trial.number] = over

    def reseed_rng(self) -> None:
        """A fresh state, for copies of a sampler that run side by side."""
        self._rng = np.random.default_rng()
        self._random.reseed_rng()
        if self._source is not None:
            self._planner.rng = self._rng

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.RLock()

    # beyond Optuna's interface

    @property
    def search_space(self) -> dict[str, BaseDistribution]:
        """Distributions of the given space, for ``study.ask``. Raises UserError without one."""
        if self._given is None:
            raise UserError("law sampler: no space was given")
        return dict(self._given.distributions)

    @property
    def pilot_runs(self) -> int:
        """Observations that the pilot makes, once the space is known."""
        return self._planner.pilot_runs if self._source is not None else 0

    def cost_of(self, config: Mapping[str, Any]) -> float:
        """Modelled cost of a run, set-up aside."""
        return self._mapper.base_cost(config)

    def stop_when_known(self, study: Study, trial: FrozenTrial) -> None:
        """A callback of ``study.optimize``: ends it when the target is known or the budget is spent."""
        if self.stop_reason(study) is not None:
            study.stop()

    def stop_reason(self, study: Study) -> str | None:
        """Why the search should end, or None."""
        with self._lock:
            if self._source is None:
                return None
            self._sync(study)
            return stop_reason(self._planner, self._look(), self._target)

    def report(self, study: Study) -> Report:
        """What is known: the target with its interval, forms with weights, verdict, check, spending.

        Raises:
            UserError: while the space is unknown or there are too few trials for a fit.
        """
        with self._lock:
            if self._source is None:
                self.infer_relative_search_space(study, study.get_trials(deepcopy=False)[-1] if study.trials else None)  # type: ignore[arg-type]
            if self._source is None:
                raise UserError("law sampler: nothing to report: the search space is not known yet")
            self._sync(study)
            return make_report(self._planner, self._target, self._setting, self._look())

    def steps(self, study: Study, count: int = 8) -> list[Milestone]:
        """How the target narrowed: belief refitted to the first rows, ``count`` times on the way."""
        with self._lock:
            if self._source is None:
                return []
            self._sync(study)
            return make_steps(self._planner, self._fresh_belief(), count)

    def forecast(self, width: float, study: Study | None = None) -> Forecast:
        """What it would cost to narrow the target to a half-width, by the design that this sampler would make.

        Without a study, or with few rows in it, parameters are drawn from the prior.

        Raises:
            UserError: while the space is unknown.
        """
        with self._lock:
            if self._source is None:
                raise UserError("law sampler: no forecast: the search space is not known yet; give a space")
            if study is not None:
                self._sync(study)
            return make_forecast(self._planner, self._look(), width)

    def propose(self, study: Study, count: int) -> list[Config]:
        """A batch for parallel actors, without opening trials: fantasised, affordable together.

        No check among them: without a trial nothing would keep its row apart.
        """
        if not 1 <= count <= _MAX_ASK:
            raise UserError(f"law sampler: count = {count}; allowed: 1 … {_MAX_ASK}")
        with self._lock:
            if self._source is None:
                raise UserError("law sampler: the search space is not known yet")
            self._sync(study)
            kept, self._planner.check_key = self._planner.check_key, self._planner.check_key or ""
            try:
                return [config for config, _ in self._choose(count)]
            finally:
                self._planner.check_key = kept

    def hold_check(self, config: Config) -> None:
        """The check of an earlier session is under way: no other is chosen, and its place is not fitted."""
        with self._lock:
            self._planner.check_key = config_key(config)

    # inside

    def _named(self, target: Exponents) -> Exponents:
        """With the names of all exponents when none is given. Raises UserError for one that no law has."""
        known = list(dict.fromkeys(n for c in self._contenders for n in c.form.names))
        for name in target.names:
            if name not in known:
                raise unknown("parameter", name, known, "target: names")
        if target.names:
            return target
        powers = [c.form for c in self._contenders if has_exponents(c.form)] or [self._contenders[0].form]
        return replace(target, names=tuple(dict.fromkeys(n for form in powers for n in exponents_of(form))))

    def _prepare(self, source: Source) -> None:
        """Everything that follows from the space: ranges, groups, target, planner."""
        missing = sorted(self._mapper.parameters() - _known(source))
        if missing:
            raise unknown("parameter", missing[0], _known(source), "law sampler: axes")
        self._pending, self._over, self._labels = {}, {}, dict[str, int]()
        self._reader = Reader(source, self._mapper, self._labels, self._contenders, self._attributes, self._budget)
        sample = source.draw(np.random.default_rng(0), [])
        places = np.array([self._mapper.place(c) for c in sample])
        usable = self._reader.usable(places)
        if not usable.any():
            raise UserError("law sampler: no configuration of the space has a (positive) value on every axis")
        low, high = places[usable].min(axis=0), places[usable].max(axis=0)
        labels = list(dict.fromkeys(self._mapper.label(c) for c, ok in zip(sample, usable, strict=True) if ok))
        outputs = self._mapper.outputs or ("",)
        groups = tuple("/".join(p for p in (lab, o) if p) or "all" for lab in labels for o in outputs)
        self._labels.update({label: i for i, label in enumerate(labels)})
        self._setting = Setting(self._mapper.names, tuple(map(float, low)), tuple(map(float, high)), groups)
        bound: BoundTarget = self._target.bind(self._setting)
        scales = [math.sqrt(a * b) if a > 0 else 1.0 for a, b in zip(low, high, strict=True)]
        shared = [exponents_of(c.form) if self._share == "exponents" else tuple(self._share) for c in self._contenders]
        self._scales, self._shared = scales, shared
        belief = self._fresh_belief()
        self._source = source
        self._planner = Planner(belief, bound, self._policy, self._budget, self._rng, self._max_runs)

    def _fresh_belief(self) -> Belief:
        setting = self._setting
        box, groups = (setting.low, setting.high), len(setting.groups)
        return Belief(self._contenders, self._mapper.names, self._scales, groups, self._shared, self._noise, box)

    def _sync(self, study: Study) -> None:
        """Read trials that finished since the last time."""
        for trial in study.get_trials(deepcopy=False):
            if self._reader.is_new(trial):
                pending = self._pending.pop(trial.number, None) or self._over.pop(trial.number, None)
                self._reader.read(trial, pending, self._planner)

    def _choose(self, count: int) -> list[tuple[Config, Pending]]:
        pool = self._pool()
        waiting = [(p.x, p.group, p.cost) for p in self._pending.values() if p.role != CHECK]
        aside = sum(p.cost for p in self._pending.values() if p.role == CHECK)
        chosen: list[Choice] = self._planner.choose(pool, count, waiting, aside)
        out = []
        for c in chosen:
            i = c.index
            pending = Pending(self._drawn[i], pool.x[i], pool.group[i], float(pool.cost[i]), c.role)
            out.append((self._drawn[i], pending))
        return out

    def _cheapest(self) -> Config | None:
        pool = self._look()
        return self._drawn[int(np.argmin(np.where(pool.room, pool.cost, np.inf)))] if pool.room.any() else None

    def _look(self) -> Pool:
        """Candidates as the next proposal would see them, which they leave as it would have been."""
        rng = self._rng
        self._rng = copy.deepcopy(rng)
        try:
            return self._pool()
        finally:
            self._rng = rng

    def _pool(self) -> Pool:
        self._drawn, pool = self._reader.pool(self._rng, self._under_way(), self._policy.replicates)
        return pool

    def _under_way(self) -> set[str]:
        return {config_key(p.config) for p in self._pending.values()}


def _source(
    space: Mapping[str, BaseDistribution] | SearchSpace | None, candidates: Sequence[Config] | None
) -> Source | None:
    if isinstance(space, SearchSpace):
        if candidates is not None:
            raise UserError("law sampler: candidates: a sweep's space lists its own")
        return SpaceSource(space)
    for name, d in (space or {}).items():
        if not isinstance(d, BaseDistribution):
            raise UserError(f"law sampler: space: {name}: {d!r} is not an Optuna distribution")
    if candidates is not None:
        return ListSource(candidates, space)
    return None if space is None else BoxSource(space)


def _known(source: Source) -> set[str]:
    return {n for c in (source.finite or source.draw(np.random.default_rng(0), [])) for n in c}
