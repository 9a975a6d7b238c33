"""Failed jobs with their reasons, and where every number comes from."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from isoflop.core.numbers import between, quantity
from isoflop.core.secrets import redacted
from isoflop.core.yaml_source import Source
from isoflop.dashboards.report import charts
from isoflop.dashboards.report.charts import Json
from isoflop.laws.render import numbers_line, title, value
from isoflop.sweep.results import Findings
from isoflop.sweep.titles import knobs_title

BAD = ("failed", "infeasible")
_MOST_FAILURES = 200
_LONGEST = 600


def failures(table: pa.Table) -> list[Json]:
    """Reasons with how often each occurs, then the jobs."""
    bad = table.filter(pc.is_in(table["status"], pa.array(BAD)))
    columns = ["status", "error_type", "error_text", "model", "method", "knobs", "task", "repeat", "host", "attempt"]
    rows = bad.select(columns).to_pylist()
    if not rows:
        return []
    reasons = Counter((r["status"], r["error_type"] or "–", _first_line(r["error_text"])) for r in rows)
    counted = [[count, *reason] for reason, count in reasons.most_common(40)]
    listed = [
        [
            r["model"],
            r["method"],
            knobs_title(r["knobs"]),
            r["task"],
            r["repeat"],
            r["status"],
            f"{r['error_type'] or ''}: {(r['error_text'] or '')[:_LONGEST]}",
            r["host"] or "–",
            r["attempt"],
        ]
        for r in rows[:_MOST_FAILURES]
    ]
    head = ["model", "method", "settings", "task", "repeat", "status", "error", "host", "attempts"]
    more = f"the first {_MOST_FAILURES} of {len(rows)}" if len(rows) > _MOST_FAILURES else ""
    panels = [
        charts.panel("reasons", table=charts.table(["jobs", "status", "type", "message"], counted)),
        charts.panel("jobs", table=charts.table(head, listed, more), folded=True),
    ]
    return [charts.group("failures", panels)]


def _first_line(text: str | None) -> str:
    lines = (text or "").strip().splitlines()
    return lines[0][:300] if lines else "–"


def laws(findings: Findings) -> list[Json]:
    """The parameters of every law as it was fitted."""
    panels = []
    for law in findings.laws:
        for fit in law.fits:
            rows = [
                [name, value(e), between(*(e.interval or (None, None))), e.verdict or e.method or "–"]
                for name, e in [*fit.params.items(), *fit.derived.items()]
            ]
            text = " ".join([numbers_line(fit) + ".", *fit.warnings])
            head = ["parameter", "value", f"{100 * fit.level:g} % interval", "what the data say"]
            panels.append(charts.panel(title(fit), text=text, table=charts.table(head, rows)))
    return [charts.group("parameters", panels)]


def provenance(table: pa.Table, everything: int, source: Source, findings: Findings, store: str) -> list[Json]:
    """What ran where, with which versions, and hashes of spec and rows."""
    facts: list[list[Any]] = [
        ["store", store],
        ["spec (hash)", findings.spec_digest],
        [
            "rows",
            f"{table.num_rows} jobs"
            + (f", {everything - table.num_rows} of earlier versions left out" * (everything > table.num_rows)),
        ],
        ["rows (hash)", rows_hash(table)],
        ["first job started", _when(pc.min(table["started"]).as_py())],
        ["last job finished", _when(pc.max(table["finished"]).as_py())],
        ["time of all jobs", quantity(pc.sum(table["wall_seconds"]).as_py() or 0.0, "s")],
        ["seeds", ", ".join(map(str, sorted({s for s in table["seed"].to_pylist() if s is not None})))],
    ]
    for law in findings.laws:
        facts += [
            [f"rows of law {fit.law} {', '.join(map(str, fit.key.values()))}", f"n {fit.n}, hash {fit.data_hash}"]
            for fit in law.fits
        ]
    versions: dict[str, set[str]] = {}
    for row in table["versions"].to_pylist():
        for name, version in row or ():
            versions.setdefault(name, set()).add(version)
    shown = [[name, ", ".join(sorted(found))] for name, found in sorted(versions.items())]
    places = Counter(zip(*(table[c].to_pylist() for c in ("host", "device")), strict=True))
    hosts = [[h or "–", d or "–", jobs] for (h, d), jobs in sorted(places.items(), key=str)]
    panels = [
        charts.panel("results", table=charts.table(["what", ""], facts)),
        charts.panel("versions", table=charts.table(["part", "version"], shown), folded=True),
        charts.panel("where it ran", table=charts.table(["host", "device", "jobs"], hosts), folded=True),
        charts.panel(
            "the sweep as it was run (YAML)",
            pre=redacted(source.text or json.dumps(source.data, indent=1)),
            folded=True,
        ),
    ]
    return [charts.group("provenance", panels)]


def origin(table: pa.Table, source: str) -> list[Json]:
    """Of rows that no sweep made."""
    facts = [["source", source], ["rows", table.num_rows], ["rows (hash)", rows_hash(table)]]
    return [charts.group("provenance", [charts.panel("results", table=charts.table(["what", ""], facts))])]


def rows_hash(table: pa.Table) -> str:
    """SHA-256 of job ids, states and errors, whatever the rows' order."""
    rows = sorted(zip(*(table[c].to_pylist() for c in ("job_id", "status", "error")), strict=True), key=str)
    return hashlib.sha256(repr(rows).encode()).hexdigest()[:16]


def _when(moment: Any) -> str:
    return f"{moment:%Y-%m-%d %H:%M:%S} UTC" if moment else "–"


def counts(table: pa.Table) -> str:
    """``250 ok, 7 failed``."""
    found = Counter(table["status"].to_pylist())
    return ", ".join(f"{n} {status}" for status, n in found.most_common())
