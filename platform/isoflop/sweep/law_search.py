"""``search: {sampler: law, …}``: from the spec to a sampler, and what it knows of a stored sweep."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import pyarrow as pa

from isoflop.core.errors import UserError, unknown
from isoflop.core.expressions import parse
from isoflop.laws.result import plain
from isoflop.ledger import Store
from isoflop.models.base import family_of
from isoflop.search.law import (
    BestMethod,
    Exponents,
    Frontier,
    LawSampler,
    OptimalAllocation,
    Policy,
    PredictionAt,
    Target,
)
from isoflop.search.law.axes import AxisSpec, Config, Reader
from isoflop.search.law.contenders import LawChoice
from isoflop.search.law.forecast import Forecast
from isoflop.search.law.proposer import LawProposer
from isoflop.search.law.targets import Budgeted
from isoflop.sweep.blocks import ContenderBlock, TargetBlock
from isoflop.sweep.resolve import Sweep
from isoflop.sweep.spec import SweepSpec

_KINDS: dict[str, tuple[type[Target], tuple[str, ...], tuple[str, ...]]] = {
    "allocation": (OptimalAllocation, ("budget",), ("of", "group")),
    "frontier": (Frontier, ("low", "high"), ("points", "group")),
    "prediction": (PredictionAt, ("at",), ("group",)),
    "best-method": (BestMethod, ("budget",), ("confidence",)),
    "exponents": (Exponents, (), ("names", "group")),
}
_Q = 50.0  # text tokens, where a target does not say
_FILE, _CHECK = "law_search.json", "law_check.json"
_ALWAYS = ("kind", "width")
_COSTED = ("cost", "q")
_POLICY = tuple(f.name for f in fields(Policy) if f.name not in ("replicates", "criterion"))


def make_target(block: TargetBlock) -> Target:
    """The target that a block describes.

    Raises:
        UserError: naming the key, for one that its kind needs or does not take.
    """
    kind, needs, takes = _KINDS[block.kind]
    costed = _COSTED if block.kind in ("allocation", "frontier", "best-method") else ()
    allowed = (*_ALWAYS, *needs, *takes, *costed)
    values = {k: v for k, v in block.model_dump().items() if v is not None}
    for name in values:
        if name not in allowed:
            raise UserError(f"{name}: a target of kind {block.kind} does not take it; allowed: {', '.join(allowed)}")
    for name in needs:
        if name not in values:
            raise UserError(f"the key {name!r} is missing; a target of kind {block.kind} needs {', '.join(needs)}")
    arguments = {k: v for k, v in values.items() if k not in ("kind", "q")}
    if costed:
        arguments["constants"] = {"Q": block.q if block.q is not None else _Q}
    if block.kind == "allocation" and isinstance(block.budget, tuple):
        raise UserError("budget: a target of kind allocation takes one; several are for best-method")
    return kind(**arguments)


def make_law_sampler(sweep: Sweep) -> LawSampler:
    """The sampler of a resolved sweep.

    Raises:
        UserError: with file, line and key.
    """
    spec, source = sweep.spec, sweep.source
    block = spec.search
    assert block.target is not None  # the spec's own validation
    where = ("search",)
    try:
        target = make_target(block.target)
    except UserError as error:
        raise UserError(f"{source.where((*where, 'target'))}: {error}") from None
    for name in block.options:
        if name not in _POLICY:
            raise unknown("option of law", name, _POLICY, source.where((*where, "options")))
        if isinstance(block.options[name], bool) or not isinstance(block.options[name], (int, float)):
            raise UserError(f"{source.where((*where, 'options', name))}: {block.options[name]!r} must be a number")
    names = {p.name for b in sweep.space.branches for p in b.params}
    axes = {a: _axis(sweep, a, s, names) for a, s in (block.axes or _default_axes(sweep, names)).items()}
    try:
        return LawSampler(
            axes,
            target,
            [_choice(law) for law in block.laws],
            by=block.by,
            share=block.share,
            outputs=_outputs(spec),
            space=sweep.space,
            cost=block.cost or _default_cost(target, axes),
            constants=dict(target.constants) if isinstance(target, Budgeted) else {"Q": _Q},
            cost_attr="flops",
            examples_attr="examples",
            budget=spec.budget.flops,
            max_runs=spec.budget.trials,
            policy=Policy(replicates=False, **block.options),
            seed=spec.seed,
        )
    except UserError as error:
        raise UserError(f"{source.where(where)}: {str(error).removeprefix('law sampler: ')}") from None


def _default_cost(target: Target, axes: Mapping[str, AxisSpec]) -> str | None:
    """Of a trial until FLOPs are measured (only ratios matter): the target's own cost of an answer, or the usual one."""
    if isinstance(target, Budgeted):
        known = {*axes, *target.constants}
        return (
            target.cost if parse(target.cost, "cost").names <= known else None
        )  # the target's own check names what is wrong
    return "2*N*(Q+V)" if {"N", "V"} <= set(axes) else "N" if "N" in axes else None


def make_law_proposer(sweep: Sweep) -> LawProposer:
    """The proposer for the driver."""
    directions = [o.direction for o in sweep.spec.objectives]
    return LawProposer(sweep.space, make_law_sampler(sweep), directions, sweep.spec.seed)


def _choice(law: str | ContenderBlock) -> LawChoice:
    return law if isinstance(law, str) else (law.law, dict(law.x))


def _outputs(spec: SweepSpec) -> tuple[str, ...]:
    """Several objectives have a law each, by the name of their task or metric."""
    if len(spec.objectives) == 1:
        return ()
    return tuple(o.task or o.metric for o in spec.objectives)


def _default_axes(sweep: Sweep, names: set[str]) -> dict[str, Any]:
    """N, and V from the methods' ratio knobs where each has one that counts tokens."""
    ratio = tuple(sorted(n for n in names if n.rsplit(".", 1)[-1] in ("k", "tokens")))
    return {"N": "N", "V": ratio} if ratio else {"N": "N"}


def _axis(sweep: Sweep, axis: str, spec: str | float | Sequence[str], names: set[str]) -> AxisSpec:
    """A reader of configurations: ``N`` is the model's size, a list means the first knob that exists."""
    where = sweep.source.where(("search", "axes", axis))
    sizes = {m.ref: float(family_of(m.ref).info(m.ref, m.options).n_params) for m in sweep.spec.models}
    if spec == "N":
        return {"model": sizes}
    if isinstance(spec, (int, float)):
        return float(spec)
    if isinstance(spec, str):
        reader = Reader(where, spec)
        for name in sorted(reader.names):
            if name not in names and name != "N":
                raise unknown("knob", name, [*names, "N"], where)
        return lambda config: reader({**config, "N": sizes[str(config["model"])]})
    for name in spec:
        if name not in names:
            raise unknown("knob", name, names, where)
    return _First(tuple(spec))


class _First:
    """The first knob of a list that a configuration has."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self._names = names

    def __call__(self, config: Config) -> float:
        return next((float(config[n]) for n in self._names if n in config), math.nan)


def keep_check(store: Store, name: str, proposer: LawProposer) -> None:
    """Remember the search's check beside the ledger as soon as it is chosen, and give it back to a search that goes on."""
    path = store.path("sweeps", name, _CHECK)
    if (data := store.read(path)) is not None:
        proposer.keep_check(json.loads(data))
    proposer.on_check = lambda config: store.write(path, json.dumps(plain(dict(config))).encode())


def save_knowledge(store: Store, spec: SweepSpec, proposer: LawProposer) -> None:
    """Keep what the search has found out beside the sweep's rows, so that it can be shown without resolving the sweep."""
    if not proposer.told:
        return
    report, steps = proposer.report().to_dict(), [vars(s) for s in proposer.steps()]
    if steps and steps[-1]["rows"] == report["rows"]:
        steps[-1]["half_width"] = report["half_width"]  # a replay may have ended in another basin
    data = {**report, "steps": steps, "about": about(spec)}
    store.write(store.path("sweeps", spec.name, _FILE), json.dumps(plain(data)).encode())


def about(spec: SweepSpec) -> str:
    """What the search's laws are of, where that is not plain."""
    alone = [o for o in spec.objectives if o.task is None]
    if not alone or len(spec.tasks) == 1:
        return ""
    names = ", ".join(t.name for t in spec.tasks)
    return f"the search's law is of the mean {alone[0].metric} of {names}; objectives with a task each give every task a law"


def read_knowledge(store: Store, name: str) -> dict[str, Any] | None:
    """What :func:`save_knowledge` kept, or None."""
    data = store.read(store.path("sweeps", name, _FILE))
    return None if data is None else json.loads(data)


def describe(data: dict[str, Any]) -> list[str]:
    """Lines for people."""
    lines = [data["about"]] if data.get("about") else []
    lines += [
        f"{q['label']} = {show(q['value'])}  95 % [{show(q['low'])}, {show(q['high'])}]" for q in data["target"][:12]
    ]
    if len(data["target"]) > 12:
        lines.append(f"… and {len(data['target']) - 12} more quantities (--json)")
    for budget, best in data["best_method"].items():
        lines.append(f"best at {budget}: {best['method']} (probability {best['probability']:.3f})")
    lines.append("forms: " + ", ".join(f"{f} {w:.3f}" for f, w in data["forms"].items()))
    lines.append(data["verdict"])
    if data["check"]:
        c = data["check"]
        place = ", ".join(f"{a}={v:g}" for a, v in c["place"].items())
        lines.append(
            f"check at {place}, never fitted: predicted {show(c['predicted'])} ± {show(1.96 * c['sd'])}, "
            f"observed {show(c['observed'])}"
        )
    for step in data["steps"]:
        lines.append(f"half-width {show(step['half_width'])} after {step['rows']} rows and {step['spent']:.3g} FLOPs")
    if data["stop"]:
        lines.append(f"the search ends: {data['stop']}")
    return lines


def show(value: float | None) -> str:
    """Four digits."""
    return "?" if value is None else f"{value:.4g}"


def forecast_of(sweep: Sweep, table: pa.Table, store: Store | None = None) -> Forecast | None:
    """What the asked-for width is expected to cost, from the prior or from the rows so far; None without a width."""
    target = sweep.spec.search.target
    if target is None or target.width is None:
        return None
    from isoflop.sweep.trials import TrialBook

    proposer = make_law_proposer(sweep)
    if store is not None:
        keep_check(store, sweep.spec.name, proposer)
    if table.num_rows:
        TrialBook(sweep, proposer).restore(table)
    return proposer.forecast(target.width)
