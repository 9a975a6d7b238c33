"""What a fit returns: small typed objects that print, predict, serialise and reload to identical predictions."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from isoflop.core.errors import UserError
from isoflop.core.expressions import Array
from isoflop.core.result import Result
from isoflop.laws.base import LAWS, LawForm, custom_form
from isoflop.laws.bootstrap import Resamples, too_few
from isoflop.laws.engine import Box
from isoflop.laws.table import Columns, GroupData


@dataclass(frozen=True)
class Estimate:
    """A number with what the data say about it.

    Attributes:
        value: full precision, never rounded.
        interval: ends at the fit's level, or None; ``method`` says how it was made.
        identified: True, False, or None when it was not examined; ``verdict`` says it in words.
    """

    value: float
    unit: str = ""
    interval: tuple[float, float] | None = None
    method: str = ""
    identified: bool | None = None
    verdict: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; infinite ends become None."""
        ends = None if self.interval is None else [_finite(v) for v in self.interval]
        return {
            "value": _finite(self.value),
            "unit": self.unit,
            "interval": ends,
            "interval_method": self.method,
            "identified": self.identified,
            "verdict": self.verdict,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Estimate:
        """Inverse of ``to_dict``."""
        ends = data["interval"]
        interval = None if ends is None else (_open(ends[0], -math.inf), _open(ends[1], math.inf))
        return cls(
            _open(data["value"], math.nan),
            data["unit"],
            interval,
            data["interval_method"],
            data["identified"],
            data["verdict"],
        )


@dataclass(repr=False)
class Fit(Result):
    """One fitted law.

    Attributes:
        form: the law; ``p`` its natural parameters (P,) in the order of ``form.names``; ``cov`` their Wald covariance.
        params, derived: estimates by name.
        objective, delta, loss, sse, rmse, r2: what was minimised and how well; ``sse`` and ``r2`` are on y itself.
        status: ``converged``, ``iteration limit``, ``line-search failure`` or ``parameter at bound``.
        warnings: in words, what a reader must know.
        record: everything that the reporting checklist asks for (data rules, starts, bounds, seeds, software).
        diagnostics: residual tests.
        samples: bootstrap parameters, when drawn; data: the rows, when in memory.
    """

    form: LawForm
    p: Array
    cov: Array
    params: dict[str, Estimate]
    derived: dict[str, Estimate]
    objective: str
    delta: float
    loss: float
    sse: float
    rmse: float
    r2: float
    n: int
    status: str
    columns: Columns
    box: Box
    key: dict[str, Any] = field(default_factory=dict)
    level: float = 0.95
    warnings: list[str] = field(default_factory=list)
    record: dict[str, Any] = field(default_factory=dict)
    diagnostics: dict[str, Any] = field(default_factory=dict)
    data_hash: str = ""
    samples: Resamples | None = None
    data: GroupData | None = None

    @property
    def resampled(self) -> bool:
        """Whether there are bootstrap samples, and enough of them for intervals."""
        return self.samples is not None and self.samples.enough(self.level)

    @property
    def law(self) -> str:
        """The law's name, or the user's expression."""
        return self.form.name if self.form.name in LAWS else self.form.formula

    def __getitem__(self, name: str) -> float:
        """A parameter's or derived quantity's value."""
        found = self.params.get(name) or self.derived.get(name)
        if found is None:
            raise KeyError(name)
        return found.value

    def predict(self, **x: Any) -> Array:
        """The law at given variables (scalars or arrays that broadcast), in the units of the fit."""
        for name in self.form.variable_names:
            if name not in x:
                raise UserError(
                    f"predict: a value for {name} is needed (variables: {', '.join(self.form.variable_names)})"
                )
        arrays = np.broadcast_arrays(*(np.asarray(x[v], dtype=np.float64) for v in self.form.variable_names))
        flat = {v: np.ravel(a) for v, a in zip(self.form.variable_names, arrays, strict=True)}
        return self.form.evaluate(flat, self.p).reshape(arrays[0].shape)

    def predict_interval(
        self, x: Mapping[str, Any], level: float | None = None, new_run: bool = False
    ) -> tuple[Array, Array]:
        """Band of the mean (bootstrap percentiles), or of a new run (resampled residuals added). Needs ``samples``."""
        if self.samples is None or self.data is None:
            raise UserError("predict_interval needs a fit with bootstrap > 0, in memory")
        level = level or self.level
        if not self.samples.enough(level):
            raise UserError(f"predict_interval: {too_few(len(self.samples.p), level)}")
        points = {v: np.atleast_1d(np.asarray(x[v], dtype=np.float64)) for v in self.form.variable_names}
        draws = self.form.evaluate(points, self.samples.p)
        if new_run:
            rng = np.random.default_rng(0)
            residual = self.data.y - self.form.evaluate(self.data.x, self.p)
            draws = draws + rng.choice(
                residual * math.sqrt(self.n / max(1, self.n - int(self.box.free.sum()))), size=draws.shape
            )
        tail = 50 * (1 - level)
        low, high = np.nanpercentile(draws, [tail, 100 - tail], axis=0)
        return low, high

    def residuals(self) -> Array:
        """y minus the law, in the order of the fit's rows."""
        if self.data is None:
            raise UserError("residuals need the fit's rows, in memory")
        return self.data.y - self.form.evaluate(self.data.x, self.p)

    def quantity(self, text: str) -> Estimate:
        """Any expression in the parameters, with its bootstrap (or delta-method) interval."""
        from isoflop.laws.inference import quantity

        return quantity(self, text)

    def to_dict(self, samples: bool = False) -> dict[str, Any]:
        """Plain JSON types: ``law``, ``params``, ``objective``, ``r2``, ``n``, ``status``, ``derived``, ``data_hash`` and the record."""
        form = self.form
        data: dict[str, Any] = {
            "law": self.law,
            "formula": form.formula,
            "variables": {v: self.columns.variables[v] for v in form.variable_names},
            "y": self.columns.y,
            "group": plain(self.key),
            "params": {n: e.to_dict() for n, e in self.params.items()},
            "derived": {n: e.to_dict() for n, e in self.derived.items()},
            "covariance": [[_finite(v) for v in row] for row in self.cov],
            "objective": self.objective,
            "delta": self.delta,
            "loss": _finite(self.loss),
            "sse": _finite(self.sse),
            "rmse": _finite(self.rmse),
            "r2": _finite(self.r2),
            "n": self.n,
            "level": self.level,
            "status": self.status,
            "warnings": self.warnings,
            "diagnostics": plain(self.diagnostics),
            "data_hash": self.data_hash,
            "columns": {
                "weights": self.columns.weights,
                "cluster": self.columns.cluster,
                "where": self.columns.condition,
            },
            "bounds": {n: [_finite(self.box.low[i]), _finite(self.box.high[i])] for i, n in enumerate(form.names)},
            "record": plain(self.record),
        }
        if samples and self.samples is not None:
            data["samples"] = self.samples.p.tolist()
        return data

    def to_json(self, **options: Any) -> str:
        """``to_dict`` as text."""
        return json.dumps(self.to_dict(), **options)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Fit:
        """A fit from its dictionary: identical predictions, without the rows."""
        names = list(data["params"])
        if data["law"] in LAWS:
            form = LAWS.get(data["law"])
        else:
            bounds = {n: (_open(b[0], -math.inf), _open(b[1], math.inf)) for n, b in data["bounds"].items()}
            form = custom_form(data["formula"], list(data["variables"]), bounds=bounds)
        params = {n: Estimate.from_dict(e) for n, e in data["params"].items()}
        low = np.array([_open(data["bounds"][n][0], -math.inf) for n in names])
        high = np.array([_open(data["bounds"][n][1], math.inf) for n in names])
        columns = Columns(
            data["y"],
            dict(data["variables"]),
            data["columns"]["weights"],
            data["columns"]["cluster"],
            data["columns"]["where"],
        )
        fit = cls(
            form=form,
            p=np.array([params[n].value for n in form.names]),
            cov=np.array([[_open(v, math.inf) for v in row] for row in data["covariance"]]),
            params=params,
            derived={n: Estimate.from_dict(e) for n, e in data["derived"].items()},
            objective=data["objective"],
            delta=data["delta"],
            loss=_open(data["loss"], math.nan),
            sse=_open(data["sse"], math.nan),
            rmse=_open(data["rmse"], math.nan),
            r2=_open(data["r2"], math.nan),
            n=data["n"],
            status=data["status"],
            columns=columns,
            box=Box(low, high),
            key=dict(data["group"]),
            level=data["level"],
            warnings=list(data["warnings"]),
            record=dict(data["record"]),
            diagnostics=dict(data["diagnostics"]),
            data_hash=data["data_hash"],
        )
        if "samples" in data:
            draws = np.array(data["samples"], dtype=np.float64)
            fit.samples = Resamples(
                draws, np.full(len(draws), np.nan), data["record"].get("bootstrap", {}).get("scheme", ""), 0, {}
            )
        return fit

    def to_arrow(self) -> pa.Table:
        """One row per parameter and derived quantity."""
        rows = [
            {"kind": kind, "name": n, **{k: v for k, v in e.to_dict().items() if k != "interval"}, **_ends(e)}
            for kind, table in (("parameter", self.params), ("derived", self.derived))
            for n, e in table.items()
        ]
        table = pa.Table.from_pylist(rows)
        for name, value in reversed(self.key.items()):
            table = table.add_column(0, name, pa.array([value] * len(rows)))
        return table.replace_schema_metadata({"isoflop.law": self.to_json()})

    def _repr_html_(self) -> str:
        from isoflop.laws.render import fit_html

        return fit_html(self)

    def __str__(self) -> str:
        from isoflop.laws.render import fit_text

        return fit_text(self)

    __repr__ = __str__  # at a prompt, people want the law and not its thousand resamples


@dataclass(repr=False)
class GroupedFit(Result):
    """Fits of one law to every group of a table, and the groups that it could not be fitted to (with the reason)."""

    by: tuple[str, ...]
    fits: list[Fit]
    refused: list[tuple[dict[str, Any], str]] = field(default_factory=list)

    def __iter__(self) -> Iterator[Fit]:
        return iter(self.fits)

    def __len__(self) -> int:
        return len(self.fits)

    def __getitem__(self, key: Any) -> Fit:
        """A fit by its group's value, tuple of values, or mapping."""
        wanted = (
            dict(key)
            if isinstance(key, Mapping)
            else dict(zip(self.by, key if isinstance(key, tuple) else (key,), strict=True))
        )
        for fit in self.fits:
            if fit.key == wanted:
                return fit
        raise KeyError(key)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "by": list(self.by),
            "groups": [f.to_dict() for f in self.fits],
            "refused": [{"group": plain(k), "reason": reason} for k, reason in self.refused],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> GroupedFit:
        """Inverse of ``to_dict``."""
        refused = [(dict(r["group"]), r["reason"]) for r in data["refused"]]
        return cls(tuple(data["by"]), [Fit.from_dict(f) for f in data["groups"]], refused)

    def to_arrow(self) -> pa.Table:
        """One row per group and parameter; the metadata hold the whole grouped fit, as ``from_dict`` reads it."""
        table = pa.concat_tables([f.to_arrow() for f in self.fits], promote_options="permissive")
        return table.replace_schema_metadata({"isoflop.law": json.dumps(self.to_dict())})

    def _repr_html_(self) -> str:
        return "".join(f._repr_html_() for f in self.fits)

    def __str__(self) -> str:
        lines = [str(f) for f in self.fits] + [f"refused {k}: {reason}" for k, reason in self.refused]
        return "\n\n".join(lines)

    __repr__ = __str__


def plain(value: Any) -> Any:
    """Nested dictionaries and lists in JSON's types: what is not finite becomes None, a date or another value of a column text."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, float):
        return _finite(value)
    if value is None or isinstance(value, (str, int)):
        return value
    return value.item() if hasattr(value, "item") else str(value)


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _open(value: float | None, otherwise: float) -> float:
    return otherwise if value is None else float(value)


def _ends(e: Estimate) -> dict[str, float | None]:
    low, high = e.interval or (math.nan, math.nan)
    return {"low": _finite(low), "high": _finite(high)}
