"""SnapKV: what the end of the prompt looks at (arXiv 2404.14469).

Shape suffixes: B batch, G key-value heads, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from isoflop.core.knobs import Knob
from isoflop.methods.base import METHODS
from isoflop.methods.kv_cache.eviction import Eviction
from isoflop.methods.kv_cache.scores import attention_scores, window
from isoflop.models.hooks.attention import AttentionCall

KERNELS = tuple(range(1, 64, 2))


@METHODS.register("snapkv")
@dataclass(frozen=True)
class SnapKV(Eviction):
    """The observation window at the end of the prompt stays; it votes on the earlier tokens, smoothed over neighbours.

    Sums of the window's attention to the tokens before it are averaged over ``kernel`` neighbours (beyond the ends count
    zeros), so that tokens stay in runs. Nothing is evicted while decoding. A window that is no smaller than the budget
    leaves no votes: only the newest tokens stay. The default is a quarter of the released code's 64, which is meant for
    prompts of thousands of tokens and would be the whole budget in those of tens or hundreds.
    """

    paper: ClassVar[str] = "arXiv 2404.14469"

    window: Annotated[int, Knob(low=1, high=1024, unit="tokens", doc="observation window at the prompt's end")] = 16
    kernel: Annotated[
        int, Knob(choices=KERNELS, unit="tokens", doc="neighbours that scores are averaged over; odd, for a middle")
    ] = 5

    def windows(self, kept: int) -> tuple[int, int]:
        """The observation window, or as much of it as the budget holds."""
        return 0, min(self.window, kept)

    def score(self, prompt: AttentionCall) -> Tensor:
        """Smoothed votes, (B, G, T)."""
        votes_BGT = attention_scores(prompt, window(prompt, self.window))
        before_T = torch.arange(votes_BGT.shape[-1], device=votes_BGT.device) < votes_BGT.shape[-1] - self.window
        return self.smoothed(votes_BGT * before_T)

    def smoothed(self, votes_BGT: Tensor) -> Tensor:
        """Over neighbours."""
        return F.avg_pool1d(votes_BGT, self.kernel, stride=1, padding=self.kernel // 2)
