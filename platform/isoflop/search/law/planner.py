"""Which run next: pilot, check, disagreement, gain. Knows beliefs, targets and costs; knows no Optuna.

The order of a search:

1. **Pilot**: runs that identify every parameter of every contender: D-optimal on average over draws from the prior, per
   cost, until there are ``pilot_factor`` times as many as parameters.
2. **Check**: the largest run that ``check_share`` of the budget pays for (of all, where only runs are limited). It is never
   fitted; its prediction is reported beside it, and when it falls outside, the form is not believed.
3. **Disagreement**: one run in ``1/explore`` goes where contenders predict differently, whatever their weights.
4. **Gain**: all others. Where money or a number of runs is given, the best design for all that is left
   (:mod:`isoflop.search.law.design`) is solved anew before every run, and the run that it wants most often is made; without
   limits, or while most of the doubt is between forms, the best score of :mod:`isoflop.search.law.gains`. Where no contender
   fits, the parameters include the misfit's waves (:mod:`isoflop.search.law.misfit`): runs then go, by their scores, where
   the misfit matters to the target, at places that have not been run.

Shapes: M candidates, O observations per candidate, P parameters, T quantities, S draws, K axes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from isoflop.core.expressions import Array, Mask
from isoflop.search.law.belief import Belief, inverse
from isoflop.search.law.design import Linear, best_counts
from isoflop.search.law.gains import d_gains, fantasise, normal_draws, v_gains
from isoflop.search.law.hypotheses import Hypothesis
from isoflop.search.law.policy import CHECK, Choice, Policy, Pool, TargetState
from isoflop.search.law.rows import Row, RowTable
from isoflop.search.law.views import (
    View,
    between,
    doubt,
    importance_of,
    make_views,
    stack,
    target_draws,
    target_state,
)

_PRIOR_DRAWS = 4
_PILOT_NOISE = 0.02**2  # relative variance that a pilot assumes
_RULED_OUT = 0.0025
_WANTED = 0.5  # runs of a candidate in the design from which it may be the next
_COUNTS = 0.02  # weight from which a hypothesis has a say in the design


@dataclass
class _Left:
    """What may still be spent; infinities without a limit."""

    money: float
    runs: float

    def take(self, cost: float) -> None:
        self.money -= cost
        self.runs -= 1


class Planner:
    """Decides on runs from a belief.

    Args:
        belief: fits; target: bound target; policy: knobs.
        budget: for the sum of costs, or None; max_runs: number of runs that there may be, the check included, or None.
        rng: for replays.
    """

    def __init__(
        self,
        belief: Belief,
        target: Any,
        policy: Policy,
        budget: float | None,
        rng: np.random.Generator,
        max_runs: int | None = None,
    ) -> None:
        self.belief, self.target, self.policy, self.budget = belief, target, policy, budget
        self.rng, self.max_runs = rng, max_runs
        self.table = RowTable()  # what is fitted
        self.check: Row | None = None
        self.check_key: Any = None
        self.spent, self.runs = 0.0, 0
        self._since_explored = 0
        self._fitted_rows = -1
        self._guesses: tuple[list[Any], list[tuple[Hypothesis, Array]]] | None = None

    # rows

    @property
    def pilot_noise(self) -> float:
        """Variance that is assumed before there are rows, with a typical value of 1."""
        return _PILOT_NOISE

    @property
    def pilot_runs(self) -> int:
        """Observations that the pilot makes: at most half of the runs that there may be."""
        wanted = math.ceil(self.policy.pilot_factor * self.belief.parameters)
        return wanted if self.max_runs is None else min(wanted, max(2, self.max_runs // 2))

    def add(self, rows: Sequence[Row]) -> None:
        """Observations of one run that came in; the check is kept aside."""
        self.runs += bool(rows)
        for row in rows:
            self.spent += row.cost
            if row.role == CHECK:
                self.check = row
            else:
                self.table.rows.append(row)

    def charge(self, cost: float) -> None:
        """A run that came to nothing."""
        self.runs += 1
        self.spent += cost

    def lose_check(self) -> None:
        """The run that was to be the check has failed: the next largest takes its place."""
        self.check_key = None

    @property
    def enough(self) -> bool:
        """Whether the rows can tell anything: two more than the law has parameters. Fewer repeat what was assumed."""
        return len(self.table) >= self.least_rows

    @property
    def least_rows(self) -> int:
        """Rows from which something is known."""
        return self.belief.parameters + 2

    def refresh(self) -> bool:
        """Refit if rows are new; False while there are too few for a fit."""
        if len(self.table) < 2:
            return False
        if len(self.table) != self._fitted_rows:
            self.belief.update(self.table)
            self._fitted_rows = len(self.table)
        return True

    # choosing

    def choose(
        self, pool: Pool, count: int = 1, pending: Sequence[tuple[Array, np.ndarray, float]] = (), aside: float = 0.0
    ) -> list[Choice]:
        """Up to ``count`` runs; fewer when nothing is affordable.

        Args:
            pending: runs under way as (x (O, K), group (O,), cost): fantasised.
            aside: cost of a check under way.
        """
        waiting = list(pending)
        left = self.left(aside + sum(c for _, _, c in waiting), len(waiting) + (aside > 0))
        out: list[Choice] = []
        while len(out) < count and left.runs >= 1:
            possible = pool.room & (pool.cost <= left.money * (1 + 1e-9))
            if not self.policy.replicates:
                possible &= ~np.isin(np.arange(len(pool)), [c.index for c in out])
            if not possible.any():
                break
            choice = self._next(pool, possible, waiting, left)
            if choice is None:
                break
            out.append(choice)
            i = choice.index
            pool.ran[i] = True
            left.take(float(pool.cost[i]))
            if choice.role != CHECK:
                waiting.append((pool.x[i], pool.group[i], float(pool.cost[i])))
        return out

    def left(self, committed: float = 0.0, under_way: int = 0) -> _Left:
        money = math.inf if self.budget is None else self.budget - self.spent - committed
        return _Left(money, math.inf if self.max_runs is None else self.max_runs - self.runs - under_way)

    def affordable(self, pool: Pool) -> Mask:
        left = self.left()
        return pool.room & (pool.cost <= left.money * (1 + 1e-9)) & (left.runs >= 1)

    def _next(
        self, pool: Pool, possible: Mask, waiting: list[tuple[Array, np.ndarray, float]], left: _Left
    ) -> Choice | None:
        seen = len(self.table) + sum(len(g) for _, g, _ in waiting)
        if seen < self.pilot_runs:
            cap = math.inf if self.budget is None else self.policy.pilot_share * self.budget
            spent = sum(r.cost for r in self.table.rows) + sum(c for _, _, c in waiting)
            within = possible & (spent + pool.cost <= cap)
            if within.any():
                return self._pilot(pool, within, waiting)
        if (check := self._check(pool, possible)) is not None:
            return check
        if not self.refresh():
            return self._pilot(pool, possible, waiting)
        possible = possible & np.array([k != self.check_key for k in pool.keys])
        if not possible.any():
            return None
        possible, repeats = self._where(pool, possible)
        views = self.views(pool)
        for x, group, cost in waiting:
            self._imagine(views, x, group, cost)
        noise = self.noise(pool)
        if self._explores():
            score = self._disagreement_score(views, pool, noise)
            if np.max(np.where(possible, score, 0.0)) > 0:
                self._since_explored = 0
                best = int(np.argmax(np.where(possible, score, -np.inf)))
                return Choice(best, "disagreement", float(score[best]))
        self._since_explored += 1
        wanted = self._design(views, pool, possible, noise, left, repeats)
        score = self.score(views, pool, noise)
        if wanted is not None:
            possible = possible & (wanted >= min(_WANTED, float(wanted[possible].max())))
        best = int(np.argmax(np.where(possible, score, -np.inf)))
        return Choice(best, "gain", float(score[best]))

    def _design(
        self, views: list[View], pool: Pool, possible: Mask, noise_MO: Array, left: _Left, repeats: bool
    ) -> Array | None:
        """Runs of every candidate in the best design for what is left (M,); None where a design would not answer."""
        variance = self.policy.criterion == "V"
        if variance and self.belief.lack_of_fit.rejected:
            return None  # all of the money at once would trust the assumed misfit too far ahead; one run at a time looks again
        limited = ((pool.cost, left.money), (np.ones(len(pool)), left.runs))
        use = [take / have for take, have in limited if math.isfinite(have)]
        importance = importance_of(views, self.target)
        within, across = doubt(views, importance)
        if not use or (variance and across > within):
            return None
        spot, problems = np.flatnonzero(possible), []
        for v in views:
            if v.hypothesis.weight >= _COUNTS:
                precision = inverse(v.cov)
                slope = v.cross @ precision * np.sqrt(importance)[:, None] if variance else None
                h = v.h_MOP[spot] / np.sqrt(noise_MO[spot])[:, :, None]
                problems.append(Linear(v.hypothesis.weight, precision, h, slope))
        out = np.zeros(len(pool))
        out[spot] = best_counts(problems, np.stack(use)[:, spot], math.inf if repeats else 1.0)
        return out

    def _explores(self) -> bool:
        forms = {h.label for h in self.belief.hypotheses}
        return len(forms) > 1 and self.policy.explore > 0 and self._since_explored + 1 >= round(1 / self.policy.explore)

    def _where(self, pool: Pool, possible: Mask) -> tuple[Mask, bool]:
        """Where gains are looked for, and whether places may be run again.

        Where no contender fits, new places while there are any: how rough the misfit is one only assumes, so that a repeat's
        computed worth (that of a known smooth surface) is not to be relied on.
        """
        if self.policy.criterion != "V" or not self.belief.lack_of_fit.rejected:
            return possible, self.policy.replicates
        new = possible & ~pool.ran
        return (new, False) if new.any() else (possible, self.policy.replicates)

    # pilot and check

    def _pilot(self, pool: Pool, possible: Mask, waiting: list[tuple[Array, np.ndarray, float]]) -> Choice:
        """D-optimal on average over the prior, given what is measured or under way."""
        if self._guesses is None or self._guesses[0] is not pool.keys:
            self._guesses = (pool.keys, [(h, stack(h, pool)) for h in self.prior_draws()])
        have = [(np.array([r.x]), np.array([r.group])) for r in self.table.rows] + [(x, g) for x, g, _ in waiting]
        x = np.concatenate([np.empty((0, pool.x.shape[2])), *(x for x, _ in have)])
        group = np.concatenate([np.empty(0, dtype=np.int64), *(g for _, g in have)])
        noise = np.full(pool.group.shape, _PILOT_NOISE)
        total = np.zeros(len(pool))
        for h, h_MOP in self._guesses[1]:
            cov = h.cov
            if len(x):
                j = h.jacobian(x, group)
                cov = inverse(j.T @ j / _PILOT_NOISE + np.diag(h.prior_sd**-2.0))
            total += np.nan_to_num(d_gains(cov, h_MOP, noise))
        score = total / pool.price**self.policy.pilot_gamma
        best = int(np.argmax(np.where(possible, score, -np.inf)))
        return Choice(best, "pilot", float(score[best]))

    def prior_draws(self) -> list[Hypothesis]:
        """Every contender at a few parameters that its prior holds possible; errors in units of a typical one."""
        b = self.belief
        out = []
        for h in Belief(b.contenders, b.axes, b.scales, b.groups, b.shared).prior(1.0):
            for z in normal_draws(len(h.u), 8)[:_PRIOR_DRAWS]:
                u = h.clip((h.prior_mean + 0.7 * z * h.prior_sd)[None])[0]
                out.append(Hypothesis(h.label, 0, h.blocks, u, h.cov))
        return out

    def _check(self, pool: Pool, possible: Mask) -> Choice | None:
        """The largest affordable run, once."""
        affordable = self.check_candidates(pool, possible)
        if not affordable.any():
            return None
        best = int(np.argmax(np.where(affordable, pool.cost, -np.inf)))
        self.check_key = pool.keys[best]
        return Choice(best, CHECK)

    def check_candidates(self, pool: Pool, possible: Mask) -> Mask:
        """What could be the check; nothing when there has been one, or none is wanted."""
        unlimited = self.budget is None and self.max_runs is None
        if unlimited or not self.policy.check_share or self.check is not None or self.check_key is not None:
            return np.zeros(len(pool), dtype=bool)
        return possible & (pool.cost <= self.policy.check_share * (math.inf if self.budget is None else self.budget))

    # gains

    def score(self, views: list[View], pool: Pool, noise_MO: Array) -> Array:
        """Gain per cost^gamma of every candidate (M,)."""
        importance = importance_of(views, self.target)
        gain = np.zeros(len(pool))
        for v in views:
            if v.hypothesis.weight < 1e-3:
                continue
            if self.policy.criterion == "D":
                gain += v.hypothesis.weight * d_gains(v.cov, v.h_MOP, noise_MO)
            else:
                gain += v.hypothesis.weight * v_gains(v.cov, v.cross, v.h_MOP, noise_MO, importance)
        if self.policy.criterion == "V":
            gain += between(views, noise_MO, importance, np.array([v.hypothesis.weight for v in views]))
        return np.nan_to_num(gain) / pool.price**self.policy.gamma

    def _disagreement_score(self, views: list[View], pool: Pool, noise_MO: Array) -> Array:
        """As the score's second part, with every form's best basin weighed alike: a doubt that weights cannot silence."""
        best: dict[str, View] = {}
        for v in views:
            if v.hypothesis.weight > _RULED_OUT:
                best.setdefault(v.hypothesis.label, v)
        chosen = list(best.values())
        weight = np.full(len(chosen), 1 / len(chosen))
        gain = between(chosen, noise_MO, importance_of(views, self.target), weight)
        return np.nan_to_num(gain) / pool.price**self.policy.gamma

    def noise(self, pool: Pool) -> Array:
        """Variance R of each candidate's observations (M, O): scatter, and what the misfit's waves cannot express."""
        m, o, k = pool.x.shape
        noise = self.belief.noise
        out = np.repeat((noise.sigma2 * noise.relative(np.log(pool.cost)))[:, None], o, axis=1)
        return out + self._unexpressed(pool.x.reshape(m * o, k), pool.group.ravel()).reshape(m, o)

    def _unexpressed(self, x: Array, group: np.ndarray) -> Array:
        surface = self.belief.hypotheses[0].surface
        return np.zeros(len(x)) if surface is None else surface.waves.rest(x, group)

    def _imagine(self, views: list[View], x: Array, group: np.ndarray, cost: float) -> None:
        noise = self.belief.noise
        r = noise.sigma2 * float(noise.relative(np.log(np.array(cost)))) + self._unexpressed(x, group)
        for v in views:
            v.cov, v.cross = fantasise(v.cov, v.cross, v.hypothesis.jacobian(x, group), r)

    # stopping

    # knowledge

    def views(self, pool: Pool) -> list[View]:
        """Every hypothesis linearised, with the target's contrasts applied."""
        return make_views(self.belief, self.target, pool)

    def draws(self) -> tuple[Array, Array]:
        """Draws of the target from the mixture (n, T) with weights (n,)."""
        return target_draws(self.belief, self.target)

    def state(self) -> TargetState | None:
        """What is known of the target; None before a fit."""
        return target_state(self.belief, self.target) if self.refresh() else None
