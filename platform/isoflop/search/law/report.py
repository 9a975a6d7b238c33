"""What a search has found out: the target, the forms, whether they fit, the check, and what it took."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import special

from isoflop.core.expressions import Array
from isoflop.search.law.best_method import BestMethod
from isoflop.search.law.hypotheses import REJECT
from isoflop.search.law.policy import TargetState
from isoflop.search.law.stopping import stop_reason
from isoflop.search.law.targets import Setting, Target

if TYPE_CHECKING:
    from isoflop.search.law.belief import Belief
    from isoflop.search.law.planner import Planner
    from isoflop.search.law.policy import Pool

_OUTSIDE = 0.002  # p-value of the check below which the form is not believed


@dataclass(frozen=True)
class Quantity:
    """One quantity of the target with its 95 % interval, in its own unit.

    Attributes:
        end: ``high`` or ``low`` where the interval reaches that end of the range in which the optimum was looked for (``both``:
            of the whole range nothing is excluded). Knowledge is one-sided then: the optimum may lie beyond.
    """

    label: str
    value: float
    low: float
    high: float
    end: str = ""


@dataclass(frozen=True)
class Check:
    """The run that the search fits no law with: what was predicted for it and what came.

    Attributes:
        predicted, sd: mixture mean and standard deviation of a new run, parameter uncertainty and noise together.
        half: of the 95 % interval of what comes, by Student's t; outside: what came does not lie in it.
        p: two-sided probability of a result so far off, by Student's t.
    """

    place: dict[str, float]
    observed: float
    predicted: float
    sd: float
    half: float
    outside: bool
    p: float
    cost: float


@dataclass(frozen=True)
class Report:
    """The answer so far.

    Attributes:
        quantities: the target; forms: weight per form; best_method: per budget (name, probability).
        rows, spent, budget: what it took; half_width: of the widest quantity, relative for positive ones; inf where nothing has
            two sides.
        fits: False when a test says that no contender fits; verdict: why, in words.
        check: the run that was kept out of the fits, or None; stop: why the search may end, or None.
    """

    quantities: list[Quantity]
    forms: dict[str, float]
    best_method: dict[str, tuple[str, float]]
    rows: int
    spent: float
    budget: float | None
    half_width: float
    fits: bool
    verdict: str
    check: Check | None
    stop: str | None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "target": [vars(q) for q in self.quantities],
            "forms": self.forms,
            "best_method": {b: {"method": m, "probability": p} for b, (m, p) in self.best_method.items()},
            "rows": self.rows,
            "spent": self.spent,
            "budget": self.budget,
            "half_width": self.half_width,
            "fits": self.fits,
            "verdict": self.verdict,
            "check": None if self.check is None else vars(self.check),
            "stop": self.stop,
        }

    def __str__(self) -> str:
        lines = [in_words(vars(q)) for q in self.quantities]
        lines += [f"best at {b}: {m} (probability {p:.3f})" for b, (m, p) in self.best_method.items()]
        if self.forms:
            lines.append("forms: " + ", ".join(f"{f} {w:.3f}" for f, w in self.forms.items()))
        lines.append(self.verdict)
        if self.check is not None:
            c = self.check
            at = ", ".join(f"{a}={v:g}" for a, v in c.place.items())
            lines.append(
                f"check ({at}): predicted {c.predicted:.5g} ± {c.half:.2g}, observed {c.observed:.5g} (p = {c.p:.2g})"
            )
        of = "" if self.budget is None else f" of {self.budget:.4g}"
        lines.append(f"{self.rows} rows, cost {self.spent:.4g}{of}, half-width {self.half_width:.3g}")
        if self.stop:
            lines.append(f"may stop: {self.stop}")
        return "\n".join(lines)


def make_report(planner: Planner, target: Target, setting: Setting, pool: Pool) -> Report:
    """Everything known now. With fewer rows than parameters and two, nothing but the spending: the rest would be the prior."""
    state = planner.state()
    stop = stop_reason(planner, pool, target)
    if state is None or not planner.enough:
        rows = len(planner.table)
        words = f"{rows} rows tell nothing of a law of {planner.belief.parameters} parameters: it takes {planner.least_rows}"
        return Report([], {}, {}, rows, planner.spent, planner.budget, math.inf, True, words, None, stop)
    quantities = _quantities(state)
    best: dict[str, tuple[str, float]] = {}
    if isinstance(target, BestMethod):
        best = planner.target.choice(*planner.draws())
    forms: dict[str, float] = {}
    for h in planner.belief.hypotheses:
        forms[h.label] = forms.get(h.label, 0.0) + h.weight
    check = make_check(planner, setting)
    fits, verdict = judge(planner, check)
    return Report(
        quantities,
        forms,
        best,
        len(planner.table),
        planner.spent,
        planner.budget,
        state.two_sided_half_width,
        fits,
        verdict,
        check,
        stop,
    )


def _quantities(state: TargetState) -> list[Quantity]:
    out = _exp if state.log else _same
    ends = {(True, True): "both", (True, False): "low", (False, True): "high", (False, False): ""}
    columns = (state.labels, state.mean, state.low, state.high, state.at_low, state.at_high)
    found = []
    for label, mean, low, high, at_low, at_high in zip(*columns, strict=True):
        value, first, last = (float(v) for v in out(np.array([mean, low, high])))
        found.append(Quantity(label, value, first, last, ends[bool(at_low), bool(at_high)]))
    return found


def in_words(quantity: Mapping[str, Any]) -> str:
    """A quantity with what is known of it, one-sided where it reaches the end of its range."""
    low, high = (shown(quantity[k]) for k in ("low", "high"))
    end = quantity.get("end", "")
    if end == "both":
        return f"{quantity['label']}: anywhere in the range, {low} … {high}, or beyond"
    if end == "high":
        return f"{quantity['label']} ≥ {low} (95 %, one-sided: the range ends at {high}, and it may lie beyond)"
    if end == "low":
        return f"{quantity['label']} ≤ {high} (95 %, one-sided: the range begins at {low}, and it may lie before)"
    return f"{quantity['label']} = {shown(quantity['value'])}  95 % [{low}, {high}]"


def shown(value: float | None) -> str:
    """Four digits."""
    return "?" if value is None or not math.isfinite(value) else f"{value:.4g}"


@dataclass(frozen=True)
class Milestone:
    """What was known after the first ``rows`` rows, which cost ``spent``."""

    rows: int
    spent: float
    half_width: float


def make_steps(planner: Planner, belief: Belief, count: int) -> list[Milestone]:
    """The target's half-width on the way, from a belief fitted to ever more of the rows in their order."""
    from isoflop.search.law.planner import Planner as Replay

    rows = planner.table.rows
    first = min(len(rows), planner.pilot_runs)
    if first < 2:
        return []
    replay = Replay(belief, planner.target, planner.policy, None, planner.rng)
    out = []
    for k in np.unique(np.round(np.geomspace(first, len(rows), count)).astype(int)):
        replay.add(rows[len(replay.table) : k])
        state = replay.state()
        if state is not None and replay.enough:
            out.append(Milestone(int(k), replay.spent, state.two_sided_half_width))
    return out


def make_check(planner: Planner, setting: Setting) -> Check | None:
    """The check's prediction from everything that was fitted."""
    row = planner.check
    if row is None or not planner.belief.hypotheses:
        return None
    x, group = np.array([row.x]), np.array([row.group])
    noise = planner.belief.noise
    new = noise.sigma2 * float(noise.relative(np.log(np.array(row.cost))))
    if (surface := planner.belief.hypotheses[0].surface) is not None:
        new += float(surface.waves.rest(x, group)[0])
    means, variances, weights = [], [], []
    for h in planner.belief.hypotheses:
        j = h.jacobian(x, group)[0]
        means.append(float(h.predict(h.u[None], x, group)[0, 0]))
        variances.append(float(j @ h.cov @ j) + new)
        weights.append(h.weight)
    p, mean = np.array(weights), np.array(means)
    centre = float(p @ mean)
    sd = math.sqrt(float(p @ (np.array(variances) + (mean - centre) ** 2)))
    z = abs(row.y - centre) / sd
    dof = max(2.0, noise.dof)
    tail = 2 * float(1 - special.stdtr(dof, z))
    half = sd * float(special.stdtrit(dof, 0.975))
    place = dict(zip(setting.axes, row.x, strict=True))
    return Check(place, row.y, centre, sd, half, abs(row.y - centre) > half, tail, row.cost)


def judge(planner: Planner, check: Check | None) -> tuple[bool, str]:
    """Whether the best contender fits, in words."""
    best, test = planner.belief.hypotheses[0].label, planner.belief.lack_of_fit
    problems = []
    if test.p < REJECT:
        problems.append(f"misses places by more than their repeats scatter (F = {test.f:.3g}, p = {test.p:.2g})")
    elif test.rejected:
        problems.append(f"leaves residuals that bend along the axes (F = {test.bend_f:.3g}, p = {test.bend_p:.2g})")
    if check is not None and check.p < _OUTSIDE:
        problems.append(
            f"misses the check: predicted {check.predicted:.4g}, observed {check.observed:.4g} (p = {check.p:.2g})"
        )
    if problems:
        return False, f"the form {best} does not fit: it " + "; it ".join(problems)
    doubt = ""
    if check is not None and check.outside:
        doubt = f"; but the check lies outside its 95 % interval, which chance alone does once in twenty (p = {check.p:.2g})"
    if not test.tested:
        return True, f"{best}: too few rows to test its fit, so that no width is believed{doubt}"
    repeats = "" if math.isnan(test.p) else f"repeats p = {test.p:.2g}, "
    return True, f"{best}: no sign of lack of fit ({repeats}bend p = {test.bend_p:.2g}){doubt}"


def _exp(values: Array) -> Array:
    return np.exp(values)


def _same(values: Array) -> Array:
    return values
