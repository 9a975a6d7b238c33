"""MLflow's SQLite file: made aside and renamed, so that it is whole or absent whenever somebody is killed.

MLflow creates its tables in some fifty steps that take seconds. Whoever is killed among them, or does it beside another
process, leaves a file that no MLflow can open again. Here one process at a time makes the file under a lock, elsewhere; a
half-made one that an earlier version or somebody else left is set aside when no run is in it, and made anew: whatever it
should show comes from the ledger.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal
from urllib.parse import quote, urlparse

from isoflop.core.errors import UserError
from isoflop.core.files import put_in_place, sync

log = logging.getLogger(__name__)
Verdict = Literal["whole", "absent", "half-made"]
_COMPANIONS = (
    "",
    "-journal",
    "-wal",
    "-shm",
)  # a stale one would be replayed into the file that takes the old one's name
_PART = "part"
_LOCK_SECONDS, _LOOK_SECONDS = 300.0, 0.1


_BROKEN = ("image is malformed", "is not a database")  # in SQLite's words, which MLflow passes on
_REMEDY = "move it away and resume: it is built anew from the ledger"


class Unusable(UserError):
    """Nothing can be tracked until somebody mends what the message names; waiting and trying again change nothing."""


def sqlite_path(uri: str) -> Path | None:
    """The file of a ``sqlite:///`` URI; None for every other tracking URI."""
    return Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None


def check_damage(uri: str, error: Exception) -> None:
    """Raise :class:`Unusable` for an error that says that a SQLite file is broken."""
    if (path := sqlite_path(uri)) is not None and any(words in str(error) for words in _BROKEN):
        raise Unusable(f"{path} is damaged; {_REMEDY}") from error


def prepare(uri: str) -> None:
    """See to it that a SQLite tracking URI has a whole database in WAL mode, and that another database has its driver.

    Raises:
        Unusable: the file is not MLflow's, or of another MLflow's version and in use, or there is no driver; says what to do.
        OSError: the folder cannot be written, or another process has been making the file for minutes.
    """
    path = sqlite_path(uri)
    if path is None:
        _check_driver(uri)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    if _verdict(path) != "whole":
        with _locked(path):
            _remove_parts(path)
            found = _verdict(path)  # another process may have been faster
            if found == "half-made":
                log.warning("%s was never finished; it is set aside as %s and made anew", path, _set_aside(path).name)
            if found != "whole":
                _make(path)
    _use_wal(path)


def _check_driver(uri: str) -> None:
    """MLflow itself tries for minutes to load what is not installed."""
    scheme = urlparse(uri).scheme
    if scheme.partition("+")[0] not in ("mysql", "mssql", "postgresql", "sqlite"):
        return
    import sqlalchemy

    try:
        sqlalchemy.create_engine(uri)
    except ImportError as error:
        raise Unusable(f"--tracking-uri {scheme}://…: its driver is not installed ({error})") from None
    except sqlalchemy.exc.ArgumentError as error:
        raise Unusable(f"--tracking-uri {scheme}://…: {error}") from None


def _verdict(path: Path) -> Verdict:
    """Whether MLflow can use the file. Alembic's revision tells: it is written when all steps are done."""
    if not path.exists():
        return "absent"
    try:
        with contextlib.closing(
            sqlite3.connect(f"file:{quote(str(path))}?mode=rw", uri=True, timeout=30)
        ) as connection:
            query = "SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite_%'"
            tables = {name for (name,) in connection.execute(query)}
            counts = {t: _count(connection, t) for t in tables & {"runs", "alembic_version"}}
            revision = (
                connection.execute("SELECT max(version_num) FROM alembic_version").fetchone()[0]
                if counts.get("alembic_version")
                else None
            )
    except sqlite3.OperationalError as error:  # locked, no permission: says nothing about the content
        raise OSError(f"{path}: {error}") from error
    except sqlite3.DatabaseError as error:
        raise Unusable(f"{path} cannot be read ({error}); {_REMEDY}") from None
    head, known = _revisions()
    if revision == head:
        return "whole"
    if revision is not None and revision not in known:
        raise Unusable(
            f"{path} was made by another version of MLflow (revision {revision}, here {head}); install that one, or "
            + _REMEDY
        )
    if counts.get("runs"):
        raise Unusable(
            f"{path} was made by an older MLflow (revision {revision}, here {head}) and holds runs; run `mlflow db upgrade "
            f"sqlite:///{path}`, or {_REMEDY}"
        )
    if tables and not tables & {"experiments", "runs", "metrics", "params", "tags", "alembic_version"}:
        raise Unusable(
            f"{path} holds tables that are not MLflow's ({', '.join(sorted(tables)[:3])}); name another file"
        )
    return "half-made"


def _count(connection: sqlite3.Connection, table: str) -> int:
    return int(connection.execute(f"SELECT count(*) FROM {table}").fetchone()[0])


def _revisions() -> tuple[str | None, frozenset[str]]:
    """The revision of a whole database, and all that came before it, of the MLflow that is installed."""
    import mlflow.store.db_migrations as migrations
    from alembic.script import ScriptDirectory

    script = ScriptDirectory(str(Path(str(migrations.__file__)).parent))
    return script.get_current_head(), frozenset(s.revision for s in script.walk_revisions())


def _make(path: Path) -> None:
    """A whole database under ``path``; call it under the lock, when nothing lies there."""
    part = path.with_name(f".{path.name}.{_PART}-{os.getpid()}")
    try:
        _fill(part)
        _use_wal(part)
        sync(part)
        for suffix in _COMPANIONS[1:]:
            path.with_name(path.name + suffix).unlink(missing_ok=True)
        put_in_place(part, path)
    finally:
        for suffix in _COMPANIONS:
            part.with_name(part.name + suffix).unlink(missing_ok=True)


def _fill(part: Path) -> None:
    """MLflow's own steps, in a file that nobody else knows."""
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    SqlAlchemyStore(f"sqlite:///{part}", f"file://{part.parent / 'mlartifacts'}").engine.dispose()


def _remove_parts(path: Path) -> None:
    """What killed processes left; under the lock nobody is making one."""
    for old in path.parent.glob(f".{path.name}.{_PART}-*"):
        old.unlink(missing_ok=True)


def _set_aside(path: Path) -> Path:
    """Move a file away, its journals with it. Nothing is deleted: somebody may want to look at it."""
    aside = path.with_name(f"{path.name}.half-made-{time.time_ns()}")
    for suffix in _COMPANIONS:
        with contextlib.suppress(FileNotFoundError):
            os.rename(path.with_name(path.name + suffix), aside.with_name(aside.name + suffix))
    return aside


def _use_wal(path: Path) -> None:
    """Readers (the UI) and the writer do not wait for each other; the setting stays with the file."""
    with contextlib.closing(sqlite3.connect(path, timeout=30)) as connection:
        connection.execute("PRAGMA journal_mode=WAL")


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process makes a file; the kernel frees the lock however that process ends."""
    lock = path.with_name(f".{path.name}.lock")
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
    try:
        deadline = time.monotonic() + _LOCK_SECONDS
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise OSError(f"{path}: another process has been making it for {_LOCK_SECONDS:.0f} s") from None
                time.sleep(_LOOK_SECONDS)
        yield
    finally:
        os.close(descriptor)
