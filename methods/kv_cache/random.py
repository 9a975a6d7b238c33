"""Random eviction: the control of every score."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from torch import Tensor

from isoflop.core.knobs import Knob
from isoflop.methods.base import METHODS
from isoflop.methods.kv_cache.chance import uniform
from isoflop.methods.kv_cache.eviction import Eviction
from isoflop.methods.kv_cache.select import count_of
from isoflop.models.hooks.attention import AttentionCall


@METHODS.register("kv-random")
@dataclass(frozen=True)
class KvRandom(Eviction):
    """Each head keeps tokens drawn without replacement, the same for the same prompt."""

    recent: Annotated[float, Knob(low=0.0, high=1.0, doc="share of the budget for the newest tokens")] = 0.0

    def windows(self, kept: int) -> tuple[int, int]:
        """The newest tokens."""
        return 0, count_of(self.recent, kept, least=0)

    def score(self, prompt: AttentionCall) -> Tensor:
        """Random numbers."""
        return uniform(prompt, "kv-random")
