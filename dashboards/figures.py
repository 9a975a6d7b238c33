"""Figures over a sweep: every measured configuration, and the frontier that a law draws through them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import plotly.graph_objects as go
import pyarrow as pa
from plotly.subplots import make_subplots

from isoflop.core.expressions import parse
from isoflop.dashboards.palette import LIGHT, faded, series, symbol
from isoflop.laws.table import of_group

if TYPE_CHECKING:
    from isoflop.frontier.result import Frontier
    from isoflop.sweep.api import SweepResults


def frontier_figure(
    results: SweepResults, law: str | None = None, cost: str | None = None, **options: Any
) -> go.Figure:
    """Error against inference cost, a panel per task: measured jobs by V and N, the law's frontier with its interval.

    Args:
        results: an opened sweep.
        law, cost, options: as for :meth:`isoflop.SweepResults.frontier`; by default as the sweep's YAML says.
    """
    table = results.results()
    found = results.frontier(law=law, cost=cost, **options)
    frontiers: list[Frontier] = [found] if hasattr(found, "points") else list(found)
    figure = make_subplots(
        rows=1, cols=len(frontiers), subplot_titles=[_title(f) for f in frontiers], horizontal_spacing=0.08
    )
    for column, frontier in enumerate(frontiers, start=1):
        _band(figure, frontier, column)
        _points(figure, _group(table, frontier.key), frontier.cost, frontier.constants, column)
        figure.update_xaxes(
            type="log", title_text=f"inference cost per answer, {frontier.cost} (FLOPs)", row=1, col=column
        )
        figure.update_yaxes(title_text="error" if column == 1 else "", rangemode="tozero", row=1, col=column)
    figure.update_layout(
        template="plotly_white",
        width=560 * len(frontiers),
        height=460,
        legend={"orientation": "h", "y": -0.22},
        margin={"t": 50, "b": 40},
    )
    return figure


def _band(figure: go.Figure, frontier: Frontier, column: int) -> None:
    x = [p.budget for p in frontier.points]
    error = [p.error.value for p in frontier.points]
    ends = [p.error.interval or (p.error.value, p.error.value) for p in frontier.points]
    first = column == 1
    band = [*(high for _, high in ends), *(low for low, _ in reversed(ends))]
    figure.add_trace(
        go.Scatter(
            x=[*x, *reversed(x)],
            y=band,
            fill="toself",
            mode="lines",
            line_width=0,
            fillcolor=faded(LIGHT["faint"], 0.25),
            name="95 % interval",
            hoverinfo="skip",
            showlegend=first,
        ),
        row=1,
        col=column,
    )
    names = list(frontier.points[0].continuous) if frontier.points else []
    text = ["<br>".join(f"{n}* = {p.continuous[n].value:.3g}" for n in names) for p in frontier.points]
    figure.add_trace(
        go.Scatter(
            x=x,
            y=error,
            mode="lines",
            line={"color": LIGHT["ink"], "dash": "dash"},
            name="frontier of the law",
            text=text,
            hovertemplate="budget %{x:.3g}<br>error %{y:.3f}<br>%{text}<extra></extra>",
            showlegend=first,
        ),
        row=1,
        col=column,
    )


def _points(figure: go.Figure, table: pa.Table, cost: str, constants: Mapping[str, float], column: int) -> None:
    rows = [
        r
        for r in table.select(["model", "method", "knobs", "N", "V", "Q", "error"]).to_pylist()
        if r["error"] is not None
    ]
    formula = parse(cost)
    for index, tokens in enumerate(sorted({r["V"] for r in rows})):
        chosen = sorted((r for r in rows if r["V"] == tokens), key=lambda r: r["N"])
        values = {k: np.asarray([r[k] for r in chosen], dtype=float) for k in ("N", "V", "Q")}
        price = np.broadcast_to(formula({**dict(constants), **values}), len(chosen))
        figure.add_trace(
            go.Scatter(
                x=price,
                y=[r["error"] for r in chosen],
                mode="markers+lines",
                line_width=1,
                marker={"size": 9, "color": series(index), "symbol": symbol(index)},
                line_color=series(index),
                name=f"V = {tokens:g}",
                text=[f"{r['model']}<br>{r['method']} {r['knobs']}" for r in chosen],
                hovertemplate="%{text}<br>cost %{x:.3g}<br>error %{y:.3f}<extra></extra>",
                showlegend=column == 1,
            ),
            row=1,
            col=column,
        )


def _group(table: pa.Table, key: Mapping[str, Any]) -> pa.Table:
    return table.filter(pa.array(of_group(table, key)))


def _title(frontier: Frontier) -> str:
    return ", ".join(str(v) for v in frontier.key.values()) or frontier.law
