"""Attention of a few new queries over a cache held in several pieces, joined by log-sum-exp.

A piece holds exact keys and values, or packed ones that are read as codes and never expanded in memory. All of its tokens
lie before the queries, so there is no causal mask, and the order of tokens does not matter.

Shape suffixes: B batch, H query heads, G key-value heads, M query rows of a key-value head (its heads times T), T queries,
N tokens of a piece, D head width.
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


def _dense(x: Tensor | Packed, channel_scale_BGD: Tensor | None) -> Tensor:
    values = unpack(x) if isinstance(x, Packed) else x.float()
    return values if channel_scale_BGD is None else values * channel_scale_BGD.float()[:, :, None]


def _supported(q_BHTD: Tensor, segments: Sequence[SegmentPart], softmax: Softmax) -> bool:
    rows = q_BHTD.shape[1] // max(1, segments[0].k.shape[1]) * q_BHTD.shape[2] if segments else 0
    widths = [x.shape[-1] for part in segments for x in (part.k, part.v)]
    axes = [x.axis for part in segments for x in (part.k, part.v) if isinstance(x, Packed)]
    return 0 < rows <= 64 and q_BHTD.numel() > 0 and max(widths) <= 256 and min(axes, default=-1) >= -2


@operation("isoflop.kernels.decode_segments_triton:decode_segments", supports=_supported)
def decode_segments(q_BHTD: Tensor, segments: Sequence[SegmentPart], softmax: Softmax) -> tuple[Tensor, Tensor]:
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
    groups = segments[0].k.shape[1]
    q_BGMD = q_BHTD.float().reshape(batch, groups, -1, width)
    logits_BGMN = torch.cat([_logits(q_BGMD, part, softmax) for part in segments], dim=-1)
    lse_BGM = logits_BGMN.logsumexp(-1) if logits_BGMN.shape[-1] else logits_BGMN.new_full(q_BGMD.shape[:3], -torch.inf)
    p_BGMN = (logits_BGMN - lse_BGM.nan_to_num(neginf=0.0)[..., None]).exp()
    pieces = p_BGMN.split([part.tokens for part in segments], dim=-1)
    out_BGMD = sum((p @ part.values() for p, part in zip(pieces, segments, strict=True)), start=torch.zeros(()))
    out_BHTD = out_BGMD.reshape(batch, heads, queries, -1).to(q_BHTD.dtype)
    return softmax.with_sinks(out_BHTD, lse_BGM.reshape(batch, heads, queries))


def _logits(q_BGMD: Tensor, part: SegmentPart, softmax: Softmax) -> Tensor:
    logits = softmax.logits(q_BGMD @ part.keys().transpose(-1, -2))
    return logits if part.log_bias_BGN is None else logits + part.log_bias_BGN.float()[:, :, None]
