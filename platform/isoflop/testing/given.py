"""A stage cache some of whose values are given instead of computed: an untrained tower, a few made-up documents."""

from __future__ import annotations

from collections.abc import Mapping
from tempfile import mkdtemp
from typing import Any

import numpy as np

from isoflop.core.folder_context import FolderContext, remove_with
from isoflop.core.stage import Stage

SENTENCE = "it's the other weather whether they're there or where others were same thing then who is new to old ways"


class GivenContext(FolderContext):
    """Stages of some kinds have the values that are given, for everybody who asks; the others are computed as ever.

    Args:
        given: values by ``Stage.kind``.
    """

    def __init__(self, given: Mapping[str, Any]) -> None:
        super().__init__(mkdtemp(prefix="isoflop-probe-"))
        remove_with(self, self.root)
        self._given = dict(given)

    def get(self, stage: Stage) -> Any:
        """The given value, or that of the stage."""
        return self._given[stage.kind] if stage.kind in self._given else super().get(stage)


def made_up_documents(documents: int = 12, words: int = 60, seed: int = 0) -> dict[str, dict[str, str]]:
    """Texts of frequent words by split and name, in place of the corpus that differs between Python releases."""
    rng = np.random.default_rng(seed)
    return {
        split: {f"{split}-{number}": " ".join(rng.choice(SENTENCE.split(), words)) for number in range(documents)}
        for split in ("train", "test")
    }
