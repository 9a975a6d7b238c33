"""What two layers' caches hold together: directions of keys and values once, and of each layer its norms and its exceptions.

Shape suffixes: B batch, G key-value heads, N tokens, D head width, M query rows of a key-value head, R exceptions of all rows
and heads.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from isoflop.kernels.decode_segments import SegmentPart
from isoflop.models.growing import Rooms
from isoflop.models.segments import Segment

_NEARLY_PARALLEL = 1e-4
"""Sine of an angle up to which two directions are mixed linearly."""


@dataclass
class PairPart:
    """Keys or values of two layers, lower and upper.

    Attributes:
        shared_BGND: what both read, directions or a mean.
        norms: (B, G, N) of each layer, which directions are multiplied by; None for a mean.
        owner_R, place_R: int32, row and head (b·G + g) and token of each exception.
        kept: (R, D) of each layer, what stands there instead.
        limits_BG: the angle by which exceptions are chosen among tokens that follow; None where none are merged.
    """

    shared_BGND: Tensor
    norms: list[Tensor] | None
    owner_R: Tensor
    place_R: Tensor
    kept: list[Tensor]
    limits_BG: Tensor | None
    _rooms: Rooms = field(default_factory=Rooms, repr=False)

    def append(self, other: PairPart) -> None:
        """Further tokens behind those that are there."""
        before = self.shared_BGND.shape[2]
        self.shared_BGND = self._rooms.append("shared", self.shared_BGND, other.shared_BGND)
        if self.norms is not None and other.norms is not None:
            pairs = enumerate(zip(self.norms, other.norms, strict=True))
            self.norms = [self._rooms.append(f"norm {side}", *pair) for side, pair in pairs]
        if len(other.owner_R):
            self.owner_R = torch.cat((self.owner_R, other.owner_R))
            self.place_R = torch.cat((self.place_R, other.place_R + before))
            self.kept = [torch.cat(pair) for pair in zip(self.kept, other.kept, strict=True)]

    def whole(self, side: int) -> Tensor:
        """One layer's vectors, (B, G, N, D)."""
        x_BGND = self.shared_BGND if self.norms is None else self.shared_BGND * self.norms[side][..., None]
        flat = x_BGND.flatten(0, 1).clone() if len(self.owner_R) else x_BGND.flatten(0, 1)
        if len(self.owner_R):
            flat[self.owner_R.long(), self.place_R.long()] = self.kept[side]
        return flat.view(x_BGND.shape)

    def products(self, q_BGMD: Tensor, side: int) -> Tensor:
        """Queries times one layer's keys: n·(q·e), (B, G, M, N) in float32 (section 3.2)."""
        q = q_BGMD.float()
        found_BGMN = q @ self.shared_BGND.float().transpose(-1, -2)
        if self.norms is not None:
            found_BGMN = found_BGMN * self.norms[side].float()[:, :, None]
        if len(self.owner_R):
            owner, place = self.owner_R.long(), self.place_R.long()
            exact_RM = (q.flatten(0, 1)[owner] @ self.kept[side].float()[..., None])[..., 0]
            found_BGMN.flatten(0, 1).transpose(1, 2)[owner, place] = exact_RM
        return found_BGMN

    def mixed(self, p_BGMN: Tensor, side: int) -> Tensor:
        """Weights times one layer's values: Σ (p·n)·e, (B, G, M, D)."""
        p = p_BGMN.float().flatten(0, 1)
        owner, place = self.owner_R.long(), self.place_R.long()
        exact_RM = p.transpose(1, 2)[owner, place]
        if len(self.owner_R):
            p = p.clone()
            p.transpose(1, 2)[owner, place] = 0.0
        if self.norms is not None:
            p = p * self.norms[side].float().flatten(0, 1)[:, None]
        found = p @ self.shared_BGND.float().flatten(0, 1)
        found.index_add_(0, owner, exact_RM[..., None] * self.kept[side].float()[:, None])
        return found.view(*p_BGMN.shape[:3], -1)

    def tensors(self, side: int) -> Iterable[Tensor]:
        """What one of the layers reads; what it shares with the other is the same tensor."""
        yield from (self.shared_BGND, self.owner_R, self.place_R, self.kept[side])
        if self.norms is not None:
            yield self.norms[side]
        if self.limits_BG is not None:
            yield self.limits_BG


@dataclass
class OwnPart:
    """Keys or values that two layers keep each for itself, (B, G, N, D)."""

    own: list[Tensor]
    _rooms: Rooms = field(default_factory=Rooms, repr=False)

    def append(self, other: OwnPart) -> None:
        """Further tokens behind those that are there."""
        pairs = enumerate(zip(self.own, other.own, strict=True))
        self.own = [self._rooms.append(f"own {side}", *pair) for side, pair in pairs]

    def whole(self, side: int) -> Tensor:
        """One layer's vectors."""
        return self.own[side]

    def products(self, q_BGMD: Tensor, side: int) -> Tensor:
        """Queries times keys."""
        return q_BGMD.float() @ self.own[side].float().transpose(-1, -2)

    def mixed(self, p_BGMN: Tensor, side: int) -> Tensor:
        """Weights times values."""
        return p_BGMN.float() @ self.own[side].float()

    def tensors(self, side: int) -> Iterable[Tensor]:
        """The layer's own."""
        yield self.own[side]


@dataclass
class Pair:
    """The caches of two layers.

    Attributes:
        k, v: keys and values.
        positions_BGN, log_bias_BGN: as in ``Segment``.
        devices: of the two layers; what they hold together lies where the lower one does, and queries come to it.
    """

    k: PairPart | OwnPart
    v: PairPart | OwnPart
    positions_BGN: Tensor
    log_bias_BGN: Tensor | None
    devices: tuple[torch.device, torch.device]
    _rooms: Rooms = field(default_factory=Rooms, repr=False)

    def append(self, other: Pair) -> None:
        """Further tokens behind those that are there."""
        for mine, new in ((self.k, other.k), (self.v, other.v)):
            mine.append(new)  # type: ignore[arg-type]
        self.positions_BGN = self._rooms.append("positions", self.positions_BGN, other.positions_BGN)
        if self.log_bias_BGN is not None or other.log_bias_BGN is not None:
            parts = (
                torch.zeros_like(p.positions_BGN, dtype=torch.float32)
                if p.log_bias_BGN is None
                else p.log_bias_BGN.float()
                for p in (self, other)
            )
            mine_BGN, new_BGN = parts
            mine_BGN = mine_BGN[:, :, : self.positions_BGN.shape[2] - new_BGN.shape[2]]
            self.log_bias_BGN = self._rooms.append("bias", mine_BGN, new_BGN)

    def segment(self, side: int) -> PairSegment:
        """What the lower (0) or upper (1) layer reads."""
        device = self.devices[side]
        bias_BGN = None if self.log_bias_BGN is None else self.log_bias_BGN.to(device)
        return PairSegment(self.positions_BGN.to(device), bias_BGN, self, side)


@dataclass
class PairSegment(Segment):
    """One layer's view of a pair."""

    pair: Pair
    side: int

    def part(self) -> SegmentPart:
        """Multiplied out, for readers that know no pairs."""
        k_BGND, v_BGND = (part.whole(self.side).to(self.positions_BGN.device) for part in (self.pair.k, self.pair.v))
        return SegmentPart(k_BGND, v_BGND, self.log_bias_BGN)

    def tensors(self) -> Iterable[Tensor]:
        """Shared ones are the same in both layers, and count once."""
        yield from (*self.pair.k.tensors(self.side), *self.pair.v.tensors(self.side))
        if self.log_bias_BGN is not None:
            yield self.log_bias_BGN

    def products(self, q_BGMD: Tensor) -> Tensor:
        """See ``PairPart``."""
        return self.pair.k.products(q_BGMD.to(self.pair.devices[0]), self.side).to(q_BGMD.device)

    def mixed(self, p_BGMN: Tensor) -> Tensor:
        """See ``PairPart``."""
        return self.pair.v.mixed(p_BGMN.to(self.pair.devices[0]), self.side).to(p_BGMN.device)


def angles(lower_BGND: Tensor, upper_BGND: Tensor) -> Tensor:
    """Between the directions of two vectors, 0 to π, (B, G, N); of a zero vector and any other it is 0."""
    products_BGN = (lower_BGND.float() * upper_BGND.float()).sum(-1)
    norms_BGN = lower_BGND.float().norm(dim=-1) * upper_BGND.float().norm(dim=-1)
    return torch.where(norms_BGN > 0, products_BGN / norms_BGN.clamp(min=1e-30), 1.0).clamp(-1, 1).arccos()


def between(lower_BGND: Tensor, upper_BGND: Tensor, t: float) -> Tensor:
    """The unit vector at t of the way from the lower's direction to the upper's, along the sphere (equation 3)."""
    low, up = (torch.nn.functional.normalize(x.float(), dim=-1, eps=1e-30) for x in (lower_BGND, upper_BGND))
    angle = angles(lower_BGND, upper_BGND)[..., None]
    sine = angle.sin()
    flat = sine < _NEARLY_PARALLEL
    safe = sine.masked_fill(flat, 1.0)
    mixed = torch.where(
        flat, (1 - t) * low + t * up, ((1 - t) * angle).sin() / safe * low + (t * angle).sin() / safe * up
    )
    return torch.nn.functional.normalize(mixed, dim=-1, eps=1e-30).to(lower_BGND.dtype)
