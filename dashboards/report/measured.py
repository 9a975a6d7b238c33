"""The frontier of what was measured: error against each cost, and the best configuration under a budget."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from isoflop.dashboards.report import charts
from isoflop.dashboards.report.charts import Json
from isoflop.dashboards.report.configs import Config, Cost, by_scene, varying_costs
from isoflop.dashboards.report.numbers import quantity, short, with_interval

STEPS = 41
_MOST_SERIES = 8
_TOTALS = ("flops", "bytes")  # a headline rather tells of these than of a part of them


def groups(configs: Sequence[Config], palette: Mapping[str, int]) -> list[Json]:
    """A group per measured cost, with a panel per task."""
    found: dict[Cost, list[Json]] = {}
    for task, own in by_scene(configs).items():
        for cost in varying_costs(own):
            found.setdefault(cost, []).append(_panel(task, own, cost, palette))
    return [charts.group(f"measured: {cost.label}", panels) for cost, panels in found.items()]


def headline(configs: Sequence[Config]) -> list[str]:
    """Per task: the cheapest configuration whose error lies within the interval of the best one's.

    In compute or in memory, whichever is saved more.
    """
    found = []
    for task, own in by_scene(configs).items():
        costs = varying_costs(own)
        if not costs:
            best = min(own, key=lambda c: c.error)
            found.append(f"{task}: {best.title} has the least error, {_error(best)}")
            continue
        cost = max(costs, key=lambda cost: (cost.key in _TOTALS, _saving(own, cost)))
        choice = enough(own, cost.key)
        place = quantity(choice.costs[cost.key], cost.unit)
        comparison = against_uncompressed(choice, own, lambda c, key=cost.key: c.costs.get(key))  # type: ignore[misc]
        found.append(f"{task}: at {place} ({cost.label}), {choice.title}, error {_error(choice)}{comparison}")
    return found


def _saving(configs: Sequence[Config], cost: Cost) -> float:
    """The cheapest uncompressed configuration's cost over that of the choice: which cost this sweep's methods save."""
    chosen = enough(configs, cost.key).costs[cost.key]
    dense = [c.costs[cost.key] for c in configs if c.uncompressed and cost.key in c.costs]
    return min(dense, default=chosen) / chosen if chosen else 0.0


def enough(configs: Sequence[Config], key: str) -> Config:
    """The cheapest configuration whose mean error is not above the interval of the best one."""
    known = [c for c in configs if key in c.costs]
    best = min(known, key=lambda c: c.error)
    limit = best.high if best.high is not None else best.error
    return min((c for c in known if c.error <= limit), key=lambda c: (c.costs[key], c.error))


def _panel(task: str, configs: Sequence[Config], cost: Cost, palette: Mapping[str, int]) -> Json:
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
    return charts.panel(task, chart, slider=_slider(known, cost))


def _point(c: Config, cost: Cost) -> Json:
    return charts.point(c.costs[cost.key], c.error, c.title, c.low, c.high)


def frontier(configs: Sequence[Config], key: str) -> list[Config]:
    """Configurations that no other beats in both cost and error, from the cheapest on."""
    found: list[Config] = []
    for c in sorted(configs, key=lambda c: (c.costs[key], c.error)):
        if not found or c.error < found[-1].error:
            found.append(c)
    return found


def _slider(configs: Sequence[Config], cost: Cost) -> Json:
    prices = [c.costs[cost.key] for c in configs]
    budgets = np.geomspace(min(prices), max(prices), STEPS)
    budgets[0], budgets[-1] = min(prices), max(prices)
    stairs = frontier(configs, cost.key)
    states = []
    for budget in budgets.tolist():
        best = [c for c in stairs if c.costs[cost.key] <= budget * (1 + 1e-12)][-1]
        comparison = against_uncompressed(best, configs, lambda c: c.costs.get(cost.key))
        price = quantity(best.costs[cost.key], cost.unit)
        text = f"Best measured: {best.title}, error {_error(best)}, costs {price}{comparison}."
        mark = charts.point(best.costs[cost.key], best.error, best.title, best.low, best.high)
        states.append({"budget": budget, "label": quantity(budget, cost.unit), "text": text, "mark": mark})
    chosen = enough(configs, cost.key).costs[cost.key]
    start = next(i for i, b in enumerate(budgets) if b >= chosen * (1 - 1e-12))
    return {"label": f"Budget: {cost.label}", "states": states, "start": start}


def _error(c: Config) -> str:
    return with_interval(c.error, c.low, c.high, f"{c.repeats} repeats" if c.repeats > 1 else "one seed")


def against_uncompressed(choice: Config, configs: Sequence[Config], price: Callable[[Config], float | None]) -> str:
    """How much cheaper a choice is than the cheapest uncompressed configuration that is not worse, in words.

    Not worse: its mean error is not above the upper end of the choice's interval, so that noise makes no claim.
    """
    own, reached = price(choice), choice.error if choice.high is None else choice.high
    dense = [(p, c) for c in configs if c.uncompressed and (p := price(c)) is not None]
    if choice.uncompressed:
        return "; it is uncompressed"
    if not dense or not own:
        return ""
    not_worse = [(p, c) for p, c in dense if c.error <= reached]
    if not_worse:
        cost, other = min(not_worse, key=lambda pair: pair[0])
        factor = cost / own
        words = f"{short(factor)} × cheaper than" if factor > 1 else f"{short(1 / factor)} × dearer than"
        words = "as dear as" if abs(factor - 1) < 0.005 else words
        return (
            f"; {words} the cheapest uncompressed model that is not worse ({other.model}, error {short(other.error)})"
        )
    cost, other = min(dense, key=lambda pair: pair[1].error)
    return f"; no uncompressed model reaches that error (the best, {other.model}: {short(other.error)} at {short(cost / own)} × the cost)"
