"""From an optimum to statements: intervals, and a verdict in words for every parameter and every quantity that matters.

One rule decides what is identified, for parameters, derived quantities, optima and predictions alike: see :func:`judge`.
"""

from __future__ import annotations

import math

import numpy as np
from scipy import special

from isoflop.core.expressions import Array, parse
from isoflop.laws import wald
from isoflop.laws.base import LawForm
from isoflop.laws.bootstrap import Resamples, too_few
from isoflop.laws.engine import Box, Optimum
from isoflop.laws.objective import Objective
from isoflop.laws.profile import ProfileInterval, profile
from isoflop.laws.result import Estimate, Fit
from isoflop.laws.table import GroupData

_OFTEN = 0.05  # share of resamples on a bound from which the profile is preferred


def parameter_estimates(
    form: LawForm,
    data: GroupData,
    best: Optimum,
    box: Box,
    objective: Objective,
    cov: Array,
    samples: Resamples | None,
    with_profile: bool,
    level: float,
) -> dict[str, Estimate]:
    """Every parameter with its interval and its verdict.

    The interval is the bootstrap's if drawn and no parameter sits on its bound, else the profile's, else Wald's.
    """
    steps = np.sqrt(np.maximum(np.diag(cov), 0.0))
    free = box.free & ~np.isin(form.names, best.at_bound)
    widen = wald.widening(form, data, best.p, objective, free)
    ranges = profile(form, data, best.p, best.loss, box, objective, steps, level, widen) if with_profile else {}
    dof = wald.degrees(data, int(box.free.sum()))
    bound = _bounding(best, samples)
    estimates = {}
    for i, name in enumerate(form.names):
        unit = form.parameters[i].unit
        value = float(best.p[i])
        if not box.free[i]:
            estimates[name] = Estimate(value, unit, (value, value), "fixed", None, "held at this value")
            continue
        if (
            bound and name in ranges
        ):  # resamples that sit on one bound know nothing of the room that it leaves the others
            ends, method = (
                (ranges[name].low, ranges[name].high),
                f"{_profile(widen[i], data)} (resamples sit on the bound of {bound})",
            )
        elif samples is not None and samples.enough(level):
            ends, method = samples.interval(samples.p[:, i], level), f"bootstrap ({samples.scheme})"
        elif name in ranges:
            ends, method = (ranges[name].low, ranges[name].high), _profile(widen[i], data)
        else:
            ends, method = wald.interval(form, i, best.p, cov, dof, level), "Wald"
        identified, words = _verdict(form, i, best, box, ranges.get(name), data, level, samples, ends)
        estimates[name] = Estimate(value, unit, ends, method, identified, words)
    return estimates


def _profile(widen: float, data: GroupData) -> str:
    """What to call a profile interval, which makes up for noise that is not equal and independent."""
    if data.cluster is not None:
        return "profile, as clusters scatter"
    return "profile" if widen == 1 else f"profile, {math.sqrt(widen):.2g} times wider for unequal noise"


def judge(value: float, ends: tuple[float, float], scale: float | None = None) -> str:
    """Why a number is not identified, or "" where it is.

    The rule: both ends of its interval are finite, and they lie no further apart than twice the number itself. A floor may be
    close to 0 and yet be known: it is held against ``scale``, the observed range of y, where that is larger.
    """
    if not (math.isfinite(value) and all(map(math.isfinite, ends))):
        return "its interval runs off to infinity"
    width = ends[1] - ends[0]
    if width <= 2 * abs(value) or width == 0 or (scale is not None and width <= scale):
        return ""
    if scale is not None and scale > 2 * abs(value):
        return f"its interval is {width / max(scale, 1e-300):.3g} times the observed range of y"
    return f"its interval is {width / max(abs(value), 1e-300):.3g} times its value"


def _bounding(best: Optimum, samples: Resamples | None) -> str:
    """Parameters on a bound at the optimum, or in so many resamples that percentiles would be too narrow."""
    often = {} if samples is None else {n for n, k in samples.at_bound.items() if k > _OFTEN * len(samples.p)}
    return ", ".join(sorted({*best.at_bound, *often}))


def _verdict(
    form: LawForm,
    i: int,
    best: Optimum,
    box: Box,
    found: ProfileInterval | None,
    data: GroupData,
    level: float,
    samples: Resamples | None,
    ends: tuple[float, float],
) -> tuple[bool | None, str]:
    """What the data say about one parameter: identified or not, and why."""
    name, percent = form.names[i], f"{100 * level:g}%"
    others = {n: form.position(n) for n in best.at_bound if n != name}
    words = ", ".join(f"{n} on its bound {_nearest_bound(box, k, best.p[k]):g}" for n, k in others.items())
    given = f" (given {words})" if words else ""
    if name in best.at_bound:
        return False, f"not identified: on its bound {_nearest_bound(box, i, best.p[i]):g}{_limit(found, percent)}"
    walls = () if found is None else ((box.low[i], found.low_closed), (box.high[i], found.high_closed))
    open_ends = [wall for wall, closed in walls if not closed]
    if found is not None and open_ends and math.isfinite(open_ends[0]):
        return False, f"not identified: cannot be told from its bound {open_ends[0]:g}{_limit(found, percent)}{given}"
    if found is not None and open_ends:
        return False, f"not identified: the data set no {'lower' if not found.low_closed else 'upper'} limit{given}"
    stuck = 0 if samples is None else samples.at_bound.get(name, 0)
    if samples is not None and stuck > 0.5 * (1 - level) * len(samples.p):
        return False, f"not identified: on its bound in {stuck} of {len(samples.p)} resamples{given}"
    why = judge(float(best.p[i]), ends, float(np.ptp(data.y)) if _is_floor(form, name) else None)
    return (False, f"not identified: {why}{given}") if why else (True, f"identified{given}")


def _nearest_bound(box: Box, i: int, value: float) -> float:
    """The bound itself: the value may be off by rounding."""
    return float(min((box.low[i], box.high[i]), key=lambda end: abs(end - value)))


def _limit(found: ProfileInterval | None, percent: str) -> str:
    """The one-sided limit that the profile still gives."""
    if found is None or found.low_closed == found.high_closed:
        return ""
    return f"; {percent} limit: " + (f"below {found.high:.4g}" if found.high_closed else f"above {found.low:.4g}")


def _is_floor(form: LawForm, name: str) -> bool:
    return bool(form.asymptote) and name in parse(form.asymptote).names


def derived_estimates(fit: Fit) -> dict[str, Estimate]:
    """The form's own quantities of interest."""
    return {name: quantity(fit, text) for name, text in fit.form.derived.items()}


def quantity(fit: Fit, text: str) -> Estimate:
    """An expression in the parameters, with an interval from the bootstrap, else by the delta method."""
    value = float(fit.form.quantity(text, fit.p[None])[0])
    if fit.samples is not None and fit.resampled:
        draws = fit.form.quantity(text, fit.samples.p)
        return estimate_from_draws(value, draws, fit.samples, fit.level)
    free = int(fit.box.free.sum())
    dof = max(1, fit.n - free) if fit.data is None else wald.degrees(fit.data, free)
    ends = delta_interval(fit.form, text, fit.p, fit.cov, dof, fit.level)
    return _judged(value, ends, "delta method")


def parameter_rows(fit: Fit) -> Array:
    """(1 + R, P): the estimate, then the bootstrap samples where there are enough of them for an interval."""
    if fit.samples is None or not fit.resampled:
        return fit.p[None]
    return np.concatenate([fit.p[None], fit.samples.p])


def estimate_from_rows(fit: Fit, values: Array) -> Estimate:
    """An estimate of a quantity (1 + R,) that was evaluated on ``parameter_rows``."""
    if fit.samples is None:
        return Estimate(float(values[0]), verdict="no interval: the fit has no bootstrap")
    return estimate_from_draws(float(values[0]), values[1:], fit.samples, fit.level)


def estimate_from_draws(value: float, draws: Array, samples: Resamples, level: float, unit: str = "") -> Estimate:
    """An estimate whose interval and verdict come from bootstrap draws of the quantity."""
    if not samples.enough(level):
        return Estimate(value, unit, verdict=f"no interval: {too_few(len(samples.p), level)}")
    ends = samples.interval(draws, level)
    method = f"bootstrap ({samples.scheme})"
    return _judged(value, ends, method, unit)


def _judged(value: float, ends: tuple[float, float], method: str, unit: str = "") -> Estimate:
    why = judge(value, ends)
    return Estimate(value, unit, ends, method, not why, f"not identified: {why}" if why else "identified")


def delta_interval(form: LawForm, text: str, p: Array, cov: Array, dof: int, level: float) -> tuple[float, float]:
    """Delta method: value ± t sqrt(grad Sigma grad^T)."""
    parsed = parse(text, "quantity")
    at = {n: p[i] for i, n in enumerate(form.names)}
    gradient = np.array([float(parsed.derivative(n)(at)) if n in parsed.names else 0.0 for n in form.names])
    used = gradient != 0
    if not np.isfinite(gradient).all() or not np.isfinite(cov[np.ix_(used, used)]).all():
        return -math.inf, math.inf
    se = math.sqrt(max(0.0, float(gradient[used] @ cov[np.ix_(used, used)] @ gradient[used])))
    t = float(special.stdtrit(max(1, dof), 0.5 + level / 2))
    value = float(parsed(at))
    return value - t * se, value + t * se
