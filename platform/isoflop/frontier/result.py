"""Frontiers as typed results: the best configuration per budget, with intervals, tables and JSON."""

from __future__ import annotations

import html
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from isoflop.core.result import Result
from isoflop.laws.render import WIDTH, number, span
from isoflop.laws.result import Estimate, plain

_MISS = 0.1  # of what was measured


@dataclass
class Choice:
    """One configuration of a menu.

    Attributes:
        x: variables; cost: what it costs.
        error: predicted error with its interval.
        probability: share of bootstrap samples in which it is the best of the menu (None without a bootstrap).
    """

    x: dict[str, float]
    cost: float
    error: Estimate
    probability: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {"x": self.x, "cost": self.cost, "error": self.error.to_dict(), "probability": self.probability}


@dataclass
class Measured:
    """A configuration that has run, and the law's choice beside it, both by what was measured.

    Attributes:
        x: variables; cost: what it costs; error: weighted mean of its rows; rows: how many.
        choice_error: that of the law's choice; None where that has not run.
        noise: standard error of the difference of the two, from the scatter of rows around their configurations' means; None
            where there are too few repeats to tell.
    """

    x: dict[str, float]
    cost: float
    error: float
    rows: int
    choice_error: float | None
    noise: float | None = None

    @property
    def caveat(self) -> str:
        """What to add where a difference could be chance."""
        return "" if self.noise is not None else " (noise unknown: no repeats)"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return dict(vars(self))


@dataclass
class FrontierPoint:
    """The optimum at one budget.

    Attributes:
        continuous: every free variable at the optimum, with intervals; error: the predicted error there.
        closed_form: the optimum came from a formula; check: its relative distance from the numeric search.
        discrete: the best of the menu by the law, and the runners-up, best first.
        measured: the best of the menu by its rows (None where no row is affordable, or the rows are not at hand).
        extrapolation: decades beyond the data, per variable (0 inside).
        notes: what a reader must know.
    """

    budget: float
    continuous: dict[str, Estimate]
    error: Estimate
    closed_form: bool
    check: float | None
    discrete: list[Choice]
    extrapolation: dict[str, float]
    notes: list[str] = field(default_factory=list)
    measured: Measured | None = None

    @property
    def contradicted(self) -> bool:
        """A configuration that costs no more than the law's choice was measured to have less error than it.

        By more than two standard errors, where repeats tell the noise.
        """
        best, m = self.discrete[0] if self.discrete else None, self.measured
        if best is None or m is None or m.choice_error is None or m.x == best.x:
            return False
        return m.cost <= best.cost * (1 + 1e-9) and m.choice_error - m.error > 2 * (m.noise or 0.0)

    @property
    def choice_measured(self) -> float | None:
        """What the law's choice measured; None where it has not run."""
        return self.measured.choice_error if self.measured else None

    @property
    def missed(self) -> float | None:
        """What the law's choice measured, where the law is off by more than a tenth of it and its interval does not hold it."""
        seen = self.choice_measured
        if not self.discrete or seen is None:
            return None
        error = self.discrete[0].error
        low, high = error.interval or (error.value, error.value)
        inside = low <= seen <= high
        return None if inside or abs(error.value - seen) <= _MISS * abs(seen) else seen

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        point = {
            "budget": self.budget,
            "optimum": {k: e.to_dict() for k, e in self.continuous.items()},
            "error": self.error.to_dict(),
            "closed_form": self.closed_form,
            "numeric_check": self.check,
            "choice": self.discrete[0].to_dict() if self.discrete else None,
            "choice_measured": self.choice_measured,
            "runners_up": [c.to_dict() for c in self.discrete[1:]],
            "measured_best": self.measured.to_dict() if self.measured else None,
            "extrapolation_decades": self.extrapolation,
            "notes": self.notes,
        }
        return dict(plain(point))


@dataclass
class Frontier(Result):
    """Optima of one law under one cost over budgets.

    Attributes:
        cost_note: where the cost's constants come from, when nobody gave it.
    """

    law: str
    cost: str
    constants: dict[str, float]
    points: list[FrontierPoint]
    key: dict[str, Any] = field(default_factory=dict)
    data_hash: str = ""
    cost_note: str = ""

    def __iter__(self) -> Iterator[FrontierPoint]:
        return iter(self.points)

    def __getitem__(self, i: int) -> FrontierPoint:
        return self.points[i]

    def __len__(self) -> int:
        return len(self.points)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "law": self.law,
            "cost": self.cost,
            "cost_note": self.cost_note,
            "constants": self.constants,
            "group": plain(self.key),
            "data_hash": self.data_hash,
            "points": [p.to_dict() for p in self.points],
        }

    def to_arrow(self) -> pa.Table:
        """One row per budget: optimum, interval ends, error, discrete choice, and the hash of the rows it rests on."""
        rows = []
        for point in self.points:
            row: dict[str, Any] = {**self.key, "budget": point.budget}
            for name, e in [*point.continuous.items(), ("error", point.error)]:
                low, high = e.interval or (None, None)
                row |= {name: e.value, f"{name}_low": low, f"{name}_high": high}
            if point.discrete:
                best = point.discrete[0]
                row |= {f"choice_{k}": v for k, v in best.x.items()}
                row |= {
                    "choice_cost": best.cost,
                    "choice_error": best.error.value,
                    "choice_measured": point.choice_measured,
                    "choice_probability": best.probability,
                }
            rows.append({**row, "data_hash": self.data_hash})
        return pa.Table.from_pylist(rows)

    def _lines(self) -> list[str]:
        group = ", ".join(f"{k}={v}" for k, v in self.key.items())
        constants = ", ".join(f"{k}={v:g}" for k, v in self.constants.items())
        lines = [
            f"frontier of {self.law}, cost {self.cost}"
            + (f" ({constants})" if constants else "")
            + (f"  [{group}]" if group else ""),
            *([self.cost_note] if self.cost_note else []),
        ]
        for p in self.points:
            lines.append(f"budget {number(p.budget)}")
            for name, e in [*p.continuous.items(), ("error", p.error)]:
                lines.append(f"  {name:8}{number(e.value):>14}  {span(e)}")
            if p.discrete:
                best = p.discrete[0]
                where = ", ".join(f"{k} = {number(v)}" for k, v in best.x.items())
                sure = "" if best.probability is None else f", best in {100 * best.probability:.0f}% of resamples"
                seen = "" if p.choice_measured is None else f", measured {number(p.choice_measured)}"
                lines.append(f"  at hand: {where}; error {number(best.error.value)} by the law{seen}{sure}")
                if p.missed is not None:
                    lines.append(f"  ! the law misses what it chose: {number(p.missed)} was measured there")
                lines += [f"  measured: {text}" for text in measured_otherwise(p)]
            lines += [f"  ! {note}" for note in p.notes]
        return lines

    def __str__(self) -> str:
        import textwrap

        return "\n".join(
            part
            for line in self._lines()
            for part in textwrap.wrap(line, WIDTH, subsequent_indent="    ", replace_whitespace=False) or [""]
        )

    def _repr_html_(self) -> str:
        table = self.to_arrow().drop_columns("data_hash")
        head = "".join(f"<th>{html.escape(c)}</th>" for c in table.column_names)
        body = "".join(
            "<tr>"
            + "".join(f"<td>{number(v) if isinstance(v, float) else html.escape(str(v))}</td>" for v in row.values())
            + "</tr>"
            for row in table.to_pylist()
        )
        notes = "".join(f"<li>{html.escape(n)}</li>" for p in self.points for n in p.notes)
        return f"<div><p>{html.escape(self._lines()[0])}</p><table><tr>{head}</tr>{body}</table><ul>{notes}</ul></div>"


def measured_otherwise(point: FrontierPoint) -> list[str]:
    """A line when the rows speak against the law's choice: something no dearer was measured to be better."""
    m = point.measured
    if m is None or m.choice_error is None or not point.contradicted:
        return []
    where = ", ".join(f"{k} = {number(v)}" for k, v in m.x.items())
    return [f"{where} costs no more; error {number(m.error)}, of the law's choice {number(m.choice_error)}{m.caveat}"]


@dataclass
class Frontiers(Result):
    """One frontier per group of a grouped fit."""

    frontiers: list[Frontier]

    def __iter__(self) -> Iterator[Frontier]:
        return iter(self.frontiers)

    def __len__(self) -> int:
        return len(self.frontiers)

    def __getitem__(self, i: int) -> Frontier:
        return self.frontiers[i]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {"groups": [f.to_dict() for f in self.frontiers]}

    def to_arrow(self) -> pa.Table:
        """All groups in one table."""
        return pa.concat_tables([f.to_arrow() for f in self.frontiers], promote_options="permissive")

    def __str__(self) -> str:
        return "\n\n".join(str(f) for f in self.frontiers)

    def _repr_html_(self) -> str:
        return "".join(f._repr_html_() for f in self.frontiers)
