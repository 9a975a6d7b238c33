"""One writer per sweep: what it says of itself and of others, how long a lease lasts, why a file is set aside."""

from __future__ import annotations

import errno
import json
import os
import time
import uuid
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import ledger_row as row

from isoflop.core.errors import UserError
from isoflop.ledger import Ledger, Store
from isoflop.ledger import ledger as module
from isoflop.ledger.ledger import LedgerBusy
from isoflop.ledger.schema import SCHEMA, to_table
from isoflop.ledger.store import StoreError


def local(folder: Path) -> Ledger:
    return Ledger(Store.open(str(folder)), "s")


def remote() -> Ledger:
    return Ledger(Store.open(f"memory://{uuid.uuid4().hex}"), "s")


def lock_of(book: Ledger) -> str:
    return book.store.path("sweeps", "s", "lock")


def lease(book: Ledger) -> dict[str, object]:
    return json.loads(book.store.read(lock_of(book)) or b"{}")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The ledger's clocks, moved by hand; sleeping moves them."""
    now = [1_000_000.0]

    class Time:
        time = monotonic = staticmethod(lambda: now[0])

        @staticmethod
        def sleep(seconds: float) -> None:
            now[0] += seconds

    monkeypatch.setattr(module, "time", Time)
    return now


# on this host


def test_a_lock_says_who_holds_it_and_nothing_once_it_is_free(tmp_path: Path) -> None:
    book = local(tmp_path)
    path = Path(lock_of(book))
    path.parent.mkdir(parents=True)
    path.write_text("process 123456789 on a host with a long name, left behind by a kill")
    assert book.lock() is book
    assert book.lock() is book  # once more changes nothing
    assert path.read_text().startswith(f"process {os.getpid()} on ")
    assert "left behind" not in path.read_text()
    book.unlock()
    assert path.read_text() == ""
    assert not book.locked


def test_a_holder_that_has_not_said_who_it_is_yet(tmp_path: Path) -> None:
    book = local(tmp_path).lock()
    Path(lock_of(book)).write_bytes(b"")
    with pytest.raises(LedgerBusy, match="sweep 's' is being written by another process; wait for it"):
        local(tmp_path).lock()
    Path(lock_of(book)).write_bytes(b"\xff\xfe" + 300 * b"x")
    with pytest.raises(LedgerBusy) as caught:
        local(tmp_path).lock()
    assert len(str(caught.value)) < 320


def test_who_may_not_lock_keeps_no_file_open(tmp_path: Path) -> None:
    book = local(tmp_path).lock()
    before = set(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with pytest.raises(LedgerBusy):
            local(tmp_path).lock()
    assert set(os.listdir("/proc/self/fd")) <= before  # others may be closed meanwhile, by whoever collects garbage
    book.unlock()


def test_a_full_disk_is_told_at_the_lock_and_leaves_it_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    book = local(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(StoreError) as caught:
            book.lock()
    assert str(caught.value) == f"store {tmp_path} cannot be written: No space left on device: {lock_of(book)}"
    assert not book.locked
    local(tmp_path).lock().unlock()


def test_a_ledger_whose_folder_is_a_link_is_not_locked(tmp_path: Path) -> None:
    (tmp_path / "victim").mkdir()
    (tmp_path / "sweeps" / "s").mkdir(parents=True)
    (tmp_path / "sweeps" / "s" / "ledger").symlink_to(tmp_path / "victim")
    with pytest.raises(StoreError, match="a symbolic link inside a store"):
        local(tmp_path).lock()


def test_folds_and_appends_need_the_lock(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="only under its lock"):
        local(tmp_path).fold(at_least=0)


# on a remote store


def test_a_lease_lasts_two_minutes(clock: list[float]) -> None:
    book = remote().lock()
    clock[0] += 119.0
    with pytest.raises(LedgerBusy, match=r"is being written by process \d+ on .* \(seen 119 s ago\)"):
        Ledger(book.store, "s").lock()
    clock[0] += 2.0
    assert Ledger(book.store, "s").lock().locked


def test_a_lease_from_the_future_bars_the_way_no_longer_than_one_of_the_past(clock: list[float]) -> None:
    book = remote()
    for ahead, free in ((100.0, False), (130.0, True)):
        book.store.write(lock_of(book), json.dumps({"holder": "x", "time": clock[0] + ahead}).encode())
        if free:
            book.lock()
        else:
            with pytest.raises(LedgerBusy):
                book.lock()


@pytest.mark.parametrize(
    "left_behind",
    ["", "[]", "null", "{", '{"holder": "x"}', '{"holder": "x", "time": "12"}', '{"holder": "x", "time": null}',
     '{"holder": "x", "time": NaN}', '{"holder": "x", "time": 1e999}', '{"holder": "x", "time": "soon"}'],
)  # fmt: skip
def test_a_lease_without_a_time_of_today_bars_nobody(clock: list[float], left_behind: str) -> None:
    book = remote()
    book.store.write(lock_of(book), left_behind.encode())
    assert book.lock().locked


def test_a_lease_is_renewed_every_half_minute(clock: list[float]) -> None:
    book = remote().lock()
    taken = lease(book)["time"]
    clock[0] += 29.0
    book.keep_lease()
    assert lease(book)["time"] == taken
    clock[0] += 2.0
    book.keep_lease()
    assert lease(book)["time"] == clock[0]
    clock[0] += 29.0
    book.keep_lease()
    assert lease(book)["time"] == clock[0] - 29.0


def test_a_lease_that_somebody_deleted_is_taken_again(clock: list[float]) -> None:
    book = remote().lock()
    holder = lease(book)["holder"]
    book.store.delete(lock_of(book))
    clock[0] += 31.0
    book.keep_lease()
    assert lease(book)["holder"] == holder


def test_of_two_that_take_a_lease_at_once_one_gives_way(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    book = remote()

    def other(seconds: float) -> None:
        book.store.write(lock_of(book), json.dumps({"holder": "another", "time": clock[0]}).encode())

    monkeypatch.setattr(module.time, "sleep", staticmethod(other))
    with pytest.raises(LedgerBusy, match="is being written by another; wait for it or stop it"):
        book.lock()
    assert not book.locked
    assert lease(book)["holder"] == "another"


def test_a_driver_that_was_taken_over_leaves_the_other_its_lease(clock: list[float]) -> None:
    book = remote().lock()
    clock[0] += 121.0
    second = Ledger(book.store, "s").lock()
    with pytest.raises(LedgerBusy, match=r"was taken over by process .*; this driver stops"):
        book.append([row("a")])
    assert not book.locked
    third = Ledger(book.store, "s")
    with pytest.raises(LedgerBusy):
        third.lock()
    book.unlock()
    assert lease(book)["holder"] == second._lease
    second.unlock()
    assert book.store.read(lock_of(book)) is None
    assert not second.locked
    with pytest.raises(RuntimeError, match="only under its lock"):
        second.append([row("b")])


def test_who_lost_its_lease_unnoticed_does_not_delete_anothers(clock: list[float]) -> None:
    book = remote().lock()
    clock[0] += 121.0
    second = Ledger(book.store, "s").lock()
    book.unlock()
    assert lease(book)["holder"] == second._lease


def test_a_store_that_is_away_says_no_secret() -> None:
    store = Store.open("memory://away")
    shown = Store("s3://KEY:SECRET@bucket/x", store.fs, store.base)
    assert shown.shown == "s3://***:***@bucket/x"
    assert "SECRET" not in repr(shown)

    def away(path: str) -> None:
        raise OSError(errno.EHOSTUNREACH, os.strerror(errno.EHOSTUNREACH), path)

    class Away:
        open_input_file = staticmethod(away)

    object.__setattr__(shown, "fs", Away())
    with pytest.raises(StoreError) as caught:
        shown.read("x")
    assert str(caught.value) == "store s3://***:***@bucket/x cannot be read: No route to host: x"


# why a file is set aside


def write(book: Ledger, table: pa.Table) -> None:
    Path(book.folder).mkdir(parents=True, exist_ok=True)
    pq.write_table(table, Path(book.folder) / "000000000009-x.parquet")


def one(**values: object) -> pa.Table:
    return to_table([row("a", sequence=1, **values)])


ASIDE: dict[str, tuple[pa.Table, str]] = {
    "of another program": (pa.table({"x": [1]}), "not a file of a ledger"),
    "a doubled column": (one().append_column("task", pa.array(["t"])), "a column stands twice in it"),
    "no job": (one(job_id=None), "column job_id is null in some rows"),
    "a status": (one(status="done"), "status 'done' is none of ok, failed, infeasible, pruned"),
    "a spec that is a list": (one(spec="[]"), "column spec holds what is no block of JSON: '[]'"),
    "knobs that are long": (one(knobs=f'"{50 * "k"}"'), f"column knobs holds what is no block of JSON: '\"{39 * 'k'}'"),
    "replaces a block": (one().replace_schema_metadata({**SCHEMA.metadata, "isoflop.replaces": "{}"}), "what it replaces is no list of names"),
    "replaces numbers": (one().replace_schema_metadata({**SCHEMA.metadata, "isoflop.replaces": '["a", 1]'}), "what it replaces is no list of names"),
}  # fmt: skip


@pytest.mark.parametrize("kind", ASIDE)
def test_why_a_file_is_set_aside_is_told_once(tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    book, (table, why) = local(tmp_path), ASIDE[kind]
    write(book, table)
    for _ in range(2):
        assert book.read().num_rows == 0
    assert [record.getMessage() for record in caplog.records] == [
        f"{book.folder}/000000000009-x.parquet cannot be read ({why}); its jobs will run again"
    ]
    assert book.set_aside == ["000000000009-x.parquet"]


def test_columns_of_a_later_version_are_named(tmp_path: Path) -> None:
    book = local(tmp_path)
    write(book, one().append_column("later", pa.array([1])).append_column("more", pa.array([1])))
    with pytest.raises(UserError, match="columns later, more were added by a later isoflop; update this one"):
        book.read()


def test_rows_without_a_spec_are_read(tmp_path: Path) -> None:
    book = local(tmp_path)
    write(book, one(spec=None, knobs="{}"))
    assert book.read(["knobs"]).to_pylist() == [{"knobs": "{}"}]
    assert book.read(["error"]).column_names == ["error"]


def test_files_that_keep_vanishing_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    book, tries = local(tmp_path), []

    def gone(columns: object) -> pa.Table:
        tries.append(time.monotonic())
        raise FileNotFoundError

    monkeypatch.setattr(book, "_read_once", gone)
    monkeypatch.setattr(module.time, "sleep", lambda seconds: None)
    with pytest.raises(UserError, match="files keep vanishing while they are read"):
        book.read()
    assert len(tries) == 20


def test_what_was_folded_by_a_killed_writer_is_not_counted_as_commits(tmp_path: Path) -> None:
    book = local(tmp_path).lock()
    for number in range(3):
        book.append([row(f"j{number}")])
    book.unlock()
    again = local(tmp_path).lock()
    assert not again.fold(at_least=4)
    assert again.fold(at_least=3)
    assert not again.fold(at_least=1)
    again.unlock()
    third = local(tmp_path).lock()
    assert not third.fold(at_least=1)
    assert third.sequence == 3


def test_nothing_to_commit_makes_no_file(tmp_path: Path) -> None:
    book = local(tmp_path).lock()
    assert book.append([]) == 0
    assert not Path(book.folder).exists()
    assert book.sequence == 0


def test_a_ledger_is_where_older_versions_left_it(tmp_path: Path) -> None:
    book = local(tmp_path).lock()
    book.append([row("a")])
    assert len(list((tmp_path / "sweeps" / "s" / "ledger").glob("000000000001-*.parquet"))) == 1
    assert (tmp_path / "sweeps" / "s" / "lock").exists()


def test_where_every_file_is_damaged_there_is_nothing_to_fold(tmp_path: Path) -> None:
    book = local(tmp_path).lock()
    for number in range(2):
        book.append([row(f"j{number}")])
    for path in Path(book.folder).iterdir():
        path.write_bytes(b"torn")
    assert book.fold(at_least=1)
    assert not book.fold(at_least=1)
    assert len(book.set_aside) == 2 == len(list((tmp_path / "sweeps" / "s" / "torn").iterdir()))
    book.append([row("j2")])
    assert book.read(["job_id"]).to_pylist() == [{"job_id": "j2"}]
