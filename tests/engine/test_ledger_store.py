"""The ledger: atomic commits, damage, folding under kills, one writer, other stores."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import ledger_row as row
from hypothesis import given, settings
from hypothesis import strategies as st

from isoflop.core.errors import UserError
from isoflop.ledger import Ledger, Store
from isoflop.ledger.ledger import LedgerBusy
from isoflop.ledger.schema import SCHEMA, latest, to_table
from isoflop.ledger.store import StoreError


def ledger(tmp_path: Path, name: str = "s") -> Ledger:
    return Ledger(Store.open(str(tmp_path)), name).lock()


def files(book: Ledger) -> list[Path]:
    return sorted(Path(book.folder).glob("*.parquet"))


def errors(book: Ledger) -> dict[str, float]:
    table = book.read()
    return dict(zip(table["job_id"].to_pylist(), table["error"].to_pylist(), strict=True))


def test_rows_come_back_as_they_were_written(tmp_path: Path) -> None:
    book = ledger(tmp_path)
    assert book.read().num_rows == 0
    assert book.append([row("a"), row("b", 0.25)]) == 2
    assert book.append([]) == 0
    table = Ledger(Store.open(str(tmp_path)), "s").read()
    assert table.schema.equals(SCHEMA)
    assert table["job_id"].to_pylist() == ["a", "b"]
    assert table["sequence"].to_pylist() == [1, 2]
    assert table["metrics"].to_pylist() == [[("loss", 1.0)], [("loss", 1.0)]]


def test_the_last_row_of_a_job_counts_and_history_keeps_all(tmp_path: Path) -> None:
    book = ledger(tmp_path)
    book.append([row("a", 0.1)])
    book.append([row("b", 0.2), row("a", 0.3), row("a", 0.4)])
    assert errors(book) == {"a": 0.4, "b": 0.2}
    assert book.read()["job_id"].to_pylist() == ["a", "b"]  # in the order in which they first came
    assert book.history().num_rows == 4


def test_sequence_goes_on_after_a_restart(tmp_path: Path) -> None:
    first = ledger(tmp_path)
    first.append([row("a"), row("b")])
    first.unlock()
    second = ledger(tmp_path)
    assert second.sequence == 2
    second.append([row("a", 0.9)])
    assert errors(second)["a"] == 0.9


def test_writing_without_the_lock_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="lock"):
        Ledger(Store.open(str(tmp_path)), "s").append([row("a")])


@pytest.mark.parametrize("damage", ["empty", "garbage", "truncated", "foreign", "foreign-named"])
def test_a_file_that_cannot_be_read_is_set_aside_and_costs_only_its_own_rows(tmp_path: Path, damage: str) -> None:
    book = ledger(tmp_path)
    book.append([row("a")])
    book.append([row("b")])
    good, bad = files(book)
    content = {
        "garbage": b"this is no Parquet file, though somebody called it one" * 10,
        "truncated": bad.read_bytes()[:-20],
    }
    bad.write_bytes(content.get(damage, b""))
    if damage.startswith("foreign"):
        columns = {"job_id": ["x"], "sequence": [1]} if damage == "foreign-named" else {"unrelated": [1, 2, 3]}
        pq.write_table(pa.table(columns), bad)
    reader = Ledger(Store.open(str(tmp_path)), "s")
    assert errors(reader) == {"a": 0.5}
    assert errors(reader) == {"a": 0.5}
    assert reader.set_aside == [bad.name]
    assert bad.exists()  # only the writer moves files
    assert errors(book) == {"a": 0.5}
    assert files(book) == [good]
    assert (tmp_path / "sweeps" / "s" / "torn" / bad.name).exists()
    book.append([row("b")])
    assert set(errors(book)) == {"a", "b"}


def test_a_flipped_byte_is_found_or_does_no_harm(tmp_path: Path) -> None:
    """Pages carry checksums: a disk that lies must not change a score."""
    book = ledger(tmp_path)
    book.append([row("b", scores=[random.Random(i).random() for i in range(2000)])])
    whole = book.read()
    (file,) = files(book)
    content = file.read_bytes()
    found = 0
    for at in range(0, len(content), 411):
        file.write_bytes(content[:at] + bytes([content[at] ^ 0xFF]) + content[at + 1 :])
        table = Ledger(Store.open(str(tmp_path)), "s").read()
        assert table.num_rows == 0 or table.equals(whole), at
        found += table.num_rows == 0
    assert found > 10


def test_a_ledger_of_another_version_is_an_error_and_stays_where_it_is(tmp_path: Path) -> None:
    book = ledger(tmp_path)
    book.append([row("a")])
    table = to_table([row("b", sequence=2)]).replace_schema_metadata({"isoflop.ledger": "99"})
    pq.write_table(table, Path(book.folder) / "000000000002-future.parquet")
    with pytest.raises(UserError, match="ledger version 99; this isoflop reads version 1"):
        book.read()
    assert len(files(book)) == 2


def test_a_file_that_may_not_be_read_is_no_torn_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    book = ledger(tmp_path)
    book.append([row("a")])

    class Broken:
        def open_input_file(self, path: str) -> Any:
            raise PermissionError(13, "Permission denied", path)

        def __getattr__(self, name: str) -> Any:
            return getattr(real, name)

    real = book.store.fs
    object.__setattr__(book.store, "fs", Broken())
    with pytest.raises(StoreError, match="Permission denied"):
        book.read()
    object.__setattr__(book.store, "fs", real)
    assert errors(book) == {"a": 0.5}


def test_leftovers_of_a_killed_write_are_ignored(tmp_path: Path) -> None:
    book = ledger(tmp_path)
    book.append([row("a")])
    (Path(book.folder) / ".000000000002-x.parquet.1234").write_bytes(b"half a fi")
    assert errors(book) == {"a": 0.5}


def test_a_full_disk_loses_nothing_that_was_committed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    book = ledger(tmp_path)
    book.append([row("a")])

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreError, match="No space left"):
        book.append([row("b")])
    monkeypatch.undo()
    assert errors(book) == {"a": 0.5}
    book.append([row("b")])
    assert set(errors(book)) == {"a", "b"}


# folding


def _fill(book: Ledger, count: int) -> dict[str, float]:
    for i in range(count):
        book.append([row(f"j{i % 7}", i / 100)])
    return errors(book)


def test_folding_keeps_every_row_and_leaves_one_file(tmp_path: Path) -> None:
    book = ledger(tmp_path)
    before = _fill(book, 20)
    history = book.history().sort_by("sequence")
    assert not book.fold(at_least=21)
    assert book.fold(at_least=20)
    assert len(files(book)) == 1
    assert errors(book) == before
    assert book.history().sort_by("sequence").equals(history)
    book.append([row("new")])
    assert not book.fold(at_least=2), "what is folded already is not rewritten for one more commit"
    assert book.fold(at_least=1)
    assert len(files(book)) == 2
    assert errors(book) == {**before, "new": 0.5}


def test_many_folds_are_folded_again(tmp_path: Path) -> None:
    book = ledger(tmp_path)
    for i in range(70):
        book.append([row(f"j{i}", i / 100)])
        assert book.fold(at_least=1)
    assert len(files(book)) < 70
    assert errors(book) == {f"j{i}": i / 100 for i in range(70)}
    assert book.history()["sequence"].to_pylist() == sorted(book.history()["sequence"].to_pylist())


class _Killed(BaseException):
    """Stands for the process's end at this line."""


@pytest.mark.parametrize("step", range(7))
def test_a_kill_at_any_step_of_folding_doubles_and_loses_nothing(tmp_path: Path, step: int) -> None:
    book = ledger(tmp_path)
    before = _fill(book, 5)
    count = book.history().num_rows
    real, calls = book.store.fs, [0]

    class Dying:
        def delete_file(self, path: str) -> None:
            calls[0] += 1
            if calls[0] > step:
                raise _Killed
            real.delete_file(path)

        def __getattr__(self, name: str) -> Any:
            return getattr(real, name)

    object.__setattr__(book.store, "fs", Dying())
    with contextlib.suppress(_Killed):
        book.fold(at_least=1)
    object.__setattr__(book.store, "fs", real)
    book.unlock()
    again = ledger(tmp_path)
    assert errors(again) == before
    assert again.history().num_rows == count
    again.append([row("later")])
    assert again.fold(at_least=1)
    assert errors(again) == {**before, "later": 0.5}
    assert again.history().num_rows == count + 1
    assert len(files(again)) <= 2


def test_readers_see_every_row_while_the_writer_folds(tmp_path: Path) -> None:
    book = ledger(tmp_path)
    _fill(book, 5)
    failures: list[Any] = []
    done = threading.Event()

    def read() -> None:
        reader = Ledger(Store.open(str(tmp_path)), "s")
        while not done.is_set():
            try:
                if reader.read(["job_id"]).num_rows < 5 or reader.set_aside:
                    failures.append(reader.set_aside)
            except Exception as error:
                failures.append(error)

    threads = [threading.Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()
    for i in range(40):
        book.append([row(f"j{i % 5}")])
        if i % 4 == 3:
            book.fold(at_least=2)
    done.set()
    for thread in threads:
        thread.join()
    assert not failures


@settings(max_examples=25)
@given(
    st.lists(st.one_of(st.just("fold"), st.just("reopen"), st.lists(st.sampled_from("abcde"), max_size=4)), max_size=12)
)
def test_any_order_of_appends_folds_and_restarts_gives_the_same_rows(
    tmp_path_factory: pytest.TempPathFactory, actions: list[Any]
) -> None:
    folder = tmp_path_factory.mktemp("ledger") / uuid.uuid4().hex
    book = ledger(folder)
    expected: dict[str, float] = {}
    number = 0.0
    for action in actions:
        if action == "fold":
            book.fold(at_least=1)
        elif action == "reopen":
            book.unlock()
            book = ledger(folder)
        else:
            rows = []
            for job in action:
                number += 1
                rows.append(row(job, number))
                expected[job] = number
            book.append(rows)
    assert errors(book) == expected
    assert list(errors(book)) == list(expected)
    assert book.history().num_rows == number
    book.unlock()


def test_latest_orders_by_sequence_whatever_the_order_of_files() -> None:
    rows = [row("a", i / 10, sequence=i) for i in (3, 1, 2)]
    assert latest(to_table(rows))["error"].to_pylist() == [0.3]
    assert latest(to_table([])).num_rows == 0


# one writer


def test_a_second_writer_gets_one_clear_line(tmp_path: Path) -> None:
    book = ledger(tmp_path)
    with pytest.raises(
        LedgerBusy,
        match=rf"sweep 's' is being written by process {os.getpid()} on .*; wait for it, stop it, or give this run another name",
    ) as caught:
        ledger(tmp_path)
    assert "\n" not in str(caught.value)
    assert ledger(tmp_path, "other").locked  # another sweep of the same store is free
    book.unlock()
    ledger(tmp_path).unlock()


HOLDER = """
import sys, time
from isoflop.ledger import Ledger, Store
book = Ledger(Store.open(sys.argv[1]), "s").lock()
print("locked", flush=True)
time.sleep(100)
"""


def test_kill_9_of_the_holder_frees_the_lock(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline().strip() == "locked"
        with pytest.raises(LedgerBusy, match=f"process {holder.pid}"):
            ledger(tmp_path)
        holder.send_signal(signal.SIGKILL)
        holder.wait(10)
        ledger(tmp_path).append([row("a")])
    finally:
        holder.kill()
        holder.wait(10)


# stores


def memory_store() -> Store:
    return Store.open(f"memory://{uuid.uuid4().hex}")


def test_any_fsspec_uri_works_as_the_store() -> None:
    store = memory_store()
    assert store.local is None
    assert store.sweeps() == []
    book = Ledger(store, "s").lock()
    for i in range(4):
        book.append([row(f"j{i}")])
    assert book.fold(at_least=2)
    book.append([row("j0", 0.75)])
    assert errors(Ledger(store, "s")) == {"j0": 0.75, "j1": 0.5, "j2": 0.5, "j3": 0.5}
    assert store.sweeps() == ["s"]
    with pytest.raises(LedgerBusy, match=r"is being written by process \d+ on .*seen"):
        Ledger(store, "s").lock()
    book.unlock()
    Ledger(store, "s").lock().unlock()


def test_a_lease_that_is_stale_or_damaged_does_not_bar_the_way() -> None:
    store = memory_store()
    for left_behind in (b'{"holder": "somebody", "time": 12}', b"\x00 nonsense"):
        store.write(store.path("sweeps", "s", "lock"), left_behind)
        book = Ledger(store, "s").lock()
        assert book.locked
        book.unlock()


def test_a_driver_that_lost_its_lease_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    store = memory_store()
    book = Ledger(store, "s").lock()
    store.write(store.path("sweeps", "s", "lock"), f'{{"holder": "another", "time": {time.time()}}}'.encode())
    monkeypatch.setattr("isoflop.ledger.ledger._LEASE_SECONDS", 0.0)
    with pytest.raises(LedgerBusy, match="taken over by another"):
        book.append([row("a")])
    assert Ledger(store, "s").read().num_rows == 0


def test_a_damaged_file_of_a_remote_store_is_set_aside() -> None:
    store = memory_store()
    book = Ledger(store, "s").lock()
    book.append([row("a")])
    store.write(f"{book.folder}/000000000009-x.parquet", b"garbage")
    assert errors(book) == {"a": 0.5}
    assert book.set_aside == ["000000000009-x.parquet"]
    book.unlock()


def test_a_scheme_that_does_not_exist_is_an_error() -> None:
    with pytest.raises(UserError, match="unknown scheme 'nosuch'"):
        Store.open("nosuch://x/y")


def test_a_store_that_is_a_file_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    store = Store.open(str(tmp_path / "file"))
    with pytest.raises(UserError, match="cannot be written: Not a directory"):
        Ledger(store, "s").lock()
