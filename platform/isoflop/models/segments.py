"""Segments: the pieces a compressed key-value cache consists of, read together as one softmax.

Keys are stored after RoPE, so their order inside a segment does not matter and nothing is scattered back into place.
Every tensor that must stay resident belongs to a segment, so that bytes are counted on what is really there. Segments
stand in ascending order of position, so that a slot's place tells whether its token is among the newest.

Shape suffixes: B batch, H query heads, G key-value heads, T queries, N tokens of a segment, D head width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from isoflop.kernels.decode_segments import SegmentPart, decode_segments
from isoflop.kernels.quant import Packed
from isoflop.models.base import tensor_bytes


@dataclass
class Segment(ABC):
    """Tokens of the cache in one representation.

    Attributes:
        positions_BGN: numbers of the tokens in the order in which they came (``AttentionCall.order_BT``), not RoPE's. They
            order queries against keys, and are stored only when a method says so: softmax itself needs no positions,
            since keys carry theirs.
        log_bias_BGN: added to the logits: -inf for an empty slot, log n for a slot that stands for n tokens; or None.
    """

    positions_BGN: Tensor
    log_bias_BGN: Tensor | None

    @property
    def tokens(self) -> int:
        """N, empty slots included."""
        return self.positions_BGN.shape[2]

    @abstractmethod
    def part(self) -> SegmentPart:
        """What the decoding kernel reads: packed tensors stay packed."""

    def keys(self) -> Tensor:
        """k_BGND as attention reads them."""
        return self.part().keys()

    def values(self) -> Tensor:
        """v_BGND as attention reads them."""
        return self.part().values()

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
        """Add tokens at the end."""
        self.k_BGND = torch.cat((self.k_BGND, k_BGTD), dim=2)
        self.v_BGND = torch.cat((self.v_BGND, v_BGTD), dim=2)
        self.positions_BGN = torch.cat((self.positions_BGN, positions_BGT), dim=2)
        if self.log_bias_BGN is not None:
            self.log_bias_BGN = torch.cat((self.log_bias_BGN, torch.zeros_like(k_BGTD[..., 0])), dim=2)


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


def decode_one(q_BH1D: Tensor, segments: Sequence[Segment], scaling: float) -> Tensor:
    """Softmax attention of one query per row, behind all tokens of the segments: (B, 1, H, D).

    The same as ``attend_segments``, by the kernel that reads packed segments as codes.
    """
    out_BH1D, _ = decode_segments(q_BH1D, [s.part() for s in segments if s.tokens], scaling)
    return out_BH1D.transpose(1, 2)


def attend_segments(
    q_BHTD: Tensor, segments: Sequence[Segment], scaling: float, order_BT: Tensor
) -> tuple[Tensor, Tensor]:
    """Softmax attention over the union of segments; a query sees keys at its own position and before.

    Args:
        order_BT: numbers of the queries, as in ``AttentionCall``.

    Returns:
        out_BTHD, and the probabilities p_BHTN over the segments' tokens in their order (float32).
    """
    segments = [segment for segment in segments if segment.tokens]
    logits = [segment_logits(q_BHTD, s, scaling, order_BT) for s in segments]
    p_BHTN = torch.cat(logits, dim=-1).softmax(-1)
    out_BHTD = torch.zeros_like(q_BHTD)
    for segment, p in zip(segments, p_BHTN.split([part.shape[-1] for part in logits], dim=-1), strict=True):
        v_BGND = segment.values()
        p_BGRN = p.to(v_BGND.dtype).reshape(p.shape[0], v_BGND.shape[1], -1, p.shape[-1])
        out_BHTD += (p_BGRN @ v_BGND).reshape(out_BHTD.shape)
    return out_BHTD.transpose(1, 2), p_BHTN


def segment_logits(q_BHTD: Tensor, segment: Segment, scaling: float, order_BT: Tensor) -> Tensor:
    """Masked logits (B, H, T, N) in float32 of queries against one segment."""
    k_BGND = segment.keys()
    batch, heads, length, width = q_BHTD.shape
    groups = k_BGND.shape[1]
    q_BGRD = q_BHTD.reshape(batch, groups, -1, width)  # a key-value head's query heads one after the other
    logits = (q_BGRD.float() @ k_BGND.float().transpose(-1, -2)) * scaling
    logits = logits.reshape(batch, groups, heads // groups, length, -1)
    if segment.log_bias_BGN is not None:
        logits = logits + segment.log_bias_BGN[:, :, None, None, :].float()
    later = segment.positions_BGN[:, :, None, None, :] > order_BT[:, None, None, :, None]
    return logits.masked_fill(later, float("-inf")).reshape(batch, heads, length, -1)


def stored_bytes(tensors: Iterable[Tensor], dense_bits: int) -> float:
    """Bytes of tensors, each storage once; see ``ModelInfo.dense_bits``."""
    seen = {t.data_ptr(): t for t in tensors if t.numel()}
    return sum(tensor_bytes(t, dense_bits) for t in seen.values())
