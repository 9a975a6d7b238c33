"""A sweep as the sections of its report: plain JSON, every number from the ledger and the laws fitted on it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from isoflop import __version__
from isoflop.core.errors import UserError
from isoflop.dashboards.report import charts, costs, knobs, lawful, measured, methods, record
from isoflop.dashboards.report.charts import Json
from isoflop.dashboards.report.configs import Config, colours, read_configs
from isoflop.sweep.api import SweepResults, stored_source
from isoflop.sweep.law_search import describe
from isoflop.sweep.results import Findings, find, usable


def build(sweep: SweepResults, findings: Findings | None = None) -> Json:
    """The report as JSON.

    Args:
        sweep: an opened sweep.
        findings: its laws and frontiers with the fits in memory; fitted when not given.

    Returns:
        ``name``, ``description``, ``facts``, ``headline`` (a sentence, in clauses), ``sections`` (see :mod:`.charts`) and
        ``left_out`` (why a section is missing, one line each).

    Raises:
        UserError: the sweep has no rows yet.
    """
    table = sweep.results()
    if not table.num_rows:
        raise UserError(f"sweep {sweep.name!r} has no results yet: nothing to report")
    good = usable(table)
    findings = findings or find(sweep.spec, good)
    configs = read_configs(good)
    palette = colours(c.variant for c in configs)
    drawn = lawful.pairs(findings)
    left_out: list[str] = []
    sections = [
        _frontier(configs, drawn, palette),
        *_law_sections(findings, drawn),
        _methods(good, configs, palette),
        _knobs(configs),
        charts.section("parallel", "Parallel coordinates", knobs.coordinates(configs), _PARALLEL),
        charts.section("costs", "Where costs go", costs.breakdown(configs)),
        charts.section("failures", "Failed jobs", record.failures(table)),
        _provenance(sweep, table, findings),
    ]
    shown = []
    for section in sections:
        if section["groups"]:
            shown.append(section)
        elif why := _why_empty(section["id"], findings, configs):
            left_out.append(f"{section['title']}: {why}")
    return {
        "name": sweep.name,
        "description": sweep.spec.description or "",
        "facts": [record.counts(table), f"results up to {_last(table)}", f"isoflop {__version__}"],
        "headline": _headline(configs, drawn, table),
        "sections": shown,
        "left_out": left_out,
    }


_FRONTIER = (
    "Error against the cost of an answer. The slider sets a budget; the text under it states the best configuration that it "
    "pays for. Bars and bands are 95 % intervals: of measured means over repeats (Student's t; over examples where there is "
    "one repeat), of laws by bootstrap. An uncompressed model is called not worse where its mean error lies inside or below the "
    "interval of the measured choice."
)
_PARALLEL = "A line is a configuration, mean over repeats; its colour is the error. The slider fades all but the best."


def _headline(configs: Sequence[Config], drawn: Sequence[lawful.Pair], table: Any) -> list[str]:
    if drawn:
        return lawful.headline(drawn, configs)
    if configs:
        return measured.headline(configs)
    return [f"No job of this sweep has finished: {record.counts(table)}"]


def _last(table: Any) -> str:
    known = [t for t in table["finished"].to_pylist() if t is not None]
    return f"{max(known):%Y-%m-%d %H:%M} UTC" if known else "–"


def _frontier(configs: Sequence[Config], drawn: Sequence[lawful.Pair], palette: dict[str, int]) -> Json:
    groups = [*lawful.groups(drawn, configs), *measured.groups(configs, palette)]
    return charts.section("frontier", "Frontier", groups, _FRONTIER)


def _law_sections(findings: Findings, drawn: Sequence[lawful.Pair]) -> list[Json]:
    problems = [f"{law.block.law}: {law.problem}" for law in findings.laws if law.problem]
    problems += [f"frontier of {f.block.law}: {f.problem}" for f in findings.frontiers if f.problem]
    return [
        charts.section("laws", "Error against size and tokens", lawful.curves(findings), _LAWS, problems),
        charts.section("isoflop", "IsoFLOP curves", lawful.isoflop(drawn), _ISOFLOP),
        charts.section("predicted", "Observed against predicted", lawful.predictions(findings), _PREDICTED),
        charts.section("parameters", "Parameters of the laws", record.laws(findings)),
    ]


_LAWS = (
    "Curves are the fitted law at levels of its other variables, bands their 95 % bootstrap intervals, points the rows."
)
_ISOFLOP = "The law along curves of equal cost: what a larger model with fewer tokens does. Points are rows within 20 % of a cost."
_PREDICTED = "Points on the diagonal are predicted exactly. Hollow ones were held out: predicted by a fit of the smaller sizes only."


def _methods(table: Any, configs: Sequence[Config], palette: dict[str, int]) -> Json:
    several = len({c.variant for c in configs}) > 1
    groups = [
        charts.group("paired differences", methods.comparisons(table, configs) if several else []),
        charts.group("error along the ratio", methods.curves(configs, palette) if several else []),
    ]
    return charts.section("methods", "Methods compared", groups)


def _knobs(configs: Sequence[Config]) -> Json:
    return charts.section("importance", "Importance of settings", knobs.importance(configs), _IMPORTANCE)


_IMPORTANCE = "Optuna's fANOVA on a study rebuilt from the rows, inside the settings that this sweep tried."


def _provenance(sweep: SweepResults, table: Any, findings: Findings) -> Json:
    everything = sweep.results(["job_id"], everything=True).num_rows
    source = stored_source(sweep.store, sweep.name)
    groups = record.provenance(table, everything, source, findings, sweep.store.uri)
    searched = sweep.law_search()
    notes = describe(searched) if searched is not None else []
    return charts.section("provenance", "Where the numbers come from", groups, notes=notes)


def _why_empty(key: str, findings: Findings, configs: Sequence[Config]) -> str:
    reasons: dict[str, Callable[[], str]] = {
        "frontier": lambda: "no finished job" if not configs else "no cost differs between the configurations",
        "laws": lambda: _no_law(findings),
        "isoflop": lambda: _no_law(findings) or "the sweep asks for no frontier of a law with two variables",
        "predicted": lambda: _no_law(findings),
        "methods": lambda: "there is one method" if configs else "no finished job",
        "importance": lambda: knobs.NO_IMPORTANCE,
        "parallel": lambda: "fewer than two settings vary",
        "costs": lambda: "no finished job",
    }
    return reasons.get(key, lambda: "")()


def _no_law(findings: Findings) -> str:
    if not findings.laws:
        return "the sweep asks for no law"
    problems = [law.problem for law in findings.laws if law.problem]
    return "; ".join(problems)
