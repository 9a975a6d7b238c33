"""Writes runs straight into MLflow's SQLite tables, many per transaction.

The public client commits several times per run; at hundreds of short jobs per second that is the bottleneck. These
tables are not a documented interface, so this module alone knows them: it looks at their columns when it starts, and
where they are not the ones it was written for, it declines and the public client is used instead. A test writes one run
both ways and compares what MLflow reads back.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import closing
from pathlib import Path

from isoflop.core.hashing import content_hash
from isoflop.track.database import sqlite_path
from isoflop.track.run_data import STAMP_TAG, RunData, TaskData, stamp_in

_COLUMNS = {
    "runs": {
        "run_uuid", "name", "source_type", "source_name", "entry_point_name", "user_id", "status", "start_time", "end_time",
        "deleted_time", "source_version", "lifecycle_stage", "artifact_uri", "experiment_id",
    },
    "metrics": {"key", "value", "timestamp", "run_uuid", "step", "is_nan"},
    "latest_metrics": {"key", "value", "timestamp", "step", "is_nan", "run_uuid"},
    "params": {"key", "value", "run_uuid"},
    "tags": {"key", "value", "run_uuid"},
    "datasets": {
        "dataset_uuid", "experiment_id", "name", "digest", "dataset_source_type", "dataset_source", "dataset_schema",
        "dataset_profile",
    },
    "inputs": {"input_uuid", "source_type", "source_id", "destination_type", "destination_id", "step"},
    "input_tags": {"input_uuid", "name", "value"},
}  # fmt: skip
_BUSY_MS = 30_000
_VALUES = 20_000  # of metrics, per transaction


def run_id_of(experiment: str, job_id: str) -> str:
    """The id of a job's run: known before anything is written, and the same whenever it is written again."""
    return content_hash({"experiment": experiment, "job": job_id}, 32)


class BulkWriter:
    """Bulk inserts into one experiment. Use :meth:`open`.

    Args:
        path: of the database.
        experiment_id: as MLflow numbers it.
        artifact_root: the experiment's artifact location.
    """

    def __init__(self, path: Path, experiment_id: str, artifact_root: str) -> None:
        self._path = path
        self._experiment_id = int(experiment_id)
        self._artifact_root = artifact_root.rstrip("/")

    @classmethod
    def open(cls, uri: str, experiment_id: str, artifact_root: str) -> BulkWriter | None:
        """A writer for a SQLite tracking URI whose tables are as expected; None otherwise."""
        path = sqlite_path(uri)
        if path is None:
            return None
        with closing(sqlite3.connect(path)) as connection:
            for table, expected in _COLUMNS.items():
                if {row[1] for row in connection.execute(f"PRAGMA table_info({table})")} != expected:
                    return None
        return cls(path, experiment_id, artifact_root)

    def write(self, runs: Iterable[tuple[str, RunData, dict[str, str]]]) -> None:
        """Write runs, many per transaction, each run whole or not at all. A run that exists is replaced.

        Args:
            runs: run id, content, further tags.
        """
        for batch in _portions(runs):
            self._write(batch)

    def shown(self) -> Iterator[list[tuple[str, str, int]]]:
        """The experiment's runs of jobs: run id, job id, stamp of the row shown (0 while half written). A page of all."""
        query = """
            SELECT r.run_uuid, job.value, stamp.value
            FROM runs r JOIN tags job ON job.run_uuid = r.run_uuid AND job.key = 'isoflop.job_id' AND job.value != ''
            LEFT JOIN tags stamp ON stamp.run_uuid = r.run_uuid AND stamp.key = ?
            WHERE r.experiment_id = ? AND r.lifecycle_stage = 'active' ORDER BY r.start_time DESC, r.run_uuid"""
        with closing(sqlite3.connect(self._path, timeout=_BUSY_MS / 1000)) as connection:
            found = connection.execute(query, (STAMP_TAG, self._experiment_id)).fetchall()
        yield [(run_id, job_id, stamp_in(tag)) for run_id, job_id, tag in found]

    def _write(self, batch: _Batch) -> None:
        """One transaction."""
        ids = [(run_id,) for run_id, _, _ in batch]
        with closing(sqlite3.connect(self._path, timeout=_BUSY_MS / 1000, isolation_level=None)) as connection:
            connection.execute("PRAGMA synchronous=NORMAL")
            connection.execute("PRAGMA foreign_keys=ON")
            connection.execute("BEGIN IMMEDIATE")
            try:
                # children first: foreign keys point at runs
                own = "SELECT input_uuid FROM inputs WHERE destination_type = 'RUN' AND destination_id = ?"
                connection.executemany(f"DELETE FROM input_tags WHERE input_uuid IN ({own})", ids)
                connection.executemany("DELETE FROM inputs WHERE destination_type = 'RUN' AND destination_id = ?", ids)
                for table in ("tags", "params", "latest_metrics", "metrics"):
                    connection.executemany(f"DELETE FROM {table} WHERE run_uuid = ?", ids)
                connection.executemany(
                    "INSERT OR REPLACE INTO runs (run_uuid, name, source_type, source_name, entry_point_name, user_id, status,"
                    " start_time, end_time, source_version, lifecycle_stage, artifact_uri, experiment_id)"
                    " VALUES (?, ?, 'UNKNOWN', '', '', ?, ?, ?, ?, '', 'active', ?, ?)",
                    [self._run(run_id, data, tags) for run_id, data, tags in batch],
                )
                connection.executemany(
                    "INSERT INTO params (key, value, run_uuid) VALUES (?, ?, ?)", _each(batch, _params)
                )
                connection.executemany(
                    "INSERT OR REPLACE INTO tags (key, value, run_uuid) VALUES (?, ?, ?)", _each(batch, _tags)
                )
                metrics = "(key, value, timestamp, step, is_nan, run_uuid) VALUES (?, ?, ?, ?, 0, ?)"
                connection.executemany(f"INSERT OR IGNORE INTO metrics {metrics}", _each(batch, _metrics))
                connection.executemany(f"INSERT OR REPLACE INTO latest_metrics {metrics}", _each(batch, _latest))
                self._write_inputs(connection, batch)
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:  # SQLite ends it itself when the disk is full
                    connection.execute("ROLLBACK")
                raise

    def _write_inputs(self, connection: sqlite3.Connection, batch: _Batch) -> None:
        """The data set of each run; one that is there already, of whoever wrote it, is used."""
        numbers: dict[TaskData, str] = {}
        for data in {data.dataset for _, data, _ in batch if data.dataset is not None}:
            named = (self._experiment_id, data.name, data.digest)
            new = content_hash([*named], 32)
            connection.execute(
                "INSERT OR IGNORE INTO datasets (dataset_uuid, experiment_id, name, digest, dataset_source_type,"
                " dataset_source, dataset_profile) VALUES (?, ?, ?, ?, ?, ?, ?)",
                (new, *named, data.SOURCE_TYPE, data.source, data.profile),
            )
            query = "SELECT dataset_uuid FROM datasets WHERE experiment_id = ? AND name = ? AND digest = ?"
            (numbers[data],) = connection.execute(query, named).fetchone()
        edges = [
            (content_hash([run_id, data.dataset.name, data.dataset.digest], 32), numbers[data.dataset], run_id)
            for run_id, data, _ in batch
            if data.dataset is not None
        ]
        connection.executemany(
            "INSERT INTO inputs (input_uuid, source_type, source_id, destination_type, destination_id, step)"
            " VALUES (?, 'DATASET', ?, 'RUN', ?, 0)",
            edges,
        )
        tags = [(edge, *TaskData.CONTEXT) for edge, _, _ in edges]
        connection.executemany("INSERT INTO input_tags (input_uuid, name, value) VALUES (?, ?, ?)", tags)

    def _run(self, run_id: str, data: RunData, tags: dict[str, str]) -> tuple[str | int, ...]:
        uri = f"{self._artifact_root}/{run_id}/artifacts"
        return (
            run_id,
            data.name,
            tags.get("mlflow.user", ""),
            data.status,
            data.start_ms,
            data.end_ms,
            uri,
            self._experiment_id,
        )


_Batch = list[tuple[str, RunData, dict[str, str]]]


def _portions(runs: Iterable[tuple[str, RunData, dict[str, str]]]) -> Iterator[_Batch]:
    """Runs in portions of about ``_VALUES`` metric values: others wait for the database as long as one takes."""
    batch: _Batch = []
    values = 0
    for run in runs:
        batch.append(run)
        values += len(run[1].metrics) + len(run[1].steps)
        if values >= _VALUES:
            yield batch
            batch, values = [], 0
    if batch:
        yield batch


def _each(batch: _Batch, rows: object) -> Iterator[tuple[object, ...]]:
    for run_id, data, tags in batch:
        yield from rows(run_id, data, tags)  # type: ignore[operator]


def _params(run_id: str, data: RunData, _: dict[str, str]) -> Iterator[tuple[object, ...]]:
    return ((key, value, run_id) for key, value in data.params.items())


def _tags(run_id: str, data: RunData, tags: dict[str, str]) -> Iterator[tuple[object, ...]]:
    return ((key, value, run_id) for key, value in {**tags, **data.tags, "mlflow.runName": data.name}.items())


def _metrics(run_id: str, data: RunData, _: dict[str, str]) -> Iterator[tuple[object, ...]]:
    for key, value in data.metrics.items():
        yield key, value, data.end_ms, 0, run_id
    for key, step, value in data.steps:
        yield key, value, data.end_ms, step, run_id


def _latest(run_id: str, data: RunData, _: dict[str, str]) -> Iterator[tuple[object, ...]]:
    last = {key: (value, 0) for key, value in data.metrics.items()}
    for key, step, value in data.steps:
        if key not in last or step >= last[key][1]:
            last[key] = (value, step)
    return ((key, value, data.end_ms, step, run_id) for key, (value, step) in last.items())
