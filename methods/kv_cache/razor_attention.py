"""RazorAttention: a full cache for the heads that retrieve, little and a summary for the others (arXiv 2407.15891).

The paper's authors released no code; an implementation by their company exists (mindspore golden-stick), whose summary lacks the
count of what it stands for (``compensation: plain``).

Shape suffixes: B batch, G key-value heads, T tokens, N tokens of a segment, D head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Self

import torch
from torch import Tensor

from isoflop.core.knobs import Knob
from isoflop.core.stage import Stage, StageContext
from isoflop.methods.base import METHODS, Axes, Method
from isoflop.methods.calibration import OnModel
from isoflop.methods.kv_cache.base import KvCacheMethod, empty_recent, key_positions, whole_prompt
from isoflop.methods.kv_cache.retrieval_heads import HeadScores, head_scores, stage_of
from isoflop.methods.kv_cache.select import candidates, count_of, lengths, protect, select
from isoflop.models.base import Model, ModelInfo
from isoflop.models.hooks.attention import AttentionCall
from isoflop.models.segments import DenseSegment, LayerStore, Segment

COUNTED, PLAIN, NONE = "count-weighted", "plain", "none"


@METHODS.register("razor-attention")
@dataclass(frozen=True)
class RazorAttention(KvCacheMethod):
    """Few heads look far back; they keep everything. Of all others the first and newest tokens stay, and one that stands for the rest.

    Heads are found once per model on random tokens that repeat: the shares ``induction`` and ``echo`` of all key-value heads with
    the most attention to what followed a token's earlier copies, and to the copies. The summary is the mean of the dropped keys
    and of the dropped values, and weighs as much as their number: log N_d is added to its logit (equation 6). New tokens are kept by
    all heads. The paper keeps at least 4,000 newest tokens, on prompts of tens of thousands.
    """

    paper: ClassVar[str] = "arXiv 2407.15891"

    buffer: Annotated[float, Knob(low=0.0, high=1.0, ratio=True, doc="share of the prompt that heads which do not retrieve keep of its end; the paper's 1/C")] = 0.2  # fmt: skip
    least: Annotated[int, Knob(low=0, high=1_000_000, unit="tokens", doc="newest tokens that these heads keep at least; the paper's S0")] = 16  # fmt: skip
    sinks: Annotated[int, Knob(low=0, high=1024, unit="tokens", doc="first tokens that they keep")] = 4
    induction: Annotated[float, Knob(low=0.0, high=1.0, doc="share of all key-value heads that retrieve by induction")] = 0.14  # fmt: skip
    echo: Annotated[float, Knob(low=0.0, high=1.0, doc="share of all key-value heads that retrieve by echo")] = 0.01
    compensation: Annotated[str, Knob(choices=(COUNTED, PLAIN, NONE), doc="what stands for dropped tokens: their means with the weight of their number, the means as one token, nothing")] = COUNTED  # fmt: skip
    search_tokens: Annotated[int, Knob(low=2, high=100_000, log=True, unit="tokens", doc="random tokens of one repeat in the search for heads, as far as the model reads so many")] = 2500  # fmt: skip
    repeats: Annotated[int, Knob(low=2, high=16, doc="repeats in the search")] = 4

    @classmethod
    def identity(cls, info: ModelInfo) -> Self:
        """Every head keeps everything."""
        return cls(induction=1.0)

    def axes(self, info: ModelInfo) -> Axes:
        """1 over the share of the cache that is kept, first tokens, summaries and overlap of the two kinds of heads left out."""
        full = min(1.0, self.induction + self.echo)
        kept = full + (1 - full) * self.buffer
        return Axes(ratio=1 / kept if kept else None)

    def prepare(
        self, info: ModelInfo, weights: Stage | None, seed: int, trained_with: tuple[Method, ...] = ()
    ) -> Stage | None:
        """The scores of the heads; one search serves all shares."""
        self.check(info)
        return stage_of(OnModel.source(info, weights, seed, trained_with), self.search_tokens, self.repeats)

    def calibrate(self, model: Model, ctx: StageContext, seed: int) -> HeadScores:
        """What the stage computes, on a loaded model."""
        return head_scores(model, self.search_tokens, self.repeats, seed)

    def compress(self, prompt: AttentionCall, prepared: Any) -> LayerStore:
        """A whole segment for the heads that retrieve, and a short one for the others."""
        if not isinstance(prepared, HeadScores):
            raise ValueError("method razor-attention searches heads: apply() needs the value of its prepare() stage")
        full_G = prepared.retrieval(self.echo, self.induction)[prompt.layer].to(prompt.k_BGTD.device)
        whole = whole_prompt(prompt)
        segments: list[Segment] = []
        if bool(full_G.any()):
            segments.append(whole if bool(full_G.all()) else whole.of_heads(full_G))
        if not bool(full_G.all()):
            some = bool(full_G.any())
            segments += [segment.of_heads(~full_G) if some else segment for segment in self._short(prompt)]
        return LayerStore(segments, empty_recent(prompt))

    def _short(self, prompt: AttentionCall) -> list[DenseSegment]:
        """First and newest tokens, and what stands for the others, as if of all heads."""
        seen = lengths(prompt)
        recent = [min(n, max(self.least, count_of(self.buffer, n, least=0))) for n in seen]
        counts = [min(n, r + self.sinks) for n, r in zip(seen, recent, strict=True)]
        nothing_BGT = torch.zeros_like(prompt.k_BGTD[..., 0], dtype=torch.float32)
        sinks = [count - r for count, r in zip(counts, recent, strict=True)]
        scores_BGT = protect(nothing_BGT, key_positions(prompt), seen, sinks, recent)
        kept = select(scores_BGT, counts, candidates(prompt))
        whole = whole_prompt(prompt)
        stays = whole.taken(kept.index_BGM, kept.bias(whole.k_BGND.dtype))
        if self.compensation == NONE:
            return [stays]
        gone_BGT = ~kept.mask(nothing_BGT.shape[-1])
        if (real_B1T := candidates(prompt)) is not None:
            gone_BGT = gone_BGT & real_B1T
        return [summary(whole, gone_BGT, self.compensation == COUNTED), stays]


def summary(whole: DenseSegment, gone_BGN: Tensor, counted: bool) -> DenseSegment:
    """One entry per head with the means of the keys and values of ``gone_BGN``; empty where there are none."""
    count_BG1 = gone_BGN.sum(-1, keepdim=True)
    k_BG1D, v_BG1D = (
        ((x.float() * gone_BGN[..., None]).sum(2, keepdim=True) / count_BG1.clamp(min=1)[..., None]).to(x.dtype)
        for x in (whole.k_BGND, whole.v_BGND)
    )
    bias_BG1 = count_BG1.float().log() if counted else torch.where(count_BG1 > 0, 0.0, float("-inf"))
    return DenseSegment(torch.zeros_like(whole.positions_BGN[:, :, :1]), bias_BG1, k_BG1D, v_BG1D)
