"""What a finished (or half finished) sweep says: usable rows, fitted laws, frontiers, and the files that record them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.feather

from isoflop.core.errors import UserError
from isoflop.sweep.blocks import FrontierBlock, LawBlock
from isoflop.sweep.measured_cost import DefaultCost, default_cost
from isoflop.sweep.spec import SweepSpec
from isoflop.track import Artifact
from isoflop.track.names import spelt_apart

if TYPE_CHECKING:
    from isoflop.frontier.result import Frontier, Frontiers
    from isoflop.laws.result import Fit, GroupedFit
    from isoflop.ledger import Store


def usable(table: pa.Table) -> pa.Table:
    """Rows that laws may use: jobs that ran to their end. A pruned job saw only some examples and is left out."""
    return table.filter(pc.equal(table["status"], "ok"))


@dataclass
class LawFinding:
    """A law that the sweep asked for; ``fit`` is None and ``problem`` says why when the rows do not support it."""

    block: LawBlock
    fit: GroupedFit | Fit | None = None
    problem: str = ""

    @property
    def fits(self) -> list[Fit]:
        """One fit per group."""
        from isoflop.laws.result import GroupedFit

        if self.fit is None:
            return []
        return list(self.fit) if isinstance(self.fit, GroupedFit) else [self.fit]


@dataclass
class FrontierFinding:
    """A frontier that the sweep asked for, one per group of its law."""

    block: FrontierBlock
    frontiers: list[Frontier] = field(default_factory=list)
    problem: str = ""


@dataclass
class Findings:
    """Laws and frontiers of a sweep.

    Attributes:
        spec_digest: hash of the spec they were asked for in.
    """

    spec_digest: str
    laws: list[LawFinding] = field(default_factory=list)
    frontiers: list[FrontierFinding] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "spec": self.spec_digest,
            "laws": [{"fits": [f.to_dict() for f in law.fits], "problem": law.problem} for law in self.laws],
            "frontiers": [
                {"frontiers": [f.to_dict() for f in found.frontiers], "problem": found.problem}
                for found in self.frontiers
            ],
        }

    def tables(self) -> dict[str, pa.Table]:
        """File name -> Arrow table, with the hashes of the spec and of the rows in its metadata."""
        out = {}
        for index, law in enumerate(self.laws):
            if law.fits:
                out[f"law-{index}-{file_stem(law.block.law)}"] = self._joined(law.fits)
        for index, found in enumerate(self.frontiers):
            if found.frontiers:
                out[f"frontier-{index}-{file_stem(found.block.law)}"] = self._joined(found.frontiers)
        return out

    def _joined(self, parts: Sequence[Fit] | Sequence[Frontier]) -> pa.Table:
        """One table of all groups; its metadata name the spec and, per group, the rows (by hash) that it rests on."""
        table = pa.concat_tables([p.to_arrow() for p in parts], promote_options="permissive")
        hashes = json.dumps([p.data_hash for p in parts])
        return table.replace_schema_metadata({"isoflop.spec": self.spec_digest, "isoflop.rows": hashes})

    def save(self, store: Store, name: str) -> None:
        """Write tables and record beside the ledger."""
        folder = store.path("sweeps", name, "laws")
        for old in store.names(folder, ".arrow"):  # of an earlier version of the YAML
            if old.removesuffix(".arrow") not in self.tables():
                store.delete(f"{folder}/{old}")
        for stem, table in self.tables().items():
            store.write(f"{folder}/{stem}.arrow", _arrow_bytes(table))
        store.write(f"{folder}/record.json", json.dumps(self.to_dict(), indent=1).encode())

    def artifacts(self) -> list[Artifact]:
        """Files for the parent run: laws as JSON, frontiers as CSV. Figures are drawn by dashboards."""
        out = [Artifact("laws.json", json.dumps(self.to_dict(), indent=1))]
        for stem, table in self.tables().items():
            out.append(Artifact(f"{stem}.csv", table.to_pandas().to_csv(index=False)))
        return out

    def metrics(self) -> dict[str, float]:
        """Numbers for the parent run."""
        out: dict[str, float] = {}
        for law in self.laws:
            for fit in law.fits:
                label = "/".join(["law", law.block.law, *map(str, fit.key.values())])
                for name in fit.form.names:
                    # a number that the data do not determine must not stand in a column beside numbers that they do
                    known = fit.params[name].identified is not False
                    out[f"{label}/{name}{'' if known else ' not identified'}"] = float(fit[name])
                out[f"{label}/r2"] = float(fit.r2)
        names = spelt_apart(out)
        return {names[k]: v for k, v in out.items() if np.isfinite(v)}


def find(spec: SweepSpec, table: pa.Table) -> Findings:
    """Fit the laws and draw the frontiers of a spec on usable rows. What the rows do not support is said, not raised."""
    findings = Findings(spec.digest)
    for block in spec.laws:
        finding = LawFinding(block)
        findings.laws.append(finding)
        try:
            finding.fit = fit_block(block, table, spec.seed)
        except UserError as error:
            finding.problem = str(error)
    for block_ in spec.frontiers:
        found = FrontierFinding(block_)
        findings.frontiers.append(found)
        law = next((f for f in findings.laws if f.block.law == block_.law), None)
        try:
            if law is None:
                law = LawFinding(LawBlock(law=block_.law))
                law.fit = fit_block(law.block, table, spec.seed)
            if law.fit is None:
                found.problem = law.problem
                continue
            found.frontiers = frontiers_of(law.fits, table, block_.cost, block_.q, block_.budgets or None)
        except UserError as error:
            found.problem = str(error)
    return findings


def law_block(spec: SweepSpec, law: str | None) -> LawBlock:
    """The YAML's block for a law (its first block, when none is named), or the defaults."""
    found = next((block for block in spec.laws if law in (None, block.law)), None)
    return found or LawBlock(law=law or "product")


def frontier_block(spec: SweepSpec, law: str | None) -> FrontierBlock:
    """The YAML's frontier block for a law (its first, when none is named), or the defaults."""
    found = next((block for block in spec.frontiers if law in (None, block.law)), None)
    return found or FrontierBlock(law=law or law_block(spec, None).law)


def fit_block(block: LawBlock, table: pa.Table, seed: int, /, **options: Any) -> GroupedFit | Fit:
    """Fit one law as its block says; ``options`` of :func:`isoflop.fit` take precedence."""
    from isoflop.laws import fit

    asked: dict[str, Any] = {
        "law": block.law,
        "y": block.y,
        "map": dict(block.x),
        "by": block.by,
        "where": block.where,
        "objective": block.objective,
        "delta": block.delta,
        "weights": block.weights,
        "fixed": dict(block.fixed) or None,
        "bootstrap": block.bootstrap,
        "seed": seed,
    }
    return fit(table, **{**asked, **options})


def frontiers_of(
    fits: Iterable[Fit], table: pa.Table, cost: str | None, q: float | None, budgets: Any = None, **options: Any
) -> list[Frontier]:
    """A frontier per fit. Without ``cost`` it is all that the rows of the fit's group measured; so is Q without ``q``."""
    from isoflop.frontier import frontier
    from isoflop.frontier.build import measured_q
    from isoflop.frontier.result import Frontier
    from isoflop.laws.table import of_group, where

    out: list[Frontier] = []
    for fit in fits:
        rows = where(table, fit.columns.condition)
        rows = rows.filter(pa.array(of_group(rows, fit.key)))
        asked = DefaultCost(cost) if cost is not None else default_cost(rows, fit.columns.variables)
        known = {**asked.constants, **(options.get("constants") or {})}
        given = {**options, "constants": known, "q": q if q is not None else measured_q(rows, {}), "budget": budgets}
        found: Frontier | Frontiers = frontier(fit, cost=asked.formula, **given)
        drawn = [found] if isinstance(found, Frontier) else list(found)
        out.extend(replace(one, cost_note=asked.note) for one in drawn)
    return out


def _arrow_bytes(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pyarrow.feather.write_feather(table, sink, compression="zstd")
    return bytes(sink.getvalue())


def file_stem(text: str) -> str:
    """The text as part of a file name."""
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in text)[:60] or "law"
