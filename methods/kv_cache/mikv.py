"""MiKV: what eviction would drop is kept at low precision (arXiv 2402.18096).

No code was released; the equations are the paper's.

Shape suffixes: B batch, G key-value heads, H query heads, T tokens, N tokens of a tier, D head width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Self

import torch
from torch import Tensor

from isoflop.core.errors import Infeasible
from isoflop.core.knobs import Knob
from isoflop.core.stage import StageContext
from isoflop.kernels.quant import FP16_MAX
from isoflop.methods.base import METHODS, Axes
from isoflop.methods.kv_cache.base import KvCacheMethod, empty_recent, key_positions, padding_bias
from isoflop.methods.kv_cache.quantised import EXACT
from isoflop.methods.kv_cache.scores import attention_scores, forgetting, over_group, real
from isoflop.methods.kv_cache.select import candidates, count_of, lengths, protect, split
from isoflop.methods.kv_cache.token_tiers import Tier, TokenCodec, exact, taken
from isoflop.models.base import Model, ModelInfo
from isoflop.models.hooks.attention import AttentionCall
from isoflop.models.segments import DenseSegment, LayerStore, attend_segments


@METHODS.register("mikv")
@dataclass(frozen=True)
class MiKV(KvCacheMethod):
    """Important tokens at high precision, all others at low precision instead of nowhere.

    Importance is H2O's: half of the important tokens are the newest, half those with the largest sums of attention. While
    tokens are generated, each new one is important, and the least important that is not new is encoded anew at ``bits_lo``,
    once and for all, after it has been attended to. Keys that are quantised are multiplied by a balancer per channel first,
    the root of the largest |query| over the largest |key| of the prompt, which evens out outliers and whose inverse the queries
    carry. ``bits_lo: 0`` evicts instead, and is H2O.
    """

    paper: ClassVar[str] = "arXiv 2402.18096"

    importance: Annotated[float, Knob(low=0.0, high=1.0, ratio=True, doc="share of the tokens at bits_hi")] = 0.2
    bits_hi: Annotated[int, Knob(choices=(4, 8, 16), unit="bits", doc="of important tokens; 16 keeps them as they are")] = 16  # fmt: skip
    bits_lo: Annotated[int, Knob(choices=(0, 2, 3, 4, 8, 16), unit="bits", doc="of all others; 0 evicts them")] = 2
    group: Annotated[int, Knob(low=0, high=1024, unit="values", doc="channels that share a grid; 0: half of a head, which RoPE does not mix with the other half")] = 0  # fmt: skip
    balancer: Annotated[bool, Knob(doc="even out the channels of quantised keys")] = True
    recent: Annotated[float, Knob(low=0.0, high=1.0, doc="share of the important tokens that are the newest")] = 0.5
    budget: Annotated[str, Knob(choices=("fraction", "fixed"), doc="important tokens while decoding: their share of all, or their number in the prompt")] = "fraction"  # fmt: skip

    @classmethod
    def identity(cls, info: ModelInfo) -> Self:
        """All tokens important, and kept as they are."""
        return cls(importance=1.0, bits_hi=EXACT)

    def axes(self, info: ModelInfo) -> Axes:
        """Bits per element of the tiers by their shares, grids left out."""
        bits = self.importance * self.bits_hi + (1 - self.importance) * self.bits_lo
        return Axes(bits=bits, ratio=info.dense_bits / bits if bits else math.inf)

    def check(self, info: ModelInfo) -> None:
        """Refuse tiers in the wrong order, and a cache of nothing."""
        super().check(info)
        if self.bits_lo > self.bits_hi:
            raise Infeasible(f"method mikv: bits_lo = {self.bits_lo} exceeds bits_hi = {self.bits_hi}; lower bits_lo")
        if not self.bits_lo and not self.importance:
            raise Infeasible("method mikv: importance = 0 with bits_lo = 0 keeps nothing; raise one of them")

    def compress(self, prompt: AttentionCall, prepared: Any) -> LayerStore:
        """Both tiers of the prompt."""
        seen = lengths(prompt)
        important = [self._important(n) for n in seen]
        scores_BGT = attention_scores(prompt, forgetting(prompt, 1.0))
        protected_BGT = protect(scores_BGT, key_positions(prompt), seen, [0] * len(seen), self._newest(important))
        best, others = split(protected_BGT, important, seen, candidates(prompt))
        whole = DenseSegment(key_positions(prompt), padding_bias(prompt), prompt.k_BGTD, prompt.v_BGTD)
        scale_BGD = balancer(prompt) if self.balancer else None
        width = prompt.k_BGTD.shape[-1]
        hi, lo = (Tier(self._codec(bits, width, scale_BGD)) for bits in (self.bits_hi, self.bits_lo))
        hi.append(exact(taken(whole, best)))
        if self.bits_lo:
            lo.append(exact(taken(whole, others)))
        store = LayerStore([], empty_recent(prompt))
        store.state = {"hi": hi, "lo": lo, "seen": seen, "prompt": important, "held": important}
        self._keep(store, best.take(scores_BGT).float())
        return store

    def stride(self, store: LayerStore) -> int | None:
        """Importance changes with every token."""
        return 1

    def step(self, query: AttentionCall, store: LayerStore, prepared: Any) -> Tensor:
        """Attend, add what was received to the scores, and demote."""
        hi: Tier = store.state["hi"]
        new = store.recent
        new = DenseSegment(new.positions_BGN, padding_bias(query), new.k_BGND, new.v_BGND)
        out_B1HD, p_BH1N = attend_segments(query.q_BHTD, [*store.segments, new], query.softmax, query.order_BT)
        if query.valid_BT is not None:  # a padding query may see nothing at all
            out_B1HD, p_BH1N = out_B1HD.nan_to_num(), p_BH1N.nan_to_num()
        received_BGN = over_group(p_BH1N[:, :, 0, -(hi.tokens + 1) :], query.k_BGTD.shape[1])
        scores_BGN = torch.nn.functional.pad(store.state["scores"], (0, 1)) + received_BGN
        hi.append(new)
        store.recent = empty_recent(query)
        self._keep(store, self._demoted(query, store, scores_BGN))
        return out_B1HD

    def _demoted(self, query: AttentionCall, store: LayerStore, scores_BGN: Tensor) -> Tensor:
        """Move what is over the budgets to the other tier; the scores of what stays."""
        hi, lo = store.state["hi"], store.state["lo"]
        rows = query.q_BHTD.shape[0]
        fresh = [1] * rows if query.valid_BT is None else query.valid_BT[:, 0].long().tolist()
        seen, total = ([n + f for n, f in zip(store.state[name], fresh, strict=True)] for name in ("seen", "held"))
        budgets = [self._important(n) for n in seen] if self.budget == "fraction" else store.state["prompt"]
        held = [min(pair) for pair in zip(total, budgets, strict=True)]
        store.state |= {"seen": seen, "held": held}
        live_BGN = None if hi.segment.log_bias_BGN is None else hi.segment.log_bias_BGN == 0
        if held == total and live_BGN is None:
            return scores_BGN
        protected_BGN = protect(scores_BGN, hi.segment.positions_BGN, seen, [0] * rows, self._newest(held))
        stay, leave = split(protected_BGN, held, total, live_BGN)
        if leave.index_BGM.shape[-1] and self.bits_lo:
            lo.append(exact(taken(hi.segment, leave)))
        hi.keep(stay)
        return stay.take(scores_BGN)

    def _keep(self, store: LayerStore, scores_BGN: Tensor) -> None:
        """The tiers as segments, and the scores of the important tokens."""
        scores_BGN = scores_BGN.contiguous()
        store.state["scores"] = scores_BGN
        store.segments = [tier.segment for tier in (store.state["lo"], store.state["hi"]) if tier.segment is not None]
        # seen as integers, so that they count their 4 bytes also where float32 stands for 16 bits
        store.extra = [scores_BGN.view(torch.int32)]

    def _important(self, seen: int) -> int:
        """The whole number of tokens in the share; one at least where nothing else would be kept."""
        return min(seen, max(math.floor(self.importance * seen + 1e-9), 0 if self.bits_lo else 1))

    def _newest(self, important: list[int]) -> list[int]:
        return [count_of(self.recent, n, least=0) for n in important]

    def _codec(self, bits: int, width: int, scale_BGD: Tensor | None) -> TokenCodec:
        return TokenCodec(bits, self.group or max(1, width // 2), scale_BGD)

    def footprint(self, model: Model, ctx: StageContext) -> dict[str, float]:
        """Also ``bits``: per element of the prompt's cache, overhead included."""
        costs = super().footprint(model, ctx)
        return {**costs, "bits": model.info.dense_bits / costs["ratio"]}


def balancer(prompt: AttentionCall) -> Tensor:
    """What quantised keys are divided by, (B, G, D), float16: the root of the largest |key| over the largest |query| of a channel.

    The inverse of the paper's b (section 3.3), over the real tokens of a row and the query heads of a group; 1 where one of them
    is zero.
    """
    groups, real_B1T1 = prompt.k_BGTD.shape[1], real(prompt)[:, None, :, None]
    most_q_BHD, most_k_BGD = ((x.float().abs() * real_B1T1).amax(2) for x in (prompt.q_BHTD, prompt.k_BGTD))
    most_q_BGD = most_q_BHD.unflatten(1, (groups, -1)).amax(2)
    scale_BGD = (most_k_BGD / most_q_BGD).sqrt().clamp(max=FP16_MAX).half()
    nothing_BGD = (most_q_BGD == 0) | (most_k_BGD == 0) | (scale_BGD == 0)
    return scale_BGD.masked_fill(nothing_BGD, 1.0)
