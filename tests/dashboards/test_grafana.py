"""The Grafana dashboard asks for metrics that sweeps export, by their names in Prometheus."""

from __future__ import annotations

import json
import re
from pathlib import Path

from isoflop.execute import metrics

DASHBOARD = json.loads((Path(__file__).parents[2] / "dashboards" / "grafana" / "isoflop.json").read_text())
EXPORTED = set(metrics.describe())


def test_every_metric_that_is_asked_for_is_exported_and_the_other_way_round() -> None:
    asked = set(re.findall(r"ray_isoflop_\w+", json.dumps(DASHBOARD)))
    assert asked == EXPORTED


def test_the_readme_names_metrics_as_they_are_exported() -> None:
    text = (Path(__file__).parents[2] / "sweeps" / "README.md").read_text(encoding="utf-8")
    named = set(re.findall(r"ray_isoflop_\w+", text))
    assert named
    assert named <= EXPORTED


def test_panels_have_titles_explanations_and_places_of_their_own() -> None:
    panels = DASHBOARD["panels"]
    assert all(p["title"] and p["description"] and p["targets"] for p in panels)
    cells = [
        (x, y)
        for p in panels
        for x in range(p["gridPos"]["x"], p["gridPos"]["x"] + p["gridPos"]["w"])
        for y in range(p["gridPos"]["y"], p["gridPos"]["y"] + p["gridPos"]["h"])
    ]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) < 24
    assert len({p["id"] for p in panels}) == len(panels)
