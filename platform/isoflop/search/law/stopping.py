"""When a search has run enough: the target is known, nothing is left to run, or nothing that is left would help."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from isoflop.search.law.best_method import BestMethod
from isoflop.search.law.gains import v_gains
from isoflop.search.law.policy import NO_WIDTH, Pool, TargetState
from isoflop.search.law.targets import Target
from isoflop.search.law.views import between, importance_of

if TYPE_CHECKING:
    from isoflop.core.expressions import Mask
    from isoflop.search.law.planner import Planner

_HELPS = 0.01


def stop_reason(planner: Planner, pool: Pool, target: Target) -> str | None:
    """Why no further run should be made, or None.

    A target is known when there are two rows more than parameters, the form has been put to a test and stands it, the check has
    run where there is to be one, and the interval is narrow enough.
    """
    affordable = planner.affordable(pool)
    if len(planner.table) < planner.pilot_runs or not planner.refresh():
        return None if affordable.any() else used_up(planner)
    if planner.check_candidates(pool, affordable).any():
        return None
    if planner.enough and believed(planner) and (words := _known(planner, target)) is not None:
        return words
    if not affordable.any():
        return used_up(planner)
    if planner.budget is not None and _hopeless(planner, pool, affordable):
        return f"nothing affordable helps: less than {_HELPS:.0%} of the target's variance with all that is left"
    return None


def _known(planner: Planner, target: Target) -> str | None:
    """The target as it is known, where it is known well enough."""
    if isinstance(target, BestMethod):
        choices = planner.target.choice(*planner.draws())
        if any(p < target.confidence for _, p in choices.values()):
            return None
        return "known: " + ", ".join(f"{g} at {b} ({p:.1%})" for b, (g, p) in choices.items())
    state = planner.state()
    assert state is not None
    if target.width is None or state.half_width > target.width:
        return None
    return "known: " + (_on_the_end(state) or f"half-width {state.half_width:.3g} of at most {target.width:g}")


def _on_the_end(state: TargetState) -> str:
    """What is known of an optimum that lies on the end of its range in every draw: one side."""
    ends = state.one_sided & (state.high - state.low < NO_WIDTH)
    if not ends.all():
        return ""
    return ", ".join(
        f"{label} lies on the end of its range or beyond" for label, end in zip(state.labels, ends, strict=True) if end
    )


def used_up(planner: Planner) -> str:
    """That nothing is left to run, or to run it with."""
    if planner.left().runs < 1:
        return f"runs: {planner.runs} of {planner.max_runs} made"
    if planner.budget is None:
        return "every candidate has run"
    return f"budget: {planner.spent:.4g} of {planner.budget:.4g} spent, nothing affordable is left"


def believed(planner: Planner) -> bool:
    """A narrow interval of a form that does not fit, or was never put to the test, is no knowledge."""
    test = planner.belief.lack_of_fit
    return test.tested and not test.rejected


def _hopeless(planner: Planner, pool: Pool, affordable: Mask) -> bool:
    """Even the best run, repeated until the budget ends, would take nearly nothing off the target's variance."""
    if planner.policy.criterion != "V":
        return False
    views, noise = planner.views(pool), planner.noise(pool)
    importance = importance_of(views, planner.target)
    weights = np.array([v.hypothesis.weight for v in views])
    gain = between(views, noise, importance, weights)
    for v in views:
        gain = gain + v.hypothesis.weight * v_gains(v.cov, v.cross, v.h_MOP, noise, importance)
    variance = float(sum(v.hypothesis.weight * v.target_variance for v in views) @ importance)
    left = planner.left()
    times = np.where(affordable, np.minimum(left.money / pool.cost, left.runs), 0.0)
    return float(np.max(np.where(affordable, gain * times, 0.0))) < _HELPS * variance
