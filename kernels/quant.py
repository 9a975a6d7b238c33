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


def _over_groups(grid: Tensor, axis: int, group: int, length: int) -> Tensor:
    """A grid's parameters repeated for each value along ``axis``."""
    if grid.shape[axis] == 1 or length == 0:
        return grid
    return grid.repeat_interleave(group, dim=axis).narrow(axis, 0, length)


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Pack integer codes (..., n) along the last dimension into uint8 (..., bytes), padding with 0."""
    count, size = unit(bits)
    wide = torch.int32 if size * 8 <= 24 else torch.int64
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % count)).to(wide)
    shifts = torch.arange(count, device=codes.device, dtype=wide) * bits
    words = (padded.unflatten(-1, (-1, count)) << shifts).sum(-1, dtype=wide)
    bytes_at = torch.arange(size, device=codes.device, dtype=wide) * 8
    return ((words[..., None] >> bytes_at) & 255).to(torch.uint8).flatten(-2)


def unpack_bits(packed: Tensor, bits: int, length: int) -> Tensor:
    """The first ``length`` codes (uint8) of each row of ``pack_bits``."""
    count, size = unit(bits)
    wide = torch.int32 if size * 8 <= 24 else torch.int64
    bytes_at = torch.arange(size, device=packed.device, dtype=wide) * 8
    words = (packed.unflatten(-1, (-1, size)).to(wide) << bytes_at).sum(-1, dtype=wide)
    shifts = torch.arange(count, device=packed.device, dtype=wide) * bits
    return ((words[..., None] >> shifts) & (2**bits - 1)).to(torch.uint8).flatten(-2)[..., :length]


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
    length = x.shape[axis]
    values = x.float()
    groups = math.ceil(length / group)
    if length == 0:
        low = high = values.new_empty(values.shape)
    else:  # a short last group repeats its last value, which changes neither end
        padded = values.index_select(
            axis, torch.arange(groups * group, device=x.device).clamp(max=length - 1)
        ) if groups * group > length else values  # fmt: skip
        low, high = padded.unflatten(axis, (groups, group)).aminmax(dim=axis)
    scale, zero = grid_of(low, high, bits)
    step = _over_groups(scale, axis, group, length).float()
    start = _over_groups(zero, axis, group, length).float()
    steps = (values - start) / torch.where(step == 0, torch.ones_like(step), step)
    codes = (steps + 0.5).floor().clamp(0, 2**bits - 1).to(torch.uint8)
    codes = torch.where(step == 0, torch.zeros_like(codes), codes)
    return Packed(pack_bits(codes, bits), scale, zero, bits, tuple(x.shape), axis, group)


def _unpack_supported(packed: Packed, dtype: torch.dtype = torch.float32) -> bool:
    return packed.axis >= -2 and math.prod(packed.shape) > 0 and dtype != torch.float64


@operation("isoflop.kernels.quant_triton:unpack", supports=_unpack_supported)
def unpack(packed: Packed, dtype: torch.dtype = torch.float32) -> Tensor:
    """The values on the grid, in the shape that was packed. Finite grids stay finite in float16 (they saturate)."""
    codes = unpack_bits(packed.codes, packed.bits, packed.shape[-1])
    length = packed.shape[packed.axis]
    step = _over_groups(packed.scale, packed.axis, packed.group, length).float()
    start = _over_groups(packed.zero, packed.axis, packed.group, length).float()
    values = codes.float() * step + start
    if dtype == torch.float16:
        values = values.clamp(-FP16_MAX, FP16_MAX)
    return values.to(dtype)
