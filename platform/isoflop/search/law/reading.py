"""What an Optuna study says: rows for the fit, what was paid, which configurations have run or failed, what is warm.

Shapes: M candidates, K axes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from optuna.trial import FrozenTrial, TrialState

from isoflop.core.expressions import Array, Mask
from isoflop.search.law.axes import Mapper, Pricing
from isoflop.search.law.candidates import Config, Source, config_key
from isoflop.search.law.contenders import Contender
from isoflop.search.law.planner import Planner
from isoflop.search.law.policy import CHECK, Pool
from isoflop.search.law.rows import Row

ROLE = "law:role"
NOT_RUN = "law:not-run"
"""User attribute of a failed trial that never ran, and cost nothing."""


@dataclass
class Pending:
    """A run under way."""

    config: Config
    x: Array
    group: np.ndarray
    cost: float
    role: str


@dataclass(frozen=True)
class Attributes:
    """Names of user attributes: measured cost, standard errors, numbers of 0/1 examples."""

    cost: str | None = None
    se: str | None = None
    examples: str | None = None


class Reader:
    """Follows a study's trials.

    Args:
        source: candidates; mapper: from configurations to places, groups and costs; labels: number of each group's label.
        contenders: whose variables say where an axis must be positive.
        attributes: where measurements are found; budget: for the sum of costs, or None.
    """

    def __init__(
        self,
        source: Source,
        mapper: Mapper,
        labels: dict[str, int],
        contenders: Sequence[Contender],
        attributes: Attributes,
        budget: float | None,
    ) -> None:
        self._source, self._mapper, self._labels = source, mapper, labels
        self._contenders, self._attributes, self._budget = contenders, attributes, budget
        self._seen: set[int] = set()
        self._past: dict[str, Config] = {}
        self._failed: set[str] = set()
        self._warm: set[str] = set()
        self._pricing = Pricing()
        self._fixed: tuple[list[Config], Array, list[str], Array] | None = None

    def is_new(self, trial: FrozenTrial) -> bool:
        """Whether a trial has finished and was not read."""
        return trial.number not in self._seen and trial.state.is_finished()

    def read(self, trial: FrozenTrial, pending: Pending | None, planner: Planner) -> None:
        """Tell the planner of a trial that has finished."""
        self._seen.add(trial.number)
        if trial.state != TrialState.COMPLETE or not any(map(math.isfinite, trial.values)):
            self._lose(trial, pending, planner)
        else:
            self._rows(trial, planner)

    def _lose(self, trial: FrozenTrial, pending: Pending | None, planner: Planner) -> None:
        """A run without a value (failed, pruned, not finite): paid for all the same, and proposed no more."""
        config = pending.config if pending is not None else self._source.to_config(trial.params)
        if config is None:
            return
        self._failed.add(config_key(config))
        role = role_of(trial)
        if role == CHECK:
            planner.lose_check()
        ran = trial.state != TrialState.FAIL or role is not None
        if not ran or trial.user_attrs.get(NOT_RUN):
            return
        measured = None if self._attributes.cost is None else trial.user_attrs.get(self._attributes.cost)
        if measured is not None:
            planner.charge(float(measured))
        elif self._mapper.parameters() <= set(config):
            planner.charge(float(self._pricing(np.array([self._mapper.base_cost(config)]))[0]))

    def _rows(self, trial: FrozenTrial, planner: Planner) -> None:
        config = self._source.to_config(trial.params)
        if config is None:
            return
        place = self._measured_place(trial, config)
        label = self._mapper.label(config)
        if not self.usable(place[None])[0] or label not in self._labels:
            return
        names = self._attributes
        modelled = self._mapper.base_cost(config)
        setup = self._mapper.setup_costs(config)
        paid = sum(c for k, c in setup.items() if k not in self._warm)
        self._warm.update(setup)
        cost = modelled + paid
        if names.cost is not None and (measured := trial.user_attrs.get(names.cost)):
            self._pricing.observe(modelled, max(float(measured) - paid, 1e-12 * float(measured)))
            cost = float(measured)
        self._past.setdefault(config_key(config), dict(config))
        values = trial.values[: len(self._mapper.outputs) or 1]
        rows = []
        for o, y in enumerate(values):
            if not math.isfinite(y):
                continue
            se = _attribute(trial, names.se, o)
            n = _attribute(trial, names.examples, o)
            if math.isnan(se) and n > 0 and 0 <= y <= 1:
                share = min(max(y, 0.5 / n), 1 - 0.5 / n)
                se = math.sqrt(share * (1 - share) / n)
            group = self._labels[label] * len(values) + o
            role = role_of(trial) or "given"
            if role == CHECK:
                planner.check_key = config_key(config)
            rows.append(Row(tuple(place.tolist()), group, float(y), se, cost / len(values), trial.number, role))
        planner.add(rows)

    def _measured_place(self, trial: FrozenTrial, config: Config) -> Array:
        place = self._mapper.place(config)
        for k, name in enumerate(self._mapper.names):
            if name in trial.user_attrs and name not in config:
                place[k] = float(trial.user_attrs[name])
        return place

    def usable(self, places_MK: Array) -> Mask:
        """Places at which the laws have a value (M,): finite, and positive where a law takes powers of the axis."""
        positive = {a for c in self._contenders for a, v in zip(c.axes, c.form.variables, strict=False) if v.positive}
        low = np.array([0.0 if a in positive else -math.inf for a in self._mapper.names])
        return np.asarray(np.isfinite(places_MK).all(axis=1) & (places_MK > low).all(axis=1))

    def pool(self, rng: np.random.Generator, under_way: set[str], replicates: bool) -> tuple[list[Config], Pool]:
        """Candidates with places, groups and present costs."""
        configs = self._source.draw(rng, list(self._past.values()))
        if self._source.finite is not None and self._fixed is not None:
            configs, places, keys, modelled = self._fixed
        else:
            places = np.array([self._mapper.place(c) for c in configs])
            keys = [config_key(c) for c in configs]
            modelled = np.array([self._mapper.base_cost(c) for c in configs])
            if self._source.finite is not None:
                self._fixed = (configs, places, keys, modelled)
        cost = self._prices(modelled)
        if self._mapper.setup is not None:
            cost = cost + np.array([self._unpaid(c) for c in configs])
        outputs = max(1, len(self._mapper.outputs))
        first = np.array([self._labels.get(self._mapper.label(c), -1) for c in configs]) * outputs
        group = first[:, None] + np.arange(outputs)
        x = np.repeat(places[:, None, :], outputs, axis=1)
        usable = self.usable(places)
        room = usable & (first >= 0) & (cost > 0)
        begun = {*self._past, *under_way}
        ran = np.array([k in begun for k in keys], dtype=bool)
        room &= np.array([k not in self._failed for k in keys], dtype=bool)
        if not replicates:
            room &= ~ran
        safe = np.where(usable[:, None, None], x, x[int(np.argmax(usable))])  # a law has no value elsewhere
        usual = float(np.median(cost[room])) if room.any() else 1.0  # what has no room needs a number all the same
        pool = Pool(safe, np.maximum(group, 0), np.where(room, cost, usual), keys, room, ran)
        return configs, pool

    def _prices(self, modelled: Array) -> Array:
        """Expected costs; where a model in another unit makes all of them exceed the budget, the cheapest run tells the unit."""
        unit_known = self._attributes.cost is None or len(self._pricing) > 0 or self._budget is None
        good = modelled[modelled > 0]
        if unit_known or not len(good) or float(good.min()) <= (self._budget or math.inf):
            return self._pricing(modelled)
        return np.asarray(modelled * (self._budget or 1.0) / float(good.min()))

    def _unpaid(self, config: Config) -> float:
        return sum(c for k, c in self._mapper.setup_costs(config).items() if k not in self._warm)


def role_of(trial: FrozenTrial) -> str | None:
    """Why a trial was proposed; of trials that were added by hand a user attribute tells."""
    role = trial.system_attrs.get(ROLE, trial.user_attrs.get(ROLE))
    return None if role is None else str(role)


def _attribute(trial: FrozenTrial, name: str | None, output: int) -> float:
    """A number from a user attribute, or the output's entry of a list."""
    value = None if name is None else trial.user_attrs.get(name)
    if isinstance(value, (list, tuple)):
        value = value[output] if output < len(value) else None
    return math.nan if value is None else float(value)
