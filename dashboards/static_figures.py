"""Plotly's figures of results as PNG, PDF and SVG, drawn by Matplotlib: no browser is needed, and text stays text.

It knows what :mod:`isoflop.dashboards.plots` uses: lines, markers, filled bands and bars over one pair of axes.
"""

from __future__ import annotations

import io
import math
import re
from typing import Any

import plotly.graph_objects as go
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, NullFormatter

from isoflop.core.errors import UserError
from isoflop.dashboards.palette import LIGHT, SERIES

_DASHES = {"dash": "--", "dot": ":", "dashdot": "-."}
_STEPS = {"hv": "steps-post", "vh": "steps-pre"}
_MARKERS = {
    "circle": "o",
    "square": "s",
    "diamond": "D",
    "triangle-up": "^",
    "cross": "P",
    "x": "X",
    "star": "*",
    "hexagon": "h",
}
_INCHES = (6.4, 4.2)
_LABELS_INSIDE = 6
_LABEL_INCHES = 0.055  # of a letter of the legend
_LARGE = EngFormatter(sep="")


def drawn(figure: go.Figure, kind: str, dpi: int = 200) -> bytes:
    """The figure as a file.

    Args:
        kind: png, pdf or svg.
    """
    still = Figure(figsize=_INCHES, layout="constrained")
    axes = still.subplots()
    for k, trace in enumerate(figure.data):
        _add(axes, trace, SERIES[k % len(SERIES)])
    layout = figure.layout
    axes.set_title(layout.title.text or "", fontsize=10, loc="left", wrap=True)
    for name, axis in (("x", layout.xaxis), ("y", layout.yaxis)):
        getattr(axes, f"set_{name}label")(axis.title.text or "")
        if axis.type == "log":
            getattr(axes, f"set_{name}scale")("log")
            _tick(getattr(axes, f"{name}axis"), *getattr(axes, f"get_{name}lim")())
    axes.grid(True, color=LIGHT["grid"], linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    labels = axes.get_legend_handles_labels()[1]
    if len(labels) > _LABELS_INSIDE:  # they would lie on the curves
        widest = max(map(len, labels))
        still.set_size_inches(_INCHES[0] + _LABEL_INCHES * widest + 0.6, _INCHES[1])
        still.legend(fontsize=7, frameon=False, loc="outside right upper")
    elif labels:
        axes.legend(fontsize=7, frameon=False)
    out = io.BytesIO()
    with rc_context({"pdf.fonttype": 42, "svg.fonttype": "none", "svg.hashsalt": "isoflop"}):
        dated = {"pdf": {"CreationDate": None}, "svg": {"Date": None}}.get(kind, {})  # the same figure, the same bytes
        still.savefig(out, format=kind, dpi=dpi, metadata=dated)
    return out.getvalue()


def _tick(axis: Axis, low: float, high: float) -> None:
    """Ticks of a logarithmic axis in plain numbers, a few of them whatever it spans."""
    decades = math.log10(high / low) if 0 < low < high < math.inf else 1.0
    digits = (1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 7.0) if decades < 0.7 else (1.0, 2.0, 5.0) if decades < 2.5 else (1.0,)
    axis.set_major_locator(LogLocator(subs=digits, numticks=12))
    axis.set_major_formatter(FuncFormatter(lambda value, _: _LARGE(value) if abs(value) >= 1e4 else f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _add(axes: Axes, trace: Any, colour: str) -> None:
    label = trace.name if trace.name and trace.showlegend is not False else None
    if trace.type == "bar":
        axes.bar(trace.x, trace.y, color=_colour(trace.marker.color) or colour, label=label)
        return
    if trace.type != "scatter":
        raise UserError(f"a figure with {trace.type} cannot be saved without a browser; save it as .html")
    if trace.fill == "toself":
        axes.fill(trace.x, trace.y, color=_colour(trace.fillcolor), linewidth=0)
        return
    mode = trace.mode or "lines"
    own = _colour(trace.line.color) or _colour(trace.marker.color) or colour
    symbol = str(trace.marker.symbol or "circle")
    hollow = symbol.endswith("-open")
    axes.plot(
        trace.x,
        trace.y,
        color=own,
        linestyle=_DASHES.get(trace.line.dash, "-") if "lines" in mode else "none",
        drawstyle=_STEPS.get(trace.line.shape, "default"),
        marker=_MARKERS.get(symbol.removesuffix("-open"), "o") if "markers" in mode else "none",
        markersize=(trace.marker.size or 7) * 0.7,
        markerfacecolor="none" if hollow else own,
        label=label,
    )


def _colour(text: Any) -> Any:
    """Plotly's colour as Matplotlib takes it."""
    found = re.fullmatch(r"rgba\((\d+),\s*(\d+),\s*(\d+),\s*([\d.]+)\)", str(text or ""))
    if found is None:
        return text
    red, green, blue, alpha = found.groups()
    return int(red) / 255, int(green) / 255, int(blue) / 255, float(alpha)
