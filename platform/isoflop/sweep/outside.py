"""Tables from elsewhere as rows of a ledger: a CSV of results can be asked and reported like a sweep.

A row is one result, or with a column ``example`` one example's. What is read, by the ledger's own names (``map`` gives them to
columns that are called otherwise, and to expressions of columns):

* ``method`` (needed), ``error`` (needed; ``y``), ``task``, ``model``: whose result it is;
* ``repeat``, ``example``: what is paired. Rows without a repeat are unpaired;
* ``knob.NAME``, or ``knobs`` (text): settings of the method. Rows that agree in all of these are repeats of each other. Where a
  method has none, levels of its ratio or costs are its settings (:mod:`.levels`);
* ``ratio``, ``bits``, ``N``, ``V``, ``Q``; ``flops``, ``seconds``, ``weight_bytes``, ``kv_bytes``, ``bytes``: numbers.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from isoflop.core.errors import UserError, nearest, unknown
from isoflop.core.text import safe_name
from isoflop.laws.table import column
from isoflop.ledger import schema
from isoflop.sweep import levels

NAMELESS = "(unnamed model)"
"""The model of rows that name none."""
_TEXTS = ("method", "task", "model", "repeat", "example", "knobs")
_AXES = ("N", "V", "Q", "ratio", "bits")
_COSTS = ("flops", "seconds", "weight_bytes", "kv_bytes", "bytes")
_KNOB = "knob."
_BASELINES = ("none", "uncompressed", "baseline", "dense", "full")


def as_rows(
    table: pa.Table, y: str = "error", map: Mapping[str, str] | None = None, baseline: str | None = None
) -> tuple[pa.Table, list[str]]:
    """Rows in the ledger's schema, and what a reader must know of how they came about.

    Args:
        y: the error: a column or an expression.
        map: names above -> a column, or for numbers an expression of columns.
        baseline: the method that leaves a model as it is; by default one called none, uncompressed, baseline, dense or full.

    Raises:
        UserError: a column is missing or holds no numbers, or rows contradict each other.
    """
    names = dict(map or {})
    known = (*_TEXTS, *_AXES, *_COSTS)
    for name in names:
        if name not in known and not name.startswith(_KNOB):
            raise unknown("name in map", name, [*known, "knob.NAME"])
    texts = {n: _texts(table, names.get(n, n), n in names, n) for n in _TEXTS}
    if texts["method"] is None:
        guess = nearest("method", table.column_names)
        likely = guess or next(
            (c for c in table.column_names if pa.types.is_string(table.schema.field(c).type)), "COLUMN"
        )
        raise UserError(
            f"no column 'method' among {_shown(table.column_names)}; name it with map, e.g. --map method={likely}"
        )
    knobs = {n[len(_KNOB) :]: _values(table, n) for n in table.column_names if n.startswith(_KNOB)}
    knobs |= {n[len(_KNOB) :]: _values(table, c) for n, c in names.items() if n.startswith(_KNOB)}
    if texts["knobs"] is not None:
        knobs["knobs"] = texts["knobs"]
    numbers = {n: column(table, names.get(n, n), n) for n in (*_AXES, *_COSTS) if n in names or n in table.column_names}
    errors = column(table, y, "y")
    methods = texts["method"]
    plain = _baseline(methods, baseline)
    groups: dict[tuple[Any, ...], list[int]] = {}
    for i in range(table.num_rows):
        task, model = (None if found is None else found[i] for found in (texts["task"], texts["model"]))
        settings = json.dumps({k: v[i] for k, v in knobs.items() if v[i] is not None}, sort_keys=True)
        groups.setdefault((task or y, model or NAMELESS, methods[i] or "(no method)", settings), []).append(i)
    groups = _by_setting(groups, numbers, plain, texts["repeat"], texts["example"])
    repeats = _repeats(texts["repeat"], table.num_rows)
    unused = _unused(table, y, names)
    rows, notes = _joined(groups, repeats, texts["example"], errors, unused)
    out = [
        _row(place, key, repeat, members, scores, error, numbers, plain)
        for place, (key, repeat, members, scores, error) in enumerate(rows)
    ]
    if texts["repeat"] is None and texts["example"] is None:
        notes.append("rows name no repeat or example: they are compared unpaired")
    return schema.to_table(out), notes


def _unused(table: pa.Table, y: str, names: Mapping[str, str]) -> dict[str, list[Any]]:
    """Columns that nothing asks for, which may hold settings."""
    words = set(re.findall(r"\w+", " ".join([y, *names.values()]))) | set(names.values())
    known = {*_TEXTS, *_AXES, *_COSTS, "error"}
    return {
        c: table[c].to_pylist()
        for c in table.column_names
        if c not in words and c not in known and not c.startswith(_KNOB)
    }


def _tell_apart(members: Sequence[int], unused: Mapping[str, Sequence[Any]]) -> str:
    """What to do about rows that nothing tells apart: the columns that would, of those that nothing asks for."""
    several = [c for c, values in unused.items() if len({str(values[i]) for i in members}) > 1]
    if not several:
        return "tell settings apart with a column knob.NAME"
    pairs = ",".join(f"knob.{map_name(c)}={map_name(c)}" for c in several[:4])
    return f"where {' or '.join(map(map_name, several[:4]))} is a setting of the method, say so: --map {pairs}"


def _shown(names: Sequence[str]) -> str:
    return ", ".join(map_name(n) for n in names[:12]) + (", …" if len(names) > 12 else "")


def map_name(name: str) -> str:
    """A column's name as part of a line."""
    return safe_name(name, 40) or "''"


def _texts(table: pa.Table, name: str, asked: bool, field: str) -> list[str | None] | None:
    """A column as text; None where there is none and nobody asked for it."""
    if name not in table.column_names:
        if asked:
            raise unknown("column", name, table.column_names, f"map of {field}")
        return None
    return [
        None if v is None or v != v else safe_name(f"{v:g}" if isinstance(v, float) else v)
        for v in table[name].to_pylist()
    ]


def _values(table: pa.Table, name: str) -> list[Any]:
    """A knob's values as JSON has them."""
    if name not in table.column_names:
        raise unknown("column", name, table.column_names, "map of a knob")
    return [
        None if v is None or v != v else v if isinstance(v, (bool, int)) or (isinstance(v, float) and math.isfinite(v)) else safe_name(v)
        for v in table[name].to_pylist()
    ]  # fmt: skip


def _baseline(methods: Sequence[str | None], asked: str | None) -> str | None:
    known = sorted({m for m in methods if m})
    if asked is not None:
        if asked not in known:
            raise unknown("baseline", asked, known)
        return asked
    return next((m for m in _BASELINES if m in known), None)


def _by_setting(
    groups: Mapping[tuple[Any, ...], list[int]], numbers: Mapping[str, Any], plain: str | None,
    repeats: Sequence[str | None] | None, examples: Sequence[str | None] | None,
) -> dict[tuple[Any, ...], list[int]]:  # fmt: skip
    """Rows by (task, model, method, settings), where levels are settings of what no knob tells apart."""
    settings = Counter(key[:3] for key in groups)
    out: dict[tuple[Any, ...], list[int]] = {}
    for key, members in groups.items():
        told = key[3] != "{}" and (settings[key[:3]] > 1 or not levels.clash(members, repeats, examples))
        if told or key[2] == plain:
            out[key] = members
            continue
        for level, rows in levels.split(members, numbers, repeats, examples):
            out[(*key[:3], json.dumps({**json.loads(key[3]), **level}, sort_keys=True))] = rows
    return out


def _repeats(texts: Sequence[str | None] | None, count: int) -> list[int]:
    """Numbers of repeats by their names; a row without one is a repeat of its own, shared with nobody."""
    if texts is None:
        return list(range(count))
    names = sorted({t for t in texts if t is not None}, key=lambda t: (len(t), t))
    place = {t: i for i, t in enumerate(names)}
    return [place[t] if t is not None else len(names) + i for i, t in enumerate(texts)]


def _joined(
    groups: Mapping[tuple[Any, ...], list[int]],
    repeats: Sequence[int],
    examples: Sequence[str | None] | None,
    errors: Any,
    unused: Mapping[str, Sequence[Any]],
) -> tuple[list[tuple[Any, int, list[int], list[float], float]], list[str]]:
    """(configuration, repeat, its rows, scores by example, error) per row of a ledger, and what was left out."""
    found: dict[tuple[Any, int], list[int]] = {}
    for key, members in groups.items():
        for i in members:
            found.setdefault(
                (key, 0 if examples is not None and len(set(repeats)) == len(repeats) else repeats[i]), []
            ).append(i)
    if examples is None:
        for (key, _), members in found.items():
            if len(members) > 1:
                raise UserError(
                    f"rows {members[0]} and {members[1]} (the first is 0) are both {_called(key)} of task {key[0]} and one repeat; "
                    f"{_tell_apart(members, unused)}; or with columns repeat or example"
                )  # fmt: skip
        return [(key, repeat, m, [], float(errors[m[0]])) for (key, repeat), m in found.items()], []
    good: dict[tuple[Any, int], set[str]] = {}
    for (key, repeat), members in found.items():
        ids = [examples[i] for i in members]
        twice = next((e for e, n in Counter(ids).items() if n > 1), None)
        if twice is not None or None in ids:
            what = "a row has no example" if None in ids else f"example {twice!r} stands twice"
            help = "" if None in ids else f"; {_tell_apart(members, unused)}"
            raise UserError(f"{what} in {_called(key)} of task {key[0]}; each configuration has one row per example and repeat{help}")  # fmt: skip
        good[key, repeat] = {str(examples[i]) for i in members if math.isfinite(errors[i])}
    shared, sparse = _shared(good)
    rows: list[tuple[Any, int, list[int], list[float], float]] = []
    left = 0
    for (key, repeat), members in found.items():
        if (key, repeat) in sparse:
            rows.append((key, repeat, members, [], math.nan))
            continue
        kept = {str(examples[i]): float(errors[i]) for i in members if str(examples[i]) in shared[key[0], repeat]}
        left = max(left, len(members) - len(kept))
        scores = [kept[e] for e in sorted(kept)]
        whole = errors[members][np.isfinite(errors[members])]  # where nothing is shared
        rows.append((key, repeat, members, scores, float(np.mean(scores or whole))))
    notes = [f"up to {left} examples that not every configuration has are left out"] * bool(left)
    return rows, [*_left_out(sparse), *notes]


def _shared(good: Mapping[tuple[Any, int], set[str]]) -> tuple[dict[tuple[str, int], set[str]], dict[Any, str]]:
    """Examples that all have, by task and repeat; and who has less than half of what others have, so that it would cost them theirs."""
    most: dict[tuple[str, int], int] = {}
    for (key, repeat), own in good.items():
        most[key[0], repeat] = max(most.get((key[0], repeat), 0), len(own))
    shared: dict[tuple[str, int], set[str]] = {}
    sparse = {}
    for (key, repeat), own in good.items():
        place = (key[0], repeat)
        if not own or 2 * len(own) < most[place]:
            sparse[key, repeat] = f"{len(own)} of {most[place]}"
        else:
            shared[place] = shared[place] & own if place in shared else own
    return shared, sparse


def _called(key: Sequence[str]) -> str:
    """A method with its settings, from (task, model, method, settings)."""
    return " ".join([key[2], *(f"{k} {v}" for k, v in json.loads(key[3]).items())])


def _left_out(sparse: Mapping[tuple[Any, int], str]) -> list[str]:
    """A line per configuration, of the first few."""
    by_key: dict[Any, str] = {}
    for (key, _), share in sparse.items():
        by_key.setdefault(key, share)
    notes = []
    for key, share in by_key.items():
        notes.append(f"{_called(key)} of task {key[0]} is left out: it has finite errors on {share} examples")
    more = [f"and {len(notes) - 5} more configurations are left out for that"] * (len(notes) > 5)
    return notes[:5] + more


def _row(
    place: int, key: tuple[Any, ...], repeat: int, members: Sequence[int], scores: list[float], error: float,
    numbers: Mapping[str, Any], plain: str | None,
) -> dict[str, Any]:  # fmt: skip
    task, model, method, settings = key
    values = {n: _mean(a[list(members)]) for n, a in numbers.items()}
    known = {n: v for n, v in values.items() if v is not None and n != "bytes"}
    if "N" in known:  # whole, where a ledger can hold it
        size = known.pop("N")
        known |= {"N": round(size)} if abs(size) < 2**62 else {}
    ratio = 1.0 if method == plain else values.get("ratio")
    spec = {"model": model, "methods": [{"name": method, "knobs": json.loads(settings)}], "task": task}
    good = math.isfinite(error)
    return known | {
        "job_id": f"row-{place}", "trial_id": f"row-{place}", "sequence": place, "model": model, "method": method, "task": task,
        "knobs": settings, "repeat": repeat, "spec": json.dumps(spec), "ratio": ratio, "error": error if good else None,
        "scores": scores or None, "n_examples": len(scores) or None, "status": "ok" if good else "failed",
        "error_text": None if good else "no finite error",
        "footprint": {} if values.get("bytes") is None else {"bytes": values["bytes"]},
        "error_se": float(np.std(scores, ddof=1) / math.sqrt(len(scores))) if len(scores) > 1 else None,
    }  # fmt: skip


def _mean(values: Any) -> float | None:
    good = values[np.isfinite(values)]
    return float(good.mean()) if len(good) else None
