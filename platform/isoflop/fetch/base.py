"""What can be fetched, and how it comes into the cache: complete or not at all, once, checked before anybody sees it.

A source writes its folder elsewhere; the finished folder is renamed into place, so that a kill leaves the old state. What was
downloaded on the way is kept until then, so that a killed fetch does not download again.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from isoflop.core.errors import UserError, unknown
from isoflop.core.files import put_in_place, sync
from isoflop.core.public import public_root

RECORD = "SOURCE.json"
Say = Callable[[str], None]
Make = Callable[[Path, Path, Say], Mapping[str, Any]]
"""Writes a source into an empty folder; the second folder keeps downloads until the source is in place. Gives what to record of
it: where it came from, hashes, figures of its checks."""


class Unreachable(UserError):
    """An origin cannot be reached, so that the next one may be tried."""


_OLD = "old"
"""Where the version that is being replaced lies meanwhile."""


@dataclass(frozen=True)
class Source:
    """Something that can be fetched.

    Attributes:
        name: as in ``public:NAME``.
        what: one line, with its licence.
        version: names the content; another one is made anew.
        origins: where it may come from, by name, in the order in which they are tried.
    """

    name: str
    what: str
    version: str
    origins: Mapping[str, Make]

    @property
    def folder(self) -> Path:
        """Where it lies once it is fetched."""
        return public_root() / self.name

    def record(self) -> dict[str, Any] | None:
        """What was written down when it was fetched; None while it is not, or is of another version."""
        try:
            stored: dict[str, Any] = json.loads((self.folder / RECORD).read_text())
        except (OSError, ValueError):
            return None
        return stored if stored.get("version") == self.version else None

    def fetch(self, origin: str = "", say: Say = print) -> dict[str, Any]:
        """Fetch it unless it is there; its record.

        Args:
            origin: take this one; empty for whatever is there, or else the first that can be reached.

        Raises:
            UserError: no such origin, none that can be reached, content that is not what was pinned, a check that fails.
        """
        if origin and origin not in self.origins:
            raise unknown("origin", origin, list(self.origins), f"fetch {self.name}")
        with self._alone():
            stored = self.record()
            if stored is not None and origin in ("", stored.get("origin")):
                return stored
            return self._install(origin, say)

    def _install(self, origin: str, say: Say) -> dict[str, Any]:
        problems = []
        for name in [origin] if origin else self.origins:
            work = Path(tempfile.mkdtemp(prefix=f".unfinished-{self.name}-", dir=public_root()))
            try:
                found = {"version": self.version, "origin": name}
                found |= self.origins[name](work, self._downloads, say)
                (work / RECORD).write_text(json.dumps(found, indent=1) + "\n")
                work.chmod(0o755)
                _flush(work)
                self._put(work)
                shutil.rmtree(self._downloads, ignore_errors=True)
                return found
            except Unreachable as error:
                problems.append(str(error))
            finally:
                shutil.rmtree(work, ignore_errors=True)
        raise UserError(f"fetch {self.name}: {'; '.join(problems)}")

    def _put(self, work: Path) -> None:
        """Rename a finished folder into place; one of another version goes out of the way first."""
        if self.folder.exists():
            old = Path(tempfile.mkdtemp(prefix=f".unfinished-{self.name}-", dir=public_root()))
            self.folder.rename(old / _OLD)
            put_in_place(work, self.folder)
            shutil.rmtree(old, ignore_errors=True)
        else:
            put_in_place(work, self.folder)

    @property
    def _downloads(self) -> Path:
        return public_root() / f".downloads-{self.name}"

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """One process at a time; what killed ones have left is removed, or goes back where it was."""
        try:
            public_root().mkdir(parents=True, exist_ok=True)
            lock = open(public_root() / f".lock-{self.name}", "w")  # noqa: SIM115 (held over the yield, closed below)
        except OSError as error:
            raise UserError(f"fetch {self.name}: {public_root()}: {error.strerror or error}") from None
        with lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            for left in public_root().glob(f".unfinished-{self.name}-*"):
                if (left / _OLD).exists() and not self.folder.exists():  # killed while it was being replaced
                    put_in_place(left / _OLD, self.folder)
                shutil.rmtree(left, ignore_errors=True)
            yield


def _flush(folder: Path) -> None:
    """Bring a folder's files to the disk, so that the rename does not outrun them."""
    for path in (p for p in folder.rglob("*") if p.is_file()):
        sync(path)
