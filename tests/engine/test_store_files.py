"""Files of a store on this host: plain ones only, whole or absent, and never outside of the store."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from isoflop.ledger import Store
from isoflop.ledger.files import open_plain, read_plain, refuse_links, write_whole
from isoflop.ledger.store import StoreError

LINK = "a symbolic link inside a store, through which nothing is written"
WAYS: dict[str, Callable[[Store, str], object]] = {
    "write": lambda store, path: store.write(path, b"new"),
    "delete": lambda store, path: store.delete(path),
    "move": lambda store, path: store.move(path, store.path("torn")),
    "open": lambda store, path: os.close(store.open_plain(path, os.O_RDWR | os.O_CREAT)),
    "lend": lambda store, path: store.no_links("sweeps", "s", "file"),
}


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def descriptors() -> set[str]:
    """Open now; what earlier tests left may be closed at any time by whoever collects garbage."""
    return set(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("link", ["sweeps", "sweeps/s", "sweeps/s/file"])
def test_no_link_in_a_store_is_followed(tmp_path: Path, way: str, link: str) -> None:
    victim, store = tmp_path / "victim", Store.open(str(tmp_path / "store"))
    for folder in (victim / "s", victim):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "file").write_bytes(b"mine")
    place = tmp_path / "store" / link
    place.parent.mkdir(parents=True)
    place.symlink_to({"sweeps": victim, "sweeps/s": victim / "s"}.get(link, victim / "file"))
    before = snapshot(victim)
    with pytest.raises(StoreError) as caught:
        WAYS[way](store, store.path("sweeps", "s", "file"))
    assert str(caught.value).endswith(f": {LINK}: {place}")
    assert snapshot(victim) == before
    assert place.is_symlink()


def test_nothing_is_moved_into_a_folder_that_is_a_link(tmp_path: Path) -> None:
    store, victim = Store.open(str(tmp_path / "store")), tmp_path / "victim"
    store.write(store.path("file"), b"x")
    victim.mkdir()
    (tmp_path / "store" / "torn").symlink_to(victim)
    with pytest.raises(StoreError, match=LINK):
        store.move(store.path("file"), store.path("torn"))
    assert list(victim.iterdir()) == []
    assert store.read(store.path("file")) == b"x"


def test_links_on_the_way_to_a_store_are_the_users_own(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "way").symlink_to(tmp_path / "real")
    for given in (tmp_path / "way", tmp_path / "way" / "store"):
        store = Store.open(str(given))
        store.write(store.path("a", "file"), b"x")
        assert store.read(store.path("a", "file")) == b"x"
    refuse_links(tmp_path / "other", tmp_path / "way" / "file")  # not inside: nobody's concern


def test_a_link_is_followed_by_who_reads(tmp_path: Path) -> None:
    (tmp_path / "real").write_bytes(b"x")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert read_plain(tmp_path / "link") == b"x"
    with pytest.raises(OSError, match=os.strerror(errno.ELOOP)):
        open_plain(tmp_path / "link", os.O_RDONLY)


def a_pipe(folder: Path) -> Path:
    os.mkfifo(folder / "pipe")
    return folder / "pipe"


def a_folder(folder: Path) -> Path:
    (folder / "inner").mkdir()
    return folder / "inner"


@pytest.mark.parametrize("flags", [os.O_RDONLY, os.O_WRONLY])
@pytest.mark.parametrize("make", [a_pipe, lambda folder: Path("/dev/null")], ids=["pipe", "device"])
def test_what_is_no_plain_file_is_refused_at_once(tmp_path: Path, make: Callable[[Path], Path], flags: int) -> None:
    """A pipe that nobody reads cannot be opened for writing; whatever else opens is closed again."""
    path = make(tmp_path)
    before = descriptors()
    with pytest.raises(OSError, match="no plain file") as caught:
        open_plain(path, flags)
    told = (caught.value.errno, caught.value.strerror, caught.value.filename)
    assert told == (errno.EINVAL, "no plain file", str(path))
    assert descriptors() <= before


def test_a_folder_is_no_plain_file(tmp_path: Path) -> None:
    before = descriptors()
    with pytest.raises(OSError, match="no plain file"):
        open_plain(a_folder(tmp_path), os.O_RDONLY)
    assert descriptors() <= before


def test_other_errors_stay_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        open_plain(tmp_path / "none", os.O_RDONLY)
    with pytest.raises(IsADirectoryError):
        open_plain(a_folder(tmp_path), os.O_WRONLY)


def test_a_descriptor_is_not_inherited_and_its_file_is_the_owners(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        descriptor = open_plain(tmp_path / "file", os.O_WRONLY | os.O_CREAT)
    finally:
        os.umask(old)
    try:
        assert not os.get_inheritable(descriptor)
        assert os.fstat(descriptor).st_mode & 0o777 == 0o644
    finally:
        os.close(descriptor)


@pytest.mark.parametrize("durable", [True, False])
def test_a_file_is_replaced_whole_and_flushed_where_it_has_to_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, durable: bool
) -> None:
    flushed: list[int] = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (flushed.append(os.fstat(fd).st_size), real(fd)))
    target = tmp_path / "a" / "b" / "file"
    for content in (b"old and longer", b"new"):
        flushed.clear()
        write_whole(target, content, durable)
        assert target.read_bytes() == content
        assert len(flushed) == (2 if durable else 0)  # the file with all that is in it, and its folder
        assert not durable or flushed[0] == len(content)
    assert [p.name for p in target.parent.iterdir()] == ["file"]


@pytest.mark.parametrize("durable", [True, False])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path, durable: bool) -> None:
    write_whole(tmp_path / "file", b"old")
    with pytest.raises(TypeError):
        write_whole(tmp_path / "file", "text", durable)  # type: ignore[arg-type]
    assert snapshot(tmp_path) == {"file": b"old"}
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError):
        write_whole(tmp_path / "folder", b"x", durable)
    assert snapshot(tmp_path) == {"file": b"old"}


def test_where_not_even_the_part_can_be_made_its_own_error_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(path: Path, flags: int) -> int:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr("isoflop.ledger.files.open_plain", refused)
    with pytest.raises(PermissionError):
        write_whole(tmp_path / "file", b"x")


def test_files_last_unless_somebody_says_that_they_need_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[int] = []
    monkeypatch.setattr(os, "fsync", flushed.append)
    write_whole(tmp_path / "file", b"x")
    assert len(flushed) == 2
    store = Store.open(str(tmp_path))
    store.write(store.path("other"), b"x")
    assert len(flushed) == 4
    store.write(store.path("third"), b"x", durable=False)
    assert len(flushed) == 4
