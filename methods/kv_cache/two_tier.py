"""Two tiers of bits, chosen by a score: what mixed-precision caches share, and its control, random tiers.

Shape suffixes: B batch, G key-value heads, T tokens, N tokens of a block.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Self

from torch import Tensor

from isoflop.core.errors import Infeasible
from isoflop.core.knobs import Knob
from isoflop.methods.base import METHODS, Axes
from isoflop.methods.kv_cache.chance import uniform
from isoflop.methods.kv_cache.quantised import Grids, Quantised
from isoflop.methods.kv_cache.select import KeptTokens, candidates, count_of, lengths, split
from isoflop.models.base import ModelInfo
from isoflop.models.hooks.attention import AttentionCall
from isoflop.models.segments import LayerStore

V_GROUP = 32


@dataclass(frozen=True)
class TwoTier(Quantised):
    """Base class: the most salient tokens of each head at ``bits_hi``, the others at ``bits_lo``.

    Keys have one grid per channel and tier. Values (``cst``): channels divided by the root of their largest magnitude over
    both tiers, then one grid per token and head; ``token`` leaves the channels as they are; ``group32`` has a grid per 32
    channels.
    """

    salient_ratio: Annotated[float, Knob(low=0.0, high=1.0, ratio=True, doc="share of the tokens at bits_hi")] = 0.6
    bits_hi: Annotated[
        int, Knob(choices=(4, 8, 16), unit="bits", doc="of salient tokens; 16 keeps them as they are")
    ] = 4
    bits_lo: Annotated[int, Knob(choices=(2, 3, 4, 8, 16), unit="bits", doc="of the other tokens")] = 2
    v_scheme: Annotated[str, Knob(choices=("cst", "token", "group32"), doc="what shares a grid among the values")] = (
        "cst"
    )

    @classmethod
    def identity(cls, info: ModelInfo) -> Self:
        """Every token kept as it is; new ones too."""
        return cls(salient_ratio=1.0, bits_hi=16, bits_lo=16)

    @abstractmethod
    def saliency(self, prompt: AttentionCall) -> Tensor:
        """Scores of the prompt's tokens, (B, G, T)."""

    @abstractmethod
    def new_saliency(self, query: AttentionCall, store: LayerStore) -> Tensor:
        """Scores of a full buffer's tokens (``store.recent``), (B, G, N), when the newest query (T = 1) has attended to all."""

    def axes(self, info: ModelInfo) -> Axes:
        """Bits per element of the tiers by their shares, and dense bits over them."""
        bits = self.salient_ratio * self.bits_hi + (1 - self.salient_ratio) * self.bits_lo
        return Axes(bits=bits, ratio=info.dense_bits / bits)

    def check(self, info: ModelInfo) -> None:
        """Refuse tiers in the wrong order."""
        super().check(info)
        if self.bits_lo > self.bits_hi:
            raise Infeasible(
                f"method {self.name}: bits_lo = {self.bits_lo} exceeds bits_hi = {self.bits_hi}; lower bits_lo"
            )

    def grids(self) -> Grids:
        """Keys per channel; values as ``v_scheme`` says."""
        return Grids(v_group=V_GROUP if self.v_scheme == "group32" else None, v_balanced=self.v_scheme == "cst")

    def tiers(self, block: AttentionCall) -> Sequence[tuple[int, KeptTokens]]:
        """The highest saliency at bits_hi."""
        return self._by_score(self.saliency(block), lengths(block), candidates(block))

    def new_tiers(self, query: AttentionCall, store: LayerStore) -> Sequence[tuple[int, KeptTokens]]:
        """The same among the tokens of a full buffer."""
        return self._by_score(self.new_saliency(query, store), [store.recent.tokens] * query.q_BHTD.shape[0], None)

    def _by_score(self, scores_BGN: Tensor, total: list[int], real_B1N: Tensor | None) -> list[tuple[int, KeptTokens]]:
        counts = [count_of(self.salient_ratio, n, least=0) for n in total]
        salient, regular = split(scores_BGN, counts, total, real_B1N)
        return [(self.bits_hi, salient), (self.bits_lo, regular)]


@METHODS.register("mixed-random")
@dataclass(frozen=True)
class MixedRandom(TwoTier):
    """Random tokens at ``bits_hi``: what a saliency must beat at equal bytes."""

    def saliency(self, prompt: AttentionCall) -> Tensor:
        """Random numbers, the same for the same prompt."""
        return uniform(prompt, "mixed-random")

    def new_saliency(self, query: AttentionCall, store: LayerStore) -> Tensor:
        """Random numbers by position."""
        block = store.recent
        tokens = replace(query, k_BGTD=block.k_BGND, order_BT=block.positions_BGN[:, 0], ids_BT=None)
        return uniform(tokens, "mixed-random")
