"""QuaRot's cache: keys and values rotated, then quantised token by token (arXiv 2404.00456).

Shape suffixes: B batch, H query heads, G key-value heads, T queries, N tokens, D head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor

from isoflop.core.errors import Infeasible
from isoflop.core.knobs import Knob
from isoflop.kernels.quant import quant_pack
from isoflop.methods.base import METHODS
from isoflop.methods.hadamard import hadamard, has_hadamard
from isoflop.methods.kv_cache.base import empty_recent, whole_prompt
from isoflop.methods.kv_cache.packing import Packs
from isoflop.methods.kv_cache.quantised import EXACT, KeyAndValueBits
from isoflop.methods.kv_cache.select import all_tokens
from isoflop.methods.kv_cache.token_tiers import Tier, TokenCodec
from isoflop.models.base import ModelInfo
from isoflop.models.hooks.attention import AttentionCall
from isoflop.models.segments import DenseSegment, LayerStore, PackedSegment, Segment, attend_segments, decode_one


@METHODS.register("quarot-kv")
@dataclass(frozen=True)
class QuarotKv(KeyAndValueBits, Packs):
    """A Hadamard matrix spreads the large channels of keys and values over all channels of a head; then few bits suffice per token.

    Keys and queries are rotated behind RoPE, which leaves their products as they are; values are rotated, and outputs back. Every
    token is quantised as it comes, asymmetrically, with ends of the grid at ``clip`` times the largest and smallest entry of its
    group, or at the entries themselves where they all lie on one side of that. Zero points are numbers, as in the released kernels,
    and not whole steps, as in its simulation. The method's weights and activations are not part of this.
    """

    paper: ClassVar[str] = "arXiv 2404.00456"

    group: Annotated[int, Knob(low=0, high=65536, unit="values", doc="channels of one grid; 0: all of a head")] = 0
    clip: Annotated[float, Knob(low=0.5, high=1.0, doc="share of a group's range that its grid spans")] = 0.95

    def check(self, info: ModelInfo) -> None:
        """Refuse heads of a width without a Hadamard matrix."""
        super().check(info)
        width = info.geometry.get("head_width", info.geometry["width"] // info.geometry["heads"])
        if self.bits < EXACT and not has_hadamard(width):
            raise Infeasible(
                f"method quarot-kv: no Hadamard matrix of {width} channels, the width of a head of model {info.ref}, is known here; allowed: "
                "powers of two, and 12, 20, 28, 36, 44, 60 … times them"
            )
        if self.group and width % self.group:
            raise Infeasible(
                f"method quarot-kv: groups of {self.group} channels (group) do not divide a head of {width}; allowed: 0 for all of them, "
                "or a divisor"
            )

    def compress(self, prompt: AttentionCall, prepared: Any) -> LayerStore:
        """All tokens, rotated and packed."""
        store = LayerStore([], empty_recent(prompt))
        whole = whole_prompt(prompt)
        if self.bits >= EXACT:
            store.segments = [whole]
            return store
        kept = all_tokens(prompt)
        self._take_in(whole.taken(kept.index_BGM, kept.bias(torch.float32)), store)
        return store

    def read(self, query: AttentionCall, store: LayerStore, prepared: Any) -> Tensor:
        """In the rotated basis, and the outputs back."""
        if self.bits >= EXACT:
            return super().read(query, store, prepared)
        turn_DD = hadamard(query.q_BHTD.shape[-1]).to(query.q_BHTD.device)
        q_BHTD = (query.q_BHTD.float() @ turn_DD).to(query.q_BHTD.dtype)
        if q_BHTD.shape[2] == 1:
            out_BTHD = decode_one(q_BHTD, store.segments, query.softmax)
        else:
            out_BTHD = attend_segments(q_BHTD, store.segments, query.softmax, query.order_BT)[0]
        return (out_BTHD.float() @ turn_DD.T).to(out_BTHD.dtype)

    def step(self, query: AttentionCall, store: LayerStore, prepared: Any) -> Tensor:
        """Pack the new tokens, then read: a token is never read exactly, not even by itself."""
        if self.bits < EXACT:
            self._take_in(store.recent, store)
            store.recent = empty_recent(query)
        return self.read(query, store, prepared)

    def pack(self, kept: DenseSegment) -> list[Segment]:
        """The same of tokens that another method keeps."""
        return [kept] if self.bits >= EXACT else [self._codec(kept.k_BGND.shape[-1]).encode(kept)]

    def _codec(self, width: int) -> RotatedCodec:
        return RotatedCodec(self.bits, self.group or width, v_bits=self.value_bits or self.bits, clip=self.clip)

    def _take_in(self, tokens: DenseSegment, store: LayerStore) -> None:
        if "tier" not in store.state:
            held = store.segments[0] if store.segments else None
            store.state["tier"] = Tier(self._codec(tokens.k_BGND.shape[-1]), held)
        store.state["tier"].append(tokens)
        store.segments = [store.state["tier"].segment]


@dataclass(frozen=True, eq=False)
class RotatedCodec(TokenCodec):
    """Tokens rotated and clipped before they are packed.

    Attributes:
        v_bits: per element of the values.
        clip: see ``QuarotKv``.
    """

    v_bits: int = 4
    clip: float = 1.0

    def encode(self, tokens: DenseSegment) -> Segment:
        """Packed tokens in the rotated basis."""
        turn_DD = hadamard(tokens.k_BGND.shape[-1]).to(tokens.k_BGND.device)
        k, v = (
            quant_pack(clipped(x.float() @ turn_DD, self.group, self.clip), bits, -1, self.group)
            for x, bits in ((tokens.k_BGND, self.bits), (tokens.v_BGND, self.v_bits))
        )
        return PackedSegment(tokens.positions_BGN, tokens.log_bias_BGN, k, v)


def clipped(x_BGND: Tensor, group: int, clip: float) -> Tensor:
    """``x`` with each group of channels cut to ``clip`` times its largest and smallest entry."""
    width = x_BGND.shape[-1]
    if clip >= 1:
        return x_BGND
    x_BGNXg = x_BGND.unflatten(-1, (width // group, group))
    low, high = x_BGNXg.amin(-1, keepdim=True), x_BGNXg.amax(-1, keepdim=True)
    return x_BGNXg.clamp(torch.minimum(low * clip, high), torch.maximum(high * clip, low)).flatten(-2)
