"""``isoflop.compare``: several forms on the same rows, by likelihood and by extrapolation, always beside plain baselines."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from isoflop.core.errors import UserError, unknown
from isoflop.laws.base import LawForm, resolve_form
from isoflop.laws.bootstrap import enough_resamples, too_few
from isoflop.laws.compared import Comparison, Comparisons, Entry
from isoflop.laws.engine import NotEstimable, make_box
from isoflop.laws.extrapolation import BASELINES, LEVEL, baseline_rollout, interpolation_error, rollout, splits
from isoflop.laws.fitting import Settings, check_count, fit_data
from isoflop.laws.objective import Objective
from isoflop.laws.result import Fit
from isoflop.laws.table import Columns, GroupData, Tabular, as_table, describe_key, load_groups
from isoflop.laws.validation import semilog

DEFAULT_FORMS = ("product", "semilog")


@dataclass(frozen=True)
class _Question:
    """What is asked of every form and group alike: see :func:`compare`."""

    columns: Columns
    goal: Objective
    along: str
    resamples: int
    seed: int


def compare(
    table: Tabular,
    forms: Sequence[str | LawForm] | Mapping[str, Mapping[str, Any]] = DEFAULT_FORMS,
    y: str = "error",
    map: Mapping[str, str] | None = None,
    by: Sequence[str] | str = (),
    objective: str = "squared",
    delta: float = 1e-3,
    weights: str | None = None,
    where: str | None = None,
    along: str | None = None,
    bootstrap: int = 0,
    seed: int = 0,
) -> Comparison | Comparisons:
    """Fit several forms to the same rows and judge them by AICc and by leave-largest-out.

    Args:
        table: Arrow table, pandas DataFrame or dict of columns.
        forms: names, expressions or ``LawForm``s; or label -> options (``law``, ``fixed``, ``bounds``), e.g.
            ``{"no floor": {"law": "product", "fixed": {"E": 0}}}``. A semilog in the same variables is always added.
        map, y, weights, where, objective, delta: as in ``fit``; the union of the forms' variables must be mapped.
        by: columns whose distinct values are compared apart; gives ``Comparisons``.
        along: the size whose largest values are held out; default: the first variable.
        bootstrap: resamples for the coverage of held-out prediction intervals (0: none).
    """
    mapping, goal = dict(map or {}), Objective(objective, delta)
    check_count("bootstrap", bootstrap)
    check_count("seed", seed)
    asked = _labelled(forms, list(mapping))
    variables = list(dict.fromkeys(v for form, _ in asked.values() for v in form.variable_names))
    for name in mapping:
        if name not in variables:
            raise unknown("variable of these forms", name, variables, "map")
    columns = Columns(y, {v: mapping.get(v, v) for v in variables}, weights, None, where)
    groups_by = (by,) if isinstance(by, str) else tuple(by)
    groups = load_groups(as_table(table), semilog(variables), columns, groups_by, goal.log)
    question = _Question(columns, goal, along or variables[0], bootstrap, seed)
    found, refused = [], list[tuple[dict[str, Any], str]]()
    for data in groups:
        if data.n == 0:
            refused.append((data.key, "no finite rows to fit"))
            continue
        found.append(_compare(asked, data, question))
    if not found:
        raise UserError(f"no group can be compared: {refused[0][1]}{describe_key(refused[0][0])}")
    return Comparisons(groups_by, found, refused) if groups_by else found[0]


def _compare(
    forms: Mapping[str, tuple[LawForm, dict[str, Any]]],
    data: GroupData,
    question: _Question,
) -> Comparison:
    asked, everything = dict(forms), semilog(list(data.x))
    if not any("log(" in form.formula and not form.nonlinear for form, _ in asked.values()) and all(
        np.all(x > 0) for x in data.x.values()
    ):
        asked["semilog (baseline)"] = (everything, {})
    along, resamples = question.along, question.resamples
    cuts = splits(data, along)
    entries = [_entry(label, form, options, data, question) for label, (form, options) in asked.items()]
    _rank(entries)
    entries.sort(key=lambda e: math.inf if e.aicc is None else e.aicc)
    entries += [Entry(name, cuts=baseline_rollout(name, data, along, cuts)) for name in BASELINES]
    verdict = _verdict(entries)
    if resamples and not enough_resamples(resamples, LEVEL):
        verdict.append(f"no coverage: {too_few(resamples, LEVEL)}")
    return Comparison(entries, along, data.n, verdict, data.data_hash, data.key)


def _labelled(forms: Any, variables: list[str]) -> dict[str, tuple[LawForm, dict[str, Any]]]:
    if isinstance(forms, str):
        forms = [forms]
    if isinstance(forms, Mapping):
        return {
            str(k): (resolve_form(o.get("law", k), variables), {n: v for n, v in o.items() if n != "law"})
            for k, o in forms.items()
        }
    out: dict[str, tuple[LawForm, dict[str, Any]]] = {}
    for form in forms:
        resolved = resolve_form(form, variables)
        label = form if isinstance(form, str) else resolved.name
        if label in out:
            raise UserError(f"compare: form {label!r} is given twice")
        out[label] = (resolved, {})
    if not out:
        raise UserError("compare: at least one form is needed")
    return out


def _entry(
    label: str,
    form: LawForm,
    options: Mapping[str, Any],
    data: GroupData,
    question: _Question,
) -> Entry:
    foreign = sorted(set(options) - {"fixed", "bounds"})
    if foreign:
        raise UserError(f"compare: form {label!r} has an unknown option {foreign[0]!r}; allowed: law, fixed, bounds")
    box = make_box(form, options.get("bounds"), options.get("fixed"))
    own = GroupData(
        data.key,
        {v: data.x[v] for v in form.variable_names},
        data.y,
        data.w,
        data.cluster,
        data.dropped,
        data.data_hash,
    )
    columns, goal, along, seed = question.columns, question.goal, question.along, question.seed
    mine = Columns(
        columns.y, {v: columns.variables[v] for v in form.variable_names}, columns.weights, None, columns.condition
    )
    try:
        fitted = fit_data(form, [own], mine, Settings(goal, box, seed=seed))
    except NotEstimable as error:
        return Entry(label, refused=str(error))
    assert isinstance(fitted, Fit)
    entry = Entry(label, fitted, k=int(box.free.sum()) + 1)
    entry.aicc, entry.bic = information(fitted)
    if along in form.variable_names:
        entry.cuts = rollout(form, own, box, goal, along, question.resamples, seed=seed)
    entry.interpolation = interpolation_error(form, own, box, goal, seed=seed)
    return entry


def information(fit: Fit) -> tuple[float | None, float | None]:
    """AICc and BIC on the scale of y, sigma counted; None where no likelihood matches the objective.

    Least squares: n ln(SSE/n), plus 2 sum ln y for a fit to ln y. Huber terms of which most lie beyond delta: Laplace.
    """
    if fit.data is None:
        raise UserError("information criteria need the fit's rows, in memory")
    n, k = fit.n, int(fit.box.free.sum()) + 1
    goal = Objective(fit.objective, fit.delta)
    r = goal.residual(fit.form.evaluate(fit.data.x, fit.p), fit.data.y)
    shift = 2 * float(np.sum(np.log(fit.data.y))) if goal.log else 0.0
    if not goal.robust:
        sse = float(np.sum(fit.data.w * r**2))
        if sse <= 0:
            return None, None
        value = n * math.log(sse / n) + shift
    elif float(np.median(np.abs(r))) > goal.delta:
        spread = float(np.sum(fit.data.w * np.abs(r))) / n
        value = 2 * n * math.log(2 * spread) + 2 * n - n * (1 + math.log(2 * math.pi)) + shift
    else:
        return None, None
    aicc = value + 2 * k + 2 * k * (k + 1) / (n - k - 1) if n > k + 1 else None
    return aicc, value + k * math.log(n)


def nested_test(small: Fit, big: Fit, boundary: bool = False) -> dict[str, float]:
    """F test of a law against one that contains it, on the same rows.

    ``boundary``: the small law puts one parameter on the edge of its range (E = 0); the null is then a 50:50 mixture of
    chi-square with 0 and 1 degrees of freedom, and the p-value halves.
    """
    if small.n != big.n or small.columns.y != big.columns.y or small.objective != big.objective:
        raise UserError("nested_test: both fits must use the same rows, target and objective")
    if big.objective not in ("squared", "squared-log"):
        raise UserError(f"nested_test: objective {big.objective!r} has no F test; fit with 'squared' or 'squared-log'")
    p_small, p_big = int(small.box.free.sum()), int(big.box.free.sum())
    extra, dof = p_big - p_small, big.n - p_big
    if extra <= 0 or dof <= 0:
        raise UserError(
            f"nested_test: the big law has {p_big} free parameters, the small one {p_small}, on {big.n} rows"
        )
    ratio = ((small.loss - big.loss) / extra) / (big.loss / dof)
    p = float(stats.f.sf(max(ratio, 0.0), extra, dof))
    return {"F": ratio, "p": 0.5 * p if boundary and extra == 1 else p, "extra": extra, "dof": dof}


def _rank(entries: list[Entry]) -> None:
    scored = [(e, e.aicc) for e in entries if e.aicc is not None]
    if not scored:
        return
    best = min(a for _, a in scored)
    total = sum(math.exp(-0.5 * (a - best)) for _, a in scored)
    for entry, a in scored:
        entry.delta, entry.weight = a - best, math.exp(-0.5 * (a - best)) / total


def _verdict(entries: list[Entry]) -> list[str]:
    words = []
    scored = [e for e in entries if e.delta is not None]
    judged = [e for e in entries if e.cuts]
    if scored:
        rivals = [e.label for e in scored if (e.delta or 0.0) < 2]
        words.append(
            f"AICc: {rivals[0]}" if len(rivals) == 1 else f"AICc cannot decide between {', '.join(rivals)} (Δ < 2)"
        )
    if judged:
        best = min(judged, key=lambda e: e.cuts[0].rmse)
        words.append(f"extrapolation to the largest size: {best.label} (RMSE {best.cuts[0].rmse:.3g})")
        if scored and best.label != scored[0].label:
            words.append("the two criteria disagree: look at both, and at the sign of the bias")
        floor = min((e.cuts[0].rmse for e in judged if e.fit is None), default=math.inf)
        worse = [e.label for e in judged if e.fit is not None and e.cuts[0].rmse > floor]
        if worse:
            words.append(f"no better than a baseline without a law: {', '.join(worse)}")
    return words
