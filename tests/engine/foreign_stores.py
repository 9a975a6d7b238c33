"""Stores that somebody else made, damaged or malicious: one that is whole, and ways to spoil it."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from helpers import run_local, toy

NAME = "toy"
SPEC = toy()  # without laws: fitting them takes longer than all else


def make_store(folder: Path) -> Path:
    """A sweep that was run twice, with its report; every file that a session may leave. Returns the store."""
    from isoflop.dashboards.session import conclude
    from isoflop.sweep.api import open_sweep

    run_local({**SPEC, "models": ["toy/s"]}, folder)
    run_local({**SPEC, "models": ["toy/s", "toy/l"]}, folder)  # some rows are stale then
    run_local(SPEC, folder)
    conclude(open_sweep(NAME, str(folder / "store")))
    (folder / "store" / "sweeps" / NAME / "grid_search.json").write_text('{"lines": ["none"]}')
    return folder / "store"


def copy_store(store: Path, target: Path) -> Path:
    shutil.copytree(store, target, symlinks=True)
    return target


def files_of(store: Path) -> list[Path]:
    return sorted(p for p in store.rglob("*") if p.is_file() and not p.is_symlink())


JSONS: tuple[Any, ...] = (
    None, True, 0, -1, 1e308, 2**70, "", "text", "\x07\x1b[31m", [], [1], ["a"], [None], {}, {"a": 1}, [[[]]], {"snapshot": 1},
    {"holder": [], "time": "x"}, {"lines": 1},
)  # fmt: skip
ODD: tuple[Any, ...] = (
    None,
    2**62,
    -1,
    0.0,
    float("nan"),
    float("inf"),
    "",
    "ok",
    "{",
    "[]",
    "null",
    "\x07\0",
    "x" * 10_000,
    [],
)


def garbage(path: Path, rng: random.Random) -> None:
    path.write_bytes(rng.randbytes(rng.choice([0, 1, 7, 100, 5000])))


def flip(path: Path, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    for _ in range(rng.choice([1, 3, 50])):
        if data:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def cut(path: Path, rng: random.Random) -> None:
    path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size + 1)])


def other_json(path: Path, rng: random.Random) -> None:
    path.write_text(json.dumps(rng.choice(JSONS)))


def spoilt_json(path: Path, rng: random.Random) -> None:
    """One value somewhere inside is another."""
    try:
        data = json.loads(path.read_text())
    except ValueError:
        return other_json(path, rng)
    place, inner = None, data
    while isinstance(inner, (dict, list)) and inner:
        place, key = inner, rng.choice(list(inner) if isinstance(inner, dict) else range(len(inner)))
        inner = inner[key]
        if rng.random() < 0.5:
            break
    if place is None:
        return other_json(path, rng)
    place[key] = rng.choice(JSONS)
    path.write_text(json.dumps(data))
    return None


def removed(path: Path, rng: random.Random) -> None:
    path.unlink()


def folder_instead(path: Path, rng: random.Random) -> None:
    path.unlink()
    path.mkdir()


def pipe_instead(path: Path, rng: random.Random) -> None:
    path.unlink()
    os.mkfifo(path)


def loop_instead(path: Path, rng: random.Random) -> None:
    path.unlink()
    path.symlink_to(path.name)


def _table(path: Path) -> pa.Table | None:
    try:
        return pq.read_table(path)
    except (pa.ArrowException, OSError, ValueError):
        return None


def other_type(path: Path, rng: random.Random) -> None:
    """A column of a ledger has another type, or nothing in it."""
    if (table := _table(path)) is None:
        return garbage(path, rng)
    name = rng.choice(table.column_names)
    n = table.num_rows
    columns = [
        pa.nulls(n), pa.array(["text"] * n), pa.array([b"\xff\xfe"] * n), pa.array([2**62] * n), pa.array([-1.5] * n), pa.array([True] * n),
        pa.array([[1]] * n), pa.array([{"a": 1}] * n), pa.array([None] * n, pa.string()), pa.array([0] * n, pa.timestamp("s")),
        pa.Array.from_buffers(pa.string(), n, pa.array([b"\xff\xfe"] * n).buffers()),
    ]  # fmt: skip
    spoilt = table.set_column(table.column_names.index(name), name, rng.choice(columns))
    pq.write_table(spoilt.replace_schema_metadata(table.schema.metadata), path)
    return None


def other_value(path: Path, rng: random.Random) -> None:
    """A value of a ledger is one that no ledger wrote, in its own type."""
    if (table := _table(path)) is None:
        return garbage(path, rng)
    name = rng.choice(table.column_names)
    values = table[name].to_pylist()
    values[rng.randrange(len(values))] = rng.choice(ODD)
    try:
        spoilt = table.set_column(table.column_names.index(name), name, pa.array(values, table[name].type))
    except (pa.ArrowException, OverflowError, ValueError, TypeError):
        return other_type(path, rng)
    pq.write_table(spoilt.replace_schema_metadata(table.schema.metadata), path)
    return None


def other_columns(path: Path, rng: random.Random) -> None:
    """Columns are missing, doubled or unknown, or the file says other things of itself."""
    if (table := _table(path)) is None:
        return garbage(path, rng)
    metadata = dict(table.schema.metadata or {})
    kind = rng.randrange(5)
    if kind == 0:
        table = table.drop_columns([rng.choice(table.column_names)])
    elif kind == 1:
        table = table.append_column("later", pa.nulls(table.num_rows))
    elif kind == 2:
        name = rng.choice(table.column_names)
        table = table.append_column(name, table[name])
    elif kind == 3:
        metadata[b"isoflop.ledger"] = rng.choice([b"2", b"", b"\xff"])
    else:
        metadata[b"isoflop.replaces"] = rng.choice([b"{", b"1", b'[1, "../../x"]', b"\xff", b'["../../../victim"]'])
    pq.write_table(table.replace_schema_metadata(metadata), path)
    return None


Spoil = Callable[[Path, random.Random], None]
ANY_FILE: tuple[Spoil, ...] = (garbage, flip, cut, other_json, removed, folder_instead, pipe_instead, loop_instead)
JSON_FILE: tuple[Spoil, ...] = (spoilt_json, spoilt_json, other_json)
LEDGER_FILE: tuple[Spoil, ...] = (other_type, other_type, other_value, other_value, other_columns)


def spoil(store: Path, rng: random.Random) -> str:
    """Damage one file of a store; says which and how."""
    path = rng.choice(files_of(store))
    fitting = {".json": JSON_FILE, ".parquet": LEDGER_FILE}.get(path.suffix, ())
    how = rng.choice([*ANY_FILE, *fitting, *fitting])
    how(path, rng)
    return f"{how.__name__} {path.name}"
