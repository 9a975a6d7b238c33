"""Ready views of the runs table: which columns it shows, in which order, and which charts stand above the generated ones.

MLflow keeps a view that somebody shares as a tag of the experiment, ``mlflow.sharedViewState.KEY``, and opens it at
``#/experiments/ID/runs?viewStateShareKey=KEY``. The form of that JSON is its user interface's own and no documented API:
a server that does not know a part of it leaves that part out, and one that cannot read it says so and shows the plain table.
"""

from __future__ import annotations

import json
from typing import Any

TAG = "mlflow.sharedViewState."
JOBS, BEST = "jobs", "best"
_PARAMS = ("model", "method", "task")
_METRICS = ("error", "N", "V", "ratio", "flops", "seconds", "bytes", "weight_bytes", "kv_bytes")
_FIRST, _LAST = (
    ("0", "attributes.`Run Name`"),
    ("runDateAndNestInfo", "duration"),
)  # columns of every table: marks, name; age
_SECTION = "isoflop"
_MOST_RUNS = 1000  # in a chart


def views() -> dict[str, str]:
    """Tags of the experiment, name -> JSON.

    ``jobs``: the jobs without the sweep's own run, newest first. ``best``: least error first. (A shared view cannot say
    which runs are unfolded; the plain table has the jobs below the sweep's run.)
    """
    columns = [f"params.`{name}`" for name in _PARAMS] + [f"metrics.`{name}`" for name in _METRICS]
    shown: dict[str, Any] = {
        "searchFilter": "params.task != ''",
        "selectedColumns": columns,
        "columnOrder": [*_FIRST, *columns, *_LAST],
        "runsHiddenMode": "SHOW_ALL",
        "compareRunCharts": _charts(),
        "compareRunSections": [_named({"name": "Sweep", "display": True, "isReordered": True}, _SECTION)],
        "isAccordionReordered": True,  # or sections would be sorted by name
    }
    ranked = {**shown, "orderByKey": "metrics.`error`", "orderByAsc": True}
    return {f"{TAG}{JOBS}": json.dumps(shown), f"{TAG}{BEST}": json.dumps(ranked)}


def _charts() -> list[dict[str, Any]]:
    """Error against compute, size and ratio, and parallel coordinates."""
    found = [
        _chart("SCATTER", f"error against {what}", xaxis=_metric(key), yaxis=_metric("error"))
        for key, what in (
            ("flops", "FLOPs per answer"),
            ("N", "size N"),
            ("ratio", "the ratio that the method's family counts"),
        )
    ]
    axes = {"selectedParams": list(_PARAMS[:2]), "selectedMetrics": ["N", "V", "ratio", "flops", "error"]}
    return [*found, _chart("PARALLEL", "settings, costs and error", showAllRuns=False, **axes)]


def _chart(kind: str, title: str, **more: Any) -> dict[str, Any]:
    common = {"type": kind, "runsCountToCompare": _MOST_RUNS, "metricSectionId": _SECTION, "displayName": title}
    return _named({**common, **more}, f"isoflop {title}")


def _metric(key: str) -> dict[str, str]:
    return {"key": key, "type": "METRIC"}


def _named(part: dict[str, Any], uuid: str) -> dict[str, Any]:
    return {**part, "uuid": uuid, "deleted": False, "isGenerated": False}
