"""Which settings matter: Optuna's importance, and parallel coordinates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from isoflop.core.numbers import plain
from isoflop.dashboards.report import charts
from isoflop.dashboards.report.charts import Json
from isoflop.search.importance import FEWEST_ROWS, MOST_ROWS, importances
from isoflop.sweep.configs import COSTS, Config, by_scene, varying_costs

MOST_LINES = 1500
_MOST_AXES = 9


def importance(configs: Sequence[Config]) -> tuple[list[Json], str]:
    """Per task: what explains the error over all configurations, and inside each method.

    Returns:
        The groups, and why what is missing among them is.
    """
    found: list[Json] = []
    missing: dict[str, list[str]] = {}
    for task, own in by_scene(configs).items():
        asked = {"model and method": (own, [{"model": c.model, "method": c.method} for c in own])}
        for method in dict.fromkeys(c.method for c in own):
            inside = [c for c in own if c.method == method]
            asked[method] = inside, [{"model": c.model, **c.settings} for c in inside]
        panels = []
        for what, (members, points) in asked.items():
            panel = _bars(f"{task}: {what}", points, members)
            if isinstance(panel, str):
                missing.setdefault(panel, []).append(f"{task}: {what}")
            else:
                panels.append(panel)
        found.append(charts.group(task, panels))
    return found, "; ".join(f"{reason} ({_listed(titles)})" for reason, titles in missing.items())


def _listed(titles: Sequence[str], most: int = 3) -> str:
    more = f", {len(titles) - most} more" if len(titles) > most else ""
    return ", ".join(titles[:most]) + more


def _bars(title: str, points: Sequence[dict[str, Any]], configs: Sequence[Config]) -> Json | str:
    """A panel, or why there is none."""
    errors = [c.error for c in configs]
    shares = importances(points, errors)
    if not shares:
        if len(points) < FEWEST_ROWS:
            return f"fewer than {FEWEST_ROWS} configurations"
        return "all errors are equal" if min(errors) == max(errors) else _FEW_SETTINGS
    rows = [{"label": name, "values": [share]} for name, share in shares.items()]
    axis = charts.axis("share of the variance of the error (fANOVA)", to=1.0)
    drawn = f", of which {MOST_ROWS}, drawn at random, are judged" if len(points) > MOST_ROWS else ""
    text = f"{len(points)} configurations{drawn}."
    return charts.panel(title, charts.bars(title, axis, ["importance"], rows), text)


_FEW_SETTINGS = "fewer than two settings that vary and that every configuration has"


def coordinates(configs: Sequence[Config]) -> list[Json]:
    """A panel per task: every configuration as a line through its settings, costs and error."""
    found = []
    for task, own in by_scene(configs).items():
        panel = _parallel(task, own)
        if panel is not None:
            found.append(charts.group(task, [panel]))
    return found


def _parallel(task: str, configs: Sequence[Config]) -> Json | None:
    ranked = sorted(configs, key=lambda c: c.error)
    step = -(-len(ranked) // MOST_LINES)
    lines = [(_values(c), c) for c in ranked[::step]]
    frequency: dict[str, int] = {}
    for values, _ in lines:
        for name, value in values.items():
            frequency[name] = frequency.get(name, 0) + (value is not None)
    varied = [n for n in frequency if len({values.get(n) for values, _ in lines if values.get(n) is not None}) > 1]
    fixed = [n for n in ("model", "method") if n in varied]
    costs = [c.key for c in varying_costs(configs)][:2]
    last = [n for n in ("V", "ratio", *costs) if n in varied]
    others = {*fixed, *last, *(k.key for k in COSTS)}
    knobs = sorted((n for n in varied if n not in others), key=lambda n: -frequency[n])
    names = [*fixed, *knobs[: _MOST_AXES - len(fixed) - len(last) - 1], *last]
    if len(names) < 2 or len(lines) < 2:
        return None
    axes = [_axis(n, [values.get(n) for values, _ in lines]) for n in names]
    axes.append({"name": "error", "log": charts.spread([c.error for c in ranked]), "levels": None})
    drawn = [
        {"values": [*(_shown(values.get(a["name"]), a) for a in axes[:-1]), c.error], "error": c.error, "text": c.title}
        for values, c in lines
    ]
    text = f"{len(lines)} of {len(ranked)} configurations, evenly over the ranking." if step > 1 else ""
    return charts.panel(task, charts.parallel(f"{task}: settings, costs and error", axes, drawn), text)


def _values(c: Config) -> dict[str, Any]:
    found: dict[str, Any] = {"model": c.model, "method": c.method}
    found |= {k: plain(v) for k, v in c.settings.items()}
    return {**found, "V": c.V, "ratio": c.times, **{k.key: c.costs.get(k.key) for k in COSTS}}


def _axis(name: str, values: Sequence[Any]) -> Json:
    known = [v for v in values if v is not None]
    if all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in known):
        return {"name": name, "log": charts.spread(known, 20), "levels": None}
    return {
        "name": name,
        "log": False,
        "levels": sorted({str(v).lower() if isinstance(v, bool) else str(v) for v in known}),
    }


def _shown(value: Any, axis: Json) -> Any:
    if value is None or axis["levels"] is None:
        return value
    return axis["levels"].index(str(value).lower() if isinstance(value, bool) else str(value))
