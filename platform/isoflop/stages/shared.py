"""Large results of stages in a folder that several hosts see, beside the store: they need not travel through memory."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
import uuid
from pathlib import Path

LARGE_STAGE = 64 * 2**20  # bytes; what is smaller goes through Ray's object store, which is faster for it
_META = "stage.json"
_ABANDONED_SECONDS = 24 * 3600.0


class SharedStages:
    """A folder of finished stages, one folder each, named by content. No locks: they are unreliable on network disks.

    A result appears by a rename, complete; whoever comes second finds it there. A path may exist on two hosts without
    being the same folder, so a driver leaves a mark and asks its workers whether they see it.

    Args:
        root: the folder; created by :meth:`leave_mark`.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)

    def leave_mark(self) -> str:
        """Leave a mark for workers to look for; its name. Removes what killed processes left. Raises OSError."""
        self.root.mkdir(parents=True, exist_ok=True)
        for old in self.root.glob(".*"):
            with contextlib.suppress(OSError):
                if time.time() - old.stat().st_mtime > _ABANDONED_SECONDS:
                    shutil.rmtree(old) if old.is_dir() else old.unlink()
        mark = f".mark-{uuid.uuid4().hex}"
        (self.root / mark).touch()
        return mark

    def sees(self, mark: str) -> bool:
        """Whether this host sees the folder in which ``mark`` was left."""
        return (self.root / mark).is_file()

    def remove_mark(self, mark: str) -> None:
        """Remove a mark."""
        with contextlib.suppress(OSError):
            (self.root / mark).unlink()

    def keys(self) -> set[str]:
        """Keys of the stages that are here."""
        with contextlib.suppress(OSError):
            return {p.parent.name for p in self.root.glob(f"*/{_META}") if not p.parent.name.startswith(".")}
        return set()

    def __contains__(self, key: str) -> bool:
        return (self.folder(key) / _META).is_file()

    def folder(self, key: str) -> Path:
        """Where a stage lies or will lie."""
        return self.root / key

    def publish(self, key: str, source: Path) -> Path:
        """Put a finished stage here unless it is; its folder. Raises OSError, e.g. when the disk is full."""
        target = self.folder(key)
        if key in self:
            return target
        part = Path(tempfile.mkdtemp(prefix=f".{key}-", dir=self.root))
        try:
            shutil.copytree(source, part, dirs_exist_ok=True, copy_function=_copy_durably)
            os.chmod(part, 0o755)
            try:
                os.rename(part, target)
            except OSError:
                if key not in self:
                    raise
        finally:
            shutil.rmtree(part, ignore_errors=True)
        return target


def folder_size(folder: Path) -> int:
    """Bytes of the files below ``folder``."""
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def _copy_durably(source: str, target: str) -> None:
    shutil.copyfile(source, target)
    with open(target, "rb") as file:
        os.fsync(file.fileno())
