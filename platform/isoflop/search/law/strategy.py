"""Law search as a strategy: from a sweep's ``search`` block to the sampler, and what is kept and said of it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any

from isoflop.core.errors import UserError, unknown
from isoflop.core.expressions import parse
from isoflop.core.knobs import Knob, frozen
from isoflop.laws.result import plain
from isoflop.search.law.axes import AxisSpec, Config, Reader
from isoflop.search.law.best_method import BestMethod
from isoflop.search.law.contenders import LawChoice
from isoflop.search.law.forecast import Forecast
from isoflop.search.law.policy import Policy
from isoflop.search.law.proposer import LawProposer
from isoflop.search.law.report import in_words, shown
from isoflop.search.law.sampler import LawSampler
from isoflop.search.law.targets import Budgeted, Exponents, Frontier, OptimalAllocation, PredictionAt, Target
from isoflop.search.proposer import Proposer
from isoflop.search.strategy import STRATEGIES, Problem, Shelf, Strategy

_KINDS: dict[str, tuple[type[Target], tuple[str, ...], tuple[str, ...]]] = {
    "allocation": (OptimalAllocation, ("budget",), ("of", "group")),
    "frontier": (Frontier, ("low", "high"), ("points", "group")),
    "prediction": (PredictionAt, ("at",), ("group",)),
    "best-method": (BestMethod, ("budget",), ("confidence",)),
    "exponents": (Exponents, (), ("names", "group")),
}
_USUAL = ("N", "V")  # axes that a search takes where the YAML names none
_Q = 50.0  # text tokens, where a target does not say
_CHECK = "law_check.json"
_ALWAYS = ("kind", "width")
_COSTED = ("cost", "q")
_MOST_SHOWN = 12  # quantities of a target


@STRATEGIES.register("law")
@dataclass(frozen=True)
class LawSearch(Strategy):
    """Buys certainty about a law's answer (``target``): runs are chosen by what they teach of it, per unit of cost."""

    dear = True  # but it thinks in the driver, where the check that it chooses is kept before it runs
    prunable = False
    unprunable = "a law is fitted on finished jobs"
    measures = True
    forecasts = True
    keys = ("target", "axes", "laws", "by", "share", "cost")

    gamma: Annotated[float, Knob(low=0.0, high=4.0, doc="power of the cost in a run's score")] = Policy.gamma
    pilot_gamma: Annotated[float, Knob(low=0.0, high=4.0, doc="the same for the pilot")] = Policy.pilot_gamma
    pilot_factor: Annotated[float, Knob(low=0.0, doc="pilot runs per parameter of the law")] = Policy.pilot_factor
    pilot_share: Annotated[float, Knob(low=0.0, high=1.0, doc="of the budget for the pilot, at most")] = (
        Policy.pilot_share
    )
    explore: Annotated[float, Knob(low=0.0, high=1.0, doc="share of runs where competing forms disagree")] = (
        Policy.explore
    )
    check_share: Annotated[
        float, Knob(low=0.0, high=1.0, doc="of the budget for the run that the search fits no law with; 0: none")
    ] = Policy.check_share

    def check(self, problem: Problem) -> None:
        if "target" not in problem.more:
            raise UserError(
                f"{problem.where('target')}: sampler 'law' needs one, e.g. {{kind: allocation, budget: 2e7}} "
                f"(kinds: {', '.join(_KINDS)})"
            )
        self.sampler(problem)

    def make(self, problem: Problem) -> LawProposer:
        return LawProposer(problem.space, self.sampler(problem), problem.directions, problem.seed)

    def sampler(self, problem: Problem) -> LawSampler:
        """Optuna's side of it.

        Raises:
            UserError: with the key.
        """
        more = problem.more
        try:
            target = make_target(more["target"])
        except UserError as error:
            raise UserError(f"{problem.where('target')}: {error}") from None
        axes = _axes(problem)
        try:
            return LawSampler(
                axes,
                target,
                [_choice(law) for law in more.get("laws", ("product",))],
                by=more.get("by", ()),
                share=more.get("share", ()),
                outputs=_outputs(problem),
                space=problem.space,
                cost=more.get("cost") or _default_cost(target, axes),
                constants=dict(target.constants) if isinstance(target, Budgeted) else {"Q": _Q},
                cost_attr="flops",
                examples_attr="examples",
                budget=problem.flops,
                max_runs=problem.trials,
                policy=Policy(replicates=False, **asdict(self)),
                seed=problem.seed,
            )
        except UserError as error:
            raise UserError(f"{problem.where()}: {str(error).removeprefix('law sampler: ')}") from None

    def keep(self, proposer: Proposer, shelf: Shelf) -> None:
        """Remember the search's check as soon as it is chosen, and give it back to a search that goes on."""
        assert isinstance(proposer, LawProposer)
        if (data := shelf.read(_CHECK)) is not None:
            try:
                proposer.keep_check({name: frozen(value) for name, value in json.loads(data).items()})
            except (ValueError, TypeError, AttributeError):
                raise UserError(f"{_CHECK} of the sweep is damaged; delete it") from None
        proposer.on_check = lambda config: shelf.write(_CHECK, json.dumps(plain(dict(config))).encode())

    def forecast(self, proposer: Proposer, problem: Problem) -> Forecast | None:
        """What the asked-for width is expected to cost, from the prior or from the rows so far; None without a width."""
        assert isinstance(proposer, LawProposer)
        width = problem.more["target"].get("width")
        return None if width is None else proposer.forecast(width)

    def findings(self, proposer: Proposer, problem: Problem) -> dict[str, Any] | None:
        assert isinstance(proposer, LawProposer)
        if not proposer.told:
            return None
        report, steps = proposer.report().to_dict(), [vars(s) for s in proposer.steps()]
        if steps and steps[-1]["rows"] == report["rows"]:
            steps[-1]["half_width"] = report["half_width"]  # a replay may have ended in another basin
        return dict(plain({**report, "steps": steps, "about": about(problem)}))

    @classmethod
    def lines(cls, findings: Mapping[str, Any]) -> list[str]:
        return describe(findings)


def make_target(block: Mapping[str, Any]) -> Target:
    """The target that a block describes.

    Raises:
        UserError: naming the key, for one that its kind needs or does not take.
    """
    values = {k: v for k, v in block.items() if v is not None}
    kind, needs, takes = _KINDS[values["kind"]]
    costed = _COSTED if values["kind"] in ("allocation", "frontier", "best-method") else ()
    allowed = (*_ALWAYS, *needs, *takes, *costed)
    for name in values:
        if name not in allowed:
            raise UserError(
                f"{name}: a target of kind {values['kind']} does not take it; allowed: {', '.join(allowed)}"
            )
    for name in needs:
        if name not in values:
            raise UserError(f"the key {name!r} is missing; a target of kind {values['kind']} needs {', '.join(needs)}")
    arguments = {k: v for k, v in values.items() if k not in ("kind", "q")}
    if costed:
        arguments["constants"] = {"Q": values.get("q", _Q)}
    if values["kind"] == "allocation" and isinstance(values["budget"], tuple):
        raise UserError("budget: a target of kind allocation takes one; several are for best-method")
    return kind(**arguments)


def _default_cost(target: Target, axes: Mapping[str, AxisSpec]) -> str | None:
    """Of a trial until FLOPs are measured (only ratios matter): the target's own cost of an answer, or the usual one."""
    if isinstance(target, Budgeted):
        known = {*axes, *target.constants}
        return (
            target.cost if parse(target.cost, "cost").names <= known else None
        )  # the target's own check names what is wrong
    return "2*N*(Q+V)" if {"N", "V"} <= set(axes) else "N" if "N" in axes else None


def _choice(law: str | Mapping[str, Any]) -> LawChoice:
    return law if isinstance(law, str) else (law["law"], dict(law["x"]))


def _outputs(problem: Problem) -> tuple[str, ...]:
    """Several objectives have a law each, by the name of their task or metric."""
    if len(problem.aims) == 1:
        return ()
    return tuple(aim.task or aim.metric for aim in problem.aims)


def _axes(problem: Problem) -> dict[str, AxisSpec]:
    """The axes that the YAML names, or those that the methods plan."""
    asked = problem.more.get("axes")
    if not asked:
        return {name: spec for name, spec in problem.axes.items() if name in _USUAL}
    names = {p.name for b in problem.space.branches for p in b.params}
    return {axis: _axis(problem, axis, spec, names) for axis, spec in asked.items()}


def _axis(problem: Problem, axis: str, spec: str | float | Sequence[str], names: set[str]) -> AxisSpec:
    """A reader of configurations: ``N`` is the model's size, a list means the first knob that exists."""
    where = problem.where("axes", axis)
    sizes = dict(problem.sizes)
    planned = {name: read for name, read in problem.axes.items() if callable(read)}
    if spec == "N":
        return {"model": sizes}
    if isinstance(spec, (int, float)):
        return float(spec)
    if isinstance(spec, str):
        reader = Reader(where, spec)
        for name in sorted(reader.names):
            if name not in names and name not in planned and name != "N":
                raise unknown("knob, or axis that the methods plan,", name, [*names, *planned, "N"], where)
        used = [name for name in planned if name in reader.names]
        return lambda config: reader(
            {**config, "N": sizes[str(config["model"])], **{name: planned[name](config) for name in used}}
        )
    for name in spec:
        if name not in names:
            raise unknown("knob", name, names, where)
    return FirstKnob(tuple(spec))


class FirstKnob:
    """The first knob of a list that a configuration has; nan when it has none of them."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self._names = names

    def __call__(self, config: Config) -> float:
        return next((float(config[n]) for n in self._names if n in config), math.nan)


def about(problem: Problem) -> str:
    """What the search's laws are of, where that is not plain."""
    alone = [aim for aim in problem.aims if aim.task is None]
    if not alone or len(problem.tasks) == 1:
        return ""
    names = ", ".join(problem.tasks)
    return f"the search's law is of the mean {alone[0].metric} of {names}; objectives with a task each give every task a law"


def describe(data: Mapping[str, Any]) -> list[str]:
    """Lines for people."""
    lines = [data["about"]] if data.get("about") else []
    lines += [in_words(q) for q in data["target"][:_MOST_SHOWN]]
    if len(data["target"]) > _MOST_SHOWN:
        lines.append(f"… and {len(data['target']) - _MOST_SHOWN} more quantities (--json)")
    for budget, best in data["best_method"].items():
        lines.append(f"best at {budget}: {best['method']} (probability {best['probability']:.3f})")
    if data["forms"]:
        lines.append("forms: " + ", ".join(f"{f} {w:.3f}" for f, w in data["forms"].items()))
    lines.append(data["verdict"])
    if data["check"]:
        c = data["check"]
        place = ", ".join(f"{a}={v:g}" for a, v in c["place"].items())
        half = c.get("half", 1.96 * c["sd"])  # kept by an earlier version
        outside = ": outside" if abs(c["observed"] - c["predicted"]) > half else ""
        lines.append(
            f"check at {place}, kept out of the search's fits: predicted {shown(c['predicted'])} ± {shown(half)}, "
            f"observed {shown(c['observed'])}{outside}"
        )
    for step in data["steps"]:
        width = step["half_width"]
        told = "one side known" if width is None or not math.isfinite(width) else f"half-width {shown(width)}"
        lines.append(f"{told} after {step['rows']} rows and {step['spent']:.3g} FLOPs")
    if data["stop"]:
        lines.append(f"the search ends: {data['stop']}")
    return lines
