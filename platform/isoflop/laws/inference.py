"""From an optimum to statements: intervals, and a verdict in words for every parameter and every quantity that matters."""

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
    ranges = profile(form, data, best.p, best.loss, box, objective, steps, level) if with_profile else {}
    dof = data.n - int(box.free.sum())
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
            ends, method = (ranges[name].low, ranges[name].high), f"profile (resamples sit on the bound of {bound})"
        elif samples is not None and samples.enough(level):
            ends, method = samples.interval(samples.p[:, i], level), f"bootstrap ({samples.scheme})"
        elif name in ranges:
            ends, method = (ranges[name].low, ranges[name].high), "profile"
        else:
            ends, method = wald.interval(form, i, best.p, cov, dof, level), "Wald"
        identified, words = _verdict(form, i, best, box, ranges.get(name), data, level, samples)
        estimates[name] = Estimate(value, unit, ends, method, identified, words)
    return estimates


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
) -> tuple[bool | None, str]:
    """What the data say about one parameter: identified or not, and why."""
    name, percent = form.names[i], f"{100 * level:g}%"
    others = {n: form.position(n) for n in best.at_bound if n != name}
    words = ", ".join(f"{n} on its bound {_nearest_bound(box, k, best.p[k]):g}" for n, k in others.items())
    given = f" (given {words})" if words else ""
    if name in best.at_bound:
        return False, f"not identified: on its bound {_nearest_bound(box, i, best.p[i]):g}{_limit(found, percent)}"
    if found is None:
        return None, "not examined (no profile)"
    walls = [w for w, closed in ((box.low[i], found.low_closed), (box.high[i], found.high_closed)) if not closed]
    if walls and math.isfinite(walls[0]):
        return False, f"not identified: cannot be told from its bound {walls[0]:g}{_limit(found, percent)}{given}"
    if walls:
        return False, f"not identified: the data set no {'lower' if not found.low_closed else 'upper'} limit{given}"
    stuck = 0 if samples is None else samples.at_bound.get(name, 0)
    if samples is not None and stuck > 0.5 * (1 - level) * len(samples.p):
        return False, f"not identified: on its bound in {stuck} of {len(samples.p)} resamples{given}"
    spread = float(np.ptp(data.y))
    if _is_floor(form, name) and found.high - found.low > spread:
        width = f"{found.high - found.low:.3g}"
        return False, f"not identified: its {percent} range {width} exceeds the observed range of y, {spread:.3g}"
    if form.parameters[i].linear and form.parameters[i].low >= 0 and found.low > 0 and found.high / found.low > 100:
        return False, f"not identified: known only to a factor of {found.high / found.low:.3g}{given}"
    return True, f"identified{given}"


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
    if fit.samples is not None and fit.samples.enough(fit.level):
        draws = fit.form.quantity(text, fit.samples.p)
        return estimate_from_draws(value, draws, fit.samples, fit.level)
    ends = delta_interval(fit.form, text, fit.p, fit.cov, fit.n - int(fit.box.free.sum()), fit.level)
    wide = not all(map(math.isfinite, ends))
    return Estimate(
        value,
        "",
        ends,
        "delta method",
        False if wide else None,
        "not identified" if wide else "not examined (no bootstrap)",
    )


def parameter_rows(fit: Fit) -> Array:
    """(1 + R, P): the estimate, then the bootstrap samples when there are any."""
    return fit.p[None] if fit.samples is None else np.concatenate([fit.p[None], fit.samples.p])


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
    if not (math.isfinite(value) and all(map(math.isfinite, ends))):
        return Estimate(value, unit, ends, method, False, "not identified: runs off to infinity in some resamples")
    width = ends[1] - ends[0]
    if width > 2 * abs(value) and width > 0:
        return Estimate(
            value,
            unit,
            ends,
            method,
            False,
            f"not identified: its interval is {width / max(abs(value), 1e-300):.3g} times its value",
        )
    return Estimate(value, unit, ends, method, True, "identified")


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
