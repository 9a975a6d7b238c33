"""Payloads: a matrix in its stored form. What is counted is what is stored, and what is served is decoded from it.

Every payload holds tensors, and settings (shape, bits, group …) that are configuration and cost nothing per weight. Its
bytes are those of its tensors, which is the length of ``serialise``; only full-precision weights kept as they are count
``dense_bits`` per element (see ``ModelInfo.dense_bits``).

Shape suffixes: O outputs (rows), I inputs (columns), K rank of a block, S blocks of a stack.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from isoflop.kernels.quant import Packed, pack_bits, quant_pack, unpack, unpack_bits
from isoflop.models.base import tensor_bytes


class _Kinds(dict[str, "type[Payload]"]):
    def __missing__(self, kind: str) -> type[Payload]:
        from isoflop.methods.base import METHODS

        METHODS.names()  # imports whatever defines methods, their payloads with them
        found = self.get(kind)
        if found is None:
            raise KeyError(f"payload of kind {kind!r}: the method that stored it is not installed")
        return found


PAYLOADS: dict[str, type[Payload]] = _Kinds()
"""Every class of payloads by its kind, which its definition puts here."""


@dataclass(frozen=True, eq=False)
class Payload(ABC):
    """A stored matrix.

    Attributes:
        shape: (rows, cols) of the matrix.
    """

    kind: ClassVar[str]
    shape: tuple[int, int]

    def __init_subclass__(cls) -> None:
        if "kind" in vars(cls):
            PAYLOADS[cls.kind] = cls

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Everything that must be stored, by name."""

    def settings(self) -> dict[str, Any]:
        """The rest, as plain JSON types."""
        return {"shape": list(self.shape)}

    @classmethod
    @abstractmethod
    def restore(cls, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Payload:
        """The payload from its settings and tensors."""

    @abstractmethod
    def decode(self) -> Tensor:
        """The matrix (O, I) as it is served, in float32 (kept weights in their own type)."""

    def nbytes(self, dense_bits: int = 32) -> float:
        """Bytes as stored; float32 tensors count ``dense_bits`` per element."""
        return sum(tensor_bytes(t, dense_bits) for t in self.tensors().values())

    def serialise(self) -> bytes:
        """The tensors' bytes one after the other, in the order of ``tensors``."""
        parts = (t.detach().cpu().contiguous().flatten() for t in self.tensors().values())
        return b"".join(part.view(torch.uint8).numpy().tobytes() for part in parts)


@dataclass(frozen=True, eq=False)
class DensePayload(Payload):
    """The matrix as it is."""

    kind: ClassVar[str] = "dense"
    weight_OI: Tensor

    @classmethod
    def of(cls, weight_OI: Tensor) -> DensePayload:
        """Keep a copy."""
        return cls((weight_OI.shape[0], weight_OI.shape[1]), weight_OI.clone().contiguous())

    def tensors(self) -> dict[str, Tensor]:
        """The weights."""
        return {"weight": self.weight_OI}

    @classmethod
    def restore(cls, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> DensePayload:
        """The inverse of ``tensors``."""
        return cls(_shape(settings), tensors["weight"])

    def decode(self) -> Tensor:
        """The weights."""
        return self.weight_OI


@dataclass(frozen=True, eq=False)
class AbsentPayload(Payload):
    """Nothing: the matrix of a part that is left out."""

    kind: ClassVar[str] = "absent"

    def tensors(self) -> dict[str, Tensor]:
        """None."""
        return {}

    @classmethod
    def restore(cls, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> AbsentPayload:
        """The inverse of ``settings``."""
        return cls(_shape(settings))

    def decode(self) -> Tensor:
        """Zeros."""
        return torch.zeros(self.shape)


@dataclass(frozen=True, eq=False)
class GridPayload(Payload):
    """Codes on uniform grids, one grid per group of weights of a row: bits + 32/group bits per weight."""

    kind: ClassVar[str] = "grid"
    packed: Packed

    @classmethod
    def round(cls, weight_OI: Tensor, bits: int, group: int) -> GridPayload:
        """Round to nearest on asymmetric min-max grids along the inputs."""
        return cls((weight_OI.shape[0], weight_OI.shape[1]), quant_pack(weight_OI.contiguous(), bits, -1, group))

    @classmethod
    def of_codes(cls, codes_OI: Tensor, scale_OG: Tensor, zero_OG: Tensor, bits: int, group: int) -> GridPayload:
        """From codes chosen elsewhere; ``scale_OG`` and ``zero_OG`` are float16, one per group."""
        shape = (codes_OI.shape[0], codes_OI.shape[1])
        packed = Packed(pack_bits(codes_OI, bits), scale_OG, zero_OG, bits, shape, -1, min(group, shape[1]))
        return cls(shape, packed)

    def tensors(self) -> dict[str, Tensor]:
        """Codes, scales and zeros."""
        return {"codes": self.packed.codes, "scale": self.packed.scale, "zero": self.packed.zero}

    def settings(self) -> dict[str, Any]:
        """Shape, bits and group."""
        return {**super().settings(), "bits": self.packed.bits, "group": self.packed.group}

    @classmethod
    def restore(cls, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> GridPayload:
        """The inverse of ``settings`` and ``tensors``."""
        shape = _shape(settings)
        grid = (tensors["codes"], tensors["scale"], tensors["zero"])
        return cls(shape, Packed(*grid, settings["bits"], shape, -1, settings["group"]))

    def decode(self) -> Tensor:
        """Values on the grids."""
        return unpack(self.packed)


@dataclass(frozen=True, eq=False)
class BitmapPayload(Payload):
    """Kept weights and one bit per position, or per group of neighbours: 16·(1 - sparsity) + 1/group bits per weight at 16-bit weights."""

    kind: ClassVar[str] = "bitmap"
    kept: Tensor
    bitmap: Tensor
    group: int = 1

    @classmethod
    def of(cls, weight_OI: Tensor, keep_OI: Tensor, group: int = 1) -> BitmapPayload:
        """Keep what ``keep_OI`` marks.

        Raises:
            ValueError: it marks parts of a group.
        """
        keep_NG = keep_OI.reshape(-1, group)
        if not torch.equal(keep_NG.any(1), keep_NG.all(1)):
            raise ValueError(f"a bitmap of groups keeps {group} neighbours or none of them")
        bits = pack_bits(keep_NG[:, 0].to(torch.uint8), 1)
        return cls((weight_OI.shape[0], weight_OI.shape[1]), weight_OI[keep_OI], bits, group)

    def tensors(self) -> dict[str, Tensor]:
        """Kept weights in row-major order, and the bitmap."""
        return {"kept": self.kept, "bitmap": self.bitmap}

    def settings(self) -> dict[str, Any]:
        """The shape, and the group where there is one."""
        return {**super().settings(), **({"group": self.group} if self.group > 1 else {})}

    @classmethod
    def restore(cls, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> BitmapPayload:
        """The inverse of ``settings`` and ``tensors``."""
        return cls(_shape(settings), tensors["kept"], tensors["bitmap"], settings.get("group", 1))

    def decode(self) -> Tensor:
        """Zeros with the kept weights in their places."""
        rows, cols = self.shape
        keep_N = unpack_bits(self.bitmap, 1, rows * cols // self.group).bool()
        keep_OI = keep_N.repeat_interleave(self.group).view(rows, cols)
        weight_OI = self.kept.new_zeros(rows, cols)
        weight_OI[keep_OI] = self.kept
        return weight_OI


@dataclass(frozen=True, eq=False)
class PatternPayload(Payload):
    """N:M sparsity: in every M inputs of a row N weights are kept, each with its place in log2 M bits."""

    kind: ClassVar[str] = "pattern"
    kept: Tensor
    places: Tensor
    pattern: tuple[int, int]

    @classmethod
    def of(cls, weight_OI: Tensor, keep_OI: Tensor, pattern: tuple[int, int]) -> PatternPayload:
        """Keep what ``keep_OI`` marks: N in every M of a row.

        Raises:
            ValueError: another number is marked somewhere.
        """
        n, m = pattern
        rows, cols = weight_OI.shape
        if not bool((keep_OI.unflatten(1, (-1, m)).sum(-1) == n).all()):
            raise ValueError(f"a {n}:{m} pattern keeps {n} in every {m} inputs")
        places = (torch.arange(cols, device=weight_OI.device) % m).expand(rows, cols)[keep_OI]
        return cls((rows, cols), weight_OI[keep_OI], pack_bits(places.to(torch.uint8), _place_bits(m)), pattern)

    def tensors(self) -> dict[str, Tensor]:
        """Kept weights in row-major order, and their places."""
        return {"kept": self.kept, "places": self.places}

    def settings(self) -> dict[str, Any]:
        """Shape and pattern."""
        return {**super().settings(), "pattern": list(self.pattern)}

    @classmethod
    def restore(cls, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> PatternPayload:
        """The inverse of ``settings`` and ``tensors``."""
        n, m = settings["pattern"]
        return cls(_shape(settings), tensors["kept"], tensors["places"], (n, m))

    def decode(self) -> Tensor:
        """Zeros with the kept weights in their places."""
        n, m = self.pattern
        places = unpack_bits(self.places, _place_bits(m), self.kept.numel()).long().view(-1, n)
        groups = self.kept.new_zeros(places.shape[0], m)
        groups.scatter_(1, places, self.kept.view(-1, n))
        return groups.view(self.shape)


@dataclass(frozen=True, eq=False)
class StackPayload(Payload):
    """A stack of residual blocks, each a rank-K product, with a sign per weight where ``signs`` is kept.

    A block takes ⌈O·I/8⌉ bytes of signs and 2·K·(O + I) bytes of float16 factors.

    Attributes:
        left_SOK, right_SKI: float16 factors.
        signs: packed signs (S, bytes), 1 for +; None for plain low-rank blocks.
        divisor_I: float16; input channels are divided by it after decoding, or None.
    """

    kind: ClassVar[str] = "stack"
    left_SOK: Tensor
    right_SKI: Tensor
    signs: Tensor | None
    divisor_I: Tensor | None = None

    @property
    def blocks(self) -> int:
        """S."""
        return self.left_SOK.shape[0]

    def prefix(self, blocks: int) -> StackPayload:
        """The first blocks."""
        signs = None if self.signs is None else self.signs[:blocks]
        return replace(self, left_SOK=self.left_SOK[:blocks], right_SKI=self.right_SKI[:blocks], signs=signs)

    def tensors(self) -> dict[str, Tensor]:
        """Factors, signs and divisor."""
        found = {"left": self.left_SOK, "right": self.right_SKI, "signs": self.signs, "divisor": self.divisor_I}
        return {name: t for name, t in found.items() if t is not None}

    @classmethod
    def restore(cls, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> StackPayload:
        """The inverse of ``settings`` and ``tensors``."""
        return cls(_shape(settings), tensors["left"], tensors["right"], tensors.get("signs"), tensors.get("divisor"))

    def block(self, number: int) -> Tensor:
        """One block (O, I), not divided."""
        product_OI = self.left_SOK[number].float() @ self.right_SKI[number].float()
        if self.signs is None:
            return product_OI
        rows, cols = self.shape
        return product_OI * signs_of(self.signs[number], rows * cols).view(rows, cols)

    def decode(self) -> Tensor:
        """The sum of all blocks."""
        total_OI = self.left_SOK.new_zeros(self.shape, dtype=torch.float32)
        for number in range(self.blocks):
            total_OI += self.block(number)
        return total_OI if self.divisor_I is None else total_OI / self.divisor_I.float()


def pack_signs(x: Tensor) -> Tensor:
    """Signs of all entries, one bit each in row-major order, ⌈n/8⌉ bytes; zero counts as positive."""
    return pack_bits((x.flatten() >= 0).to(torch.uint8), 1)


def signs_of(packed: Tensor, count: int) -> Tensor:
    """±1 in float32, (count,): the inverse of :func:`pack_signs`."""
    return unpack_bits(packed, 1, count).float() * 2 - 1


def _shape(settings: Mapping[str, Any]) -> tuple[int, int]:
    rows, cols = settings["shape"]
    return rows, cols


def _place_bits(m: int) -> int:
    return (m - 1).bit_length()
