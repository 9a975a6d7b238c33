"""ThinK: keys with fewer channels, chosen by the newest queries (arXiv 2407.21018).

Shape suffixes: B batch, H query heads, G key-value heads, T tokens of the prompt, N tokens of a segment, D head width, C channels kept,
M query rows of a key-value head.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self

import torch
from torch import Tensor

from isoflop.core.errors import Infeasible
from isoflop.core.knobs import Knob
from isoflop.kernels.decode_segments import SegmentPart
from isoflop.methods.base import METHODS, Axes
from isoflop.methods.kv_cache.scores import window
from isoflop.methods.kv_cache.select import count_of, lengths, split
from isoflop.methods.kv_cache.snapkv import SnapKV
from isoflop.models.base import ModelInfo
from isoflop.models.hooks.attention import AttentionCall
from isoflop.models.segments import DenseSegment, LayerStore, Segment, attend_segments

if TYPE_CHECKING:
    from isoflop.methods.kv_cache.probe import KvCacheProbe


@METHODS.register("think")
@dataclass(frozen=True)
class ThinK(SnapKV):
    """Each head keeps the channels of its keys that the prompt's last queries multiply by most; values stay whole.

    A channel counts by the squares of the last ``window`` queries, added up over a group's heads, times the squares of the keys. Keys
    of the newest ``recent`` tokens, and of all that are generated, keep every channel. With ``keep`` below 1, SnapKV evicts first,
    and channels are chosen for what is left. The share of channels goes to the nearest number; the released code rounds the
    pruned ones down. Prompts no longer than ``recent`` stay as they are.
    """

    paper: ClassVar[str] = "arXiv 2407.21018"
    even: ClassVar[bool] = False  # what stays is no longer exact

    keep: Annotated[float, Knob(low=0.01, high=1.0, doc="share of the tokens that SnapKV keeps before; 1 for all")] = (
        1.0
    )
    window: Annotated[int, Knob(low=1, high=1024, unit="tokens", doc="last queries that choose channels, and SnapKV's window")] = 32  # fmt: skip
    channels: Annotated[float, Knob(low=0.01, high=1.0, ratio=True, doc="share of the channels that older keys keep")] = 0.6  # fmt: skip
    recent: Annotated[int, Knob(low=0, high=1_000_000, unit="tokens", doc="newest tokens of the prompt whose keys stay whole")] = 32  # fmt: skip

    @classmethod
    def identity(cls, info: ModelInfo) -> Self:
        """Every channel of every token."""
        return cls(keep=1.0, channels=1.0)

    @classmethod
    def probe(cls) -> KvCacheProbe:
        """With evictions beneath, where SnapKV's knobs show."""
        from isoflop.methods.kv_cache.probe import KvCacheProbe

        beneath = {"keep": 0.4, "window": 4, "recent": 4}
        return KvCacheProbe(tried={"kernel": [{**beneath, "kernel": n} for n in (1, 7)]})

    def axes(self, info: ModelInfo) -> Axes:
        """Dense numbers over those kept, recent tokens left out."""
        return Axes(ratio=2 / (self.keep * (1 + self.channels)))

    def check(self, info: ModelInfo) -> None:
        """Refuse to keep no channel."""
        super().check(info)
        width = info.geometry.get("head_width", info.geometry["width"] // info.geometry["heads"])
        if count_of(self.channels, width, least=0) == 0:
            raise Infeasible(
                f"method think: channels = {self.channels:g} of the {width} of a head keeps none of them; allowed: from {0.5 / width:.3g} on"
            )

    def score(self, prompt: AttentionCall) -> Tensor:
        """SnapKV's; nothing to choose where all tokens stay."""
        return super().score(prompt) if self.keep < 1 else torch.zeros_like(prompt.k_BGTD[..., 0], dtype=torch.float32)

    def compress(self, prompt: AttentionCall, prepared: Any) -> LayerStore:
        """Older tokens with narrow keys, and the newest as they are."""
        store = super().compress(prompt, prepared)
        kept = store.segments[0]
        assert isinstance(kept, DenseSegment)
        width = kept.k_BGND.shape[-1]
        if (count := count_of(self.channels, width)) == width:
            return store
        totals = self.counts(prompt.layer, lengths(prompt), prepared)
        newest = [min(self.recent, total) for total in totals]
        places_BGN = torch.arange(kept.tokens, device=kept.k_BGND.device).expand(kept.positions_BGN.shape).float()
        live_BGN = None if kept.log_bias_BGN is None else kept.log_bias_BGN == 0
        recent, older = split(places_BGN, newest, totals, live_BGN)
        tail, head = (kept.taken(x.index_BGM, x.bias(kept.k_BGND.dtype)) for x in (recent, older))
        importance_BGD = channel_importance(prompt, kept, self.window)
        index_BGC = importance_BGD.topk(count, dim=-1).indices.sort(dim=-1).values
        store.segments = [narrowed(head, index_BGC), tail]
        return store

    def read(self, query: AttentionCall, store: LayerStore, prepared: Any) -> Tensor:
        """Narrow keys are multiplied as they are."""
        return attend_segments(query.q_BHTD, store.all(), query.softmax, query.order_BT)[0]


def channel_importance(prompt: AttentionCall, kept: DenseSegment, last: int) -> Tensor:
    """|Q|² |K|² of each channel, of the last queries and of the kept keys, (B, G, D) (equation 5)."""
    weight_BP = window(prompt, last).weight_BP
    q_BHPD = prompt.q_BHTD[:, :, prompt.q_BHTD.shape[2] - weight_BP.shape[1] :].float()
    asked_BHD = torch.einsum("bhpd,bp->bhd", q_BHPD.square(), weight_BP)
    k_BGND = kept.k_BGND.float()
    if kept.log_bias_BGN is not None:
        k_BGND = k_BGND.masked_fill((kept.log_bias_BGN != 0)[..., None], 0.0)
    return asked_BHD.unflatten(1, (k_BGND.shape[1], -1)).sum(2) * k_BGND.square().sum(2)


def narrowed(tokens: DenseSegment, index_BGC: Tensor) -> NarrowSegment:
    """Tokens with some channels of their keys."""
    k_BGNC = tokens.k_BGND.gather(3, index_BGC[:, :, None].expand(-1, -1, tokens.tokens, -1))
    index_BGC = index_BGC.to(torch.uint8 if tokens.k_BGND.shape[-1] <= 256 else torch.int16)
    return NarrowSegment(tokens.positions_BGN, tokens.log_bias_BGN, k_BGNC, tokens.v_BGND, index_BGC)


@dataclass
class NarrowSegment(Segment):
    """Keys of some channels, and whole values.

    Attributes:
        index_BGC: which channels of each head, ascending, in 8 bits or 16.
    """

    k_BGNC: Tensor
    v_BGND: Tensor
    index_BGC: Tensor

    def part(self) -> SegmentPart:
        """For readers of whole keys, zeros elsewhere."""
        index_BGNC = self.index_BGC.long()[:, :, None].expand_as(self.k_BGNC)
        return SegmentPart(
            torch.zeros_like(self.v_BGND).scatter(3, index_BGNC, self.k_BGNC), self.v_BGND, self.log_bias_BGN
        )

    def products(self, q_BGMD: Tensor) -> Tensor:
        """Over the kept channels."""
        index_BGMC = self.index_BGC.long()[:, :, None].expand(-1, -1, q_BGMD.shape[2], -1)
        return q_BGMD.float().gather(3, index_BGMC) @ self.k_BGNC.float().transpose(-1, -2)

    def values(self) -> Tensor:
        """As stored."""
        return self.v_BGND

    def tensors(self) -> Iterable[Tensor]:
        """Keys, values and channels."""
        yield from (self.k_BGNC, self.v_BGND, self.index_BGC)
        if self.log_bias_BGN is not None:
            yield self.log_bias_BGN
