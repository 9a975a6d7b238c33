"""The task ``kv-recall``: look values up in a cache of key-value pairs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np

from isoflop.core.errors import Infeasible
from isoflop.core.knobs import Knob
from isoflop.models.base import ModelInfo
from isoflop.models.lm import LmBatch
from isoflop.models.worlds import recall_world as world
from isoflop.tasks.base import TASKS
from isoflop.tasks.symbols import SymbolTask


@TASKS.register("kv-recall")
@dataclass(frozen=True)
class KvRecall(SymbolTask):
    """``BOS k v k v … SEP``, then asked keys, each answered by its value; an example's error is its share of wrong values.

    ``query: blind`` compresses the cache before a key is asked, so that every pair is as likely to be needed; a method
    that drops tokens loses what it drops. ``query: aware`` names the asked keys inside the prompt, in another order, so
    that a method may find out what will be needed. The chance error is 62/63; models of the family ``tiny-lm`` answer
    without error up to the number of pairs that they were trained on.
    """

    version: ClassVar[str] = "1"
    chance: ClassVar[float] = 1.0 - 1.0 / world.VALUES

    pairs: Annotated[int, Knob(low=1, high=world.KEYS, doc="key-value pairs in the prompt")] = 24
    asked: Annotated[int, Knob(low=1, high=world.KEYS, doc="pairs that are asked")] = 8
    filler: Annotated[int, Knob(low=0, high=512, doc="tokens between the pairs and the questions", unit="tokens")] = 0

    def check(self, info: ModelInfo) -> None:
        """Not more questions than pairs."""
        super().check(info)
        if self.asked > self.pairs:
            raise Infeasible(
                f"task {self.name}: asked = {self.asked} exceeds pairs = {self.pairs}; allowed: 1 … {self.pairs}"
            )

    def tokens_needed(self) -> int:
        """BOS, pairs, filler, SEP, names of the asked keys and SEP, questions with answers."""
        named = self.asked + 1 if self.query == "aware" else 0
        return 2 + 2 * self.pairs + self.filler + named + 2 * self.asked

    def prompt_length(self, info: ModelInfo) -> int:
        """All but the questions with answers."""
        return self.tokens_needed() - 2 * self.asked

    def draw(self, rng: np.random.Generator, rows: int) -> LmBatch:
        """Sequences of the raw vocabulary."""
        return world.recalling(rng, rows, self.pairs, self.asked, self.filler, announced=self.query == "aware")
