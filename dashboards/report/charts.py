"""Charts and sections as plain JSON: what the page's script draws and what its tables repeat.

A section has groups (one is shown at a time), a group has panels, a panel may have a chart, a slider and a table.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

Json = dict[str, Any]


def axis(label: str, unit: str = "", log: bool = False, to: float | None = None) -> Json:
    """An axis of numbers; ``to``: it reaches at least so far."""
    return {"label": label, "unit": unit, "log": log, "to": to}


def point(
    x: float | None, y: float | None, text: str = "", low: float | None = None, high: float | None = None
) -> Json:
    """A point with what its tooltip says and the ends of its interval in y."""
    return {"x": x, "y": y, "text": text, "low": low, "high": high}


def series(
    name: str,
    colour: int,
    points: Sequence[Json],
    line: bool = False,
    dots: bool = True,
    band: bool = False,
    dash: bool = False,
    hollow: bool = False,
    of: str = "",
    step: bool = False,
) -> Json:
    """Points that belong together. ``band``: their intervals as an area; otherwise as bars at the points.

    ``step``: the line keeps its height until the next point. ``of``: the series that this one is shown and hidden with, instead of having an entry of its own in the legend.
    """
    style = {"line": line, "dots": dots, "band": band, "dash": dash, "hollow": hollow, "of": of, "step": step}
    return {"name": name, "colour": colour, "points": list(points), **style}


def xy(title: str, x: Json, y: Json, content: Sequence[Json], diagonal: bool = False) -> Json:
    """Points and curves over two axes."""
    return {"kind": "xy", "title": title, "x": x, "y": y, "series": list(content), "diagonal": diagonal}


def bars(title: str, x: Json, parts: Sequence[str], rows: Sequence[Json]) -> Json:
    """Horizontal bars; rows are ``{"label", "values": one per part}``."""
    return {"kind": "bars", "title": title, "x": x, "parts": list(parts), "rows": list(rows)}


def forest(title: str, x: Json, rows: Sequence[Json]) -> Json:
    """Differences with intervals around 0; rows are ``{"label", "value", "low", "high", "text"}``."""
    return {"kind": "forest", "title": title, "x": x, "rows": list(rows)}


def parallel(title: str, axes: Sequence[Json], lines: Sequence[Json]) -> Json:
    """Parallel coordinates; axes are ``{"name", "log"}`` or ``{"name", "levels"}``, lines ``{"values", "error"}``."""
    return {"kind": "parallel", "title": title, "axes": list(axes), "lines": list(lines)}


def table(head: Sequence[str], rows: Sequence[Sequence[Any]], caption: str = "") -> Json:
    """A table of text and numbers."""
    return {"caption": caption, "head": list(head), "rows": [list(r) for r in rows]}


def panel(title: str, chart: Json | None = None, text: str = "", **more: Any) -> Json:
    """A chart with its words; ``more``: ``slider``, ``table``, ``pre``."""
    return {"title": title, "chart": chart, "text": text, **more}


def group(name: str, panels: Sequence[Json]) -> Json:
    """Panels that are seen together."""
    return {"name": name, "panels": list(panels)}


def section(
    key: str, title: str, groups: Sequence[Json], lead: str = "", notes: Sequence[str] = (), why: str = ""
) -> Json:
    """A part of the report. Groups without panels are left out; ``why``: the reason where no group is left."""
    shown = [g for g in groups if g["panels"]]
    return {"id": key, "title": title, "lead": lead, "groups": shown, "notes": list(notes), "why": why}


def spread(values: Sequence[float | None], least: float = 8.0) -> bool:
    """Whether positive values span enough for a log scale."""
    known = [v for v in values if v is not None]
    return bool(known) and min(known) > 0 and max(known) >= least * min(known)


def colours(names: Iterable[str]) -> dict[str, int]:
    """A number per name, the most frequent first; the same in every chart."""
    return {name: i for i, (name, _) in enumerate(Counter(names).most_common())}
