"""Rate curves of a sweep's rows: one per codec, task and model, and every two of them compared."""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import pyarrow as pa

from isoflop.core.errors import UserError
from isoflop.core.result import Result
from isoflop.frontier.query import sql
from isoflop.frontier.rate_curves import RateCurve
from isoflop.laws.render import number

Key = tuple[Any, ...]


@dataclass(frozen=True)
class RateCurves(Result):
    """Curves over the same rate, which can only be compared within a task and a model.

    Attributes:
        rate, error: the expressions on the axes.
        by: what tells curves apart besides task and model.
        curves: the curve of (task, model, a value for each of ``by``), sorted.
    """

    rate: str
    error: str
    by: tuple[str, ...]
    curves: dict[Key, RateCurve]

    def compare(self) -> list[dict[str, Any]]:
        """One entry per pair of curves of a task and model.

        ``task``, ``model``, the names ``a`` and ``b``, ``extra_rate`` of a over b (-0.2: a fifth less for equal errors; None
        when they reach no common error), and ``crossings``, the rates at which they change places.
        """
        entries = []
        for (one, a), (two, b) in combinations(self.curves.items(), 2):
            if one[:2] != two[:2]:
                continue
            extra = a.extra_rate(b)
            entries.append(
                {
                    "task": one[0],
                    "model": one[1],
                    "a": _name(one),
                    "b": _name(two),
                    "extra_rate": None if extra != extra else extra,
                    "crossings": a.crossings(b),
                }
            )
        return entries

    def to_arrow(self) -> pa.Table:
        """One row per point: task, model, curve, rate, error, and whether it lies on its curve's hull."""
        rows = []
        for key, curve in self.curves.items():
            hull = set(curve.hull().rates.tolist())
            for rate, error in zip(curve.rates.tolist(), curve.errors.tolist(), strict=True):
                point = {"rate": rate, "error": error, "on_hull": rate in hull}
                rows.append({"task": key[0], "model": key[1], "curve": _name(key), **point})
        return pa.Table.from_pylist(rows)

    def named(self) -> Iterator[tuple[str, RateCurve]]:
        """The curves with names that tell them apart: with task and model only where there are several."""
        several = len({key[:2] for key in self.curves}) > 1
        for key, curve in self.curves.items():
            yield " · ".join([_name(key), *map(str, key[:2] if several else ())]), curve

    def __str__(self) -> str:
        lines = []
        for task, model in dict.fromkeys(key[:2] for key in self.curves):
            lines.append(f"{task}, {model}: {self.error} over {self.rate}")
            for key, curve in self.curves.items():
                if key[:2] == (task, model):
                    points = zip(curve.rates.tolist(), curve.errors.tolist(), strict=True)
                    lines.append(f"  {_name(key)}: " + "  ".join(f"{number(r)}: {e:.4g}" for r, e in points))
            lines += [_sentence(entry) for entry in self.compare() if (entry["task"], entry["model"]) == (task, model)]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"


def rate_curves(
    table: pa.Table, rate: str = "footprint['codec_bytes']", error: str = "error", by: Sequence[str] = ("method",)
) -> RateCurves:
    """Curves of the finished rows: a point per setting of the knobs, repeats averaged.

    Settings that ``by`` does not tell apart share a curve; of several at the same rate the one with the least error counts.

    Args:
        table: ledger rows, for example ``isoflop.open(name).results()``.
        rate, error: SQL expressions, for example ``footprint['codec_payload_bytes']`` and ``metrics['psnr']``. Rows without
            them, and rates that are not above 0, are left out.
        by: SQL expressions that tell curves apart within a task and model, for example ``knobs->>'tail_drop'``.

    Raises:
        UserError: an expression is wrong, or no row has the rate and the error.
    """
    names = ", ".join(f"{expression} as by_{place}" for place, expression in enumerate(by))
    found = sql(
        f"select task, model, {names}, knobs, avg({rate}) as rate, avg({error}) as error from results "
        f"where status = 'ok' group by all having avg({rate}) > 0 and avg({error}) is not null order by all",
        table,
    ).to_pylist()
    if not found:
        raise UserError(
            f"no finished row has both {rate} above 0 and {error}; rates of codecs are footprint['codec_bytes']"
        )
    points: dict[Key, dict[float, float]] = {}
    for row in found:
        key = (row["task"], row["model"], *(row[f"by_{place}"] for place in range(len(by))))
        at = points.setdefault(key, {})
        at[row["rate"]] = min(row["error"], at.get(row["rate"], row["error"]))
    return RateCurves(rate, error, tuple(by), {key: RateCurve.of(at.items()) for key, at in points.items()})


def _name(key: Key) -> str:
    return " ".join(str(value) for value in key[2:] if value is not None)


def _sentence(entry: dict[str, Any]) -> str:
    extra = entry["extra_rate"]
    size = "reaches no error in common with" if extra is None else f"takes {extra:+.0%} rate for the errors of"
    where = ", ".join(number(float(f"{rate:.3g}")) for rate in entry["crossings"])
    return f"  {entry['a']} {size} {entry['b']}" + (f"; they cross at {where}" if where else "")
