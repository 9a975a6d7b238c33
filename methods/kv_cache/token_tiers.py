"""Packed tokens with grids of their own, which can be taken out, joined and encoded anew one by one.

What is quantised per token along its channels knows nothing of other tokens: any of them may leave, and others may follow.

Shape suffixes: B batch, G key-value heads, N tokens of a segment, M chosen tokens, D head width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from isoflop.kernels.quant import Packed, quant_pack
from isoflop.methods.kv_cache.quantised import EXACT
from isoflop.methods.kv_cache.select import KeptTokens
from isoflop.models.segments import DenseSegment, PackedSegment, Segment


@dataclass(frozen=True, eq=False)
class TokenCodec:
    """How tokens are encoded.

    Attributes:
        bits: per element; 16 keeps numbers as they are.
        group: channels that share a grid.
        k_scale_BGD: the keys' channels are divided by this before they are quantised; None for none.
    """

    bits: int
    group: int
    k_scale_BGD: Tensor | None = None

    def encode(self, tokens: DenseSegment) -> Segment:
        """A segment with the tokens of another."""
        if self.bits >= EXACT:
            return tokens
        k_BGND = tokens.k_BGND.float()
        if self.k_scale_BGD is not None:
            k_BGND = k_BGND / self.k_scale_BGD.float()[:, :, None]
        k, v = (quant_pack(x, self.bits, -1, self.group) for x in (k_BGND, tokens.v_BGND))
        return PackedSegment(tokens.positions_BGN, tokens.log_bias_BGN, k, v, self.k_scale_BGD)


def exact(segment: Segment) -> DenseSegment:
    """The tokens as attention reads them."""
    if isinstance(segment, DenseSegment):
        return segment
    return DenseSegment(segment.positions_BGN, segment.log_bias_BGN, segment.keys(), segment.values())


def taken(segment: Segment, chosen: KeptTokens) -> Segment:
    """The chosen tokens, packed ones as they are packed; empty entries get a bias of -inf."""
    bias_BGM = None if segment.log_bias_BGN is None else chosen.take(segment.log_bias_BGN)
    empty_BGM = chosen.bias(torch.float32)
    bias_BGM = empty_BGM if bias_BGM is None else bias_BGM if empty_BGM is None else bias_BGM + empty_BGM
    positions_BGM = chosen.take(segment.positions_BGN)
    if isinstance(segment, DenseSegment):
        return DenseSegment(positions_BGM, bias_BGM, chosen.take(segment.k_BGND), chosen.take(segment.v_BGND))
    assert isinstance(segment, PackedSegment)
    k, v = (_on_tokens(x, chosen.take) for x in (segment.k, segment.v))
    return PackedSegment(positions_BGM, bias_BGM, k, v, segment.k_channel_scale_BGD, segment.v_channel_scale_BGD)


def joined(first: Segment, second: Segment) -> Segment:
    """The tokens of one segment and then those of another of the same kind."""
    positions_BGN = torch.cat((first.positions_BGN, second.positions_BGN), dim=2)
    bias_BGN = _joined_bias(first, second)
    if isinstance(first, DenseSegment) and isinstance(second, DenseSegment):
        pairs = ((first.k_BGND, second.k_BGND), (first.v_BGND, second.v_BGND))
        return DenseSegment(positions_BGN, bias_BGN, *(torch.cat(pair, dim=2) for pair in pairs))
    assert isinstance(first, PackedSegment)
    assert isinstance(second, PackedSegment)
    k, v = (_joined_packed(a, b) for a, b in ((first.k, second.k), (first.v, second.v)))
    return replace(first, positions_BGN=positions_BGN, log_bias_BGN=bias_BGN, k=k, v=v)


def _joined_bias(first: Segment, second: Segment) -> Tensor | None:
    if first.log_bias_BGN is None and second.log_bias_BGN is None:
        return None
    parts = [
        torch.zeros_like(s.positions_BGN, dtype=torch.float32) if s.log_bias_BGN is None else s.log_bias_BGN.float()
        for s in (first, second)
    ]
    return torch.cat(parts, dim=2)


def _joined_packed(first: Packed, second: Packed) -> Packed:
    parts = zip(first.tensors(), second.tensors(), strict=True)
    codes, scale, zero = (torch.cat(pair, dim=2) for pair in parts)
    return replace(first, codes=codes, scale=scale, zero=zero, shape=(*first.shape[:2], codes.shape[2], first.shape[3]))


def _on_tokens(packed: Packed, take: object) -> Packed:
    codes, scale, zero = (take(x) for x in packed.tensors())  # type: ignore[operator]
    return replace(
        packed, codes=codes, scale=scale, zero=zero, shape=(*packed.shape[:2], codes.shape[2], packed.shape[3])
    )
