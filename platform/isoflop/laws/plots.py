"""Plotly figures of fits and frontiers. One palette, log axes for sizes and costs, intervals as bands."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from isoflop.frontier.raw import ParetoSet
    from isoflop.frontier.result import Frontier, Frontiers
    from isoflop.laws.comparison import Comparison
    from isoflop.laws.result import Fit, GroupedFit

PALETTE = ("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#3ca951", "#ff8ab7", "#a463f2", "#97bbf5", "#9c6b4e", "#9498a0")


def _figure(**layout: Any) -> go.Figure:
    import plotly.graph_objects as go

    figure = go.Figure()
    figure.update_layout(template="plotly_white", margin={"l": 60, "r": 20, "t": 50, "b": 50}, **layout)
    return figure


def _fade(colour: str, alpha: float = 0.18) -> str:
    r, g, b = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({r},{g},{b},{alpha})"


def _add_fit(figure: go.Figure, fit: Fit, prefix: str = "") -> None:
    import plotly.graph_objects as go

    if fit.data is None:
        raise ValueError("the fit was reloaded without its rows: nothing to plot against")
    first, *others = fit.form.variable_names
    x = fit.data.x
    label = np.zeros(fit.data.n, dtype=np.int64)
    levels = np.zeros((1, 0))
    if others:
        levels, label = np.unique(np.stack([x[v] for v in others], axis=1), axis=0, return_inverse=True)
        label = label.ravel()
    shown = np.unique(np.linspace(0, len(levels) - 1, min(len(levels), 8)).round().astype(int))
    grid = (
        np.geomspace(x[first].min(), x[first].max(), 80)
        if x[first].min() > 0
        else np.linspace(x[first].min(), x[first].max(), 80)
    )
    for k, i in enumerate(shown):
        colour = PALETTE[k % len(PALETTE)]
        values = dict(zip(others, levels[i], strict=True))
        name = prefix + (", ".join(f"{v} = {a:g}" for v, a in values.items()) or "law")
        at = {first: grid, **{v: np.full_like(grid, a) for v, a in values.items()}}
        if fit.samples is not None:
            low, high = fit.predict_interval(at)
            band = {"x": np.concatenate([grid, grid[::-1]]), "y": np.concatenate([high, low[::-1]])}
            figure.add_trace(
                go.Scatter(
                    **band,
                    fill="toself",
                    fillcolor=_fade(colour),
                    line={"width": 0},
                    hoverinfo="skip",
                    showlegend=False,
                    legendgroup=name,
                )
            )
        figure.add_trace(
            go.Scatter(x=grid, y=fit.predict(**at), mode="lines", name=name, line={"color": colour}, legendgroup=name)
        )
        mine = label == i
        figure.add_trace(
            go.Scatter(
                x=x[first][mine],
                y=fit.data.y[mine],
                mode="markers",
                marker={"color": colour, "size": 7},
                name=name,
                showlegend=False,
                legendgroup=name,
            )
        )


def plot_fit(fit: Fit) -> go.Figure:
    """Data and law against the first variable, one colour per level of the others, bootstrap band of the mean."""
    figure = _figure(
        title=f"{fit.law}: {fit.form.formula}", yaxis_title=fit.columns.y, xaxis_title=fit.form.variable_names[0]
    )
    figure.update_xaxes(type="log")
    _add_fit(figure, fit)
    return figure


def plot_groups(grouped: GroupedFit) -> go.Figure:
    """All groups of a grouped fit in one figure."""
    first = grouped.fits[0]
    figure = _figure(
        title=f"{first.law} by {', '.join(grouped.by)}",
        yaxis_title=first.columns.y,
        xaxis_title=first.form.variable_names[0],
    )
    figure.update_xaxes(type="log")
    for fit in grouped.fits:
        _add_fit(figure, fit, prefix=" / ".join(str(v) for v in fit.key.values()) + ": ")
    return figure


def _add_frontier(figure: go.Figure, frontier: Frontier, k: int) -> None:
    import plotly.graph_objects as go

    colour = PALETTE[k % len(PALETTE)]
    budget = [p.budget for p in frontier.points]
    error = [p.error.value for p in frontier.points]
    name = " / ".join(str(v) for v in frontier.key.values()) or "best by the law"
    ends = [p.error.interval for p in frontier.points]
    if all(e is not None for e in ends):
        low, high = ([e[i] for e in ends if e] for i in (0, 1))
        figure.add_trace(
            go.Scatter(
                x=budget + budget[::-1],
                y=high + low[::-1],
                fill="toself",
                fillcolor=_fade(colour),
                line={"width": 0},
                hoverinfo="skip",
                showlegend=False,
            )
        )
    text = [", ".join(f"{v} = {e.value:.4g}" for v, e in p.continuous.items()) for p in frontier.points]
    figure.add_trace(
        go.Scatter(
            x=budget,
            y=error,
            mode="lines+markers",
            name=name,
            text=text,
            line={"color": colour},
            hovertemplate="%{x:.4g}: %{y:.4g}<br>%{text}",
        )
    )
    menu = [(p.budget, p.discrete[0]) for p in frontier.points if p.discrete]
    figure.add_trace(
        go.Scatter(
            x=[b for b, _ in menu],
            y=[c.error.value for _, c in menu],
            mode="markers",
            name=f"{name}: at hand",
            marker={"color": colour, "symbol": "diamond-open", "size": 9},
            text=[", ".join(f"{v} = {a:.4g}" for v, a in c.x.items()) for _, c in menu],
            hovertemplate="%{x:.4g}: %{y:.4g}<br>%{text}",
        )
    )


def plot_comparison(comparison: Comparison) -> go.Figure:
    """Held-out RMSE against the extrapolation factor: the honest figure of merit."""
    import plotly.graph_objects as go

    figure = _figure(
        title=f"leaving out the largest {comparison.along}",
        xaxis_title="decades of extrapolation",
        yaxis_title="held-out RMSE",
    )
    figure.update_yaxes(type="log")
    for k, entry in enumerate(e for e in comparison.entries if e.cuts):
        line = {"color": PALETTE[k % len(PALETTE)], "dash": "dot" if entry.fit is None else "solid"}
        x, y = [c.decades for c in entry.cuts], [c.rmse for c in entry.cuts]
        figure.add_trace(go.Scatter(x=x, y=y, mode="lines+markers", name=entry.label, line=line))
    return figure


def plot_pareto(found: ParetoSet) -> go.Figure:
    """The non-dominated rows in the first two objectives."""
    import plotly.graph_objects as go

    names = list(found.objectives)[:2]
    values = [found.table[n].to_pylist() for n in names]
    figure = _figure(title=f"{len(found)} of {found.n} rows are on the frontier", xaxis_title=names[0])
    if len(names) == 1:
        figure.add_trace(go.Bar(x=values[0], name=names[0]))
        return figure
    figure.update_layout(yaxis_title=names[1])
    shape = "hv" if len(found.objectives) == 2 else None
    figure.add_trace(
        go.Scatter(
            x=values[0],
            y=values[1],
            mode="lines+markers" if shape else "markers",
            line={"shape": shape, "color": PALETTE[0]},
        )
    )
    return figure


def plot_frontier(frontier: Frontier) -> go.Figure:
    """Predicted error of the optimum along the budgets, its band, and the best configuration at hand."""
    figure = _figure(title=f"frontier of {frontier.law}", xaxis_title=frontier.cost, yaxis_title="predicted error")
    figure.update_xaxes(type="log")
    _add_frontier(figure, frontier, 0)
    return figure


def plot_frontiers(frontiers: Frontiers) -> go.Figure:
    """The frontiers of all groups."""
    figure = _figure(
        title=f"frontiers of {frontiers[0].law}", xaxis_title=frontiers[0].cost, yaxis_title="predicted error"
    )
    figure.update_xaxes(type="log")
    for k, frontier in enumerate(frontiers):
        _add_frontier(figure, frontier, k)
    return figure
