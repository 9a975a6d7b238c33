"""Triton half of ``isoflop.kernels.quant``: groups along the last axis or the one before it.

A tensor is seen as (outer, rows, columns), codes packed along columns. A tile holds R rows by W units by U codes; codes of a
unit lie along the innermost dimension, so that a unit is packed by one sum and unpacked by one broadcast shift.

- Groups along columns (one grid per token): a program owns R rows of one group, and finds their minimum and maximum itself.
- Short groups along rows (one grid per channel): a program owns the rows of one group by W units of columns.
- Long groups along rows do not fit a tile: their ends come from one pass of ``aminmax``, and a second pass encodes.
"""

# mypy: disallow-untyped-defs=False
# (kernels are written in Triton's language, whose values have no Python types)

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from isoflop.kernels import quant
from isoflop.kernels.quant import Packed, unit

_LONGEST_TILE_GROUP = 256
_TILE = 8192  # values of a tile


@triton.jit
def half_below(x):
    """The largest finite float16 that is not above float32 x."""
    half = tl.minimum(tl.maximum(x, -65504.0), 65504.0).to(tl.float16)
    bits = half.to(tl.int16, bitcast=True)
    wide = half.to(tl.float32)
    down = tl.where(wide > 0, bits - 1, tl.where(wide == 0, -32767, bits + 1)).to(tl.int16)
    return tl.where((wide > x) & (x > -65504.0), down.to(tl.float16, bitcast=True), half)


@triton.jit
def grid_of(low, high, LEVELS: tl.constexpr):
    """Float16 (scale, zero) that span low to high; see the twin."""
    zero = half_below(low)
    scale = -half_below(-tl.div_rn(high - zero.to(tl.float32), tl.full(low.shape, LEVELS, tl.float32)))
    nearest = tl.minimum(tl.maximum(low, -65504.0), 65504.0).to(tl.float16)
    constant = low == high
    return tl.where(constant, 0.0, scale).to(tl.float16), tl.where(constant, nearest, zero)


@triton.jit
def encode(x, scale, zero, LEVELS: tl.constexpr):
    """Codes (int32) of values on grids that broadcast against them."""
    step = scale.to(tl.float32)
    # a zero step is replaced: its codes are set to 0 below, and 0 / 0 must not appear
    steps = tl.div_rn(x - zero.to(tl.float32), tl.where(step == 0, 1.0, step) + tl.zeros_like(x))
    code = tl.minimum(tl.maximum(tl.floor(steps + 0.5), 0.0), LEVELS)
    return tl.where(step == 0, 0.0, code).to(tl.int32)


@triton.jit
def load_codes(row_ptr, row_mask, first_unit, row_units, BITS: tl.constexpr, W: tl.constexpr, U: tl.constexpr, BYTES: tl.constexpr):  # fmt: skip
    """Codes (R, W * U) of rows that start at ``row_ptr`` (R,), from unit ``first_unit`` on; 0 outside.

    Every byte is loaded once; the codes of a unit are broadcast shifts of its word.
    """
    units = first_unit + tl.arange(0, W)
    mask = row_mask[:, None] & (units < row_units)[None, :]
    at = row_ptr[:, None] + units[None, :] * BYTES
    WORD: tl.constexpr = tl.int32 if BYTES <= 3 else tl.int64
    word = tl.load(at, mask=mask, other=0).to(WORD)
    for i in tl.static_range(1, BYTES):
        word |= tl.load(at + i, mask=mask, other=0).to(WORD) << (8 * i)
    shifts = (tl.arange(0, U) * BITS).to(WORD)
    codes = (word[:, :, None] >> shifts[None, None, :]) & ((1 << BITS) - 1)
    return tl.reshape(codes.to(tl.int32), [row_ptr.shape[0], W * U])


@triton.jit
def _pack_kernel(
    x_ptr, codes_ptr, scale_ptr, zero_ptr,
    stride_outer, stride_row, stride_col, rows, columns, group, row_units,
    BITS: tl.constexpr, PER_ROW: tl.constexpr, GIVEN: tl.constexpr, ONE_GROUP: tl.constexpr,
    R: tl.constexpr, W: tl.constexpr, U: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    """One tile. PER_ROW: groups along columns; otherwise along rows. GIVEN: grids are there already (PER_ROW is False).
    ONE_GROUP: the whole axis is one group."""
    LEVELS: tl.constexpr = 2**BITS - 1
    WORD: tl.constexpr = tl.int32 if BYTES <= 3 else tl.int64
    tile, part, outer = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    if PER_ROW:  # rows in tiles of R, columns in groups
        row = tile * R + tl.arange(0, R)
        row_end = rows
        first = part * group
        column_end = tl.minimum(first + group, columns)
    else:  # rows in groups (or tiles of R when grids are given), columns in tiles of W units
        step = R if GIVEN else group
        row = tile * step + tl.arange(0, R)
        row_end = tl.minimum(tile * step + step, rows)
        first = part * (W * U)
        column_end = columns
    column = first + tl.arange(0, W)[:, None] * U + tl.arange(0, U)[None, :]
    inside = (row < row_end)[:, None, None] & (column < column_end)[None]
    at = row.to(tl.int64)[:, None, None] * stride_row + column.to(tl.int64)[None] * stride_col
    x = tl.load(x_ptr + outer * stride_outer + at, mask=inside, other=0.0).to(tl.float32)
    infinity = float("inf")
    if PER_ROW:
        groups = tl.cdiv(columns, group)
        low = tl.min(tl.min(tl.where(inside, x, infinity), 2), 1)
        high = tl.max(tl.max(tl.where(inside, x, -infinity), 2), 1)
        scale, zero = grid_of(low, high, LEVELS)
        grid_at = (outer * rows + row) * groups + part
        tl.store(scale_ptr + grid_at, scale, mask=row < row_end)
        tl.store(zero_ptr + grid_at, zero, mask=row < row_end)
        codes = encode(x, scale[:, None, None], zero[:, None, None], LEVELS)
    elif GIVEN:
        if ONE_GROUP:
            grid_at = (outer * columns + column)[None]
            known = (column < column_end)[None]
        else:
            grid_row = outer * tl.cdiv(rows, group) + row // group
            grid_at = grid_row[:, None, None] * columns + column[None]
            known = inside
        scale = tl.load(scale_ptr + grid_at, mask=known, other=0.0)
        zero = tl.load(zero_ptr + grid_at, mask=known, other=0.0)
        codes = encode(x, scale, zero, LEVELS)
    else:
        low = tl.min(tl.where(inside, x, infinity), 0)
        high = tl.max(tl.where(inside, x, -infinity), 0)
        scale, zero = grid_of(low, high, LEVELS)
        grid_at = (outer * tl.cdiv(rows, group) + tile) * columns + column
        tl.store(scale_ptr + grid_at, scale, mask=column < column_end)
        tl.store(zero_ptr + grid_at, zero, mask=column < column_end)
        codes = encode(x, scale[None], zero[None], LEVELS)
    codes = tl.where(inside, codes, 0).to(WORD)
    word = tl.sum(codes << (tl.arange(0, U) * BITS).to(WORD)[None, None, :], 2)
    units = first // U + tl.arange(0, W)
    stored = (row < row_end)[:, None] & (units < tl.cdiv(column_end, U))[None, :]
    byte_at = ((outer * rows + row)[:, None] * row_units + units[None, :]) * BYTES
    for i in tl.static_range(BYTES):
        tl.store(codes_ptr + byte_at + i, ((word >> (8 * i)) & 255).to(tl.uint8), mask=stored)


@triton.jit
def _unpack_kernel(
    codes_ptr, scale_ptr, zero_ptr, out_ptr, all_rows, rows, columns, group, row_units,
    BITS: tl.constexpr, PER_ROW: tl.constexpr, ONE_GROUP: tl.constexpr, SATURATE: tl.constexpr,
    R: tl.constexpr, W: tl.constexpr, U: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    """One tile of R rows (of all outer indices together) by W units."""
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    first = tl.program_id(1) * W
    inside_row = row < all_rows
    codes = load_codes(codes_ptr + row * row_units * BYTES, inside_row, first, row_units, BITS, W, U, BYTES)
    column = first * U + tl.arange(0, W * U)
    inside = inside_row[:, None] & (column < columns)[None, :]
    known = inside
    if PER_ROW and ONE_GROUP:
        grid_at, known = row[:, None], inside_row[:, None]
    elif PER_ROW:
        grid_at = row[:, None] * tl.cdiv(columns, group) + (column // group)[None, :]
    elif ONE_GROUP:
        grid_at = (row // rows)[:, None] * columns + column[None, :]
    else:
        grid_row = (row // rows) * tl.cdiv(rows, group) + (row % rows) // group
        grid_at = grid_row[:, None] * columns + column[None, :]
    scale = tl.load(scale_ptr + grid_at, mask=known, other=0.0).to(tl.float32)
    zero = tl.load(zero_ptr + grid_at, mask=known, other=0.0).to(tl.float32)
    value = codes.to(tl.float32) * scale + zero
    if SATURATE:
        value = tl.minimum(tl.maximum(value, -65504.0), 65504.0)
    tl.store(out_ptr + row[:, None] * columns + column[None, :], value.to(out_ptr.dtype.element_ty), mask=inside)


def _folded(shape: tuple[int, ...], per_row: bool) -> tuple[int, int, int]:
    """A shape as (outer, rows, columns); with a grid per row, all rows are alike."""
    if per_row:
        return 1, math.prod(shape[:-1]), shape[-1]
    return math.prod(shape[:-2]), shape[-2], shape[-1]


def quant_pack(x: Tensor, bits: int, axis: int = -1, group: int | None = None) -> Packed:
    """See ``isoflop.kernels.quant.quant_pack``."""
    axis, group = quant._check(x, bits, axis, group)
    count, size = unit(bits)
    per_row = axis == -1
    outer, rows, columns = _folded(tuple(x.shape), per_row)
    x_ORC = x.reshape(outer, rows, columns)
    row_units = math.ceil(columns / count)
    codes = torch.empty(*x.shape[:-1], row_units * size, dtype=torch.uint8, device=x.device)
    grid_shape = list(x.shape)
    grid_shape[axis] = math.ceil(x.shape[axis] / group)
    given = not per_row and group > _LONGEST_TILE_GROUP
    if given:
        scale, zero = _ends_of_long_groups(x, bits, group)
    else:
        scale = torch.empty(grid_shape, dtype=torch.float16, device=x.device)
        zero = torch.empty_like(scale)
    if per_row:
        width = triton.next_power_of_2(math.ceil(group / count))
        height = max(1, min(_TILE // 4 // (width * count), triton.next_power_of_2(rows)))
        launch = (math.ceil(rows / height), grid_shape[-1], outer)
    else:
        height = 64 if given else triton.next_power_of_2(group)
        width = max(1, min(_TILE // height, triton.next_power_of_2(columns), 128) // count)
        launch = (math.ceil(rows / (height if given else group)), math.ceil(row_units / width), outer)
    _pack_kernel[launch](
        x_ORC, codes, scale, zero, *x_ORC.stride(), rows, columns, group, row_units,
        BITS=bits, PER_ROW=per_row, GIVEN=given, ONE_GROUP=group == x.shape[axis], R=height, W=width, U=count, BYTES=size, enable_fp_fusion=True,
    )  # fmt: skip
    return Packed(codes, scale, zero, bits, tuple(x.shape), axis, group)


def _ends_of_long_groups(x: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor]:
    """Grids of groups along the axis before the last, by one pass over ``x`` (two where the last group is short)."""
    whole = x.shape[-2] // group * group
    parts = [x[..., :whole, :].unflatten(-2, (-1, group)).aminmax(dim=-2)]
    if whole < x.shape[-2]:
        parts.append(x[..., whole:, :].unsqueeze(-3).aminmax(dim=-2))
    low, high = (torch.cat([part[end] for part in parts], dim=-2).float() for end in (0, 1))
    return quant.grid_of(low, high, bits)


def unpack(packed: Packed, dtype: torch.dtype = torch.float32) -> Tensor:
    """See ``isoflop.kernels.quant.unpack``."""
    count, size = unit(packed.bits)
    per_row = packed.axis == -1
    outer, rows, columns = _folded(packed.shape, per_row)
    row_units = math.ceil(columns / count)
    out = torch.empty(packed.shape, dtype=dtype, device=packed.codes.device)
    width = max(1, min(triton.next_power_of_2(row_units), 256 // count))
    height = max(1, min(_TILE // 2 // (width * count), triton.next_power_of_2(outer * rows)))
    _unpack_kernel[(math.ceil(outer * rows / height), math.ceil(row_units / width))](
        packed.codes.contiguous(), packed.scale.contiguous(), packed.zero.contiguous(), out,
        outer * rows, rows, columns, packed.group, row_units,
        BITS=packed.bits, PER_ROW=per_row, ONE_GROUP=packed.group == packed.shape[packed.axis], SATURATE=dtype == torch.float16,
        R=height, W=width, U=count, BYTES=size, enable_fp_fusion=True,
    )  # fmt: skip
    return out
