"""What frontiers on fitted laws say: the frontier with a budget slider, the headline, IsoFLOP curves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from isoflop.core.errors import UserError
from isoflop.core.expressions import Array, parse
from isoflop.core.numbers import quantity, short, with_interval
from isoflop.dashboards.report import charts
from isoflop.dashboards.report.charts import Json
from isoflop.dashboards.report.fits import AXES, between, name
from isoflop.dashboards.report.measured import STEPS
from isoflop.dashboards.report.savings import Pairing, Price, against_uncompressed
from isoflop.frontier import frontier as draw_frontier
from isoflop.frontier.optimum import CostModel, make_space, spend
from isoflop.frontier.result import Frontier, FrontierPoint
from isoflop.laws.result import Fit
from isoflop.sweep.configs import Config
from isoflop.sweep.measured_cost import MEASURED
from isoflop.sweep.results import Findings

Pair = tuple[Fit, Frontier]


def pairs(findings: Findings) -> list[Pair]:
    """Each frontier of the sweep with the fit it rests on, drawn at more budgets than the ledger keeps."""
    fits = [f for law in findings.laws for f in law.fits if f.data is not None]
    found = []
    for block in findings.frontiers:
        for drawn in block.frontiers:
            fit = next((f for f in fits if f.data_hash == drawn.data_hash and f.law == drawn.law), None)
            if fit is not None:
                found.append((fit, _finer(fit, drawn)))
    return found


def _finer(fit: Fit, drawn: Frontier) -> Frontier:
    budgets = [p.budget for p in drawn.points]
    constants = {k: v for k, v in drawn.constants.items() if k != "Q"}
    grid = np.geomspace(min(budgets), max(budgets), STEPS) if len(budgets) > 1 else np.array(budgets)
    grid[0], grid[-1] = min(budgets), max(budgets)
    q = drawn.constants.get("Q", 0.0)
    finer = draw_frontier(fit, cost=drawn.cost, q=q, constants=constants, budget=grid.tolist())
    assert isinstance(finer, Frontier)
    return replace(finer, cost_note=drawn.cost_note)


def unit_of(cost: str) -> str:
    """FLOPs for what was measured and for multiples of 2 N; other formulas have the units that their author gave them."""
    return "FLOPs" if cost in MEASURED.values() or cost.replace(" ", "").startswith(("2*N*", "6*N*", "2*(N")) else ""


def groups(found: Sequence[Pair], configs: Sequence[Config], pairing: Pairing) -> list[Json]:
    """A group per law and cost, a panel per group of the fit."""
    out: dict[str, list[Json]] = {}
    for fit, line in found:
        panel = _frontier_panel(fit, line, [c for c in configs if _belongs(c, fit.key)], pairing)
        out.setdefault(f"{fit.law} law: cost {line.cost}", []).append(panel)
    return [charts.group(title, panels) for title, panels in out.items()]


def _belongs(c: Config, key: Mapping[str, object]) -> bool:
    return all(getattr(c, k, None) == v for k, v in key.items())


def _frontier_panel(fit: Fit, line: Frontier, configs: Sequence[Config], pairing: Pairing) -> Json:
    unit, title = unit_of(line.cost), name(fit.key, fit.law)
    assert fit.data is not None
    price = _price(fit, line)
    content = [
        charts.series(
            "frontier of the law",
            -1,
            [_on_line(p, unit) for p in line.points],
            line=True,
            dots=False,
            band=True,
        ),
        *_levels(fit, np.broadcast_to(price, fit.data.n)),
    ]
    known = [*fit.data.y.tolist(), *(p.error.value for p in line.points)]
    chart = charts.xy(
        f"{title}: {fit.columns.y} against inference cost",
        charts.axis(f"cost per answer, {line.cost}", unit, log=True),
        charts.axis(fit.columns.y, log=charts.spread(known)),
        content,
    )
    states = [_state(fit, p, line, configs, pairing) for p in line.points]
    slider = {"label": f"Budget: {line.cost}", "states": states, "start": len(states) // 2}
    notes = list(dict.fromkeys(n for p in line.points for n in p.notes if "lies" not in n and "end of" not in n))
    return charts.panel(title, chart, slider=slider, text=" ".join(notes))


def _price(fit: Fit, line: Frontier) -> Array:
    assert fit.data is not None
    model = CostModel.build(line.cost, fit.form.variable_names, line.constants)
    return model(fit.data.x)


def _on_line(p: FrontierPoint, unit: str) -> Json:
    low, high = p.error.interval or (None, None)
    where = ", ".join(f"{v}* = {short(e.value)}" for v, e in p.continuous.items())
    return charts.point(p.budget, p.error.value, f"{quantity(p.budget, unit)}: {where}", low, high)


def _levels(fit: Fit, x: Array) -> list[Json]:
    """The rows of a fit by the levels of its last variable."""
    assert fit.data is not None
    *others, last = fit.form.variable_names
    levels, label = np.unique(fit.data.x[last], return_inverse=True)
    if len(levels) > 8:
        levels, label = np.array([math.nan]), np.zeros(fit.data.n, dtype=np.int64)
    found = []
    for i, level in enumerate(levels.tolist()):
        mine = np.flatnonzero(label == i)
        text = [", ".join(f"{v} = {short(float(fit.data.x[v][j]))}" for v in [*others, last]) for j in mine]
        points = [charts.point(float(x[j]), float(fit.data.y[j]), t) for j, t in zip(mine, text, strict=True)]
        found.append(charts.series(f"{last} = {short(level)}" if math.isfinite(level) else "measured", i, points))
    return found


def _state(fit: Fit, p: FrontierPoint, line: Frontier, configs: Sequence[Config], pairing: Pairing) -> Json:
    text = [sentence(fit, p)]
    if p.discrete:
        text.append(at_hand(p, line, configs, pairing))
    far = {v: d for v, d in p.extrapolation.items() if d > 0.01}
    if far:
        text.append(
            "An extrapolation: "
            + ", ".join(f"{v} lies {short(d, 2)} decades outside the data" for v, d in far.items())
            + "."
        )
    low, high = p.error.interval or (None, None)
    mark = charts.point(p.budget, p.error.value, "", low, high)
    return {"budget": p.budget, "label": quantity(p.budget, unit_of(line.cost)), "text": " ".join(text), "mark": mark}


def sentence(fit: Fit, p: FrontierPoint) -> str:
    """The continuous optimum at a budget."""
    where = ", ".join(f"{v} = {with_interval(e.value, *(_ends(e.interval)))}" for v, e in p.continuous.items())
    return f"Optimum of the law: {where}; {fit.columns.y} {with_interval(p.error.value, *_ends(p.error.interval))}."


def _ends(ends: tuple[float, float] | None) -> tuple[float | None, float | None]:
    if ends is None or f"{ends[0]:.3g}" == f"{ends[1]:.3g}":
        return None, None
    return ends


def at_hand(p: FrontierPoint, line: Frontier, configs: Sequence[Config], pairing: Pairing) -> str:
    """The best of the models that were swept, with how sure that is, and against what is uncompressed.

    Where something no dearer was measured to be better than the law's choice, that is the best.
    """
    best = p.discrete[0]
    sure = "" if best.probability is None else f", the best in {100 * best.probability:.0f} % of resamples"
    error = with_interval(best.error.value, *_ends(best.error.interval))
    twin = _config_at(best.x, configs)
    label = f"{twin.title}, " if twin else ""
    levels = ", ".join(f"{v} = {short(x)}" for v, x in best.x.items())
    measured = f", measured {short(twin.error)}" if twin else ""
    told = f"{label}{levels}; predicted error {error}{measured}{sure}"
    if p.contradicted and p.measured is not None:
        m = p.measured
        rival = _config_at(m.x, configs)
        what = rival.title if rival else ", ".join(f"{v} = {short(x)}" for v, x in m.x.items())
        saved = _saving(rival, configs, line, pairing) if rival else ""
        return f"Best of those swept, as measured: {what}, error {short(m.error)}{m.caveat}{saved}. The law would take {told}."
    return f"Best of those swept: {told}{_saving(twin, configs, line, pairing) if twin else ''}."


def _saving(choice: Config, configs: Sequence[Config], line: Frontier, pairing: Pairing) -> str:
    """What a configuration saves, with the name of the cost that is compared."""
    price, what = costing(configs, line)
    found = against_uncompressed(choice, configs, price, pairing)
    return f"{found.text} [cost: {what}]" if found.factor else found.text


def costing(configs: Sequence[Config], line: Frontier) -> tuple[Price, str]:
    """The cost by which configurations are compared: all FLOPs that were measured; the frontier's formula where some have none."""
    if all("flops" in c.costs for c in configs):
        return (lambda c: c.costs["flops"]), "all measured FLOPs"
    return pricer(line), line.cost


def _config_at(x: Mapping[str, float], configs: Sequence[Config]) -> Config | None:
    def same(c: Config) -> bool:
        values = ((getattr(c, v, None), a) for v, a in x.items())
        return all(isinstance(mine, float) and math.isclose(mine, a, rel_tol=1e-9) for mine, a in values)

    return next((c for c in configs if same(c)), None)


def pricer(line: Frontier) -> Price:
    """The frontier's cost of a measured configuration."""
    formula = parse(line.cost, "cost")

    def price(c: Config) -> float | None:
        values = {n: getattr(c, n, None) for n in formula.names if n not in line.constants}
        if any(not isinstance(v, float) for v in values.values()):
            return None
        return float(formula({**line.constants, **{k: np.float64(v) for k, v in values.items() if v is not None}}))

    return price


def headline(found: Sequence[Pair], configs: Sequence[Config], pairing: Pairing) -> list[str]:
    """Per frontier: what to take at the middle of its budgets.

    That is the law's choice, unless something that costs no more was measured to have less error: then that is.
    """
    lines = []
    for fit, line in found:
        p = line.points[len(line.points) // 2]
        own = [c for c in configs if _belongs(c, fit.key)]
        lines.append(f"{name(fit.key, fit.law)}: {_recommended(p, line, own, pairing)}")
    return lines


def _recommended(p: FrontierPoint, line: Frontier, configs: Sequence[Config], pairing: Pairing) -> str:
    best = p.discrete[0] if p.discrete else None
    estimate = best.error if best else p.error
    predicted = with_interval(estimate.value, *_ends(estimate.interval))
    twin = _config_at(best.x, configs) if best else None
    if twin is None:
        what = ", ".join(f"{v} = {short(x)}" for v, x in (best.x if best else {}).items()) or "the optimum"
        return f"at {quantity(p.budget, unit_of(line.cost))} of {line.cost}, {what}, error {predicted} by the law"
    price, cost = costing(configs, line)
    unit = "FLOPs" if cost != line.cost else unit_of(cost)
    chosen = better_for_less(twin, configs, price)
    saved = against_uncompressed(chosen, configs, price, pairing).text
    at = f"at {quantity(price(chosen), unit)} per answer ({cost}), {chosen.title}"
    if chosen is twin:
        return f"{at}, error {predicted} by the law, measured {short(twin.error)}{saved}"
    error = with_interval(chosen.error, chosen.low, chosen.high)
    times = (price(twin) or 0.0) / (price(chosen) or math.inf)
    return f"{at}, measured error {error}{saved}; the law would take {twin.title}: {short(twin.error)} at {short(times)} × the cost"


def better_for_less(choice: Config, configs: Sequence[Config], price: Price) -> Config:
    """The configuration of least measured error that costs no more than ``choice``: itself, where nothing is better."""
    limit = (price(choice) or 0.0) * (1 + 1e-9)
    able = [(p, c) for c in configs if c.scene == choice.scene and (p := price(c)) is not None and p <= limit]
    least = min((c.error for _, c in able), default=choice.error)
    if least >= choice.error:
        return choice
    return min((pair for pair in able if pair[1].error == least), key=lambda pair: pair[0])[1]


def isoflop(found: Sequence[Pair]) -> tuple[list[Json], str]:
    """The law along curves of equal cost, and the rows whose cost lies within 20 % of one.

    Returns:
        The groups, and why a frontier has no curves.
    """
    out: dict[str, list[Json]] = {}
    missing: dict[str, None] = {}
    for fit, line in found:
        panel = _isoflop_panel(fit, line)
        if isinstance(panel, str):
            missing[f"frontier of {fit.law}: {panel}"] = None
        else:
            out.setdefault(f"{fit.law}, cost {line.cost}", []).append(panel)
    return [charts.group(title, panels) for title, panels in out.items()], "; ".join(missing)


def _isoflop_panel(fit: Fit, line: Frontier) -> Json | str:
    """A panel, or why there is none."""
    assert fit.data is not None
    model = CostModel.build(line.cost, fit.form.variable_names, line.constants)
    try:
        space = make_space(fit, model, None, None)
    except UserError as problem:
        return str(problem)
    if space.searched is None:
        return "its cost leaves one variable only"
    low, high = fit.record["data"]["ranges"][space.spender]
    searched = between(*space.limits[space.searched])
    price = np.broadcast_to(model(fit.data.x), fit.data.n)
    unit, content = unit_of(line.cost), []
    for k, budget in enumerate(np.geomspace(price.min(), price.max(), 7)[1:-1].tolist()):
        size = spend(model, space, budget, searched)
        inside = (size >= low / 2) & (size <= high * 2)
        error = fit.predict(**{space.spender: size, space.searched: searched})
        label = quantity(budget, unit)
        points = [
            charts.point(float(n), float(e), f"{label}, {space.searched} = {short(float(v))}")
            for n, v, e, keep in zip(size, searched, error, inside, strict=True)
            if keep
        ]
        near = np.flatnonzero(np.abs(np.log(price / budget)) <= math.log(1.2))
        dots = [
            charts.point(
                float(fit.data.x[space.spender][j]),
                float(fit.data.y[j]),
                f"{quantity(float(price[j]), unit)}, {space.searched} = {short(float(fit.data.x[space.searched][j]))}",
            )
            for j in near
        ]
        content.append(charts.series(label, k, points, line=True, dots=False))
        if dots:
            content.append(charts.series(f"measured near {label}", k, dots, of=label))
    chart = charts.xy(
        f"{name(fit.key, fit.law)}: {fit.columns.y} along curves of equal cost",
        charts.axis(AXES.get(space.spender, space.spender), log=True),
        charts.axis(fit.columns.y, log=charts.spread(fit.data.y.tolist())),
        content,
    )
    return charts.panel(name(fit.key, fit.law), chart)
