"""The cache of stages of one worker: folders on disk, named by content, and loaded values in memory."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import shutil
import sys
import tempfile
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from isoflop.core.errors import Infeasible
from isoflop.core.files import put_in_place, sync
from isoflop.core.public import default_cache_dir
from isoflop.core.stage import Stage

log = logging.getLogger(__name__)
_META = "stage.json"


class StageCache:
    """A :class:`isoflop.core.stage.StageContext` that keeps results.

    On disk a stage is complete or absent: it is written elsewhere, flushed, and renamed into place. A lock per stage
    keeps two processes of one host from computing the same thing; between hosts the driver sees to that.

    Args:
        root: folder for results; created when missing.
        device: torch device of this worker, or several.
        keep: how many loaded values stay in memory (least recently used go first).
    """

    def __init__(self, root: str | Path | None = None, device: str | Sequence[str] = "cpu", keep: int = 64) -> None:
        self.root = Path(root or default_cache_dir()).expanduser().absolute() / "stages"
        self._devices = (device,) if isinstance(device, str) else tuple(device)
        self._keep = keep
        self._values: OrderedDict[str, Any] = OrderedDict()
        self.computed: list[tuple[str, float]] = []

    @property
    def device(self) -> str:
        """The torch device of this worker; the first of several."""
        return self._devices[0]

    @property
    def devices(self) -> tuple[str, ...]:
        """All torch devices of this worker."""
        return self._devices

    def get(self, stage: Stage) -> Any:
        """The loaded value; computed and stored first when this host has it not yet."""
        if stage.key in self._values:
            self._values.move_to_end(stage.key)
            return self._values[stage.key]
        self.ensure(stage)
        try:
            value = stage.load(self, self.folder(stage))
        except Exception as error:
            if isinstance(error, (MemoryError, Infeasible)) or type(error).__name__ == "OutOfMemoryError":
                raise  # says nothing about the files
            # damaged on disk: set it aside, compute it once more
            log.warning("stage %s could not be loaded (%s); computing it again", stage.key, error)
            self._set_aside(stage)
            self.ensure(stage)
            value = stage.load(self, self.folder(stage))
        self._values[stage.key] = value
        while len(self._values) > self._keep:
            self._values.popitem(last=False)
        return value

    def scratch(self, stage: Stage) -> Path:
        """A folder beside those of the stages, removed when the stage is installed."""
        folder = self._work(stage)
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def has(self, stage: Stage) -> bool:
        """Whether the result lies on this host's disk."""
        return (self.folder(stage) / _META).is_file()

    def folder(self, stage: Stage) -> Path:
        """Where the result lies or will lie."""
        return self.root / stage.key

    def ensure(self, stage: Stage) -> float:
        """Compute the stage unless it is on disk; the seconds that took (0 when it was there)."""
        if self.has(stage):
            return 0.0
        for dep in stage.deps():
            self.ensure(dep)
        with self._lock(stage):
            if self.has(stage):  # another process was faster
                return 0.0
            started = time.monotonic()
            part = self._part(stage)
            try:
                stage.compute(self, part)
                seconds = time.monotonic() - started
                meta = {
                    "key": stage.key,
                    "spec": stage.spec(),
                    "seconds": round(seconds, 3),
                    "python": sys.version.split()[0],
                }
                (part / _META).write_text(json.dumps(meta, indent=1))
                self._install(part, self.folder(stage))
                shutil.rmtree(self._work(stage), ignore_errors=True)
            except BaseException:
                shutil.rmtree(part, ignore_errors=True)
                raise
            self.computed.append((stage.key, seconds))
            return seconds

    def files(self, stage: Stage) -> dict[str, bytes]:
        """The result as files, for another host."""
        folder = self.folder(stage)
        return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}

    def size(self, stage: Stage) -> int:
        """Bytes on disk."""
        return sum(p.stat().st_size for p in self.folder(stage).rglob("*") if p.is_file())

    def install(self, stage: Stage, files: dict[str, bytes] | Path) -> None:
        """Store a result that was computed on another host: its files, or a folder that holds them."""
        with self._lock(stage):
            if self.has(stage):
                return
            part = self._part(stage)
            if isinstance(files, Path):
                shutil.copytree(files, part, dirs_exist_ok=True, copy_function=shutil.copyfile)
            else:
                for name, content in files.items():
                    target = part / name
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(content)
            self._install(part, self.folder(stage))

    def keys(self) -> set[str]:
        """Keys of the stages whose results lie on this host's disk."""
        if not self.root.is_dir():
            return set()
        return {p.name for p in self.root.iterdir() if not p.name.startswith(".") and (p / _META).is_file()}

    def loaded(self) -> list[str]:
        """Keys of the values in memory, least recently used first."""
        return list(self._values)

    def _work(self, stage: Stage) -> Path:
        return self.root / f".work-{stage.key}"

    def _part(self, stage: Stage) -> Path:
        """An empty folder to write into; call it under the lock: what a killed process left of this stage is removed."""
        for old in self.root.glob(f".{stage.key}-*"):
            shutil.rmtree(old, ignore_errors=True)
        return Path(tempfile.mkdtemp(prefix=f".{stage.key}-", dir=self.root))

    def _install(self, part: Path, target: Path) -> None:
        for path in part.rglob("*"):
            if path.is_file():
                sync(path)
        os.chmod(part, 0o755)
        if target.exists():  # incomplete, or we would not be here under the lock
            self._move_away(target)
        put_in_place(part, target)

    def _set_aside(self, stage: Stage) -> None:
        self._values.pop(stage.key, None)
        self._move_away(self.folder(stage))

    def _move_away(self, folder: Path) -> None:
        with contextlib.suppress(OSError):
            os.rename(folder, self.root / f".damaged-{folder.name}-{time.time_ns()}")

    @contextlib.contextmanager
    def _lock(self, stage: Stage) -> Iterator[None]:
        self.root.mkdir(parents=True, exist_ok=True)
        with (self.root / f".{stage.key}.lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
