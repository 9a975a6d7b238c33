"""The rows of a sweep as configurations: one model with one setting of its methods on one task, over its repeats."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from scipy.stats import t as student

from isoflop.core.knobs import knob_specs
from isoflop.jobs.job import whole_knobs
from isoflop.methods.base import METHODS
from isoflop.sweep.compression import Compression, compression

LEVEL = 0.95
MOST_VARIANTS = 16
_MOST_LEVELS = 4  # a number with more values is something to draw along, not a variant
_SPEC = ("methods", "model", "model_options", "task", "task_options", "calibration")
_PLACES = ("data", "split")  # of a text that is calibrated on, which its content names
_COLUMNS = (
    "job_id", "task", "model", "method", "family", "spec", "repeat", "N", "V", "Q", "ratio", "bits", "error", "error_se", "flops", "flops_llm",
    "flops_vision", "flops_method", "seconds", "weight_bytes", "kv_bytes", "footprint", "wall_seconds",
)  # fmt: skip


@dataclass(frozen=True)
class Cost:
    """A measured cost: its key among a configuration's costs, what an axis calls it, and its unit."""

    key: str
    label: str
    unit: str


COSTS = (
    Cost("flops", "compute per answer", "FLOPs"),
    Cost("bytes", "memory, weights and KV cache", "B"),
    Cost("kv_bytes", "memory of the KV cache", "B"),
    Cost("weight_bytes", "memory of the weights", "B"),
    Cost("seconds", "time per answer", "s"),
)


@dataclass(frozen=True)
class Config:
    """One configuration.

    Attributes:
        scene: the task, with those of its options that vary in the sweep: errors of different scenes are never compared.
        settings: knobs of its methods, then options of the model (``model.steps``); those that vary in the sweep.
        variant: the method with the settings that make it another method rather than more or less of it.
        compression: how much less it takes, and of what; unlike ``ratio`` the same bytes as among the costs.
        error: mean over repeats; ``low``, ``high``: its 95 % interval, Student's t over repeats, or the examples' standard
            error where there is one repeat; None when neither is known.
        costs: by :class:`Cost` key, means over repeats; further parts by column name.
        jobs: ids of its rows.
    """

    task: str
    scene: str
    model: str
    method: str
    variant: str
    settings: dict[str, Any]
    N: float | None
    V: float | None
    Q: float | None
    ratio: float | None
    bits: float | None
    error: float
    low: float | None
    high: float | None
    repeats: int
    compression: Compression | None = None
    costs: dict[str, float] = field(default_factory=dict)
    jobs: tuple[str, ...] = ()

    @property
    def uncompressed(self) -> bool:
        """Whether its methods leave the model as it is."""
        return self.ratio is not None and abs(self.ratio - 1) < 1e-9

    @property
    def times(self) -> float | None:
        """Dense over compressed; see ``compression``."""
        return None if self.compression is None else self.compression.times

    @property
    def title(self) -> str:
        """Model, method and settings in one line."""
        knobs = words(self.settings)
        return f"{self.method}{f' ({knobs})' if knobs else ''} on {self.model}"


def words(settings: Mapping[str, Any]) -> str:
    """Settings in words."""
    return ", ".join(f"{k} {_text(v)}" for k, v in settings.items())


def amounts_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a row that say how much is compressed."""
    spec = json.loads(row["spec"] or "{}")
    amounts = _amounts(spec)
    return {k: v for k, v in _settings(spec).items() if k in amounts}


def read_configs(table: pa.Table) -> list[Config]:
    """All configurations of finished rows, in the rows' order."""
    groups: dict[str, list[dict[str, Any]]] = {}
    specs: dict[str, dict[str, Any]] = {}
    for row in table.select([c for c in _COLUMNS if c in table.column_names]).to_pylist():
        if row["error"] is None or not math.isfinite(row["error"]):
            continue
        spec = json.loads(row["spec"] or "{}")
        read = spec.get("calibration") or {}
        content = (spec.get("versions") or {}).get("calibration")
        spec = {k: spec.get(k) for k in _SPEC}
        spec["methods"] = [{**m, "knobs": whole_knobs(m["name"], m.get("knobs", {}))} for m in spec["methods"] or ()]
        named = {**spec, "calibration": {**{k: v for k, v in read.items() if k not in _PLACES}, "content": content}}
        key = json.dumps([row["task"], row["model"], row["method"], named], sort_keys=True)
        groups.setdefault(key, []).append(row)
        specs[key] = spec
    settings = {key: _settings(spec) for key, spec in specs.items()}
    methods = {key: rows[0]["method"] for key, rows in groups.items()}
    shown = _varied({key: (methods[key], settings[key]) for key in groups})
    variants = _variants(specs, methods, shown)
    scenes = _scenes(specs, {key: rows[0]["task"] for key, rows in groups.items()})
    return [_config(rows, scenes[key], shown[key], variants[key]) for key, rows in groups.items()]


def _scenes(specs: Mapping[str, Mapping[str, Any]], tasks: Mapping[str, str]) -> dict[str, str]:
    options = {key: spec.get("task_options") or {} for key, spec in specs.items()}
    seen: dict[tuple[str, str], set[str]] = {}
    for key, values in options.items():
        for name, value in values.items():
            seen.setdefault((tasks[key], name), set()).add(repr(value))
    found = {}
    for key, values in options.items():
        varied = ", ".join(f"{k} {_text(v)}" for k, v in values.items() if len(seen[tasks[key], k]) > 1)
        found[key] = f"{tasks[key]} ({varied})" if varied else tasks[key]
    return found


def _settings(spec: Mapping[str, Any]) -> dict[str, Any]:
    parts = spec.get("methods") or []
    prefix = len(parts) > 1
    found = {f"{p['name']}.{k}" if prefix else k: v for p in parts for k, v in p.get("knobs", {}).items()}
    found.update({f"model.{k}": v for k, v in (spec.get("model_options") or {}).items()})
    found.update({f"calibration.{k}": _named(k, v) for k, v in (spec.get("calibration") or {}).items()})
    return {k: v if isinstance(v, (bool, int, float, str)) or v is None else json.dumps(v) for k, v in found.items()}


def _named(setting: str, value: Any) -> Any:
    """A path by its last part: what distinguishes texts is their content, which is compared elsewhere."""
    return Path(value).name if setting == "data" else value


def _varied(settings: Mapping[str, tuple[str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """The settings of each configuration that take two values or more among those of its method."""
    seen: dict[tuple[str, str], set[str]] = {}
    for method, values in settings.values():
        for name, value in values.items():
            seen.setdefault((method, name), set()).add(repr(value))
    return {
        key: {k: v for k, v in values.items() if len(seen[method, k]) > 1} for key, (method, values) in settings.items()
    }


def _variants(
    specs: Mapping[str, Mapping[str, Any]], methods: Mapping[str, str], shown: Mapping[str, dict[str, Any]]
) -> dict[str, str]:
    levels: dict[tuple[str, str], set[str]] = {}
    for key, values in shown.items():
        for name, value in values.items():
            levels.setdefault((methods[key], name), set()).add(repr(value))
    found = {}
    for key, values in shown.items():
        amounts = _amounts(specs[key])
        parts = [
            f"{name} {_text(value)}"
            for name, value in values.items()
            if name not in amounts and (not _is_number(value) or len(levels[methods[key], name]) <= _MOST_LEVELS)
        ]
        found[key] = " · ".join([methods[key], *parts])
    return found if len(set(found.values())) <= MOST_VARIANTS else dict(methods)


def _amounts(spec: Mapping[str, Any]) -> set[str]:
    """Knobs that say how much is compressed. What a method does not declare comes from elsewhere: every number might."""
    parts = spec.get("methods") or []
    found = set()
    for part in parts:
        prefix = f"{part['name']}." if len(parts) > 1 else ""
        declared = knob_specs(METHODS.get(part["name"])) if part["name"] in METHODS else {}
        found |= {prefix + name for name, k in declared.items() if k.knob.ratio}
        knobs = part.get("knobs", {})
        found |= {prefix + name for name, value in knobs.items() if name not in declared and _is_number(value)}
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value:.4g}" if isinstance(value, float) else str(value)


def _config(rows: Sequence[Mapping[str, Any]], scene: str, settings: dict[str, Any], variant: str) -> Config:
    first = rows[0]
    errors = [float(r["error"]) for r in rows]
    low, high = interval(errors, [r["error_se"] for r in rows])
    return Config(
        task=first["task"],
        scene=scene,
        model=first["model"],
        method=first["method"],
        variant=variant,
        settings=settings,
        N=mean(r["N"] for r in rows),
        V=mean(r["V"] for r in rows),
        Q=mean(r["Q"] for r in rows),
        ratio=mean(r["ratio"] for r in rows),
        bits=mean(r["bits"] for r in rows),
        error=float(np.mean(errors)),
        low=low,
        high=high,
        repeats=len(rows),
        compression=_compression(rows),
        costs=costs_of(rows),
        jobs=tuple(r["job_id"] for r in rows),
    )


def _compression(rows: Sequence[Mapping[str, Any]]) -> Compression | None:
    """Of the repeats together."""
    found = [one for one in map(compression, rows) if one is not None]
    times = mean(one.times for one in found if one.of == found[0].of)
    return None if times is None else Compression(found[0].of, times)


def interval(errors: Sequence[float], examples_se: Sequence[float | None]) -> tuple[float | None, float | None]:
    """95 % interval of a mean error: over repeats by Student's t; of a single one by its examples."""
    centre = float(np.mean(errors))
    if len(errors) > 1:
        half = float(student.ppf((1 + LEVEL) / 2, len(errors) - 1) * np.std(errors, ddof=1) / math.sqrt(len(errors)))
    elif examples_se[0]:
        half = 1.959964 * float(examples_se[0])
    else:
        return None, None
    return max(0.0, centre - half) if min(errors) >= 0 else centre - half, centre + half


def costs_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """What is known of an answer's cost, by :class:`Cost` key and column, means over the rows."""
    names = (
        "flops",
        "flops_llm",
        "flops_vision",
        "flops_method",
        "seconds",
        "weight_bytes",
        "kv_bytes",
        "wall_seconds",
    )
    found = {n: mean(r[n] for r in rows) for n in names}
    footprints = [dict(r["footprint"] or ()) for r in rows]
    total = mean(f.get("bytes") for f in footprints)
    if total is None and found["weight_bytes"] is not None:
        total = found["weight_bytes"] + (found["kv_bytes"] or 0.0)
    return {k: v for k, v in {**found, "bytes": total}.items() if v is not None}


def mean(values: Iterable[float | None]) -> float | None:
    """Mean of what is known; None when nothing is."""
    known = [float(v) for v in values if v is not None and math.isfinite(v)]
    return float(np.mean(known)) if known else None


def varying_costs(configs: Sequence[Config], least: float = 1.1) -> list[Cost]:
    """The measured costs that differ by at least this factor among the configurations of a task, and no copies of another."""
    found: list[Cost] = []
    kept: list[np.ndarray] = []
    for cost in COSTS:
        values = np.array([c.costs.get(cost.key, math.nan) for c in configs])
        known = values[np.isfinite(values) & (values > 0)]
        if len(known) < max(2, len(values) // 2) or known.max() < least * known.min():
            continue
        if any(np.allclose(values, other, rtol=1e-6, equal_nan=True) for other in kept):
            continue
        found.append(cost)
        kept.append(values)
    return found


def by_scene(configs: Iterable[Config]) -> dict[str, list[Config]]:
    """Configurations of each task and setting of its options."""
    found: dict[str, list[Config]] = {}
    for config in configs:
        found.setdefault(config.scene, []).append(config)
    return found
