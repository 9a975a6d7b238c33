"""Ada-KV: the heads of a layer share its budget by what they look at (arXiv 2407.11550).

Shape suffixes: B batch, G key-value heads, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from isoflop.core.knobs import Knob
from isoflop.methods.base import METHODS
from isoflop.methods.kv_cache.base import empty_recent, key_positions
from isoflop.methods.kv_cache.eviction import Eviction
from isoflop.methods.kv_cache.head_budgets import AT_LEAST, OFFICIAL, SHARED, adaptive
from isoflop.methods.kv_cache.pyramidkv import PyramidKV
from isoflop.methods.kv_cache.select import lengths
from isoflop.methods.kv_cache.snapkv import KERNELS
from isoflop.models.hooks.attention import AttentionCall
from isoflop.models.ragged import RaggedSegment
from isoflop.models.segments import LayerStore

if TYPE_CHECKING:
    from isoflop.methods.kv_cache.probe import KvCacheProbe

SNAPKV, PYRAMID = "snapkv", "pyramidkv"


@METHODS.register("ada-kv")
@dataclass(frozen=True)
class AdaKV(PyramidKV):
    """The best tokens of a layer stay, whichever heads they are of, so that heads which look at many places keep many.

    Each head keeps the observation window. Of the rest of the layer's budget a head gets ``floor`` times the mean, and of one choice
    over the scores of all heads the other part (algorithm 1 with the safeguard). Scores are SnapKV's, with the highest of ``kernel``
    neighbours instead of their mean, and summed over the query heads of a key-value head. Heads are stored at their own lengths. The
    default window is half the paper's 32, as SnapKV's is here.

    ``base: pyramidkv`` gives lower layers larger budgets first (Ada-Pyramid). ``shares`` are the paper's, which sum to the budget;
    ``official``, rounded head by head as in the released code, and off by up to half a token a head; ``at-least``, kvpress's: the
    best ``floor`` of each head's budget, window included, are safe, and all others compete.
    """

    paper: ClassVar[str] = "arXiv 2407.11550"
    even: ClassVar[bool] = False

    kernel: Annotated[int, Knob(choices=KERNELS, unit="tokens", doc="neighbours that scores are taken over; odd, for a middle")] = 7  # fmt: skip
    floor: Annotated[float, Knob(low=0.0, high=1.0, doc="share of the budget that every head has; 1 is SnapKV's, alike for all")] = 0.2  # fmt: skip
    shares: Annotated[str, Knob(choices=(SHARED, OFFICIAL, AT_LEAST), doc="how the floor is kept, and budgets become whole numbers")] = SHARED  # fmt: skip
    pooling: Annotated[str, Knob(choices=("max", "mean"), doc="what is taken of neighbouring scores")] = "max"
    base: Annotated[str, Knob(choices=(SNAPKV, PYRAMID), doc="budgets of the layers: alike, or PyramidKV's")] = SNAPKV

    @classmethod
    def probe(cls) -> KvCacheProbe:
        """``beta`` is of pyramids."""
        from isoflop.methods.kv_cache.probe import KvCacheProbe

        pyramids = [{"base": PYRAMID, "window": 2, "beta": beta} for beta in (1, 20)]
        return KvCacheProbe(layers=2, tried={"beta": pyramids})

    def counts(self, layer: int, seen: list[int], prepared: Any) -> list[int]:
        """Means of this layer, row by row."""
        return (
            Eviction.counts(self, layer, seen, prepared)
            if self.base == SNAPKV
            else super().counts(layer, seen, prepared)
        )

    def smoothed(self, votes_BGT: Tensor) -> Tensor:
        """The highest of the neighbours, or their mean."""
        if self.pooling == "mean":
            return super().smoothed(votes_BGT)
        return F.max_pool1d(votes_BGT, self.kernel, stride=1, padding=self.kernel // 2)

    def compress(self, prompt: AttentionCall, prepared: Any) -> LayerStore:
        """One segment, of each head as long as it comes out."""
        counts = self.counts(prompt.layer, lengths(prompt), prepared)
        kept_BGT = self.kept(self.score(prompt), prompt, counts)
        tensors = key_positions(prompt), prompt.k_BGTD, prompt.v_BGTD
        return LayerStore([RaggedSegment.kept(kept_BGT, *tensors)], empty_recent(prompt))

    def kept(self, scores_BGT: Tensor, prompt: AttentionCall, counts: list[int]) -> Tensor:
        """True at tokens that stay, (B, G, T): ``counts[b]`` per head on average."""
        recent = [self.windows(count)[1] for count in counts]
        border_B11 = torch.tensor(
            [n - r for n, r in zip(lengths(prompt), recent, strict=True)], device=scores_BGT.device
        )
        newest_BGT = key_positions(prompt) >= border_B11[:, None, None]
        padding_BGT = torch.zeros_like(newest_BGT)
        if prompt.valid_BT is not None:
            padding_BGT = ~prompt.valid_BT[:, None].expand_as(newest_BGT)
        if self.shares == AT_LEAST:
            scores_BGT = scores_BGT.masked_fill(newest_BGT, torch.inf).masked_fill(padding_BGT, -torch.inf)
            return adaptive(scores_BGT, counts, self.floor, self.shares)
        scores_BGT = scores_BGT.masked_fill(newest_BGT | padding_BGT, -torch.inf)
        rest = [count - r for count, r in zip(counts, recent, strict=True)]
        return adaptive(scores_BGT, rest, self.floor, self.shares) | (newest_BGT & ~padding_BGT)
