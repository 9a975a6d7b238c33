"""``isoflop.fit``: a law on a table, with intervals, verdicts, diagnostics and a record of how it was done."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version

import numpy as np

from isoflop.core.errors import UserError, unknown
from isoflop.core.expressions import Array
from isoflop.laws import wald
from isoflop.laws.base import Bounds, LawForm, resolve_form
from isoflop.laws.bootstrap import Resamples, too_few
from isoflop.laws.bootstrap import bootstrap as draw_resamples
from isoflop.laws.diagnostics import lack_of_fit, residual_diagnostics
from isoflop.laws.engine import AT_BOUND, Box, NotEstimable, Optimum, check_estimable, fit_groups, make_box
from isoflop.laws.inference import derived_estimates, parameter_estimates
from isoflop.laws.objective import Objective
from isoflop.laws.result import Fit, GroupedFit
from isoflop.laws.table import Columns, GroupData, Tabular, as_table, describe_key, load_groups
from isoflop.laws.validation import validate


def fit(
    table: Tabular,
    law: str | LawForm = "product",
    y: str = "error",
    map: Mapping[str, str] | None = None,
    by: Sequence[str] | str = (),
    objective: str = "squared",
    delta: float = 1e-3,
    weights: str | None = None,
    where: str | None = None,
    cluster: str | None = None,
    bounds: Mapping[str, Bounds] | None = None,
    fixed: Mapping[str, float] | None = None,
    bootstrap: int = 400,
    scheme: str | None = None,
    profile: bool = True,
    level: float = 0.95,
    starts: int | None = None,
    seed: int = 0,
) -> Fit | GroupedFit:
    """Fit a law to the rows of a table.

    Args:
        table: Arrow table, pandas DataFrame or dict of columns.
        law: a registered name, a ``LawForm``, or an expression such as ``"E + A*N**-alpha + B*D**-beta"``, whose variables
            are then the keys of ``map``.
        y: target column, or an expression of columns (``"1 - score"``).
        map: variable -> column or expression of columns (``{"N": "params_b*1e9"}``); a variable that is not listed is the
            column of its name. Costs are evaluated on the same variables, so units agree between law and cost.
        by: columns whose distinct values are fitted apart; gives a ``GroupedFit``.
        objective: ``squared``, ``huber`` (on residuals of y), ``squared-log``, ``huber-log`` (on residuals of ln y).
        delta: where Huber's terms turn linear, in units of the residual.
        weights: column of weights, e.g. ``"1/stderr**2"``.
        where: SQL condition on the rows.
        cluster: column that names runs or models; the bootstrap then resamples whole clusters.
        bounds, fixed: per parameter, in natural units; on top of the form's own.
        bootstrap: resamples (0: none); scheme: ``cases``, ``cluster``, ``wild``, ``parametric``.
        profile: compute profile-likelihood ranges, which the verdicts rest on, and leave-largest-out errors for the record.
        level: of all intervals.
        starts: polished starts per fit (default: the form's).
        seed: of the search design and the resamples.

    Raises:
        UserError: for anything wrong with the input, in one line. ``NotEstimable`` names the parameter.
    """
    mapping = dict(map or {})
    form = resolve_form(law, list(mapping))
    for name in mapping:
        if name not in form.variable_names:
            raise unknown(f"variable of law {form.name!r}", name, form.variable_names, "map")
    goal = Objective(objective, delta)
    columns = Columns(y, {v: mapping.get(v, v) for v in form.variable_names}, weights, cluster, where)
    groups_by = (by,) if isinstance(by, str) else tuple(by)
    if not 0 < level < 1:
        raise UserError(f"level = {level!r} must lie between 0 and 1")
    check_count("bootstrap", bootstrap)
    check_count("seed", seed)
    box = make_box(form, bounds, fixed)
    settings = Settings(
        goal, box, bootstrap, scheme or ("cluster" if cluster else "cases"), profile, level, starts, seed
    )
    groups = load_groups(as_table(table), form, columns, groups_by, goal.log)
    return fit_data(form, groups, columns, settings, groups_by)


def check_count(name: str, value: object) -> None:
    """Raise UserError for what is no whole number from 0."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 0:
        raise UserError(f"{name} = {value!r}; allowed: whole numbers from 0")


_FAR_OFF = 1.5  # scatter of rows with much leverage over that of the others
_FEW_COPIES = 0.1  # share of the rows


@dataclass(frozen=True)
class Settings:
    """Everything about a fit that is not data; the fields are as in ``fit``."""

    objective: Objective
    box: Box
    resamples: int = 0
    scheme: str = "cases"
    profile: bool = False
    level: float = 0.95
    starts: int | None = None
    seed: int = 0


@np.errstate(all="ignore")  # what is not finite ends as None in the results, with a verdict
def fit_data(
    form: LawForm, groups: Sequence[GroupData], columns: Columns, settings: Settings, by: tuple[str, ...] = ()
) -> Fit | GroupedFit:
    """Fit groups that are already arrays; a group that cannot be estimated is refused, the others are fitted."""
    usable: list[GroupData] = []
    refused: list[tuple[dict[str, object], str]] = []
    for data in groups:
        try:
            check_estimable(form, data, settings.box)
            usable.append(data)
        except NotEstimable as error:
            if not by:
                raise
            refused.append((data.key, str(error)))
    if not usable:
        raise UserError(f"no group can be fitted: {refused[0][1]}{describe_key(refused[0][0])}")
    box, goal = settings.box, settings.objective
    optima = fit_groups(form, usable, box, goal, settings.starts, settings.seed)
    draws: Sequence[Resamples | None] = [None] * len(usable)
    if settings.resamples:
        draws = draw_resamples(form, usable, optima, box, goal, settings.resamples, settings.scheme, seed=settings.seed)
    fits = [
        _assemble(form, d, best, drawn, columns, settings) for d, best, drawn in zip(usable, optima, draws, strict=True)
    ]
    return GroupedFit(by, fits, refused) if by else fits[0]


def _assemble(
    form: LawForm, data: GroupData, best: Optimum, draws: Resamples | None, columns: Columns, settings: Settings
) -> Fit:
    box, goal = settings.box, settings.objective
    f = form.evaluate(data.x, best.p)
    residual = data.y - f
    sse = float(np.sum(data.w * residual**2))
    mean = float(np.sum(data.w * data.y) / np.sum(data.w))
    total = float(np.sum(data.w * (data.y - mean) ** 2))
    free = box.free & ~np.isin(form.names, best.at_bound)
    cov = wald.covariance(form, data, best.p, goal, free)
    fitted = Fit(
        form=form,
        p=best.p,
        cov=cov,
        params=parameter_estimates(form, data, best, box, goal, cov, draws, settings.profile, settings.level),
        derived={},
        objective=goal.kind,
        delta=goal.delta,
        loss=best.loss,
        sse=sse,
        rmse=math.sqrt(sse / float(np.sum(data.w))),
        r2=1 - sse / total if total > 0 else math.nan,
        n=data.n,
        status=best.status,
        columns=columns,
        box=box,
        key=data.key,
        level=settings.level,
        warnings=_warnings(form, best, data, draws, settings),
        record=_record(form, best, data, draws, settings),
        data_hash=data.data_hash,
        samples=draws,
        data=data,
    )
    fitted.record["covariance"] = _covariance_kind(data, goal, wald.widening(form, data, best.p, goal, free))
    fitted.derived = derived_estimates(fitted)
    fitted.diagnostics = residual_diagnostics(form, data, goal.residual(data.y, f) if goal.log else residual)
    if settings.profile:
        fitted.record["validation"] = validate(form, data, box, goal)
    repeats = None if goal.robust or goal.log else lack_of_fit(form, data, best.p, int(box.free.sum()))
    if repeats is not None:
        fitted.diagnostics["lack_of_fit"] = repeats
    return fitted


def _warnings(form: LawForm, best: Optimum, data: GroupData, draws: Resamples | None, settings: Settings) -> list[str]:
    words = []
    if best.status != "converged":
        words.append(best.status + (": " + ", ".join(best.at_bound) if best.status == AT_BOUND else ""))
    if best.at_best < max(1, 0.05 * best.starts):
        words.append(f"only {best.at_best} of {best.starts} starts reached the best loss")
    if best.minima:
        words.append(f"{len(best.minima)} other minima within 5% of the best loss: extrapolations differ between them")
    words += _copies(data)
    if settings.objective.robust and (draws is None or not draws.enough(settings.level)):
        free = settings.box.free & ~np.isin(form.names, best.at_bound)
        times = wald.far_scatter(form, data, best.p, settings.objective, free)
        if times > _FAR_OFF:
            words.append(
                f"rows far out, which decide most, scatter {times:.2g} times as much as the others: under Huber terms only a "
                "bootstrap (--bootstrap) gives their intervals, those here are too narrow"
            )
    if data.dropped:
        words.append("left out: " + ", ".join(f"{n} rows {why}" for why, n in data.dropped.items()))
    for variable in form.variable_names:
        span = float(np.max(data.x[variable]) / np.min(data.x[variable])) if np.min(data.x[variable]) > 0 else math.inf
        if span < 10:
            words.append(f"{variable} spans only a factor of {span:.3g}: do not extrapolate far")
    if draws is not None and not draws.enough(settings.level):
        words.append(f"no interval comes from the bootstrap: {too_few(len(draws.p), settings.level)}")
    elif draws is not None:
        edges = ", ".join(f"{n} in {k}" for n, k in draws.at_bound.items())
        if edges:
            words.append(f"resamples on a bound: {edges} of {len(draws.p)}")
        if draws.failed:
            words.append(f"{draws.failed} of {len(draws.p)} resamples did not converge")
    if settings.scheme == "cases" and data.n < 15 and draws is not None:
        words.append(f"n = {data.n}: prefer scheme='parametric' for intervals from so few rows")
    return words


def _covariance_kind(data: GroupData, goal: Objective, widen_P: Array) -> str:
    if data.cluster is not None:
        return "sandwich, jackknife by cluster (CR3)"
    if goal.robust or np.any(widen_P > 1):
        return "sandwich, jackknife by row (HC3)"
    return "SSE/(n - p) (J^T J)^-1: no sign of unequal noise"


def _copies(data: GroupData) -> list[str]:
    """A sentence where rows repeat others exactly: copies count as evidence, and narrow every interval.

    Copies within a cluster do no harm. A few equal rows are what scores of few examples give by chance.
    """
    columns = [*data.x.values(), data.y, data.w]
    different = len(np.unique(np.stack(columns, axis=1), axis=0))
    if data.cluster is not None:
        seen = np.unique(np.stack([*columns, data.cluster], axis=1), axis=0)[:, :-1]
        copies = len(seen) - different
    else:
        copies = data.n - different
    if copies < max(2, _FEW_COPIES * data.n):
        return []
    return [
        f"{copies} of {data.n} rows repeat others exactly, and narrow the intervals as if they were new: leave copies out, or "
        "name the column that copies share (--cluster)"
    ]


def _record(
    form: LawForm, best: Optimum, data: GroupData, draws: Resamples | None, settings: Settings
) -> dict[str, object]:
    """What the reporting checklist asks for and the result does not hold elsewhere."""
    levels = {v: len(np.unique(data.x[v])) for v in form.variable_names}
    return {
        "hypothesis": {
            "formula": form.formula,
            "source": form.source,
            "units": {v.name: v.unit or "unit of its column" for v in form.variables},
            "response": "ln y" if settings.objective.log else "y",
        },
        "data": {
            "rows": data.n,
            "levels": levels,
            "ranges": {v: [float(np.min(data.x[v])), float(np.max(data.x[v]))] for v in form.variable_names},
            "y_range": [float(np.min(data.y)), float(np.max(data.y))],
            "dropped": data.dropped,
        },
        "optimiser": {
            "method": "variable projection search, then batched bounded Levenberg-Marquardt on all parameters",
            "tolerance": "predicted relative decrease of the summed objective below 1e-14",
            "search": {p.name: list(p.search) for p in form.parameters if not p.linear},
            "search_points": form.search_points,
            "starts": best.starts,
            "starts_at_best": best.at_best,
            "iterations": best.iterations,
            "scales": best.scales,
            "at_bound": best.at_bound,
            "other_minima": [{"loss": loss, "params": [float(v) for v in p]} for loss, p in best.minima],
            "seed": settings.seed,
        },
        "bootstrap": None
        if draws is None
        else {
            "scheme": draws.scheme,
            "resamples": len(draws.p),
            "starts_per_resample": 3,
            "not_converged": draws.failed,
            "at_bound": draws.at_bound,
        },
        "software": {"isoflop": _version("isoflop"), "numpy": np.__version__},
    }


@lru_cache
def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


def natural_array(form: LawForm, params: Mapping[str, float]) -> Array:
    """Parameters by name as an array (P,); a UserError names a missing or unknown one."""
    for name in params:
        form.position(name)
    missing = [n for n in form.names if n not in params]
    if missing:
        raise UserError(f"law {form.name!r}: a value for {missing[0]} is needed")
    return np.array([float(params[n]) for n in form.names])
