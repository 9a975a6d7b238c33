"""Low-precision caches: tokens in tiers of bits, packed, appended in blocks.

A method says which tokens go into which tier. New tokens wait exactly until ``streaming_gap`` of them are there; then they
become a block of their own, with grids of their own. What is packed is never packed again, so errors do not pile up.

The order of tokens does not matter to attention, so tiers need no map back to positions.

Shape suffixes: B batch, G key-value heads, H query heads, T tokens, N tokens of a tier, D head width.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Self

import torch
from torch import Tensor

from isoflop.core.knobs import Knob
from isoflop.core.stage import StageContext
from isoflop.kernels.quant import FP16_MAX, quant_pack
from isoflop.methods.base import Axes
from isoflop.methods.kv_cache.base import KvCacheMethod, empty_recent, key_positions
from isoflop.methods.kv_cache.select import KeptTokens, candidates
from isoflop.models.base import Model, ModelInfo
from isoflop.models.hooks.attention import AttentionCall
from isoflop.models.segments import DenseSegment, LayerStore, PackedSegment, Segment

EXACT = 16
"""Bits from which numbers are kept as they are."""


@dataclass(frozen=True)
class Grids:
    """How a block is quantised.

    Attributes:
        k_axis: -2 for one grid per channel (over ``k_group`` tokens), -1 for one per token (over ``k_group`` channels).
        k_group, v_group: values that share a grid; None for all tokens of the tier, or all channels of the token.
        v_balanced: divide each channel of the values by the root of its largest magnitude first.
    """

    k_axis: int = -2
    k_group: int | None = None
    v_group: int | None = None
    v_balanced: bool = False


@dataclass(frozen=True)
class LowBit(KvCacheMethod):
    """Base class of methods whose rows say how many bits an element takes."""

    def footprint(self, model: Model, ctx: StageContext) -> dict[str, float]:
        """Also ``bits``: per element of the prompt's cache, overhead included."""
        costs = super().footprint(model, ctx)
        return {**costs, "bits": model.info.dense_bits / costs["ratio"]}


@dataclass(frozen=True)
class KeyAndValueBits(LowBit):
    """Base class of those whose values may have bits of their own."""

    bits: Annotated[int, Knob(choices=(2, 3, 4, 8, 16), ratio=True, unit="bits", doc="per element; 16 keeps the cache")] = 4  # fmt: skip
    value_bits: Annotated[int, Knob(choices=(0, 2, 3, 4, 8), unit="bits", doc="per element of the values; 0: as the keys")] = 0  # fmt: skip

    @classmethod
    def identity(cls, info: ModelInfo) -> Self:
        """16 bits."""
        return cls(bits=EXACT)

    def axes(self, info: ModelInfo) -> Axes:
        """Bits, per element; grids and exact tokens left out."""
        bits = (self.bits + (self.value_bits or self.bits)) / 2 if self.bits < EXACT else float(EXACT)
        return Axes(bits=bits, ratio=info.dense_bits / bits)


@dataclass(frozen=True)
class Quantised(LowBit):
    """Base class of low-precision caches of which every tier is packed a block at a time."""

    streaming_gap: Annotated[
        int,
        Knob(
            low=1, high=1_000_000, log=True, unit="tokens", doc="new tokens that wait exactly before they are quantised"
        ),
    ] = 100

    @abstractmethod
    def grids(self) -> Grids:
        """How each block is quantised."""

    @abstractmethod
    def tiers(self, block: AttentionCall) -> Sequence[tuple[int, KeptTokens]]:
        """Bits and tokens of each tier of the prompt; every real token is in exactly one."""

    def new_tiers(self, query: AttentionCall, store: LayerStore) -> Sequence[tuple[int, KeptTokens]]:
        """The same for a full buffer, ``store.recent``, when the newest query (T = 1) has read the store."""
        block = store.recent
        return self.tiers(replace(query, k_BGTD=block.k_BGND, v_BGTD=block.v_BGND))

    def compress(self, prompt: AttentionCall, prepared: Any) -> LayerStore:
        """One segment per tier."""
        whole = DenseSegment(key_positions(prompt), None, prompt.k_BGTD, prompt.v_BGTD)
        real_B1T = candidates(prompt)
        return LayerStore(quantise(whole, self.tiers(prompt), self.grids(), real_B1T), empty_recent(prompt))

    def stride(self, store: LayerStore) -> int | None:
        """What is left of the buffer."""
        return self.streaming_gap - store.recent.tokens

    def step(self, query: AttentionCall, store: LayerStore, prepared: Any) -> Tensor:
        """Attend, then turn a full buffer into a block."""
        out_BTHD = self.read(query, store, prepared)
        if store.recent.tokens >= self.streaming_gap:
            last = replace(query, q_BHTD=query.q_BHTD[:, :, -1:], order_BT=query.order_BT[:, -1:], valid_BT=None)
            store.segments += quantise(store.recent, self.new_tiers(last, store), self.grids())
            store.recent = empty_recent(query)
        return out_BTHD


def quantise(
    block: DenseSegment, tiers: Sequence[tuple[int, KeptTokens]], grids: Grids, real_B1N: Tensor | None = None
) -> list[Segment]:
    """The tiers of a block as segments; empty tiers are left out.

    Args:
        real_B1N: False for padding, which no tier holds.
    """
    scale_BGD = balance(block.v_BGND, real_B1N) if grids.v_balanced else None
    segments: list[Segment] = []
    for bits, chosen in tiers:
        if chosen.index_BGM.shape[-1] == 0:
            continue
        k_BGND, v_BGND = chosen.take(block.k_BGND), chosen.take(block.v_BGND)
        positions_BGN, bias_BGN = chosen.take(block.positions_BGN), chosen.bias(k_BGND.dtype)
        if block.log_bias_BGN is not None:  # entries that are empty, or stand for several tokens
            own_BGM = chosen.take(block.log_bias_BGN)
            bias_BGN = own_BGM if bias_BGN is None else own_BGM + bias_BGN
        if bits >= EXACT:
            segments.append(DenseSegment(positions_BGN, bias_BGN, k_BGND, v_BGND))
            continue
        if scale_BGD is not None:
            v_BGND = v_BGND.float() / scale_BGD.float()[:, :, None]
        k = quant_pack(k_BGND, bits, grids.k_axis, grids.k_group)
        v = quant_pack(v_BGND, bits, -1, grids.v_group)
        segments.append(PackedSegment(positions_BGN, bias_BGN, k, v, None, scale_BGD))
    return segments


def balance(v_BGND: Tensor, real_B1N: Tensor | None = None) -> Tensor:
    """ZipCache's channel scale: the root of each channel's largest magnitude over all real tokens, (B, G, D), float16.

    1 where a channel is zero.
    """
    magnitude_BGND = v_BGND.float().abs()
    if real_B1N is not None:
        magnitude_BGND = magnitude_BGND.masked_fill(~real_B1N[..., None], 0.0)
    scale_BGD = magnitude_BGND.amax(2).sqrt().clamp(max=FP16_MAX).half()
    return torch.where(scale_BGD == 0, torch.ones_like(scale_BGD), scale_BGD)
