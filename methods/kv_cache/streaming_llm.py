"""StreamingLLM: attention sinks and the newest tokens (arXiv 2309.17453).

Shape suffixes: B batch, T tokens, N candidates, G key-value heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from isoflop.core.knobs import Knob
from isoflop.methods.base import METHODS
from isoflop.methods.kv_cache.eviction import Rolling
from isoflop.models.hooks.attention import AttentionCall


@METHODS.register("streaming-llm")
@dataclass(frozen=True)
class StreamingLLM(Rolling):
    """The first tokens and the newest ones fill the budget.

    Keys keep the rotation of their own positions; the paper numbers the survivors anew, to go beyond the trained length.
    """

    paper: ClassVar[str] = "arXiv 2309.17453"

    sinks: Annotated[
        int, Knob(low=0, high=64, unit="tokens", doc="first tokens that always stay; the newest one goes first")
    ] = 4

    @property
    def remembers(self) -> bool:
        """There are no scores."""
        return False

    def windows(self, kept: int) -> tuple[int, int]:
        """Everything is protected: sinks, and the newest for the rest."""
        sinks = min(self.sinks, kept - 1)
        return sinks, kept - sinks

    def score(self, prompt: AttentionCall) -> Tensor:
        """Zeros, (B, 1, T)."""
        return torch.zeros(prompt.k_BGTD.shape[0], 1, prompt.k_BGTD.shape[2], device=prompt.k_BGTD.device)

    def update(self, scores_BGN: Tensor, received_BGN: Tensor) -> Tensor:
        """Zeros."""
        return scores_BGN
