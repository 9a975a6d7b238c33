"""Uniform grids of a row's weights: with any point as zero, with a whole zero point, or symmetric about zero.

A ``float`` grid spans a group's least to its largest weight, and keeps the value of code 0. An ``integer`` grid holds 0, whose
code is a whole number, and a ``symmetric`` one reaches as far below 0 as above; both are what released quantisers fit and what
engines read: a value is ``scale · (code - zero)``.

Shape suffixes: O outputs (rows), I inputs (columns), G groups, W columns of a group.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from isoflop.core.errors import Infeasible
from isoflop.kernels.quant import FP16_MAX, grid_of, pack_bits, unpack_bits
from isoflop.methods.weights.payloads import GridPayload, Payload

FLOAT, INTEGER, SYMMETRIC = "float", "integer", "symmetric"
GRIDS = (FLOAT, INTEGER, SYMMETRIC)
GRID_DOC = "a zero anywhere, a whole zero point as released quantisers and engines have it, or zero in the middle"
LEAST = 2.0**-24
"""The least step of float16 above 0."""


@dataclass(frozen=True, eq=False)
class IntegerGridPayload(Payload):
    """Codes on integer or symmetric grids: bits + (16 + bits)/group bits per weight, or bits + 16/group.

    Attributes:
        codes: packed by row.
        scale_OG: float16 steps.
        zeros: the codes of 0, packed by row; None where they are all 2^(bits-1).
    """

    kind: ClassVar[str] = "integer-grid"
    codes: Tensor
    scale_OG: Tensor
    zeros: Tensor | None
    bits: int
    group: int

    @classmethod
    def round(cls, weight_OI: Tensor, bits: int, group: int, symmetric: bool) -> IntegerGridPayload:
        """Round to nearest, group by group."""
        rows, cols = weight_OI.shape
        group = min(group, cols)
        grid = IntegerGrid(bits, symmetric)
        # zeros are on every grid of this kind, so that they fill the last group without moving it
        padded = torch.nn.functional.pad(weight_OI.float(), (0, -cols % group)).unflatten(1, (-1, group))
        scale_OG, zero_OG = grid.fit(padded.flatten(0, 1))
        codes = grid.codes(padded.flatten(0, 1).T, grid.ready(scale_OG, zero_OG, torch.float32)).T
        codes_OI = codes.to(torch.uint8).view(rows, -1)[:, :cols]
        return grid.payload(codes_OI, scale_OG.view(rows, -1), zero_OG.view(rows, -1), group)

    def tensors(self) -> dict[str, Tensor]:
        """Codes, scales and zeros."""
        zeros = {} if self.zeros is None else {"zeros": self.zeros}
        return {"codes": self.codes, "scale": self.scale_OG, **zeros}

    def settings(self) -> dict[str, Any]:
        """Shape, bits and group."""
        return {**super().settings(), "bits": self.bits, "group": self.group}

    @classmethod
    def restore(cls, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> IntegerGridPayload:
        """The inverse of ``settings`` and ``tensors``."""
        rows, cols = settings["shape"]
        stored = (tensors["codes"], tensors["scale"], tensors.get("zeros"))
        return cls((rows, cols), *stored, settings["bits"], settings["group"])

    @property
    def codes_OI(self) -> Tensor:
        """Codes, uint8."""
        return unpack_bits(self.codes, self.bits, self.shape[1])

    @property
    def zero_OG(self) -> Tensor:
        """Codes of 0, uint8."""
        if self.zeros is None:
            return torch.full_like(self.scale_OG, 2 ** (self.bits - 1), dtype=torch.uint8)
        return unpack_bits(self.zeros, self.bits, self.scale_OG.shape[1])

    def decode(self) -> Tensor:
        """Values on the grids."""
        group_I = torch.arange(self.shape[1], device=self.codes.device) // self.group
        steps_OI = self.codes_OI.float() - self.zero_OG.float()[:, group_I]
        return steps_OI * self.scale_OG.float()[:, group_I]


@dataclass(frozen=True, eq=False)
class PermutedPayload(Payload):
    """A payload of the columns in another order, and that order: 2 bytes per column, or 4 beyond 32,767.

    Attributes:
        inner: of the permuted matrix.
        order_I: the column of the matrix that each column of ``inner`` is.
    """

    kind: ClassVar[str] = "permuted"
    inner: Payload
    order_I: Tensor

    @classmethod
    def of(cls, inner: Payload, order_I: Tensor) -> PermutedPayload:
        """Keep the order in as few bytes as hold it."""
        small = len(order_I) <= torch.iinfo(torch.int16).max
        return cls(inner.shape, inner, order_I.to(torch.int16 if small else torch.int32))

    def tensors(self) -> dict[str, Tensor]:
        """Those of the inner payload, and the order."""
        return {**self.inner.tensors(), "order": self.order_I}

    def settings(self) -> dict[str, Any]:
        """Kind and settings of the inner payload."""
        return {**super().settings(), "inner": self.inner.kind, "settings": self.inner.settings()}

    @classmethod
    def restore(cls, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> PermutedPayload:
        """The inverse of ``settings`` and ``tensors``."""
        from isoflop.methods.weights.payloads import PAYLOADS

        inner = {name: t for name, t in tensors.items() if name != "order"}
        found = PAYLOADS[settings["inner"]].restore(settings["settings"], inner)
        return cls(found.shape, found, tensors["order"])

    def decode(self) -> Tensor:
        """The columns in their places."""
        permuted_OI = self.inner.decode()
        weight_OI = torch.empty_like(permuted_OI)
        weight_OI[:, self.order_I.long()] = permuted_OI
        return weight_OI


Ready = tuple[Tensor, Tensor, Tensor]
"""Step, zero and divisor of each row, in the type that is computed in."""


@dataclass(frozen=True)
class Grid(ABC):
    """How a group's grid is fitted and what a weight becomes on it."""

    bits: int

    @abstractmethod
    def fit(self, weight_OW: Tensor) -> tuple[Tensor, Tensor]:
        """(scale, zero) of each row, as stored: scales in float16."""

    def ready(self, scale_O: Tensor, zero_O: Tensor, dtype: torch.dtype) -> Ready:
        """What ``codes`` and ``values`` compute with."""
        step_O = scale_O.to(dtype)
        return step_O, zero_O.to(dtype), step_O.masked_fill(step_O == 0, math.inf)

    @abstractmethod
    def codes(self, column_O: Tensor, ready: Ready) -> Tensor:
        """The nearest codes, as floats; rows are the last dimension."""

    @abstractmethod
    def values(self, codes_O: Tensor, ready: Ready) -> Tensor:
        """What codes stand for; may write into ``codes_O``."""

    @abstractmethod
    def payload(self, codes_OI: Tensor, scale_OG: Tensor, zero_OG: Tensor, group: int) -> Payload:
        """What is stored."""


@dataclass(frozen=True)
class FloatGrid(Grid):
    """From a group's least to its largest weight; a constant group has code 0 alone. Halves are rounded up."""

    def fit(self, weight_OW: Tensor) -> tuple[Tensor, Tensor]:
        """Both in float16."""
        return grid_of(*weight_OW.float().aminmax(dim=1), self.bits)

    def codes(self, column_O: Tensor, ready: Ready) -> Tensor:
        """See ``Grid``."""
        _, zero_O, divisor_O = ready
        steps_O = (column_O - zero_O).div_(divisor_O)
        return steps_O.add_(0.5).floor_().clamp_(0, 2**self.bits - 1)

    def values(self, codes_O: Tensor, ready: Ready) -> Tensor:
        """See ``Grid``."""
        step_O, zero_O, _ = ready
        return codes_O.mul_(step_O).add_(zero_O)

    def payload(self, codes_OI: Tensor, scale_OG: Tensor, zero_OG: Tensor, group: int) -> Payload:
        """See ``Grid``."""
        return GridPayload.of_codes(codes_OI, scale_OG, zero_OG, self.bits, group)


@dataclass(frozen=True)
class IntegerGrid(Grid):
    """From the lesser of 0 and the least weight to the larger of 0 and the largest, or as far on both sides.

    As released with GPTQ, scales in float16 and not in float32; halves are rounded to even.
    """

    symmetric: bool = False

    def fit(self, weight_OW: Tensor) -> tuple[Tensor, Tensor]:
        """Scales in float16, codes of 0 in uint8."""
        low_O, high_O = weight_OW.float().aminmax(dim=1)
        low_O, high_O = low_O.clamp(max=0), high_O.clamp(min=0)
        if self.symmetric:
            high_O = torch.maximum(-low_O, high_O)
            low_O = -high_O
        empty_O = low_O == high_O  # nothing but zeros
        low_O, high_O = low_O.masked_fill(empty_O, -1.0), high_O.masked_fill(empty_O, 1.0)
        step_O = ((high_O - low_O) / (2**self.bits - 1)).clamp(LEAST, FP16_MAX)
        if self.symmetric:
            return step_O.half(), torch.full_like(step_O, 2 ** (self.bits - 1), dtype=torch.uint8)
        return step_O.half(), (-low_O / step_O).round_().clamp_(0, 2**self.bits - 1).to(torch.uint8)

    def codes(self, column_O: Tensor, ready: Ready) -> Tensor:
        """See ``Grid``."""
        step_O, zero_O, _ = ready
        return (column_O / step_O).round_().add_(zero_O).clamp_(0, 2**self.bits - 1)

    def values(self, codes_O: Tensor, ready: Ready) -> Tensor:
        """See ``Grid``."""
        step_O, zero_O, _ = ready
        return codes_O.sub_(zero_O).mul_(step_O)

    def payload(self, codes_OI: Tensor, scale_OG: Tensor, zero_OG: Tensor, group: int) -> IntegerGridPayload:
        """See ``Grid``."""
        zeros = None if self.symmetric else pack_bits(zero_OG, self.bits)
        shape = (codes_OI.shape[0], codes_OI.shape[1])
        packed = pack_bits(codes_OI.contiguous(), self.bits)
        return IntegerGridPayload(shape, packed, scale_OG.contiguous(), zeros, self.bits, min(group, shape[1]))


def grid_named(name: str, bits: int) -> Grid:
    """The grid that a knob names."""
    return FloatGrid(bits) if name == FLOAT else IntegerGrid(bits, name == SYMMETRIC)


def check_grid(method: str, name: str, bits: int) -> None:
    """Raise Infeasible where a grid has too few values to stand on both sides of 0."""
    if name == SYMMETRIC and bits == 1:
        raise Infeasible(
            f"method {method}: grid = {SYMMETRIC} has nothing above 0 in bits = 1; allowed: bits from 2, or grid {FLOAT} or {INTEGER}"
        )
