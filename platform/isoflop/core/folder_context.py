"""A small stage cache in one folder, for tests and notebooks: no locks, one process."""

from __future__ import annotations

import shutil
import weakref
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from isoflop.core.stage import Stage


class FolderContext:
    """A ``StageContext`` that computes each stage once into ``root`` and keeps its value in memory.

    Args:
        root: where stage folders go; reused when it holds some already.
        devices: the torch devices handed to stages and models, the first one first.
    """

    def __init__(self, root: Path | str, *devices: str) -> None:
        self.root = Path(root)
        self._devices = devices or ("cpu",)
        self._values: dict[str, Any] = {}

    @classmethod
    def temporary(cls) -> FolderContext:
        """One in a folder of its own, which goes with it, at the latest when the process ends."""
        context = cls(mkdtemp(prefix="isoflop-probe-"))
        remove_with(context, context.root)
        return context

    @property
    def device(self) -> str:
        """The torch device of this worker."""
        return self._devices[0]

    @property
    def devices(self) -> tuple[str, ...]:
        """All of them."""
        return self._devices

    def get(self, stage: Stage) -> Any:
        """The loaded value of ``stage``, computed first when its folder is missing."""
        if stage.key not in self._values:
            folder = self.root / stage.key
            if not folder.exists():
                self._compute(stage, folder)
            self._values[stage.key] = stage.load(self, folder)
        return self._values[stage.key]

    def scratch(self, stage: Stage) -> Path:
        """A folder beside those of the stages."""
        folder = self.root / f".work-{stage.key}"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _compute(self, stage: Stage, folder: Path) -> None:
        for dep in stage.deps():
            self.get(dep)
        self.root.mkdir(parents=True, exist_ok=True)
        unfinished = Path(mkdtemp(prefix="unfinished-", dir=self.root))
        stage.compute(self, unfinished)
        try:
            unfinished.rename(folder)
        except OSError:  # another process was faster
            shutil.rmtree(unfinished)
        shutil.rmtree(self.root / f".work-{stage.key}", ignore_errors=True)


def remove_with(owner: object, folder: Path) -> None:
    """Remove a folder when nobody holds ``owner`` any more, at the latest when the process ends."""
    weakref.finalize(owner, shutil.rmtree, folder, ignore_errors=True)
