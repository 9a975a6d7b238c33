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
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, RandomSampler
from optuna.search_space import IntersectionSearchSpace
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from isoflop.core.errors import UserError, unknown
from isoflop.core.expressions import Array, Mask
from isoflop.search.law.axes import AxisSpec, Mapper, Pricing
from isoflop.search.law.belief import Belief
from isoflop.search.law.candidates import BoxSource, Config, ListSource, Source, SpaceSource, config_key
from isoflop.search.law.contenders import LawChoice, exponents_of, make_contender
from isoflop.search.law.forecast import Forecast, make_forecast
from isoflop.search.law.planner import Planner
from isoflop.search.law.policy import CHECK, Choice, Policy, Pool
from isoflop.search.law.report import Report, Step, make_report, make_steps
from isoflop.search.law.rows import Row
from isoflop.search.law.targets import BoundTarget, Exponents, Setting, Target
from isoflop.search.space import Space

ROLE = "law:role"
NOT_RUN = "law:not-run"
"""User attribute of a failed trial that never ran, and cost nothing."""
_STARTUP = 4  # random trials before an unknown space is inferred
_MAX_ASK = 4096


@dataclass
class _Pending:
    """A run under way."""

    config: Config
    x: Array
    group: np.ndarray
    cost: float
    role: str


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
        space: Mapping[str, BaseDistribution] | Space | None = None,
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
        self._attrs = (cost_attr, se_attr, examples_attr)
        self._budget, self._max_runs, self._policy, self._noise = budget, max_runs, policy or Policy(), noise
        self._rng = np.random.default_rng(seed)
        self._random = RandomSampler(seed=None if seed is None else int(self._rng.integers(2**31)))
        self._lock = threading.RLock()
        self._given = _source(space, candidates)
        self._intersection = IntersectionSearchSpace()
        self._source: Source | None = None
        self._reset()
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
            return self._planner.stop_reason(self._look(), self._target)

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

    def steps(self, study: Study, count: int = 8) -> list[Step]:
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

    # inside

    def _named(self, target: Exponents) -> Exponents:
        """With the names of all exponents when none is given. Raises UserError for one that no law has."""
        known = list(dict.fromkeys(n for c in self._contenders for n in c.form.names))
        for name in target.names:
            if name not in known:
                raise unknown("parameter", name, known, "target: names")
        every = dict.fromkeys(n for c in self._contenders for n in exponents_of(c.form))
        return target if target.names else replace(target, names=tuple(every))

    def _reset(self) -> None:
        self._seen: set[int] = set()
        self._pending: dict[int, _Pending] = {}
        self._over: dict[int, _Pending] = {}
        self._past: dict[str, Config] = {}
        self._failed: set[str] = set()
        self._warm: set[str] = set()
        self._pricing = Pricing()
        self._fixed: tuple[list[Config], Array, list[str], Array] | None = None

    def _prepare(self, source: Source) -> None:
        """Everything that follows from the space: ranges, groups, target, planner."""
        missing = sorted(self._mapper.parameters() - _known(source))
        if missing:
            raise unknown("parameter", missing[0], _known(source), "law sampler: axes")
        self._reset()
        sample = source.draw(np.random.default_rng(0), [])
        places = np.array([self._mapper.place(c) for c in sample])
        usable = self._usable(places)
        if not usable.any():
            raise UserError("law sampler: no configuration of the space has a (positive) value on every axis")
        low, high = places[usable].min(axis=0), places[usable].max(axis=0)
        labels = list(dict.fromkeys(self._mapper.label(c) for c, ok in zip(sample, usable, strict=True) if ok))
        outputs = self._mapper.outputs or ("",)
        groups = tuple("/".join(p for p in (lab, o) if p) or "all" for lab in labels for o in outputs)
        self._labels = {label: i for i, label in enumerate(labels)}
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
            if trial.number in self._seen or not trial.state.is_finished():
                continue
            self._seen.add(trial.number)
            pending = self._pending.pop(trial.number, None) or self._over.pop(trial.number, None)
            if trial.state != TrialState.COMPLETE or not any(map(math.isfinite, trial.values)):
                self._lose(trial, pending)
            else:
                self._read(trial)

    def _lose(self, trial: FrozenTrial, pending: _Pending | None) -> None:
        """A run without a value (failed, pruned, not finite): paid for all the same, and proposed no more."""
        assert self._source is not None
        config = pending.config if pending is not None else self._source.to_config(trial.params)
        if config is None:
            return
        self._failed.add(config_key(config))
        if trial.system_attrs.get(ROLE) == CHECK:
            self._planner.lose_check()
        ran = trial.state != TrialState.FAIL or ROLE in trial.system_attrs
        if not ran or trial.user_attrs.get(NOT_RUN):
            return
        measured = None if self._attrs[0] is None else trial.user_attrs.get(self._attrs[0])
        if measured is not None:
            self._planner.charge(float(measured))
        elif self._mapper.parameters() <= set(config):
            self._planner.charge(float(self._pricing(np.array([self._mapper.base_cost(config)]))[0]))

    def _read(self, trial: FrozenTrial) -> None:
        assert self._source is not None
        config = self._source.to_config(trial.params)
        if config is None:
            return
        place = self._measured_place(trial, config)
        label = self._mapper.label(config)
        if not self._usable(place[None])[0] or label not in self._labels:
            return
        cost_attr, se_attr, examples_attr = self._attrs
        modelled = self._mapper.base_cost(config)
        setup = self._mapper.setup_costs(config)
        paid = sum(c for k, c in setup.items() if k not in self._warm)
        self._warm.update(setup)
        cost = modelled + paid
        if cost_attr is not None and (measured := trial.user_attrs.get(cost_attr)):
            self._pricing.observe(modelled, max(float(measured) - paid, 1e-12 * float(measured)))
            cost = float(measured)
        self._past.setdefault(config_key(config), dict(config))
        values = trial.values[: len(self._mapper.outputs) or 1]
        rows = []
        for o, y in enumerate(values):
            if not math.isfinite(y):
                continue
            se = _attribute(trial, se_attr, o)
            n = _attribute(trial, examples_attr, o)
            if math.isnan(se) and n > 0 and 0 <= y <= 1:
                share = min(max(y, 0.5 / n), 1 - 0.5 / n)
                se = math.sqrt(share * (1 - share) / n)
            group = self._labels[label] * len(values) + o
            role = str(trial.system_attrs.get(ROLE, "given"))
            if role == CHECK:
                self._planner.check_key = config_key(config)
            rows.append(Row(tuple(place.tolist()), group, float(y), se, cost / len(values), trial.number, role))
        self._planner.add(rows)

    def _measured_place(self, trial: FrozenTrial, config: Config) -> Array:
        place = self._mapper.place(config)
        for k, name in enumerate(self._mapper.names):
            if name in trial.user_attrs and name not in config:
                place[k] = float(trial.user_attrs[name])
        return place

    def _choose(self, count: int) -> list[tuple[Config, _Pending]]:
        pool = self._pool()
        waiting = [(p.x, p.group, p.cost) for p in self._pending.values() if p.role != CHECK]
        aside = sum(p.cost for p in self._pending.values() if p.role == CHECK)
        chosen: list[Choice] = self._planner.choose(pool, count, waiting, aside)
        out = []
        for c in chosen:
            i = c.index
            pending = _Pending(self._drawn[i], pool.x[i], pool.group[i], float(pool.cost[i]), c.role)
            out.append((self._drawn[i], pending))
        return out

    def _usable(self, places_MK: Array) -> Mask:
        """Places at which the laws have a value (M,): finite, and positive where a law takes powers of the axis."""
        positive = {a for c in self._contenders for a, v in zip(c.axes, c.form.variables, strict=False) if v.positive}
        low = np.array([0.0 if a in positive else -math.inf for a in self._mapper.names])
        return np.asarray(np.isfinite(places_MK).all(axis=1) & (places_MK > low).all(axis=1))

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
        """Candidates with places, groups and present costs."""
        assert self._source is not None
        configs = self._source.draw(self._rng, list(self._past.values()))
        if self._source.finite is not None and self._fixed is not None:
            configs, places, keys, modelled = self._fixed
        else:
            places = np.array([self._mapper.place(c) for c in configs])
            keys = [config_key(c) for c in configs]
            modelled = np.array([self._mapper.base_cost(c) for c in configs])
            if self._source.finite is not None:
                self._fixed = (configs, places, keys, modelled)
        self._drawn = configs
        cost = self._prices(modelled)
        if self._mapper.setup is not None:
            cost = cost + np.array([self._unpaid(c) for c in configs])
        outputs = max(1, len(self._mapper.outputs))
        first = np.array([self._labels.get(self._mapper.label(c), -1) for c in configs]) * outputs
        group = first[:, None] + np.arange(outputs)
        x = np.repeat(places[:, None, :], outputs, axis=1)
        usable = self._usable(places)
        room = usable & (first >= 0) & (cost > 0)
        begun = {*self._past, *self._under_way()}
        ran = np.array([k in begun for k in keys], dtype=bool)
        room &= np.array([k not in self._failed for k in keys], dtype=bool)
        if not self._policy.replicates:
            room &= ~ran
        safe = np.where(usable[:, None, None], x, x[int(np.argmax(usable))])  # a law has no value elsewhere
        usual = float(np.median(cost[room])) if room.any() else 1.0  # what has no room needs a number all the same
        return Pool(safe, np.maximum(group, 0), np.where(room, cost, usual), keys, room, ran)

    def _prices(self, modelled: Array) -> Array:
        """Expected costs; where a model in another unit makes all of them exceed the budget, the cheapest run tells the unit."""
        unit_known = self._attrs[0] is None or len(self._pricing) > 0 or self._budget is None
        good = modelled[modelled > 0]
        if unit_known or not len(good) or float(good.min()) <= (self._budget or math.inf):
            return self._pricing(modelled)
        return np.asarray(modelled * (self._budget or 1.0) / float(good.min()))

    def _under_way(self) -> list[str]:
        return [config_key(p.config) for p in self._pending.values()]

    def _unpaid(self, config: Config) -> float:
        return sum(c for k, c in self._mapper.setup_costs(config).items() if k not in self._warm)


def _attribute(trial: FrozenTrial, name: str | None, output: int) -> float:
    """A number from a user attribute, or the output's entry of a list."""
    value = None if name is None else trial.user_attrs.get(name)
    if isinstance(value, (list, tuple)):
        value = value[output] if output < len(value) else None
    return math.nan if value is None else float(value)


def _source(space: Mapping[str, BaseDistribution] | Space | None, candidates: Sequence[Config] | None) -> Source | None:
    if isinstance(space, Space):
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
