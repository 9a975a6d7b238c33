"""What a width will cost, before anything runs: the design is simulated, outcomes are not needed.

The variance that a run takes off a linearised target does not depend on its outcome. A forecast therefore makes the
sampler's greedy choices with fantasies until the interval is narrow enough, once for each of several parameter vectors:
those that the prior holds possible while there are no rows (noise then being 2 % of a typical value), the fitted ones later.

Shapes: M candidates, P parameters, T quantities.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from isoflop.core.expressions import Array
from isoflop.search.law.gains import d_gains, fantasise, linearise, normal_draws, root_of, v_gains
from isoflop.search.law.hypotheses import Hypothesis

if TYPE_CHECKING:
    from isoflop.search.law.planner import Planner
    from isoflop.search.law.policy import Pool

_MOST = 400  # runs of a simulated design
_NARROW = 0.02  # share of the prior's sd over which the target is linearised before anything is known
_Z95 = 1.959964


@dataclass(frozen=True)
class Forecast:
    """Expected cost of a width.

    Attributes:
        width: half-width asked for; cost: median over parameter vectors, inf when fewer than half of them reach it within
            the budget; low, high: quartiles; runs: median number.
        reached: share that reaches the width within the budget and the number of runs (at most 400).
        half_width: median half-width when they are spent.
        everything: cost of every candidate once, where there are finitely many.
    """

    width: float
    cost: float
    low: float
    high: float
    runs: float
    reached: float
    half_width: float
    everything: float

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; infinities are None."""
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in vars(self).items()}

    def lines(self) -> list[str]:
        """For people."""
        part = f" ({self.cost / self.everything:.1%} of every candidate once)" if math.isfinite(self.cost) else ""
        if self.reached < 0.5:
            return [
                f"half-width {self.width:g} is not to be expected: about {self.half_width:.2g} when the money "
                f"or the runs (at most {_MOST}) are spent"
            ]
        upper = f"{self.high:.3g}" if math.isfinite(self.high) else "more than there is"
        return [
            f"half-width {self.width:g} is expected to cost {self.cost:.3g}{part}, quartiles {self.low:.3g} to {upper}, "
            f"in about {self.runs:.0f} runs"
        ]


def make_forecast(planner: Planner, pool: Pool, width: float) -> Forecast:
    """Simulate the design from what is known now."""
    known = planner.refresh() and len(planner.table) >= planner.pilot_runs
    if known:
        starts = [(h, h.cov, planner.belief.noise.sigma2) for h in planner.belief.hypotheses if h.weight > 0.05]
        relative = planner.belief.noise.relative(np.log(pool.cost))
    else:
        starts = [(h, h.cov, planner.pilot_noise) for h in planner.prior_draws()]
        relative = np.ones(len(pool))
    budget = math.inf if planner.budget is None else planner.budget - planner.spent
    most = _MOST if planner.max_runs is None else min(_MOST, planner.max_runs - planner.runs)
    designs = [_simulate(planner, pool, h, cov, s2 * relative, width, budget, most, known) for h, cov, s2 in starts]
    found = [d for d in designs if d is not None]
    room = pool.room
    everything = float(pool.cost[room].sum())
    if not found:
        return Forecast(width, math.inf, math.inf, math.inf, math.inf, 0.0, math.inf, everything)
    cost = np.array([c for c, _, w in found if w <= width] + [math.inf for *_, w in found if w > width])
    low, middle, high = (float(np.quantile(cost, q, method="higher")) for q in (0.25, 0.5, 0.75))
    ends = [w for *_, w in found]
    runs = float(np.median([r for _, r, _ in found]))
    return Forecast(
        width, middle, low, high, runs, float(np.mean(np.array(ends) <= width)), float(np.median(ends)), everything
    )


def _simulate(
    planner: Planner,
    pool: Pool,
    h: Hypothesis,
    cov: Array,
    noise_M: Array,
    width: float,
    budget: float,
    most: int,
    known: bool,
) -> tuple[float, int, float] | None:
    """(cost, runs, half-width) of one design; None for parameters at which the target does not move (an optimum on a limit)."""
    z = normal_draws(len(h.u), 64)
    small = cov if known else cov * _NARROW**2
    root = root_of(small)
    draws = np.nan_to_num(planner.target.values(h, h.clip(h.u + z @ root.T)), nan=0.0, posinf=30.0, neginf=-30.0)
    if hasattr(planner.target, "contrasts"):
        draws = draws @ planner.target.contrasts(draws.mean(axis=0)).T
    cross = linearise(np.asarray(draws, dtype=np.float64), z, root)
    if not known:
        cross = cross / _NARROW**2
    if float(np.max(np.abs(cross))) < 1e-9:
        return None
    slope = np.linalg.solve(cov, cross.T).T
    m, o, k = pool.x.shape
    j = h.jacobian(pool.x.reshape(m * o, k), pool.group.ravel()).reshape(m, o, -1)
    noise = np.repeat(noise_M[:, None], o, axis=1)
    price = pool.price**planner.policy.gamma
    importance = np.full(len(cross), 1 / len(cross))
    spent, runs, room = 0.0, 0, pool.room.copy()
    pilot = 0 if known else planner.pilot_runs
    while True:
        half = _Z95 * float(np.sqrt(np.max(np.einsum("tp,tp->t", slope, cross))))
        possible = room & (pool.cost <= budget - spent)
        if (half <= width and runs >= pilot) or runs >= most or not possible.any():
            return spent, runs, half
        gain = d_gains(cov, j, noise) if runs < pilot else v_gains(cov, cross, j, noise, importance)
        best = int(np.argmax(np.where(possible, gain / price, -np.inf)))
        cov, cross = fantasise(cov, cross, j[best], noise[best])
        spent, runs = spent + float(pool.cost[best]), runs + 1
        room[best] = planner.policy.replicates
