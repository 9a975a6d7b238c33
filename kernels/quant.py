"""Asymmetric round-to-nearest quantisation into packed bits, and back.

A group of values along one axis shares a grid ``zero + scale * code`` with ``code`` in 0 .. 2^bits - 1. Scale and zero are
kept in float16, rounded outwards (zero down, scale up), and codes are fitted to that rounded grid. So the grid spans the
group, and each value comes back within half a step, whatever float16 does to the grid.

Layout: codes are packed along the last dimension, each row by itself, as a little-endian bit stream. A row is padded to
whole units: the fewest codes that fill whole bytes (4 codes of 2 bits in 1 byte, 8 codes of 3 bits in 3 bytes). The axis
of the groups is independent of that: ``axis=-1`` is one grid per token and ``axis=-2`` one per channel of (..., N, D).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from isoflop.kernels.dispatch import operation

FP16_MAX = 65504.0
MAX_BITS = 8


@dataclass(frozen=True, eq=False)
class Packed:
    """A quantised tensor.

    Attributes:
        codes: uint8, the tensor's shape with bytes of a packed row as the last dimension.
        scale: float16 step of each group: the tensor's shape with groups in place of the quantised axis.
        zero: float16 value of code 0 of each group, same shape as ``scale``.
        bits: per code, 1 to 8.
        shape: of the tensor.
        axis: along which values share a grid, counted from the end (-1 is the last).
        group: values of one grid; the last group of an axis may be shorter.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor
    bits: int
    shape: tuple[int, ...]
    axis: int
    group: int

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and zeros."""
        return sum(t.nbytes for t in self.tensors())

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Everything that must stay resident."""
        return self.codes, self.scale, self.zero


def unit(bits: int) -> tuple[int, int]:
    """The fewest codes that fill whole bytes: (codes, bytes)."""
    common = math.gcd(bits, 8)
    return 8 // common, bits // common


def packed_nbytes(shape: tuple[int, ...], bits: int, axis: int = -1, group: int | None = None) -> int:
    """Bytes that ``quant_pack`` takes: rows of whole units, and 4 bytes (scale and zero) for each group."""
    length = shape[axis]
    groups = math.ceil(length / (group or max(length, 1)))
    grids = math.prod(shape) // length * groups if length else 0
    codes, size = unit(bits)
    return math.prod(shape[:-1]) * math.ceil(shape[-1] / codes) * size + 4 * grids


def _check(x: Tensor, bits: int, axis: int, group: int | None) -> tuple[int, int]:
    """(axis from the end, group), or a ValueError."""
    if not 1 <= bits <= MAX_BITS:
        raise ValueError(f"bits={bits}: codes have 1 to {MAX_BITS} bits")
    if not -x.dim() <= axis < x.dim():
        raise ValueError(f"axis={axis}: the tensor has {x.dim()} dimensions")
    if group is not None and group < 1:
        raise ValueError(f"group={group}: a group holds at least one value")
    axis = axis - x.dim() if axis >= 0 else axis
    length = max(x.shape[axis], 1)
    return axis, length if group is None else min(group, length)


def _half_below(x: Tensor) -> Tensor:
    """The largest finite float16 that is not above float32 ``x``; the least float16 for what lies below all of them."""
    half = x.clamp(-FP16_MAX, FP16_MAX).half()
    bits = half.view(torch.int16)
    # one step down: towards zero for positive numbers, away from it for negative ones; below zero lies -2^-24
    down = torch.where(half > 0, bits - 1, torch.where(half == 0, torch.full_like(bits, -0x7FFF), bits + 1))
    return torch.where((half.float() > x) & (x > -FP16_MAX), down.view(torch.float16), half)


def grid_of(low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Float16 (scale, zero) of a grid that spans ``low`` to ``high`` (float32).

    Constant groups get scale 0 and the nearest float16. Beyond float16 the grid stays finite, and values saturate at its
    ends.
    """
    zero = _half_below(low)
    scale = -_half_below(-(high - zero.float()) / (2**bits - 1))
    constant = low == high
    nearest = low.clamp(-FP16_MAX, FP16_MAX).half()
    return torch.where(constant, torch.zeros_like(scale), scale), torch.where(constant, nearest, zero)


def _grouped(x: Tensor, axis: int, group: int) -> Tensor:
    """``x`` with ``axis`` split into (groups, group); a short last group repeats its last value, which moves no end."""
    length = x.shape[axis]
    groups = math.ceil(length / group)
    if groups * group > length:
        x = x.index_select(axis, torch.arange(groups * group, device=x.device).clamp(max=length - 1))
    return x.unflatten(axis, (groups, group))


def _ungrouped(x: Tensor, axis: int, length: int) -> Tensor:
    """The inverse of ``_grouped``."""
    return x.flatten(axis - 1, axis).narrow(axis, 0, length)


def _word_type(size: int) -> torch.dtype:
    """An integer type that holds the bytes of a unit (torch lacks shifts of the wider unsigned types)."""
    return torch.uint8 if size == 1 else torch.int32 if size <= 3 else torch.int64


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Pack uint8 codes (..., n) along the last dimension into uint8 (..., bytes), padding with 0."""
    count, size = unit(bits)
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % count))
    units = padded.unflatten(-1, (padded.shape[-1] // count, count)).to(_word_type(size))
    word = units[..., 0].clone()
    for i in range(1, count):  # a reduction over so few elements would be slower
        word |= units[..., i] << (bits * i)
    if size == 1:
        return word
    return torch.stack([((word >> (8 * i)) & 255).to(torch.uint8) for i in range(size)], dim=-1).flatten(-2)


def unpack_bits(packed: Tensor, bits: int, length: int) -> Tensor:
    """The first ``length`` codes (uint8) of each row of ``pack_bits``."""
    count, size = unit(bits)
    units = packed.unflatten(-1, (packed.shape[-1] // size, size)).to(_word_type(size))
    word = units[..., 0].clone()
    for i in range(1, size):
        word |= units[..., i] << (8 * i)
    mask = 2**bits - 1
    codes = torch.stack([((word >> (bits * i)) & mask).to(torch.uint8) for i in range(count)], dim=-1)
    return codes.flatten(-2)[..., :length]


def _pack_supported(x: Tensor, bits: int, axis: int = -1, group: int | None = None) -> bool:
    axis, group = _check(x, bits, axis, group)
    whole_units = axis == -2 or group % unit(bits)[0] == 0 or group == x.shape[-1]
    fits = group <= 8192 if axis == -1 else math.prod(x.shape[:-2]) <= 65535  # a tile, a CUDA grid's third dimension
    return axis >= -2 and x.is_floating_point() and x.dtype != torch.float64 and x.numel() > 0 and whole_units and fits


@operation("isoflop.kernels.quant_triton:quant_pack", supports=_pack_supported)
def quant_pack(x: Tensor, bits: int, axis: int = -1, group: int | None = None) -> Packed:
    """Quantise ``x`` to ``bits`` bits, with one grid per ``group`` values along ``axis``.

    The grid is asymmetric min-max, codes are rounded to nearest (halves up) and clamped.

    Args:
        x: any shape of at least one dimension, without NaN; computed in float32.
        bits: 1 to 8.
        axis: values of a group lie along it.
        group: values that share a grid; None for the whole axis. Where it does not divide the axis, the last is shorter.

    Raises:
        ValueError: bits, axis or group out of range.
    """
    axis, group = _check(x, bits, axis, group)
    values = _grouped(x.float(), axis, group)
    low, high = values.aminmax(dim=axis) if values.numel() else (values.select(axis, 0),) * 2
    scale, zero = grid_of(low, high, bits)
    step = scale.float().masked_fill(scale == 0, torch.inf)  # constant groups get code 0, and no 0 / 0
    steps = (values - zero.float().unsqueeze(axis)).div_(step.unsqueeze(axis)).add_(0.5).floor_()
    codes = _ungrouped(steps.clamp_(0, 2**bits - 1).to(torch.uint8), axis, x.shape[axis])
    return Packed(pack_bits(codes, bits), scale, zero, bits, tuple(x.shape), axis, group)


def _unpack_supported(packed: Packed, dtype: torch.dtype = torch.float32) -> bool:
    return packed.axis >= -2 and math.prod(packed.shape) > 0 and dtype != torch.float64


@operation("isoflop.kernels.quant_triton:unpack", supports=_unpack_supported)
def unpack(packed: Packed, dtype: torch.dtype = torch.float32) -> Tensor:
    """The values on the grid, in the shape that was packed. Finite grids stay finite in float16 (they saturate)."""
    axis = packed.axis
    codes = unpack_bits(packed.codes, packed.bits, packed.shape[-1])
    scale, zero = (grid.float().unsqueeze(axis) for grid in (packed.scale, packed.zero))
    values = _grouped(codes, axis, packed.group).float().mul_(scale).add_(zero)
    if dtype == torch.float16:
        values.clamp_(-FP16_MAX, FP16_MAX)
    return _ungrouped(values, axis, packed.shape[axis]).to(dtype)
