"""Uniform low precision in the layout of KIVI (arXiv 2402.02750): keys per channel, values per token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

from isoflop.core.knobs import Knob
from isoflop.methods.base import METHODS, Axes
from isoflop.methods.kv_cache.packing import Packs, everything
from isoflop.methods.kv_cache.quantised import Grids, Quantised, quantise
from isoflop.methods.kv_cache.select import KeptTokens, all_tokens
from isoflop.models.base import ModelInfo
from isoflop.models.hooks.attention import AttentionCall
from isoflop.models.segments import DenseSegment, Segment


@METHODS.register("kv-rtn")
@dataclass(frozen=True)
class KvRtn(Quantised, Packs):
    """Every token at the same bits, rounded to nearest.

    The plain baseline: the prompt is quantised to its last token, and new tokens wait exactly until they are a block
    (``streaming_gap``). KIVI itself, which always keeps the newest tokens exactly, is ``kivi``.
    """

    paper: ClassVar[str] = "arXiv 2402.02750"

    bits: Annotated[
        int, Knob(choices=(2, 3, 4, 8, 16), ratio=True, unit="bits", doc="per element; 16 keeps the cache")
    ] = 4
    keys: Annotated[
        str, Knob(choices=("channel", "token"), doc="whether keys share grids along tokens or channels")
    ] = "channel"
    group: Annotated[
        int, Knob(low=1, high=65536, log=True, unit="values", doc="tokens (keys per channel) or channels of one grid")
    ] = 32

    @classmethod
    def identity(cls, info: ModelInfo) -> KvRtn:
        """16 bits."""
        return cls(bits=16)

    def axes(self, info: ModelInfo) -> Axes:
        """Bits, per element, grids left out."""
        return Axes(bits=float(self.bits), ratio=info.dense_bits / self.bits)

    def grids(self) -> Grids:
        """One grid per ``group`` values."""
        return Grids(-2 if self.keys == "channel" else -1, self.group, self.group)

    def tiers(self, block: AttentionCall) -> Sequence[tuple[int, KeptTokens]]:
        """All tokens in one tier."""
        return [(self.bits, all_tokens(block))]

    def pack(self, kept: DenseSegment) -> list[Segment]:
        """The same of tokens that another method keeps."""
        return quantise(kept, [(self.bits, everything(kept))], self.grids())
