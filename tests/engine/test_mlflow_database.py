"""MLflow's SQLite file: whole or absent whoever is killed, made once whoever starts together, and one line for what cannot be."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import Lines, run_local, toy

from isoflop.cli import cli
from isoflop.track import database
from isoflop.track.database import Unusable, prepare

pytestmark = pytest.mark.usefixtures("toy_parts")


@pytest.fixture(scope="module")
def unfinished(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """What a kill leaves: MLflow's file after each of its steps but the last."""
    from alembic import command
    from mlflow.store.db.utils import _get_alembic_config
    from mlflow.store.tracking.dbmodels.initial_models import Base
    from sqlalchemy import create_engine

    folder = tmp_path_factory.mktemp("unfinished")
    path, found = folder / "growing.db", []

    def keep() -> None:
        found.append(folder / f"{len(found)}.db")
        shutil.copy(path, found[-1])

    path.touch()
    keep()
    engine = create_engine(f"sqlite:///{path}")
    for table in Base.metadata.sorted_tables:
        table.create(engine)
        keep()
    _, revisions = database._revisions()
    config = _get_alembic_config(f"sqlite:///{path}")
    for step in range(1, len(revisions), 8):
        command.upgrade(config, "+1" if step == 1 else "+8")
        keep()
    engine.dispose()
    return found


def tables(path: Path) -> set[str]:
    connection = sqlite3.connect(path)
    found = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    connection.close()
    return found


def test_a_file_is_whole_only_after_its_last_step(unfinished: list[Path], empty_mlflow: Path, tmp_path: Path) -> None:
    assert {database._verdict(path) for path in unfinished} == {"half-made"}
    assert database._verdict(tmp_path / "none.db") == "absent"
    assert database._verdict(empty_mlflow) == "whole"


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, empty_mlflow: Path) -> list[Path]:
    """MLflow's own steps take seconds: a copy of what they give stands for them. The parts that were made."""
    made: list[Path] = []

    def copy(part: Path) -> None:
        made.append(part)
        time.sleep(0.05)
        shutil.copy(empty_mlflow, part)

    monkeypatch.setattr(database, "_fill", copy)
    return made


def test_a_half_made_file_is_set_aside_with_its_journals_and_made_anew(
    unfinished: list[Path], empty_mlflow: Path, tmp_path: Path, quick: list[Path]
) -> None:
    for number, left in enumerate(unfinished):
        path = tmp_path / str(number) / "mlflow.db"
        path.parent.mkdir()
        shutil.copy(left, path)
        for suffix in ("-wal", "-shm"):
            (path.parent / f"mlflow.db{suffix}").write_bytes(b"")
        (path.parent / ".mlflow.db.part-1").write_bytes(b"of a killed process")
        prepare(f"sqlite:///{path}")
        assert tables(path) == tables(empty_mlflow)
        (aside,) = (
            p for p in path.parent.iterdir() if ".half-made-" in p.name and not p.name.endswith(("-wal", "-shm"))
        )
        assert aside.read_bytes() == left.read_bytes()
        assert not list(path.parent.glob(".mlflow.db.part-*"))


def test_a_journal_without_its_file_is_not_replayed_into_the_new_one(tmp_path: Path, quick: list[Path]) -> None:
    path = tmp_path / "mlflow.db"
    for suffix in ("-journal", "-wal", "-shm"):
        (tmp_path / f"mlflow.db{suffix}").write_bytes(b"of a file that somebody deleted")
    prepare(f"sqlite:///{path}")
    assert database._verdict(path) == "whole"
    assert not (tmp_path / "mlflow.db-journal").exists()


def test_who_starts_together_makes_it_once(tmp_path: Path, quick: list[Path]) -> None:
    path = tmp_path / "new" / "mlflow.db"
    errors: list[BaseException] = []

    def start() -> None:
        try:
            prepare(f"sqlite:///{path}")
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert len(quick) == 1
    connection = sqlite3.connect(path)
    assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    connection.close()


def with_revision(path: Path, revision: str, runs: int = 0) -> None:
    connection = sqlite3.connect(path)
    connection.execute("UPDATE alembic_version SET version_num = ?", (revision,))
    for number in range(runs):
        connection.execute("INSERT INTO runs (run_uuid, experiment_id) VALUES (?, 0)", (str(number),))
    connection.commit()
    connection.close()


def foreign(path: Path) -> None:
    path.unlink()
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE accounts (name text)")
    connection.close()


UNUSABLE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no database": (lambda path: path.write_bytes(b"not at all a database" * 100), "cannot be read"),
    "another program's": (foreign, "not MLflow's (accounts); name another file"),
    "a later MLflow's": (lambda path: with_revision(path, "ffffffffffff"), "another version of MLflow"),
    "an older MLflow's, with runs": (
        lambda path: with_revision(path, "451aebb31d03", runs=1), "run `mlflow db upgrade sqlite:///",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", UNUSABLE)
def test_a_file_that_is_not_ours_to_mend_is_left_as_it_is_and_named_with_what_helps(
    kind: str, tmp_path: Path, empty_mlflow: Path, quick: list[Path]
) -> None:
    """At once, without waiting for what cannot come, and not with the advice that would not help."""
    spoil, words = UNUSABLE[kind]
    (tmp_path / "store").mkdir()
    path = tmp_path / "store" / "mlflow.db"
    shutil.copy(empty_mlflow, path)
    spoil(path)
    before = path.read_bytes()
    lines = Lines()
    begin = time.monotonic()
    opened = run_local(toy(), tmp_path, lines, tracking_uri=None, track_wait=5.0)
    assert time.monotonic() - begin < 60
    assert opened.summary.ok == 12
    assert path.read_bytes() == before
    (told,) = (line for line in lines.lines if "does not show everything" in line)
    assert opened.summary.untracked == told
    assert f"(12 rows): MLflow: {path} " in told
    assert words in told
    assert "will bring the rest" not in told
    with pytest.raises(Unusable, match=r"mlflow\.db"):
        prepare(f"sqlite:///{path}")


def test_a_file_that_breaks_while_it_is_written_is_named_with_what_helps(tmp_path: Path, empty_mlflow: Path) -> None:
    path = tmp_path / "mlflow.db"
    shutil.copy(empty_mlflow, path)
    run_local(toy(name="one"), tmp_path, tracking_uri=f"sqlite:///{path}")
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    (page,) = connection.execute("SELECT rootpage FROM sqlite_master WHERE name = 'tags'").fetchone()
    (size,) = connection.execute("PRAGMA page_size").fetchone()
    connection.close()
    with path.open("r+b") as file:  # what tells the file's revision is whole, one of its tables is not
        file.seek((page - 1) * size)
        file.write(b"\xff" * size)
    opened = run_local(toy(name="two"), tmp_path, tracking_uri=f"sqlite:///{path}", track_wait=5.0)
    assert opened.summary.ok == 12
    assert f"{path} is damaged; move it away and resume" in opened.summary.untracked


@pytest.mark.parametrize("uri", ["nosuch://server/db", "postgresql+nosuch://h/db"])
def test_an_address_that_mlflow_cannot_take_is_told_at_once(tmp_path: Path, uri: str) -> None:
    opened = run_local(toy(), tmp_path, tracking_uri=uri, track_wait=5.0)
    assert uri.partition(":")[0] in opened.summary.untracked
    assert "will bring the rest" not in opened.summary.untracked


def test_what_mlflow_lacks_shows_in_the_exit_code_and_on_the_screen(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], empty_mlflow: Path
) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "mlflow.db").write_bytes(b"not at all a database" * 100)
    spec = tmp_path / "toy.yaml"
    spec.write_text(json.dumps(toy()))
    where = [
        "--store",
        str(tmp_path / "store"),
        "--cache-dir",
        str(tmp_path / "cache"),
        "--executor",
        "local",
        "--no-report",
    ]
    assert cli.main(["run", str(spec), *where], standalone_mode=False) == 1
    assert "MLflow does not show everything (12 rows)" in " ".join(capsys.readouterr().out.split())
    assert cli.main(["run", str(spec), *where, "--json"], standalone_mode=False) == 1
    assert "cannot be read" in json.loads(capsys.readouterr().out)["summary"]["untracked"]
    shutil.copy(empty_mlflow, tmp_path / "store" / "mlflow.db")
    assert cli.main(["run", str(spec), *where, "--json"], standalone_mode=False) == 0


# Real processes on a store that nobody has used before.

YAML = """
name: NAME
import: [toy_parts]
models: [toy/s]
methods: [{toy-tokens: {tokens: [1, 2, 4]}}]
tasks: [{toy-task: {seconds: 0.02}}]
"""


def start(folder: Path, name: str) -> subprocess.Popen[str]:
    spec = folder / f"{name}.yaml"
    folder.mkdir(parents=True, exist_ok=True)
    spec.write_text(YAML.replace("NAME", name))
    return subprocess.Popen(
        [
            sys.executable, "-m", "isoflop", "run", str(spec), "--store", str(folder / "store"), "--cache-dir",
            str(folder / "cache"), "--executor", "local", "--no-report",
        ],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=folder,
    )  # fmt: skip


def tracked(folder: Path, name: str) -> list[str]:
    """Statuses of a sweep's runs in MLflow, its own first."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{folder / 'store' / 'mlflow.db'}")
    runs = client.search_runs([client.get_experiment_by_name(name).experiment_id], max_results=1000)
    jobs = [r for r in runs if "isoflop.job_id" in r.data.tags]
    assert len(runs) == len(jobs) + 1
    assert len({r.data.tags["isoflop.job_id"] for r in jobs}) == len(jobs)
    return [r.info.status for r in runs]


@pytest.fixture
def no_child_survives(children: Callable[[], set[int]]) -> Iterator[None]:
    before = children()
    yield
    assert not children() - before


@pytest.mark.slow
@pytest.mark.usefixtures("no_child_survives")
@pytest.mark.parametrize("seed", range(int(os.environ.get("ISOFLOP_TEST_KILLS", "8"))))
def test_a_kill_in_the_first_seconds_of_a_store_costs_nothing(tmp_path: Path, seed: int) -> None:
    """Half of the kills fall while MLflow's file is made, the others anywhere in the first ten seconds."""
    rng = random.Random(seed)
    process = start(tmp_path, "early")
    if seed % 2:
        deadline = time.monotonic() + 60
        while not list((tmp_path / "store").glob(".mlflow.db.part-*")) and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(rng.random() * 3)
    else:
        time.sleep(rng.random() * 10)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    again = start(tmp_path, "early")
    _, err = again.communicate(timeout=120)
    assert again.returncode == 0, err
    assert "does not show everything" not in err
    assert tracked(tmp_path, "early") == ["FINISHED"] * 4
    assert not list((tmp_path / "store").glob(".mlflow.db.part-*"))


@pytest.mark.slow
@pytest.mark.usefixtures("no_child_survives")
@pytest.mark.parametrize("time_", range(int(os.environ.get("ISOFLOP_TEST_PAIRS", "4"))))
def test_two_sweeps_that_begin_a_store_together(tmp_path: Path, time_: int) -> None:
    processes = [start(tmp_path, name) for name in ("one", "two")]
    for process in processes:
        _, err = process.communicate(timeout=180)
        assert process.returncode == 0, err
        assert "does not show everything" not in err
    for name in ("one", "two"):
        assert tracked(tmp_path, name) == ["FINISHED"] * 4
