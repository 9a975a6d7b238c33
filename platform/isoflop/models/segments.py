"""Segments: the pieces a compressed key-value cache consists of, read together as one softmax.

Keys are stored after RoPE, so their order inside a segment does not matter and nothing is scattered back into place.
Every tensor that must stay resident belongs to a segment, so that bytes are counted on what is really there. Segments
stand in ascending order of position, so that an entry's place tells whether its token is among the newest.

A segment may hold tokens of some key-value heads only, so that heads keep different tokens and different numbers of them
(retrieval heads everything, the others little): each head reads the segments that cover it.

Shape suffixes: B batch, H query heads, G key-value heads (of a segment: those that it covers), T queries, N tokens of a
segment, D head width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from isoflop.kernels.decode_segments import Part, RaggedPart, SegmentPart, decode_segments
from isoflop.kernels.quant import Packed
from isoflop.kernels.softmax import Softmax
from isoflop.models.growing import Rooms
from isoflop.models.hooks.attention import AttentionCall
from isoflop.models.hooks.occupant import tensor_bytes

NEVER = torch.iinfo(torch.long).max
"""Position of an entry that is not there: behind every query, so that none sees it."""


@dataclass
class Segment(ABC):
    """Tokens of the cache in one representation.

    Attributes:
        positions_BGN: numbers of the tokens in the order in which they came (``AttentionCall.order_BT``), not RoPE's. They
            order queries against keys, and are stored only when a method says so: softmax itself needs no positions,
            since keys carry theirs.
        log_bias_BGN: added to the logits: -inf for an empty entry, log n for an entry that stands for n tokens; or None.
        heads_G: True at the key-value heads of the layer that the segment covers, over all of them; every other tensor of
            the segment has the covered ones in their order, and nothing for the others. None for all. Which heads they are
            is known of the model, not of a request, and counts no bytes; a method that chooses anew for each prompt
            puts its choice into ``LayerStore.extra``.
    """

    positions_BGN: Tensor
    log_bias_BGN: Tensor | None
    heads_G: Tensor | None = field(default=None, kw_only=True)

    @property
    def tokens(self) -> int:
        """N, empty entries included."""
        return self.positions_BGN.shape[2]

    def query_heads(self, heads: int) -> Tensor | None:
        """True at those of ``heads`` query heads that read the segment, (H,); None for all."""
        return None if self.heads_G is None else self.heads_G.repeat_interleave(heads // len(self.heads_G))

    @abstractmethod
    def part(self) -> SegmentPart:
        """Keys and values, (B, G, N, D), and what belongs to them: packed tensors stay packed."""

    def read_part(self) -> Part:
        """What the decoding kernel reads; nothing is copied for it."""
        return self.part()

    def keys(self) -> Tensor:
        """k_BGND as attention reads them."""
        return self.part().keys()

    def values(self) -> Tensor:
        """v_BGND as attention reads them."""
        return self.part().values()

    def products(self, q_BGMD: Tensor) -> Tensor:
        """Queries times keys, (B, G, M, N), in float32; a representation in factors need not be multiplied out."""
        return q_BGMD.float() @ self.keys().float().transpose(-1, -2)

    def mixed(self, p_BGMN: Tensor) -> Tensor:
        """Weights (float32) times values, (B, G, M, D)."""
        v_BGND = self.values()
        return p_BGMN.to(v_BGND.dtype) @ v_BGND

    def tensors(self) -> Iterable[Tensor]:
        """Everything that must stay resident."""
        part = self.part()
        for held in (part.k, part.v):
            yield from held.tensors() if isinstance(held, Packed) else (held,)
        rest = (self.log_bias_BGN, part.k_channel_scale_BGD, part.v_channel_scale_BGD)
        yield from (t for t in rest if t is not None)

    def read_tensors(self) -> Iterable[Tensor]:
        """What one decoding step fetches; by default everything."""
        return self.tensors()


@dataclass
class DenseSegment(Segment):
    """Keys and values as they are, (B, G, N, D)."""

    k_BGND: Tensor
    v_BGND: Tensor
    _rooms: Rooms = field(default_factory=Rooms, init=False, repr=False, compare=False)

    def keys(self) -> Tensor:
        """As stored."""
        return self.k_BGND

    def values(self) -> Tensor:
        """As stored."""
        return self.v_BGND

    def part(self) -> SegmentPart:
        """The tensors themselves."""
        return SegmentPart(self.k_BGND, self.v_BGND, self.log_bias_BGN)

    def append(self, k_BGTD: Tensor, v_BGTD: Tensor, positions_BGT: Tensor) -> None:
        """Add tokens at the end; of all heads of the layer, whatever the segment covers."""
        if self.heads_G is not None:
            k_BGTD, v_BGTD, positions_BGT = (x[:, self.heads_G] for x in (k_BGTD, v_BGTD, positions_BGT))
        self.k_BGND = self._rooms.append("k", self.k_BGND, k_BGTD)
        self.v_BGND = self._rooms.append("v", self.v_BGND, v_BGTD)
        self.positions_BGN = self._rooms.append("positions", self.positions_BGN, positions_BGT)
        if self.log_bias_BGN is not None:
            self.log_bias_BGN = self._rooms.append("bias", self.log_bias_BGN, torch.zeros_like(k_BGTD[..., 0]))

    def taken(self, index_BGM: Tensor, log_bias_BGM: Tensor | None, growing: bool = False) -> DenseSegment:
        """A copy of the tokens at some places of each head; with room where more are to follow."""
        rooms = Rooms()
        named = {"positions": self.positions_BGN, "k": self.k_BGND, "v": self.v_BGND}
        positions_BGM, *kept = (rooms.gather(name, x, index_BGM, growing) for name, x in named.items())
        segment = DenseSegment(positions_BGM, log_bias_BGM, *kept, heads_G=self.heads_G)
        segment._rooms = rooms
        return segment

    def of_heads(self, heads_G: Tensor) -> DenseSegment:
        """A copy that covers some of the heads of a segment that covers all."""
        bias_BGN = None if self.log_bias_BGN is None else self.log_bias_BGN[:, heads_G]
        kept = (x[:, heads_G] for x in (self.k_BGND, self.v_BGND))
        return DenseSegment(self.positions_BGN[:, heads_G], bias_BGN, *kept, heads_G=heads_G)


@dataclass
class PackedSegment(Segment):
    """Quantised keys and values, (B, G, N, D).

    Attributes:
        k, v: codes and grids; channelwise (axis -2) or per token (axis -1).
        k_channel_scale_BGD, v_channel_scale_BGD: what the dequantised channels are multiplied by, or None.
    """

    k: Packed
    v: Packed
    k_channel_scale_BGD: Tensor | None = None
    v_channel_scale_BGD: Tensor | None = None

    def part(self) -> SegmentPart:
        """Codes, grids and scales."""
        return SegmentPart(self.k, self.v, self.log_bias_BGN, self.k_channel_scale_BGD, self.v_channel_scale_BGD)


@dataclass
class LayerStore:
    """One layer's cache in a step-by-step run.

    Attributes:
        segments: the compressed prompt, and whatever a method adds while decoding.
        recent: exact tokens since the prompt.
        state: what a method keeps between steps (running scores, label caches); resident tensors belong to ``extra``.
        extra: resident tensors outside the segments.
    """

    segments: list[Segment]
    recent: DenseSegment
    state: dict[str, Any] = field(default_factory=dict)
    extra: list[Tensor] = field(default_factory=list)

    def all(self) -> list[Segment]:
        """Segments with the recent tokens last."""
        return [*self.segments, self.recent]

    def resident(self) -> list[Tensor]:
        """Everything that must stay resident, without the recent tokens."""
        return [*(t for segment in self.segments for t in segment.tensors()), *self.extra]


def decode_one(q_BH1D: Tensor, segments: Sequence[Segment], softmax: Softmax) -> Tensor:
    """Softmax attention of one query per row, behind all tokens of the segments: (B, 1, H, D).

    The same as ``attend_segments``, by the kernel that reads packed segments as codes. Segments over some of the heads are
    read by themselves and joined to the others by their log-sum-exp; nothing of the cache is copied. Without the kernel ragged heads
    are read by tiles, since its twin would make all as long as the longest.
    """
    segments = [segment for segment in segments if segment.tokens]
    parts = [segment.read_part() for segment in segments if segment.heads_G is None]
    if any(isinstance(part, RaggedPart) for part in parts) and not decode_segments.fuses(q_BH1D, parts, softmax):
        behind_all_B1 = torch.full((q_BH1D.shape[0], 1), NEVER - 1, device=q_BH1D.device)
        return attend_segments(q_BH1D, segments, softmax, behind_all_B1)[0]
    some = [segment for segment in segments if segment.heads_G is not None]
    if not some:
        return decode_segments(q_BH1D, parts, softmax)[0].transpose(1, 2)
    outs, lses, of_part = [], [], softmax.without_sinks
    if parts:
        out_BH1D, lse_BH1 = decode_segments(q_BH1D, parts, of_part)
        outs.append(out_BH1D)
        lses.append(lse_BH1)
    for segment in some:
        rows_H = segment.query_heads(q_BH1D.shape[1])
        assert rows_H is not None
        out_BR1D, lse_BR1 = decode_segments(q_BH1D[:, rows_H], [segment.read_part()], of_part)
        outs.append(_over_all_heads(out_BR1D, rows_H, 0.0))
        lses.append(_over_all_heads(lse_BR1, rows_H, float("-inf")))
    lse_NBH1 = torch.stack(lses)
    weights = lse_NBH1.softmax(0).nan_to_num()[..., None]  # a query without any entry gets zeros
    out_BH1D = sum(
        (out * w for out, w in zip(outs, weights.to(q_BH1D.dtype), strict=True)), start=torch.zeros_like(outs[0])
    )
    return softmax.with_sinks(out_BH1D, lse_NBH1.logsumexp(0))[0].transpose(1, 2)


def attend_segments(
    q_BHTD: Tensor, segments: Sequence[Segment], softmax: Softmax, order_BT: Tensor
) -> tuple[Tensor, Tensor]:
    """Softmax attention over the union of segments; a query sees keys at its own position and before.

    Args:
        order_BT: numbers of the queries, as in ``AttentionCall``.

    Returns:
        out_BTHD, and the weights p_BHTN of the segments' tokens in their order (float32), zero at those that do not cover a
        query's head; where there are sinks, they sum to less than 1.
    """
    segments = [segment for segment in segments if segment.tokens]
    logits = [segment_logits(q_BHTD, s, softmax, order_BT) for s in segments]
    p_BHTN = softmax.weights(logits[0] if len(logits) == 1 else torch.cat(logits, dim=-1))
    out_BHTD = torch.zeros_like(q_BHTD)
    for segment, p in zip(segments, p_BHTN.split([part.shape[-1] for part in logits], dim=-1), strict=True):
        rows_H = segment.query_heads(q_BHTD.shape[1])
        p_BRTN = p if rows_H is None else p[:, rows_H]
        p_BGMN = p_BRTN.reshape(p.shape[0], segment.positions_BGN.shape[1], -1, p.shape[-1])
        part_BRTD = segment.mixed(p_BGMN).reshape(*p_BRTN.shape[:3], -1)
        out_BHTD += part_BRTD if rows_H is None else _over_all_heads(part_BRTD, rows_H, 0.0)
    return out_BHTD.transpose(1, 2), p_BHTN


def segment_logits(q_BHTD: Tensor, segment: Segment, softmax: Softmax, order_BT: Tensor) -> Tensor:
    """Masked logits (B, H, T, N) in float32 of queries against one segment; -inf for heads that it does not cover."""
    rows_H = segment.query_heads(q_BHTD.shape[1])
    if rows_H is not None:
        q_BHTD = q_BHTD[:, rows_H]
    batch, heads, length, width = q_BHTD.shape
    groups = segment.positions_BGN.shape[1]
    q_BGRD = q_BHTD.reshape(batch, groups, -1, width)  # a key-value head's query heads one after the other
    logits = softmax.logits(segment.products(q_BGRD))
    logits = logits.view(batch, groups, heads // groups, length, -1)
    if segment.log_bias_BGN is not None:
        logits.add_(segment.log_bias_BGN[:, :, None, None, :].float())
    positions_BGN = segment.positions_BGN
    if positions_BGN.numel() and bool(
        (positions_BGN.amax((1, 2)) > order_BT.amin(1)).any()
    ):  # of a prompt, none is behind any query
        logits.masked_fill_(positions_BGN[:, :, None, None, :] > order_BT[:, None, None, :, None], float("-inf"))
    logits = logits.view(batch, heads, length, -1)
    return logits if rows_H is None else _over_all_heads(logits, rows_H, float("-inf"))


def _over_all_heads(x_BR: Tensor, rows_H: Tensor, empty: float) -> Tensor:
    """What some query heads have, (B, R, …), among all of them, (B, H, …); ``empty`` for the others."""
    found = x_BR.new_full((x_BR.shape[0], len(rows_H), *x_BR.shape[2:]), empty)
    found[:, rows_H] = x_BR
    return found


def stored_bytes(tensors: Iterable[Tensor], dense_bits: int) -> float:
    """Bytes of tensors, each storage once; see ``ModelInfo.dense_bits``."""
    seen = {t.data_ptr(): t for t in tensors if t.numel()}
    return sum(tensor_bytes(t, dense_bits) for t in seen.values())


def whole_prompt(call: AttentionCall) -> DenseSegment:
    """All tokens of a call as they are, padding with a bias of -inf."""
    return DenseSegment(key_positions(call), padding_bias(call), call.k_BGTD, call.v_BGTD)


def key_positions(call: AttentionCall) -> Tensor:
    """Numbers of a call's keys, (B, G, T)."""
    batch, groups, length, _ = call.k_BGTD.shape
    return call.order_BT[:, None].expand(batch, groups, length)


def padding_bias(call: AttentionCall) -> Tensor | None:
    """-inf at padding and 0 elsewhere, (B, G, T); None when nothing is padded."""
    if call.valid_BT is None:
        return None
    bias_BT = torch.zeros_like(call.valid_BT, dtype=call.k_BGTD.dtype).masked_fill(~call.valid_BT, float("-inf"))
    return bias_BT[:, None].expand(call.k_BGTD.shape[:3])
