"""What a comparison of forms found: an entry per form, the verdict, and the same per group; as text, HTML, JSON and Arrow."""

from __future__ import annotations

import html
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from isoflop.core.result import Result
from isoflop.laws.extrapolation import Cut
from isoflop.laws.render import number
from isoflop.laws.result import Fit, plain
from isoflop.laws.table import describe_key


@dataclass
class Entry:
    """One form in a comparison.

    Attributes:
        label: its name; fit: the fit (None for baselines that are no law, or when refused).
        k: estimated numbers, sigma included; aicc, bic: None when they do not apply.
        delta, weight: AICc distance from the best and Akaike weight.
        cuts: leave-largest-out with growing cut; interpolation: RMSE of random folds.
        refused: why the form could not be fitted.
    """

    label: str
    fit: Fit | None = None
    k: int = 0
    aicc: float | None = None
    bic: float | None = None
    delta: float | None = None
    weight: float | None = None
    cuts: list[Cut] = field(default_factory=list)
    interpolation: float | None = None
    refused: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "form": self.label,
            "fit": None if self.fit is None else self.fit.to_dict(),
            "k": self.k,
            "aicc": self.aicc,
            "bic": self.bic,
            "delta_aicc": self.delta,
            "akaike_weight": self.weight,
            "leave_largest_out": plain([c.to_dict() for c in self.cuts]),
            "interpolation_rmse": plain(self.interpolation),
            "refused": self.refused or None,
        }


@dataclass
class Comparison(Result):
    """Forms on the same rows; iterate over ``entries``, best AICc first, baselines last."""

    entries: list[Entry]
    along: str
    n: int
    verdict: list[str]
    data_hash: str
    key: dict[str, Any] = field(default_factory=dict)

    def __getitem__(self, label: str) -> Entry:
        """An entry by its label."""
        for entry in self.entries:
            if entry.label == label:
                return entry
        raise KeyError(label)

    def __iter__(self) -> Any:
        return iter(self.entries)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "group": plain(self.key),
            "along": self.along,
            "n": self.n,
            "verdict": self.verdict,
            "forms": [e.to_dict() for e in self.entries],
            "data_hash": self.data_hash,
        }

    def to_arrow(self) -> pa.Table:
        """One row per form."""
        rows = []
        for e in self.entries:
            first = e.cuts[0] if e.cuts else None
            rows.append(
                {
                    **self.key,
                    "form": e.label,
                    "k": e.k or None,
                    "sse": e.fit.sse if e.fit else None,
                    "r2": e.fit.r2 if e.fit else None,
                    "aicc": e.aicc,
                    "delta_aicc": e.delta,
                    "akaike_weight": e.weight,
                    "bic": e.bic,
                    "interpolation_rmse": e.interpolation,
                    "extrapolation_rmse": first.rmse if first else None,
                    "extrapolation_bias": first.bias if first else None,
                    "extrapolation_decades": first.decades if first else None,
                    "status": e.fit.status if e.fit else (e.refused or "baseline"),
                }
            )
        return pa.Table.from_pylist(rows)

    def __str__(self) -> str:
        lines = [describe_key(self.key).strip()] if self.key else []
        lines += [f"{'form':22}{'k':>3}{'ΔAICc':>9}{'weight':>8}{'R²':>8}{'inter.':>10}{'extra.':>10}{'bias':>10}"]
        for e in self.entries:
            cut = e.cuts[0] if e.cuts else None
            cells = [
                f"{e.label[:21]:22}{e.k or '':>3}",
                f"{_show(e.delta, '.2f'):>9}{_show(e.weight, '.2f'):>8}{_show(e.fit.r2 if e.fit else None, '.4f'):>8}",
                f"{_show(e.interpolation, '.4g'):>10}{_show(cut.rmse if cut else None, '.4g'):>10}{_show(cut.bias if cut else None, '+.3g'):>10}",
            ]
            lines.append("".join(cells) + (f"\n  refused: {e.refused}" if e.refused else ""))
        largest = next((e.cuts[0] for e in self.entries if e.cuts), None)
        if largest is not None:
            lines.append(
                f"extra.: RMSE at {self.along} = {', '.join(number(v) for v in largest.held_out)}, held out ({largest.decades:.2g} decades)"
            )
        return "\n".join([*lines, *(f"→ {v}" for v in self.verdict)])

    def _repr_html_(self) -> str:
        table = self.to_arrow()
        head = "".join(f"<th>{html.escape(c)}</th>" for c in table.column_names)
        body = "".join(
            "<tr>"
            + "".join(
                f"<td>{'' if v is None else number(v) if isinstance(v, float) else html.escape(str(v))}</td>"
                for v in r.values()
            )
            + "</tr>"
            for r in table.to_pylist()
        )
        return f"<div><table><tr>{head}</tr>{body}</table><ul>{''.join(f'<li>{html.escape(v)}</li>' for v in self.verdict)}</ul></div>"


@dataclass
class Comparisons(Result):
    """A comparison per group of a table, and the groups without one (with the reason)."""

    by: tuple[str, ...]
    comparisons: list[Comparison]
    refused: list[tuple[dict[str, Any], str]] = field(default_factory=list)

    def __iter__(self) -> Iterator[Comparison]:
        return iter(self.comparisons)

    def __len__(self) -> int:
        return len(self.comparisons)

    def __getitem__(self, i: int) -> Comparison:
        return self.comparisons[i]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "by": list(self.by),
            "groups": [c.to_dict() for c in self.comparisons],
            "refused": [{"group": plain(k), "reason": reason} for k, reason in self.refused],
        }

    def to_arrow(self) -> pa.Table:
        """One row per group and form."""
        return pa.concat_tables([c.to_arrow() for c in self.comparisons], promote_options="permissive")

    def __str__(self) -> str:
        lines = [str(c) for c in self.comparisons]
        return "\n\n".join(lines + [f"refused{describe_key(k)}: {reason}" for k, reason in self.refused])

    def _repr_html_(self) -> str:
        return "".join(c._repr_html_() for c in self.comparisons)


def _show(value: float | None, spec: str) -> str:
    return "" if value is None or not math.isfinite(value) else format(value, spec)
