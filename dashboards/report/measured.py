"""The frontier of what was measured: error against each cost, and the best configuration under a budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from isoflop.core.numbers import quantity, with_interval
from isoflop.dashboards.report import charts
from isoflop.dashboards.report.charts import Json
from isoflop.dashboards.report.savings import Comparison, Pairing, against_uncompressed, enough
from isoflop.sweep.configs import Config, Cost, by_scene, varying_costs

STEPS = 41
_MOST_SERIES = 8
_TOTALS = ("flops", "bytes")  # a headline rather tells of these than of a part of them


def groups(configs: Sequence[Config], palette: Mapping[str, int], pairing: Pairing) -> list[Json]:
    """A group per measured cost, with a panel per task."""
    found: dict[Cost, list[Json]] = {}
    for task, own in by_scene(configs).items():
        for cost in varying_costs(own):
            found.setdefault(cost, []).append(_panel(task, own, cost, palette, pairing))
    return [charts.group(f"measured: {cost.label}", panels) for cost, panels in found.items()]


def headline(configs: Sequence[Config], pairing: Pairing) -> list[str]:
    """Per task: the cheapest configuration that is not worse than the best one, and what it saves.

    In compute or in memory, whichever is saved more.
    """
    found = []
    for task, own in by_scene(configs).items():
        choices = [(cost, *_choice(own, cost, pairing)) for cost in varying_costs(own)]
        if not choices:
            best = min(own, key=lambda c: c.error)
            found.append(f"{task}: {best.title} has the least error, {_error(best)}")
            continue
        cost, choice, comparison = max(choices, key=lambda found: (found[0].key in _TOTALS, found[2].factor))
        place = quantity(choice.costs[cost.key], cost.unit)
        found.append(f"{task}: at {place} ({cost.label}), {choice.title}, error {_error(choice)}{comparison.text}")
    return found


def _choice(configs: Sequence[Config], cost: Cost, pairing: Pairing) -> tuple[Config, Comparison]:
    choice = enough(configs, cost.key, pairing)
    return choice, against_uncompressed(choice, configs, lambda c: c.costs.get(cost.key), pairing)


def _panel(task: str, configs: Sequence[Config], cost: Cost, palette: Mapping[str, int], pairing: Pairing) -> Json:
    known = [c for c in configs if c.costs.get(cost.key, 0) > 0]
    named = known if len({c.variant for c in known}) <= _MOST_SERIES else [replace(c, variant=c.method) for c in known]
    content = [
        charts.series(name, palette.get(name, i), [_point(c, cost) for c in named if c.variant == name])
        for i, name in enumerate(dict.fromkeys(c.variant for c in named))
    ]
    stairs = frontier(known, cost.key)
    steps = [_point(c, cost) for c in stairs]
    content.insert(0, charts.series("best measured", -1, steps, line=True, dots=False, dash=True, step=True))
    title = f"{task}: error against {cost.label}"
    chart = charts.xy(
        title,
        charts.axis(cost.label, cost.unit, log=True),
        charts.axis("error", log=charts.spread([c.error for c in known])),
        content,
    )
    return charts.panel(task, chart, slider=_slider(known, cost, pairing))


def _point(c: Config, cost: Cost) -> Json:
    return charts.point(c.costs[cost.key], c.error, c.title, c.low, c.high)


def frontier(configs: Sequence[Config], key: str) -> list[Config]:
    """Configurations that no other beats in both cost and error, from the cheapest on."""
    found: list[Config] = []
    for c in sorted(configs, key=lambda c: (c.costs[key], c.error)):
        if not found or c.error < found[-1].error:
            found.append(c)
    return found


def _slider(configs: Sequence[Config], cost: Cost, pairing: Pairing) -> Json:
    prices = [c.costs[cost.key] for c in configs]
    budgets = np.geomspace(min(prices), max(prices), STEPS)
    budgets[0], budgets[-1] = min(prices), max(prices)
    stairs = frontier(configs, cost.key)
    states = []
    for budget in budgets.tolist():
        best = [c for c in stairs if c.costs[cost.key] <= budget * (1 + 1e-12)][-1]
        comparison = against_uncompressed(best, configs, lambda c: c.costs.get(cost.key), pairing)
        price = quantity(best.costs[cost.key], cost.unit)
        text = f"Best measured: {best.title}, error {_error(best)}, costs {price}{comparison.text}."
        mark = charts.point(best.costs[cost.key], best.error, best.title, best.low, best.high)
        states.append({"budget": budget, "label": quantity(budget, cost.unit), "text": text, "mark": mark})
    chosen = enough(configs, cost.key, pairing).costs[cost.key]
    start = next(i for i, b in enumerate(budgets) if b >= chosen * (1 - 1e-12))
    return {"label": f"Budget: {cost.label}", "states": states, "start": start}


def _error(c: Config) -> str:
    return with_interval(c.error, c.low, c.high, f"{c.repeats} repeats" if c.repeats > 1 else "one seed")
