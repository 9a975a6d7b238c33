"""Attention of a few new queries over a cache held in several pieces, joined by log-sum-exp.

A piece holds exact keys and values, or packed ones that are read as codes and never expanded in memory. All of its tokens
lie before the queries, so there is no causal mask, and the order of tokens does not matter. A ragged piece holds different
numbers of tokens of each head.

Shape suffixes: B batch, H query heads, G key-value heads, M query rows of a key-value head (its heads times T), T queries,
N tokens of a piece (if it is ragged, of its longest head), D head width, O rows and heads (b·G + g), R tokens of all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from isoflop.kernels.dispatch import operation
from isoflop.kernels.quant import Packed, unpack
from isoflop.kernels.softmax import Softmax


@dataclass(frozen=True, eq=False)
class SegmentPart:
    """Tokens of a cache in one representation.

    Attributes:
        k: keys after RoPE, (B, G, N, D); packed along tokens (``axis=-2``, channelwise) or channels (``axis=-1``).
        v: values, (B, G, N, D), likewise.
        log_bias_BGN: added to the logits: -inf for an empty entry, log n for an entry that stands for n tokens.
        k_channel_scale_BGD: the keys are ``k`` times this (MiKV: one over the balancer).
        v_channel_scale_BGD: the values are ``v`` times this (ZipCache's channel-separable values).
    """

    k: Tensor | Packed
    v: Tensor | Packed
    log_bias_BGN: Tensor | None = None
    k_channel_scale_BGD: Tensor | None = None
    v_channel_scale_BGD: Tensor | None = None

    def keys(self) -> Tensor:
        """k_BGND in float32."""
        return _dense(self.k, self.k_channel_scale_BGD)

    def values(self) -> Tensor:
        """v_BGND in float32."""
        return _dense(self.v, self.v_channel_scale_BGD)

    @property
    def tokens(self) -> int:
        """N."""
        return int(self.k.shape[2])

    @property
    def groups(self) -> int:
        """G."""
        return int(self.k.shape[1])


@dataclass(frozen=True, eq=False)
class RaggedPart:
    """Exact tokens, of each head as many as it has, one head behind the other.

    Attributes:
        k_RD, v_RD: keys after RoPE, and values.
        ends_O: int32, one past the last token of each row and head.
        groups: G.
        tokens: N, of the longest head.
    """

    k_RD: Tensor
    v_RD: Tensor
    ends_O: Tensor
    groups: int
    tokens: int

    @property
    def lengths_BG(self) -> Tensor:
        """Tokens of each head, int64."""
        return self.ends_O.long().diff(prepend=self.ends_O.new_zeros(1)).view(-1, self.groups)

    def padded(self) -> SegmentPart:
        """With room for the longest head in all of them, for readers that know no ragged heads."""
        lengths_BG, places_N = self.lengths_BG, torch.arange(self.tokens, device=self.ends_O.device)
        empty_BGN = places_N >= lengths_BG[..., None]
        starts_BG = self.ends_O.view(lengths_BG.shape) - lengths_BG
        index_BGN = (starts_BG[..., None] + places_N).masked_fill(empty_BGN, 0)
        bias_BGN = torch.zeros(empty_BGN.shape, dtype=self.k_RD.dtype, device=self.k_RD.device)
        bias_BGN.masked_fill_(empty_BGN, float("-inf"))
        k_BGND, v_BGND = (x[index_BGN].masked_fill(empty_BGN[..., None], 0) for x in (self.k_RD, self.v_RD))
        return SegmentPart(k_BGND, v_BGND, bias_BGN)


Part = SegmentPart | RaggedPart


def _dense(x: Tensor | Packed, channel_scale_BGD: Tensor | None) -> Tensor:
    values = unpack(x) if isinstance(x, Packed) else x.float()
    return values if channel_scale_BGD is None else values * channel_scale_BGD.float()[:, :, None]


def operands(part: Part) -> tuple[Tensor | Packed, Tensor | Packed]:
    """Keys and values as they are held."""
    return (part.k_RD, part.v_RD) if isinstance(part, RaggedPart) else (part.k, part.v)


def _supported(q_BHTD: Tensor, segments: Sequence[Part], softmax: Softmax) -> bool:
    rows = q_BHTD.shape[1] // max(1, segments[0].groups) * q_BHTD.shape[2] if segments else 0
    held = [x for part in segments for x in operands(part)]
    widths = [x.shape[-1] for x in held]
    axes = [x.axis for x in held if isinstance(x, Packed)]
    return 0 < rows <= 64 and q_BHTD.numel() > 0 and max(widths) <= 256 and min(axes, default=-1) >= -2


@operation("isoflop.kernels.decode_segments_triton:decode_segments", supports=_supported)
def decode_segments(q_BHTD: Tensor, segments: Sequence[Part], softmax: Softmax) -> tuple[Tensor, Tensor]:
    """Softmax attention over the union of segments.

    Args:
        q_BHTD: queries after RoPE; a key-value head's query heads stand one after the other. The kernel serves up to 64
            query rows per key-value head, the twin any number.
        segments: at least one; those without tokens are allowed.
        softmax: from products to weights.

    Returns:
        out_BHTD in the type of the queries, and the natural log-sum-exp of the logits, sinks included, lse_BHT, in float32. A
        query whose entries are all empty gets zeros and, without sinks, -inf.

    Raises:
        ValueError: no segments.
    """
    if not segments:
        raise ValueError("decode_segments needs at least one segment")
    batch, heads, queries, width = q_BHTD.shape
    q_BGMD = q_BHTD.float().reshape(batch, segments[0].groups, -1, width)
    even = [part.padded() if isinstance(part, RaggedPart) else part for part in segments]
    logits_BGMN = torch.cat([_logits(q_BGMD, part, softmax) for part in even], dim=-1)
    lse_BGM = logits_BGMN.logsumexp(-1) if logits_BGMN.shape[-1] else logits_BGMN.new_full(q_BGMD.shape[:3], -torch.inf)
    p_BGMN = (logits_BGMN - lse_BGM.nan_to_num(neginf=0.0)[..., None]).exp()
    pieces = p_BGMN.split([part.tokens for part in even], dim=-1)
    out_BGMD = sum((p @ part.values() for p, part in zip(pieces, even, strict=True)), start=torch.zeros(()))
    out_BHTD = out_BGMD.reshape(batch, heads, queries, -1).to(q_BHTD.dtype)
    return softmax.with_sinks(out_BHTD, lse_BGM.reshape(batch, heads, queries))


def _logits(q_BGMD: Tensor, part: SegmentPart, softmax: Softmax) -> Tensor:
    logits = softmax.logits(q_BGMD @ part.keys().transpose(-1, -2))
    return logits if part.log_bias_BGN is None else logits + part.log_bias_BGN.float()[:, :, None]
