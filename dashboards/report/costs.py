"""Where costs go: the parts of an answer's compute and memory, and the time that the sweep itself took."""

from __future__ import annotations

from collections.abc import Sequence

from isoflop.dashboards.report import charts
from isoflop.dashboards.report.charts import Json
from isoflop.sweep.configs import Config, mean

_COMPUTE = "compute per answer"
_PARTS = {
    _COMPUTE: (
        "FLOPs",
        {"flops_llm": "language model", "flops_vision": "vision", "flops_method": "the method itself"},
    ),
    "memory": ("B", {"weight_bytes": "weights", "kv_bytes": "KV cache"}),
}
_MOST_BARS = 24


def breakdown(configs: Sequence[Config]) -> list[Json]:
    """Mean cost per model and method variant, by part; then the sweep's own seconds."""
    pairs = list(dict.fromkeys((c.model, c.variant) for c in configs))
    if len(pairs) > _MOST_BARS:
        pairs = list(dict.fromkeys((c.model, c.method) for c in configs))[:_MOST_BARS]
    members = {pair: [c for c in configs if pair in ((c.model, c.variant), (c.model, c.method))] for pair in pairs}
    found = []
    for title, (unit, parts) in _PARTS.items():
        known = {k: label for k, label in parts.items() if any(c.costs.get(k) for c in configs)}
        if not known and title == _COMPUTE and any(c.costs.get("flops") for c in configs):
            known = {"flops": "all of it"}
        rows = []
        for (model, variant), own in members.items():
            values = [mean(c.costs.get(k) for c in own) for k in known]
            if any(values):
                rows.append({"label": f"{variant} on {model}", "values": [v or 0.0 for v in values]})
        if known and rows:
            chart = charts.bars(f"{title}, mean over settings", charts.axis(title, unit), list(known.values()), rows)
            found.append(charts.group(title, [charts.panel(title, chart)]))
    seconds = [
        {"label": f"{variant} on {model}", "values": [sum(c.costs.get("wall_seconds", 0.0) * c.repeats for c in own)]}
        for (model, variant), own in members.items()
    ]
    if any(row["values"][0] for row in seconds):
        chart = charts.bars(
            "time of the jobs alone", charts.axis("time of all jobs, without shared stages", "s"), ["jobs"], seconds
        )
        text = "Jobs alone: training and other shared stages, which are computed once and cached, come on top."
        found.append(charts.group("time of this sweep", [charts.panel("time of this sweep", chart, text)]))
    return found
