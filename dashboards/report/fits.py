"""What the fitted laws alone show: curves against each variable, and predictions of held-out rows."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from isoflop.core.expressions import Array
from isoflop.core.numbers import short
from isoflop.dashboards.report import charts
from isoflop.dashboards.report.charts import Json
from isoflop.laws.engine import NotEstimable, check_estimable, fit_groups
from isoflop.laws.extrapolation import splits
from isoflop.laws.objective import Objective
from isoflop.laws.result import Fit
from isoflop.sweep.results import Findings

_LEVELS, _GRID = 6, 48


def name(key: Mapping[str, object], otherwise: str) -> str:
    """A group of a grouped fit in words."""
    return ", ".join(str(v) for v in key.values()) or otherwise


def curves(findings: Findings) -> list[Json]:
    """Error against each variable of each law, its curves at levels of the others."""
    found: dict[str, list[Json]] = {}
    for law in findings.laws:
        for fit in law.fits:
            for variable in fit.form.variable_names:
                if fit.data is not None and len(np.unique(fit.data.x[variable])) > 1:
                    found.setdefault(f"{fit.law}: against {variable}", []).append(_curve_panel(fit, variable))
    return [charts.group(title, panels) for title, panels in found.items()]


def _curve_panel(fit: Fit, variable: str) -> Json:
    assert fit.data is not None
    x, others = fit.data.x, [v for v in fit.form.variable_names if v != variable]
    levels, label = np.zeros((1, 0)), np.zeros(fit.data.n, dtype=np.int64)
    if others:
        levels, label = np.unique(np.stack([x[v] for v in others], axis=1), axis=0, return_inverse=True)
        label = label.ravel()
    grid = between(float(x[variable].min()), float(x[variable].max()))
    content = []
    for k, i in enumerate(np.unique(np.linspace(0, len(levels) - 1, min(len(levels), _LEVELS)).round().astype(int))):
        values = dict(zip(others, levels[i].tolist(), strict=True))
        at = {variable: grid, **{v: np.full_like(grid, a) for v, a in values.items()}}
        low, high = fit.predict_interval(at) if fit.resampled else (None, None)
        text = ", ".join(f"{v} = {short(a)}" for v, a in values.items())
        y = fit.predict(**at)
        line = [
            charts.point(
                float(a),
                float(b),
                text,
                *((float(low[j]), float(high[j])) if low is not None and high is not None else ()),
            )
            for j, (a, b) in enumerate(zip(grid, y, strict=True))
        ]
        dots = [charts.point(float(x[variable][j]), float(fit.data.y[j]), text) for j in np.flatnonzero(label == i)]
        own = text or "measured"
        content.append(charts.series(f"law, {own}", k, line, line=True, dots=False, band=True, of=own))
        content.append(charts.series(own, k, dots))
    chart = charts.xy(
        f"{name(fit.key, fit.law)}: {fit.columns.y} against {variable}",
        charts.axis(AXES.get(variable, variable), log=charts.spread(x[variable].tolist(), 4)),
        charts.axis(fit.columns.y, log=charts.spread(fit.data.y.tolist())),
        content,
    )
    return charts.panel(name(fit.key, fit.law), chart)


AXES = {
    "N": "N, parameters of the language model",
    "V": "V, visual tokens per answer",
    "Q": "Q, text tokens per answer",
}


def between(low: float, high: float) -> Array:
    """A grid from ``low`` to ``high``, even on a logarithmic axis where that is possible."""
    return np.geomspace(low, high, _GRID) if low > 0 else np.linspace(low, high, _GRID)


def predictions(findings: Findings) -> list[Json]:
    """Observed against predicted; the rows of the largest size as a fit without them predicts them."""
    found: dict[str, list[Json]] = {}
    for law in findings.laws:
        for fit in law.fits:
            if fit.data is not None:
                found.setdefault(fit.law, []).append(_prediction_panel(fit))
    return [charts.group(title, panels) for title, panels in found.items()]


def _prediction_panel(fit: Fit) -> Json:
    assert fit.data is not None
    inside = fit.predict(**fit.data.x)
    content = [charts.series("in the fit", 0, _scatter(fit, inside, np.ones(fit.data.n, dtype=bool)))]
    text = ""
    held = held_out(fit)
    if held is not None:
        along, test, outside = held
        sizes = ", ".join(short(float(v)) for v in np.unique(fit.data.x[along][test]))
        content.append(charts.series(f"held out: {along} = {sizes}", 1, _scatter(fit, outside, test), hollow=True))
        rmse = [float(np.sqrt(np.mean((p[test] - fit.data.y[test]) ** 2))) for p in (outside, inside)]
        text = (
            f"Without the rows at {along} = {sizes} the law predicts these with an RMSE of {short(rmse[0])}; "
            f"fitted on them, too, {short(rmse[1])}."
        )
    log = charts.spread([*fit.data.y.tolist(), *inside.tolist()])
    title = f"{name(fit.key, fit.law)}: observed against predicted {fit.columns.y}"
    x, y = charts.axis(f"predicted {fit.columns.y}", log=log), charts.axis(f"observed {fit.columns.y}", log=log)
    return charts.panel(name(fit.key, fit.law), charts.xy(title, x, y, content, diagonal=True), text)


def _scatter(fit: Fit, predicted: Array, chosen: np.ndarray) -> list[Json]:
    assert fit.data is not None
    return [
        charts.point(
            float(predicted[j]),
            float(fit.data.y[j]),
            ", ".join(f"{v} = {short(float(a[j]))}" for v, a in fit.data.x.items()),
        )
        for j in np.flatnonzero(chosen)
    ]


def held_out(fit: Fit) -> tuple[str, np.ndarray, Array] | None:
    """Variable, mask and predictions of the largest size, from a fit of the same form without it.

    The variable is the first with three levels or more, as in the fit's own validation. None when nothing can be held out.
    """
    assert fit.data is not None
    along = next((v for v in fit.form.variable_names if len(np.unique(fit.data.x[v])) >= 3), None)
    cuts = splits(fit.data, along) if along is not None else []
    if along is None or not cuts:
        return None
    train, test = cuts[0]
    part = fit.data.take(train)
    try:
        check_estimable(fit.form, part, fit.box)
    except NotEstimable:
        return None
    best = fit_groups(fit.form, [part], fit.box, Objective(fit.objective, fit.delta))[0]
    return along, test, fit.form.evaluate(fit.data.x, best.p)
