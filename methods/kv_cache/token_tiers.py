"""Packed tokens with grids of their own, which can be taken out, joined and encoded anew one by one.

What is quantised per token along its channels knows nothing of other tokens: any of them may leave, and others may follow.

Shape suffixes: B batch, G key-value heads, N tokens of a segment, M chosen tokens, D head width.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from isoflop.kernels.quant import Packed, quant_pack
from isoflop.methods.kv_cache.quantised import EXACT
from isoflop.methods.kv_cache.select import KeptTokens
from isoflop.models.growing import Rooms
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


@dataclass
class Tier:
    """Tokens in one encoding, some of which leave while others come.

    Attributes:
        codec: how they are encoded.
        segment: they themselves; None before the first.
    """

    codec: TokenCodec
    segment: Segment | None = None
    _rooms: Rooms = field(default_factory=Rooms, repr=False)

    @property
    def tokens(self) -> int:
        """Entries, empty ones included."""
        return 0 if self.segment is None else self.segment.tokens

    def append(self, tokens: DenseSegment) -> None:
        """Encode further tokens, behind those that are there."""
        new = self.codec.encode(tokens)
        self.segment = new if self.segment is None else _joined(self.segment, new, self._rooms)

    def keep(self, chosen: KeptTokens) -> None:
        """Let all others go."""
        if self.segment is not None:
            self._rooms = Rooms()
            self.segment = taken(self.segment, chosen, self._rooms)


def taken(segment: Segment, chosen: KeptTokens, rooms: Rooms | None = None) -> Segment:
    """The chosen tokens, packed ones as they are packed; empty entries get a bias of -inf.

    Args:
        rooms: where more are to follow.
    """
    growing, rooms = rooms is not None, rooms or Rooms()

    def take(name: str, x: Tensor) -> Tensor:
        return rooms.gather(name, x, chosen.index_BGM, growing)

    bias_BGM = None if segment.log_bias_BGN is None else take("bias", segment.log_bias_BGN)
    empty_BGM = chosen.bias(torch.float32)
    bias_BGM = empty_BGM if bias_BGM is None else bias_BGM if empty_BGM is None else bias_BGM + empty_BGM
    positions_BGM = take("positions", segment.positions_BGN)
    if isinstance(segment, DenseSegment):
        return DenseSegment(positions_BGM, bias_BGM, take("k", segment.k_BGND), take("v", segment.v_BGND))
    assert isinstance(segment, PackedSegment)
    k, v = (
        _packed(held, {n: take(f"{name} {n}", x) for n, x in _named(held)})
        for name, held in (("k", segment.k), ("v", segment.v))
    )
    return replace(segment, positions_BGN=positions_BGM, log_bias_BGN=bias_BGM, k=k, v=v)


def _joined(first: Segment, second: Segment, rooms: Rooms) -> Segment:
    """The tokens of one segment and then those of another of the same kind."""
    positions_BGN = rooms.append("positions", first.positions_BGN, second.positions_BGN)
    bias_BGN = None
    if first.log_bias_BGN is not None or second.log_bias_BGN is not None:
        parts = (
            s.positions_BGN.new_zeros(s.positions_BGN.shape, dtype=torch.float32)
            if s.log_bias_BGN is None
            else s.log_bias_BGN
            for s in (first, second)
        )
        bias_BGN = rooms.append("bias", *(part.float() for part in parts))
    if isinstance(first, DenseSegment) and isinstance(second, DenseSegment):
        k_BGND = rooms.append("k", first.k_BGND, second.k_BGND)
        return DenseSegment(positions_BGN, bias_BGN, k_BGND, rooms.append("v", first.v_BGND, second.v_BGND))
    assert isinstance(first, PackedSegment)
    assert isinstance(second, PackedSegment)
    k, v = (appended(a, b, rooms, name) for name, a, b in (("k", first.k, second.k), ("v", first.v, second.v)))
    return replace(first, positions_BGN=positions_BGN, log_bias_BGN=bias_BGN, k=k, v=v)


def appended(held: Packed, new: Packed, rooms: Rooms, name: str) -> Packed:
    """Tokens behind others that stay as they are packed; where grids lie along tokens, those held must fill theirs."""
    pairs = zip(_named(held), _named(new), strict=True)
    return _packed(held, {part: rooms.append(f"{name} {part}", x, y) for (part, x), (_, y) in pairs})


def _named(packed: Packed) -> list[tuple[str, Tensor]]:
    return list(zip(("codes", "scale", "zero"), packed.tensors(), strict=True))


def _packed(like: Packed, tensors: dict[str, Tensor]) -> Packed:
    shape = (*like.shape[:2], tensors["codes"].shape[2], like.shape[3])
    return replace(like, **tensors, shape=shape)  # type: ignore[arg-type]
