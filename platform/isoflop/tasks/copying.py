"""The task ``kv-copy``: repeat a segment from the cache."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import numpy as np

from isoflop.core.errors import Infeasible
from isoflop.core.knobs import Knob
from isoflop.models.base import ModelInfo
from isoflop.models.lm import LmBatch
from isoflop.models.worlds import recall_world as world
from isoflop.tasks.base import TASKS
from isoflop.tasks.symbols import SymbolTask


@TASKS.register("kv-copy")
@dataclass(frozen=True)
class KvCopy(SymbolTask):
    """``BOS segment gap segment``: an example's error is the share of wrong symbols in the repetition.

    All symbols of a segment are different. The first ``cue`` symbols of the repetition are given, and scoring starts
    behind the next one; with ``query: blind`` the cache is compressed before the cue, with ``query: aware`` behind it.
    The chance error is 125/126.
    """

    version: ClassVar[str] = "1"
    chance: ClassVar[float] = 1.0 - 1.0 / world.SYMBOLS

    length: Annotated[int, Knob(low=4, high=world.SYMBOLS, doc="symbols of the segment", unit="tokens")] = 48
    gap: Annotated[
        int, Knob(low=0, high=world.SYMBOLS, doc="symbols between segment and repetition", unit="tokens")
    ] = 0
    cue: Annotated[int, Knob(low=1, high=world.SYMBOLS, doc="given symbols of the repetition", unit="tokens")] = 4

    def check(self, info: ModelInfo) -> None:
        """Enough different symbols, and something left to score."""
        super().check(info)
        if self.length + self.gap > world.SYMBOLS:
            raise Infeasible(
                f"task {self.name}: length + gap = {self.length + self.gap} exceeds the {world.SYMBOLS} symbols of the vocabulary"
            )
        if self.cue > self.length - 2:
            raise Infeasible(
                f"task {self.name}: cue = {self.cue} leaves nothing of length = {self.length} to score; allowed: 1 … {self.length - 2}"
            )

    def tokens_needed(self) -> int:
        """BOS, the segment twice, the gap."""
        return 1 + 2 * self.length + self.gap

    def prompt_length(self, info: ModelInfo) -> int:
        """All but the repetition, of which the cue belongs to the prompt where what is asked is known."""
        return self.tokens_needed() - self.length + (self.cue if self.query == "aware" else 0)

    def draw(self, rng: np.random.Generator, rows: int) -> LmBatch:
        """Sequences of the raw vocabulary."""
        batch = world.copying(rng, rows, self.length, self.gap, self.cue)
        return replace(batch, prefix=batch.prefix + self.cue) if self.query == "aware" else batch
