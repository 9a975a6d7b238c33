"""A sweep as the sections of its report: plain JSON, every number from the ledger and the laws fitted on it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from isoflop.core.errors import UserError
from isoflop.core.text import safe_text
from isoflop.core.version import __version__
from isoflop.dashboards.report import charts, costs, fits, knobs, lawful, measured, methods, pareto, record
from isoflop.dashboards.report.charts import Json
from isoflop.dashboards.report.savings import LIKELY, Pairing
from isoflop.sweep.api import SweepResults
from isoflop.sweep.configs import Config, read_configs
from isoflop.sweep.results import Findings, find, usable
from isoflop.sweep.stored import stored_source


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
    palette, pairing = charts.colours(c.variant for c in configs), Pairing(good)
    drawn = lawful.pairs(findings)
    sections = [
        _frontier(configs, drawn, palette, pairing),
        *_law_sections(findings, drawn),
        _methods(good, configs, palette),
        _knobs(configs),
        _parallel(configs),
        _search(sweep, good, configs),
        charts.section("costs", "Where costs go", costs.breakdown(configs), why=_none(configs, "no cost was measured")),
        charts.section("failures", "Failed jobs", record.failures(table)),
        _provenance(sweep, table, findings),
    ]
    shown = [s for s in sections if s["groups"]]
    return {
        "name": sweep.name,
        "description": safe_text(sweep.spec.description, None),
        "facts": [record.counts(table), f"results up to {_last(table)}", f"isoflop {__version__}"],
        "headline": _headline(configs, drawn, table, pairing),
        "sections": shown,
        "left_out": [f"{s['title']}: {s['why']}" for s in sections if s["why"] and not s["groups"]],
    }


def build_table(name: str, table: pa.Table, notes: Sequence[str], source: str) -> Json:
    """The report of a plain table of results: what a sweep's has, without laws, a search and its YAML.

    Args:
        name: of the report; table: rows as :func:`isoflop.sweep.outside.as_rows` gives them, with what it notes.
        source: where they are from.

    Raises:
        UserError: no row has a finite error.
    """
    good = usable(table)
    configs = read_configs(good)
    if not configs:
        raise UserError(f"{source}: no row has a finite error: nothing to report")
    palette, pairing = charts.colours(c.variant for c in configs), Pairing(good)
    sections = [
        _frontier(configs, [], palette, pairing),
        _methods(good, configs, palette),
        _parallel(configs),
        charts.section("costs", "Where costs go", costs.breakdown(configs), why="no cost is known"),
        charts.section("failures", "Rows without an error", record.failures(table)),
        charts.section("provenance", "Where the numbers come from", record.origin(table, source), notes=list(notes)),
    ]
    return {
        "name": name,
        "description": "",
        "facts": [record.counts(table), source, f"isoflop {__version__}"],
        "headline": measured.headline(configs, pairing),
        "sections": [s for s in sections if s["groups"]],
        "left_out": [f"{s['title']}: {s['why']}" for s in sections if s["why"] and not s["groups"]],
    }


def _none(configs: Sequence[Config], otherwise: str) -> str:
    """Why a section about configurations is empty."""
    return otherwise if configs else "no finished job"


_FRONTIER = (
    "Error against the cost of an answer. The slider sets a budget; the text under it states the best configuration that it "
    "pays for. Bars and bands are 95 % intervals: of measured means over repeats (Student's t; over examples where there is "
    "one repeat), of laws by bootstrap. Two measured configurations are told apart by the examples and repeats that they share: one "
    f"counts as worse where that is likelier than {LIKELY:g}, else both are called as good, and the text says over how many examples "
    "and how probably not. Few examples or repeats leave much open. A saving is stated against the cheapest uncompressed model that is "
    "not worse, and only where the choice is as good."
)
_PARALLEL = "A line is a configuration, mean over repeats; its colour is the error. The slider fades all but the best."


def _headline(configs: Sequence[Config], drawn: Sequence[lawful.Pair], table: Any, pairing: Pairing) -> list[str]:
    if drawn:
        return lawful.headline(drawn, configs, pairing)
    if configs:
        return measured.headline(configs, pairing)
    return [f"No job of this sweep has finished: {record.counts(table)}"]


def _last(table: Any) -> str:
    known = [t for t in table["finished"].to_pylist() if t is not None]
    return f"{max(known):%Y-%m-%d %H:%M} UTC" if known else "–"


def _frontier(
    configs: Sequence[Config], drawn: Sequence[lawful.Pair], palette: dict[str, int], pairing: Pairing
) -> Json:
    groups = [*lawful.groups(drawn, configs, pairing), *measured.groups(configs, palette, pairing)]
    why = _none(configs, "no cost that half of a task's configurations know differs by 10 % among them")
    return charts.section("frontier", "Frontier", groups, _FRONTIER, why=why)


def _law_sections(findings: Findings, drawn: Sequence[lawful.Pair]) -> list[Json]:
    problems = [f"{law.block.law}: {law.problem}" for law in findings.laws if law.problem]
    problems += [f"frontier of {f.block.law}: {f.problem}" for f in findings.frontiers if f.problem]
    no_law = _no_law(findings)
    curves, no_curves = lawful.isoflop(drawn)
    flat = no_law or "no variable of a fitted law varies"
    predicted = fits.predictions(findings)
    return [
        charts.section("laws", "Error against size and tokens", fits.curves(findings), _LAWS, problems, flat),
        charts.section(
            "isoflop", "IsoFLOP curves", curves, _ISOFLOP, why=no_law or no_curves or _no_frontier(findings)
        ),
        charts.section("predicted", "Observed against predicted", predicted, _PREDICTED, why=no_law),
        charts.section("parameters", "Parameters of the laws", record.laws(findings)),  # missing only where curves are
    ]


def _no_law(findings: Findings) -> str:
    """Why no law is fitted; empty where one is."""
    if not findings.laws:
        return "the sweep asks for no law"
    if any(fit.data is not None for law in findings.laws for fit in law.fits):
        return ""
    return "; ".join(f"{law.block.law}: {law.problem or 'its fit has no rows'}" for law in findings.laws)


def _no_frontier(findings: Findings) -> str:
    problems = [f"{f.block.law}: {f.problem}" for f in findings.frontiers if f.problem]
    return "; ".join(problems) or "the sweep asks for no frontier of a law that is fitted"


_LAWS = (
    "Curves are the fitted law at levels of its other variables, bands their 95 % bootstrap intervals, points the rows."
)
_ISOFLOP = "The law along curves of equal cost: what a larger model with fewer tokens does. Points are rows within 20 % of a cost."
_PREDICTED = "Points on the diagonal are predicted exactly. Hollow ones were held out: predicted by a fit of the smaller sizes only."


def _methods(table: Any, configs: Sequence[Config], palette: dict[str, int]) -> Json:
    if len({c.variant for c in configs}) < 2:
        return charts.section("methods", "Methods compared", [], why=_none(configs, "there is one method"))
    paired, missing = methods.comparisons(table, configs)
    groups = [
        charts.group("paired differences", paired),
        charts.group("error along the ratio", methods.curves(configs, palette)),
    ]
    notes = [f"No paired differences of {reason}." for reason in missing]
    why = "; ".join([*missing, "no model was measured at two known ratios"])
    return charts.section("methods", "Methods compared", groups, notes=notes, why=why)


def _knobs(configs: Sequence[Config]) -> Json:
    groups, missing = knobs.importance(configs)
    return charts.section("importance", "Importance of settings", groups, _IMPORTANCE, why=_none(configs, missing))


def _parallel(configs: Sequence[Config]) -> Json:
    why = _none(configs, "there is one configuration" if len(configs) == 1 else "fewer than two settings or costs vary")
    return charts.section("parallel", "Parallel coordinates", knobs.coordinates(configs), _PARALLEL, why=why)


def _search(sweep: SweepResults, table: Any, configs: Sequence[Config]) -> Json:
    groups, missing = pareto.groups(sweep.spec, table, configs)
    title = "Pareto front and hypervolume" if len(sweep.spec.objectives) > 1 else "Hypervolume"
    return charts.section("search", title, groups, pareto.LEAD, why=_none(configs, missing))


_IMPORTANCE = "Optuna's fANOVA on a study rebuilt from the rows, inside the settings that this sweep tried."


def _provenance(sweep: SweepResults, table: Any, findings: Findings) -> Json:
    everything = sweep.results(["job_id"], everything=True).num_rows
    source = stored_source(sweep.store, sweep.name)
    groups = record.provenance(table, everything, source, findings, sweep.store.shown)
    return charts.section("provenance", "Where the numbers come from", groups, notes=sweep.search_lines())
