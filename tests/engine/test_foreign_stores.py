"""Stores that somebody else made: what is damaged is named in one line, and nothing is ever written outside of them."""

from __future__ import annotations

import json
import os
import random
import shutil
import time
from pathlib import Path
from typing import Any

import click
import pytest
from foreign_stores import (
    ANY_FILE,
    JSON_FILE,
    LEDGER_FILE,
    NAME,
    SPEC,
    copy_store,
    files_of,
    make_store,
    spoil,
)
from helpers import run_local

from isoflop.cli import cli
from isoflop.core.errors import UserError
from isoflop.ledger import Ledger, Store

pytestmark = pytest.mark.usefixtures("toy_parts")
READING = (
    ["ls"], ["ls", "--json"], ["show", NAME], ["show", NAME, "--rows"], ["show", NAME, "--failed"], ["show", NAME, "--json"],
    ["watch", NAME, "--once"], ["watch", NAME, "--once", "--json"], ["fit", NAME, "--law", "product"], ["frontier", NAME, "--budget", "1e9"],
    ["report", NAME, "--tracking-uri", "none", "--out", "report.html"],
)  # fmt: skip
WRITING = (["resume", NAME, "--executor", "local", "--tracking-uri", "none", "--no-report"],)
MOST_SECONDS = 20


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, toy_parts: Any) -> Path:
    return make_store(tmp_path_factory.mktemp("whole"))


def tried(command: list[str], store: Path, cache: Path) -> str:
    """Run a command as the shell would. Returns the one line of its error, or nothing; whatever else comes out is a fault."""
    more = ["--cache-dir", str(cache)] if command[0] == "resume" else []
    begin = time.monotonic()
    try:
        code = cli.main([*command, *more, "--store", str(store)], standalone_mode=False)
    except (UserError, click.ClickException) as error:
        text = error.format_message() if isinstance(error, click.ClickException) else str(error)
        assert "\n" not in text.strip(), text
        assert len(text) < 2000, text
        return text
    finally:
        assert time.monotonic() - begin < MOST_SECONDS, command
    assert code in (0, 1, None), (command, code)
    return ""


def all_ways() -> list[tuple[str, int]]:
    ways = {
        "sweep.yaml": (),
        "ledger": LEDGER_FILE,
        **dict.fromkeys(("stale.json", "state.json", "grid_search.json"), JSON_FILE),
    }
    return [(file, n) for file, fitting in ways.items() for n in range(len([*ANY_FILE, *fitting]))]


@pytest.mark.slow
@pytest.mark.parametrize("file, way", all_ways())
def test_each_file_damaged_in_each_way_is_told_in_a_line(
    whole: Path, tmp_path: Path, file: str, way: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is said of it names the file; reading changes nothing; a session afterwards runs or says what is wrong."""
    monkeypatch.chdir(tmp_path)
    store = copy_store(whole, tmp_path / "store")
    folder = store / "sweeps" / NAME
    path = next((folder / "ledger").glob("*.parquet")) if file == "ledger" else folder / file
    how = [*ANY_FILE, *(LEDGER_FILE if file == "ledger" else JSON_FILE if file.endswith("json") else ())][way]
    how(path, random.Random(f"{file} {way}"))
    for command in (["show", NAME], ["watch", NAME, "--once"], *WRITING):
        if told := tried(command, store, tmp_path / "cache"):
            assert path.name in told or file == "state.json", told


FIXED: dict[str, tuple[str, bytes, list[str]]] = {
    "no list": ("stale.json", b'{"a": 1}', ["show", NAME]),
    "a list of numbers": ("stale.json", b"[1, 2]", ["show", NAME]),
    "no JSON": ("stale.json", b"\xff\xfe", ["show", NAME]),
    "no UTF-8": ("sweep.yaml", b"name: \xff\xfe", ["show", NAME]),
    "no YAML": ("sweep.yaml", b"a: [", ["resume", NAME, "--executor", "local"]),
    "empty": ("sweep.yaml", b"", ["show", NAME]),
    "no block": ("grid_search.json", b"[]", ["show", NAME]),
    "no text": ("folder.txt", b"\xff", ["resume", NAME, "--executor", "local"]),
}


@pytest.mark.parametrize("kind", FIXED)
def test_what_cannot_be_read_is_named(whole: Path, tmp_path: Path, kind: str) -> None:
    store = copy_store(whole, tmp_path / "store")
    file, content, command = FIXED[kind]
    (store / "sweeps" / NAME / file).write_bytes(content)
    assert f"sweeps/{NAME}/{file}" in tried(command, store, tmp_path / "cache")


def test_rows_that_no_ledger_wrote_cost_their_own_file_only(whole: Path, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = Ledger(Store.open(str(whole)), NAME).history().num_rows
    for name, value in (
        ("job_id", None),
        ("status", "done"),
        ("spec", "{"),
        ("knobs", "[]"),
        ("finished", None),
        ("sequence", None),
    ):
        store = copy_store(whole, tmp_path / name)
        path = sorted((store / "sweeps" / NAME / "ledger").glob("*.parquet"))[0]
        table = pq.read_table(path)
        values = [value, *table[name].to_pylist()[1:]]
        spoilt = table.set_column(table.column_names.index(name), name, pa.array(values, table[name].type))
        pq.write_table(spoilt.replace_schema_metadata(table.schema.metadata), path)
        book = Ledger(Store.open(str(store)), NAME)
        assert book.history().num_rows == rows - table.num_rows
        assert book.set_aside == [path.name]


# writing: nothing leaves the store


def everything(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {
        str(p.relative_to(folder)): (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.rglob("*") if p.is_file()
    }


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory, toy_parts: Any, empty_mlflow: Path) -> Path:
    """A store with MLflow in it."""
    folder = tmp_path_factory.mktemp("tracked")
    (folder / "store").mkdir()
    shutil.copy(empty_mlflow, folder / "store" / "mlflow.db")
    store = make_store(folder)
    cli.main(
        ["resume", NAME, "--executor", "local", "--store", str(store), "--cache-dir", str(folder / "cache")],
        standalone_mode=False,
    )
    return store


def places(store: Path) -> list[str]:
    """Every file and folder of a store that was used, by what it is, and those that come and go."""
    found = [str(p.relative_to(store)) for p in sorted(store.rglob("*"))]
    ledger = [p for p in found if p.endswith(".parquet")]
    return [p for p in found if p not in ledger[1:]] + [
        "mlflow.db-wal", "mlflow.db-shm", "mlflow.db-journal", ".mlflow.db.lock", f"sweeps/{NAME}/state.json.new", f"sweeps/{NAME}/state.new",
        f"sweeps/{NAME}/torn", "stages",
    ]  # fmt: skip


REFUSED = (
    "mlflow.db",
    f"sweeps/{NAME}/lock",
    f"sweeps/{NAME}/log.txt",
    f"sweeps/{NAME}/ledger",
    f"sweeps/{NAME}",
    "sweeps",
)


def linked(tracked: Path, folder: Path, place: str) -> str:
    """Have a place of a store lead to something of the user's, and write to the store. Returns what was said of it.

    The user's own stays as it is, byte for byte.
    """
    store, victim = copy_store(tracked, folder / "store"), folder / "victim"
    path = store / place
    if path.is_dir() or place.endswith(("torn", "stages")):
        victim.mkdir() if not path.exists() else shutil.move(path, victim)
        (victim / "own.txt").write_text("mine")
    else:
        victim.write_text("mine") if not path.exists() else shutil.move(path, victim)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(victim)
    before = everything(folder) if victim.is_dir() else victim.read_bytes()
    spec = folder / "more.json"
    spec.write_text(json.dumps({**SPEC, "repeats": 2}))
    told = ""
    for command in (
        ["run", str(spec), "--executor", "local", "--cache-dir", str(folder.parent / "cache")],
        ["report", NAME, "--out", str(folder / "r.html")],
    ):
        try:
            cli.main([*command, "--store", str(store)], standalone_mode=False)
        except UserError as error:
            told = told or str(error)
    after = everything(folder) if victim.is_dir() else victim.read_bytes()
    if isinstance(before, dict) and isinstance(after, dict):
        before, after = ({k: v for k, v in found.items() if k.startswith("victim/")} for found in (before, after))
    assert before == after, place
    return told


@pytest.mark.parametrize("place", REFUSED)
def test_a_link_in_a_store_is_not_followed_when_it_is_written(tracked: Path, tmp_path: Path, place: str) -> None:
    told = linked(tracked, tmp_path / "x", place)
    assert "a symbolic link inside a store, through which nothing is written" in told
    assert place in told


@pytest.mark.slow
def test_no_link_in_a_store_is_followed_when_it_is_written(tracked: Path, tmp_path: Path) -> None:
    for number, place in enumerate(places(tracked)):
        told = linked(tracked, tmp_path / str(number), place)
        assert not told or "symbolic link" in told or "cannot be" in told, place


def test_a_link_to_a_store_is_followed(whole: Path, tmp_path: Path) -> None:
    """It is the user's own."""
    copy_store(whole, tmp_path / "elsewhere")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    assert run_local({**SPEC, "repeats": 2}, tmp_path, store=str(tmp_path / "link")).summary.failed == 0


def test_a_pipe_in_the_place_of_a_file_keeps_nobody_waiting(whole: Path, tmp_path: Path) -> None:
    for file in ("lock", "log.txt", "sweep.yaml", "stale.json", "state.json"):
        store = copy_store(whole, tmp_path / file)
        path = store / "sweeps" / NAME / file
        path.unlink()
        os.mkfifo(path)
        tried(["show", NAME], store, tmp_path / "cache")
        assert "no plain file" in tried(
            ["resume", NAME, "--executor", "local", "--tracking-uri", "none"], store, tmp_path / "cache"
        ) or (file in ("stale.json", "state.json"))


# addresses


@pytest.mark.parametrize(
    "uri, words",
    [
        ("a://b", "unknown scheme 'a'"),
        ("http://127.0.0.1:9/x", "nothing can be written to http"),
        ("https://host.invalid/x", "nothing can be written to https"),
        ("ftp://127.0.0.1:9/x", "cannot be opened"),
        ("file://", "cannot be opened"),
        ("/tmp/\udcff", "UTF-8"),
        ("/tmp/a\nb", "control characters"),
        ("\0", "UTF-8"),
    ],
)
def test_an_address_that_cannot_be_a_store_is_a_line_and_makes_no_folder(
    uri: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=words) as caught:
        Store.open(uri)
    assert str(caught.value).isprintable()
    assert not list(tmp_path.iterdir())


class NoNetwork:
    """A file system whose every operation fails in its own way."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __getattr__(self, name: str) -> Any:
        def failing(*_: Any, **__: Any) -> Any:
            raise self.error

        return failing


@pytest.mark.parametrize(
    "error",
    [OSError("curlCode: 6\ncould not resolve"), NotImplementedError(), RuntimeError("no\ncredentials"), KeyError("x")],
)
def test_a_store_that_does_not_answer_is_a_line_whatever_is_done(error: Exception) -> None:
    store = Store.open("memory://away")
    object.__setattr__(store, "fs", NoNetwork(error))
    book = Ledger(store, "s")
    for act in (
        store.sweeps, lambda: store.read("x"), lambda: store.write("x", b""), lambda: store.delete("x"), lambda: store.move("x", "y"),
        lambda: store.names("x", ""), book.read, book.lock,
    ):  # fmt: skip
        with pytest.raises(UserError, match="store memory://away cannot be") as caught:
            act()
        assert "\n" not in str(caught.value)


# fuzzing


@pytest.mark.slow
@pytest.mark.parametrize("part", range(10))
def test_damaged_stores(whole: Path, tmp_path: Path, part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fifty stores with one to three damaged files, three commands on each."""
    monkeypatch.chdir(tmp_path)
    for number in range(50):
        rng = random.Random(f"{part} {number}")
        store = copy_store(whole, tmp_path / "store")
        done = [spoil(store, rng) for _ in range(rng.choice([1, 1, 2, 3]))]
        for command in [*rng.sample(READING, 2), *rng.sample(WRITING, 1)]:
            try:
                tried(command, store, tmp_path / "cache")
            except BaseException as error:
                error.add_note(f"part {part}, store {number}: {done}: {command}")
                raise
        shutil.rmtree(store)
    assert not files_of(tmp_path / "store")
