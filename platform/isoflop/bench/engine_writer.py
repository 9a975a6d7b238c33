"""Our bulk writer of MLflow's tables, against bare inserts and MLflow's own client."""

from __future__ import annotations

import contextlib
import sqlite3
import time
from pathlib import Path
from typing import Any


def bench_writer(folder: Path, rows: int) -> dict[str, float]:
    """The bulk writer of MLflow against bare inserts of the same rows into bare SQLite tables."""
    import datetime as dt

    from isoflop.track.bulk import run_id_of
    from isoflop.track.projection import Projection
    from isoflop.track.run_data import RunData

    now = dt.datetime.now(dt.UTC)
    data = [
        RunData(f"job{i}", i + 1, f"run {i}", "FINISHED", int(now.timestamp() * 1000), int(now.timestamp() * 1000) + 5,
                {f"p{k}": str(k * i) for k in range(20)}, {f"m{k}": float(k + i) for k in range(30)}, (), {f"t{k}": str(k) for k in range(15)})
        for i in range(rows)
    ]  # fmt: skip
    projection = Projection(f"sqlite:///{folder / 'writer.db'}", "writer", f"file://{folder}")
    projection.begin("", {})
    begin = time.monotonic()
    for start in range(0, rows, 200):
        projection.show(data[start : start + 200])
    bulk = time.monotonic() - begin
    with contextlib.closing(sqlite3.connect(folder / "bare.db", isolation_level=None)) as connection:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=NORMAL")
        schema = sqlite3.connect(folder / "writer.db").execute(
            "SELECT sql FROM sqlite_master WHERE tbl_name IN ('runs','params','metrics','latest_metrics','tags') AND sql IS NOT NULL"
        )
        for (text,) in schema.fetchall():
            connection.execute(text)
        begin = time.monotonic()
        for start in range(0, rows, 200):
            _bare_insert(connection, [(run_id_of("writer", d.job_id), d) for d in data[start : start + 200]])
        bare = time.monotonic() - begin
    client = Projection(f"sqlite:///{folder / 'client.db'}", "writer", f"file://{folder}", bulk=False)
    client.begin("", {})
    begin = time.monotonic()
    client.show(data[:50])
    public = (time.monotonic() - begin) / 50 * rows
    return {
        "bulk_ms_per_run": 1000 * bulk / rows,
        "bulk_to_bare_sqlite": bulk / bare,
        "public_client_to_bulk": public / bulk,
    }


def _bare_insert(connection: sqlite3.Connection, batch: list[tuple[str, Any]]) -> None:
    connection.execute("BEGIN")
    connection.executemany(
        "INSERT INTO runs (run_uuid, name, source_type, status, start_time, end_time, lifecycle_stage) VALUES (?, ?, 'UNKNOWN', ?, ?, ?, 'active')",
        [(i, d.name, d.status, d.start_ms, d.end_ms) for i, d in batch],
    )
    connection.executemany(
        "INSERT INTO params (key, value, run_uuid) VALUES (?, ?, ?)",
        [(k, v, i) for i, d in batch for k, v in d.params.items()],
    )
    connection.executemany(
        "INSERT INTO tags (key, value, run_uuid) VALUES (?, ?, ?)",
        [(k, v, i) for i, d in batch for k, v in d.tags.items()],
    )
    for table in ("metrics", "latest_metrics"):
        connection.executemany(
            f"INSERT INTO {table} (key, value, timestamp, step, is_nan, run_uuid) VALUES (?, ?, ?, 0, 0, ?)",
            [(k, v, d.end_ms, i) for i, d in batch for k, v in d.metrics.items()],
        )
    connection.execute("COMMIT")
