"""``isoflop.plot``: a Plotly figure of whatever a sweep, a law or a frontier returned.

Log axes for sizes and costs, intervals as bands, colours from :mod:`isoflop.dashboards.palette`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from isoflop.core.errors import UserError
from isoflop.dashboards.palette import LIGHT, SERIES, faded, series, symbol
from isoflop.frontier.answers import Answers
from isoflop.frontier.methods import MethodComparison
from isoflop.frontier.rate_tables import RateCurves
from isoflop.frontier.raw import ParetoSet
from isoflop.frontier.result import Frontier, Frontiers
from isoflop.laws.compared import Comparison, Comparisons
from isoflop.laws.curves import curves
from isoflop.laws.result import Fit, GroupedFit
from isoflop.sweep.results import Findings, file_stem
from isoflop.track import Artifact


def plot(found: Any) -> go.Figure:
    """A figure of a result.

    ==========================================  ================================================================
    result of                                   figure
    ==========================================  ================================================================
    ``isoflop.fit``, ``sweep.fit()``            data and law against the first variable, a colour per level of
                                                the others, the bootstrap band of the mean
    ``isoflop.compare``                         held-out error against the extrapolation factor, a line per form
    ``sweep.frontier()``                        predicted error of the best configuration along the budgets
    ``isoflop.pareto``, ``sweep.pareto()``      the rows that no other row beats, in the first two objectives
    ``sweep.rate_curves()``                     error over the rate, a curve per codec
    ``isoflop.answers``                         error over cost as measured, a line per method
    ``compare_methods``                         predicted error of each method along the budgets
    ==========================================  ================================================================

    Raises:
        UserError: there is no figure of this.
    """
    for kind, draw in _DRAWN.items():
        if isinstance(found, kind):
            figure: go.Figure = draw(found)
            return figure
    kinds = ", ".join(kind.__name__ for kind in _DRAWN)
    raise UserError(f"isoflop.plot draws results ({kinds}), not {type(found).__name__}")


def figures(findings: Findings) -> dict[str, go.Figure]:
    """The figures of a sweep's laws and frontiers, by the stem of a file name."""
    out = {}
    for index, frontiers in enumerate(findings.frontiers):
        for number, frontier in enumerate(frontiers.frontiers):
            out[f"frontier-{index}-{_label(frontier.key, number)}"] = plot(frontier)
    for index, law in enumerate(findings.laws):
        for number, fit in enumerate(law.fits):
            out[f"law-{index}-{_label(fit.key, number)}"] = plot(fit)
    return out


def artifacts(findings: Findings) -> Sequence[Artifact]:
    """The figures of a sweep's laws and frontiers as interactive pages, for its run in MLflow."""
    return [
        Artifact(f"{stem}.html", figure.to_html(include_plotlyjs=True)) for stem, figure in figures(findings).items()
    ]


def _label(key: dict[str, Any], number: int) -> str:
    return "-".join(file_stem(str(v)) for v in key.values()) or str(number)


def _figure(**layout: Any) -> go.Figure:
    margin = {"l": 60, "r": 20, "t": 50, "b": 50}
    return go.Figure(layout={"template": "plotly_white", "colorway": SERIES, "margin": margin, **layout})


def _band(x: Sequence[float], low: Sequence[float], high: Sequence[float], colour: str, group: str = "") -> go.Scatter:
    return go.Scatter(
        x=[*x, *reversed(x)],
        y=[*high, *reversed(low)],
        fill="toself",
        fillcolor=faded(colour),
        line={"width": 0},
        hoverinfo="skip",
        showlegend=False,
        legendgroup=group or None,
    )


def _add_fit(figure: go.Figure, fit: Fit, prefix: str = "") -> None:
    for k, curve in enumerate(curves(fit)):
        colour = series(k)
        name = prefix + (", ".join(f"{v} = {a:g}" for v, a in curve.level.items()) or "law")
        if curve.low is not None and curve.high is not None:
            figure.add_trace(_band(curve.x.tolist(), curve.low.tolist(), curve.high.tolist(), colour, name))
        shared = {"name": name, "legendgroup": name}
        figure.add_trace(go.Scatter(x=curve.x, y=curve.y, mode="lines", line={"color": colour}, **shared))
        dots = {"color": colour, "size": 7}
        x, y = curve.measured_x, curve.measured_y
        figure.add_trace(go.Scatter(x=x, y=y, mode="markers", marker=dots, showlegend=False, **shared))


def _fit(fit: Fit) -> go.Figure:
    title = f"{fit.law}: {fit.form.formula}"
    figure = _figure(title=title, yaxis_title=fit.columns.y, xaxis_title=fit.form.variable_names[0])
    figure.update_xaxes(type="log")
    _add_fit(figure, fit)
    return figure


def _grouped_fit(grouped: GroupedFit) -> go.Figure:
    first = grouped.fits[0]
    title = f"{first.law} by {', '.join(grouped.by)}"
    figure = _figure(title=title, yaxis_title=first.columns.y, xaxis_title=first.form.variable_names[0])
    figure.update_xaxes(type="log")
    for fit in grouped.fits:
        _add_fit(figure, fit, prefix=" / ".join(str(v) for v in fit.key.values()) + ": ")
    return figure


def _comparison(comparison: Comparison) -> go.Figure:
    figure = _figure(
        title=f"leaving out the largest {comparison.along}",
        xaxis_title="decades of extrapolation",
        yaxis_title="held-out RMSE",
    )
    figure.update_yaxes(type="log")
    for k, entry in enumerate(e for e in comparison.entries if e.cuts):
        line = {"color": series(k), "dash": "dot" if entry.fit is None else "solid"}
        x, y = [c.decades for c in entry.cuts], [c.rmse for c in entry.cuts]
        figure.add_trace(go.Scatter(x=x, y=y, mode="lines+markers", name=entry.label, line=line))
    return figure


def _add_frontier(figure: go.Figure, frontier: Frontier, k: int) -> None:
    colour = series(k)
    budget = [p.budget for p in frontier.points]
    error = [p.error.value for p in frontier.points]
    name = " / ".join(str(v) for v in frontier.key.values()) or "best by the law"
    ends = [p.error.interval for p in frontier.points if p.error.interval is not None]
    if len(ends) == len(frontier.points):
        figure.add_trace(_band(budget, [low for low, _ in ends], [high for _, high in ends], colour))
    hover = "%{x:.4g}: %{y:.4g}<br>%{text}"
    text = [", ".join(f"{v} = {e.value:.4g}" for v, e in p.continuous.items()) for p in frontier.points]
    style: dict[str, Any] = {"mode": "lines+markers", "line": {"color": colour}}
    figure.add_trace(go.Scatter(x=budget, y=error, name=name, text=text, hovertemplate=hover, **style))
    menu = [(p.budget, p.discrete[0]) for p in frontier.points if p.discrete]
    figure.add_trace(
        go.Scatter(
            x=[b for b, _ in menu],
            y=[c.error.value for _, c in menu],
            mode="markers",
            name=f"{name}: at hand",
            marker={"color": colour, "symbol": "diamond-open", "size": 9},
            text=[", ".join(f"{v} = {a:.4g}" for v, a in c.x.items()) for _, c in menu],
            hovertemplate=hover,
        )
    )


def _frontier(frontier: Frontier) -> go.Figure:
    title = f"frontier of {frontier.law}"
    figure = _figure(title=title, xaxis_title=frontier.cost, yaxis_title="predicted error")
    figure.update_xaxes(type="log")
    _add_frontier(figure, frontier, 0)
    return figure


def _frontiers(frontiers: Frontiers) -> go.Figure:
    title = f"frontiers of {frontiers[0].law}"
    figure = _figure(title=title, xaxis_title=frontiers[0].cost, yaxis_title="predicted error")
    figure.update_xaxes(type="log")
    for k, frontier in enumerate(frontiers):
        _add_frontier(figure, frontier, k)
    return figure


def _pareto(found: ParetoSet) -> go.Figure:
    names = list(found.objectives)[:2]
    values = [found.table[n].to_pylist() for n in names]
    figure = _figure(title=f"{len(found)} of {found.n} rows are on the frontier", xaxis_title=names[0])
    if len(names) == 1:
        figure.add_trace(go.Bar(x=values[0], name=names[0]))
        return figure
    figure.update_layout(yaxis_title=names[1])
    shape = "hv" if len(found.objectives) == 2 else None
    line = {"shape": shape, "color": series(0)}
    mode = "lines+markers" if shape else "markers"
    figure.add_trace(go.Scatter(x=values[0], y=values[1], mode=mode, line=line))
    return figure


def _rate_curves(found: RateCurves) -> go.Figure:
    figure = _figure(xaxis_title=found.rate, yaxis_title=found.error)
    figure.update_xaxes(type="log")
    for name, curve in found.named():
        figure.add_trace(go.Scatter(x=curve.rates, y=curve.errors, name=name, mode="lines+markers"))
    return figure


def _answers(found: Answers) -> go.Figure:
    asked: dict[str, int] = {}
    for answer in found:
        asked[answer.question] = max(len(answer.candidates), asked.get(answer.question, 0))
    widest = max(asked, key=lambda question: asked[question])  # whose candidates hold those of the others
    told = [answer for answer in found if answer.question == widest]
    differing = [name for name in told[0].key if len({answer.key.get(name) for answer in told}) > 1]
    groups = {" · ".join(answer.key[name] for name in differing): answer for answer in told}
    label = next((answer.axis for answer in groups.values() if answer.axis), found.cost)
    figure = _figure(title="error over cost, as measured", xaxis_title=label, yaxis_title="error")
    figure.update_xaxes(type="log")
    k = 0
    for name, answer in groups.items():
        compressed = [c for c in answer.candidates if not c["uncompressed"]]
        for method in dict.fromkeys(c["method"] for c in compressed):
            own = sorted((c for c in compressed if c["method"] == method), key=lambda c: c["cost"])
            figure.add_trace(
                go.Scatter(
                    x=[c["cost"] for c in own],
                    y=[c["error"] for c in own],
                    text=[c["configuration"] for c in own],
                    name=f"{name}: {method}" if len(groups) > 1 else method,
                    mode="lines+markers",
                    line={"color": series(k)},
                    marker={"symbol": symbol(k), "size": 9},
                    hovertemplate="%{text}<br>%{x:.4g}: %{y:.4g}",
                )
            )
            k += 1
        if answer.reference is not None and answer.reference["cost"]:
            called = f"{name}: uncompressed" if len(groups) > 1 else "uncompressed"
            _add_reference(figure, answer.reference, [c["cost"] for c in compressed], called)
    return figure


def _add_reference(figure: go.Figure, dense: Mapping[str, Any], costs: Sequence[float], name: str) -> None:
    """A star where the uncompressed model is, and its error over the costs of all others."""
    cost, error, grey = dense["cost"], dense["error"], LIGHT["faint"]
    ends = [min([cost, *costs]), max([cost, *costs])]
    line = {"color": grey, "dash": "dash", "width": 1}
    figure.add_trace(go.Scatter(x=ends, y=[error, error], mode="lines", line=line, showlegend=False, hoverinfo="skip"))
    mark = {"symbol": "star", "size": 13, "color": grey}
    figure.add_trace(
        go.Scatter(x=[cost], y=[error], text=[dense["configuration"]], name=name, mode="markers", marker=mark)
    )


def _method_comparison(found: MethodComparison) -> go.Figure:
    figure = _figure(title="methods at their own optimum", xaxis_title=found.cost, yaxis_title="predicted error")
    figure.update_xaxes(type="log")
    for k, method in enumerate(found.methods):
        estimates = found.error[method]
        ends = [e.interval for e in estimates if e.interval is not None]
        if len(ends) == len(estimates):
            low, high = zip(*ends, strict=True)
            figure.add_trace(_band(found.budgets, low, high, series(k), method))
        line = {"color": series(k)}
        figure.add_trace(
            go.Scatter(x=found.budgets, y=[e.value for e in estimates], mode="lines", name=method, line=line)
        )
    return figure


def _comparisons(found: Comparisons) -> go.Figure:
    if not found.comparisons:
        raise UserError("no group could be compared: there is nothing to draw")
    figure = _comparison(found[0])
    figure.data = ()
    k = 0
    for comparison in found:
        group = ", ".join(map(str, comparison.key.values()))
        for trace in _comparison(comparison).data:
            trace.update(name=f"{group}: {trace.name}", line_color=series(k))
            figure.add_trace(trace)
            k += 1
    return figure


_DRAWN: dict[type, Callable[[Any], go.Figure]] = {
    Fit: _fit,
    GroupedFit: _grouped_fit,
    Comparison: _comparison,
    Frontier: _frontier,
    Frontiers: _frontiers,
    ParetoSet: _pareto,
    RateCurves: _rate_curves,
    Answers: _answers,
    MethodComparison: _method_comparison,
    Comparisons: _comparisons,
}
