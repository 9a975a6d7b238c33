"""The quantiser: round trips, half a step at most, bytes as the formula says, and float16's edges."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from isoflop.kernels.quant import Packed, pack_bits, packed_nbytes, quant_pack, unit, unpack, unpack_bits


@st.composite
def inputs(draw: st.DrawFn) -> tuple[Tensor, int, int, int | None]:
    """A tensor with its bits, axis and group."""
    shape = [*draw(st.lists(st.integers(0, 9), max_size=2)), draw(st.integers(1, 21))]
    bits = draw(st.integers(1, 8))
    axis = draw(st.integers(-len(shape), len(shape) - 1))
    group = draw(st.none() | st.integers(1, 12))
    seed = draw(st.integers(0, 2**16))
    spread, shift = draw(st.sampled_from([1e-9, 1e-4, 1.0, 300.0])), draw(st.sampled_from([0.0, -5.0, 1000.0]))
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * spread + shift, bits, axis, group


def per_value(packed: Packed, grid: Tensor) -> Tensor:
    """A grid's parameter at every value, by indexing."""
    index = torch.arange(packed.shape[packed.axis]) // packed.group
    return grid.float().index_select(packed.axis, index)


@given(inputs())
def test_every_value_comes_back_within_half_a_step(case: tuple[Tensor, int, int, int | None]) -> None:
    """With the float16 grid that is stored; only constant groups, which have no step, round to float16 instead."""
    x, bits, axis, group = case
    packed = quant_pack(x, bits, axis, group)
    step = per_value(packed, packed.scale)
    rounding = torch.where(step == 0, x.abs() * 2**-11 + 2**-25, x.abs() * 2**-22)
    back = unpack(packed)
    assert back.shape == x.shape
    assert bool(((back - x).abs() <= step / 2 * (1 + 1e-5) + rounding).all())


@given(inputs())
def test_bytes_are_those_of_the_formula(case: tuple[Tensor, int, int, int | None]) -> None:
    x, bits, axis, group = case
    packed = quant_pack(x, bits, axis, group)
    assert packed.nbytes == packed_nbytes(tuple(x.shape), bits, axis, group)
    assert packed.nbytes == sum(t.untyped_storage().nbytes() for t in packed.tensors())


@given(inputs())
def test_what_lies_on_the_grid_is_fixed(case: tuple[Tensor, int, int, int | None]) -> None:
    """Codes are fitted to the rounded grid: quantising the grid's own values with its parameters gives the same codes."""
    x, bits, axis, group = case
    packed = quant_pack(x, bits, axis, group)
    step, start = per_value(packed, packed.scale), per_value(packed, packed.zero)
    codes = torch.where(step == 0, 0.0, ((unpack(packed) - start) / step.masked_fill(step == 0, 1.0)).round())
    assert torch.equal(pack_bits(codes.to(torch.uint8), bits), packed.codes)


@given(st.integers(1, 8), st.integers(0, 40), st.integers(1, 4), st.integers(0, 2**16))
def test_packing_is_a_bit_stream_that_unpacks_exactly(bits: int, length: int, rows: int, seed: int) -> None:
    codes = torch.randint(0, 2**bits, (rows, length), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    packed = pack_bits(codes, bits)
    assert torch.equal(unpack_bits(packed, bits, length), codes)
    for row, line in zip(codes.tolist(), packed.tolist(), strict=True):
        number = sum(code << (bits * i) for i, code in enumerate(row))
        assert bytes(line) == number.to_bytes(packed.shape[1], "little")


@pytest.mark.parametrize("bits, expected", [(1, (8, 1)), (2, (4, 1)), (3, (8, 3)), (4, (2, 1)), (8, (1, 1))])
def test_three_bit_codes_take_three_bits(bits: int, expected: tuple[int, int]) -> None:
    assert unit(bits) == expected
    assert pack_bits(torch.zeros(1, 64, dtype=torch.uint8), bits).nbytes == 8 * bits


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("axis, group", [(-1, None), (-1, 4), (-2, None), (-2, 5), (0, 2)])
def test_codes_equal_a_loop_over_groups(bits: int, axis: int, group: int | None) -> None:
    x = torch.randn(4, 7, 10, generator=torch.Generator().manual_seed(0)) * 3
    packed = quant_pack(x, bits, axis, group)
    back, codes = unpack(packed), unpack_bits(packed.codes, bits, 10)
    length = x.shape[axis]
    size = group or length
    for g in range(math.ceil(length / size)):
        index = torch.arange(g * size, min(length, (g + 1) * size))
        values, mine = (t.index_select(axis, index).movedim(axis, -1) for t in (x, codes))
        scale, zero = (t.select(axis, g).float() for t in (packed.scale, packed.zero))
        assert bool((zero <= values.amin(-1)).all())
        assert bool((zero + scale * (2**bits - 1) >= values.amax(-1) - 1e-6).all())
        expected = ((values - zero[..., None]) / scale[..., None] + 0.5).floor().clamp(0, 2**bits - 1)
        assert torch.equal(mine.float(), expected)
        assert torch.equal(
            back.index_select(axis, index).movedim(axis, -1), expected * scale[..., None] + zero[..., None]
        )


@pytest.mark.parametrize("value", [0.0, -0.0, 0.1, -3.5, 7e4, -7e4, 1e-9])
def test_constant_rows_have_step_zero_and_no_nan(value: float) -> None:
    packed = quant_pack(torch.full((3, 5), value), 2)
    assert not packed.scale.any()
    assert not packed.codes.any()
    nearest = max(-65504.0, min(65504.0, value))
    assert torch.equal(unpack(packed), torch.full((3, 5), nearest).half().float())


def test_a_step_never_vanishes_in_float16() -> None:
    """A range far below float16's least step still gets a grid with a step."""
    x = torch.tensor([[0.0, 1e-12, 3e-10]])
    packed = quant_pack(x, 2)
    assert packed.scale.item() > 0
    assert bool((unpack(packed) - x).abs().max() <= packed.scale / 2)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_beyond_float16_values_saturate_and_stay_finite(bits: int) -> None:
    x = torch.tensor([[-1e30, -1.0, 0.0, 1e30], [6.5e4, -6.5e4, 1.0, 2.0], [1e5, 1e5, 1e5, 1e5]])
    packed = quant_pack(x, bits)
    assert all(bool(t.isfinite().all()) for t in (packed.scale, packed.zero))
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert bool(unpack(packed, dtype).isfinite().all())
    assert unpack(packed)[0, 0] == -65504.0
    assert unpack(packed)[2].tolist() == [65504.0] * 4


def test_a_batch_mate_changes_nothing() -> None:
    x = torch.randn(3, 2, 6, 8, generator=torch.Generator().manual_seed(1))
    for axis, group in ((-1, None), (-2, 4)):
        whole, alone = quant_pack(x, 3, axis, group), quant_pack(x[1:2], 3, axis, group)
        for a, b in zip(whole.tensors(), alone.tensors(), strict=True):
            assert torch.equal(a[1:2], b)


@pytest.mark.parametrize(
    "arguments, text",
    [
        ({"bits": 0}, "bits=0: codes have 1 to 8 bits"),
        ({"bits": 16}, "bits=16"),
        ({"bits": 2, "axis": 2}, "axis=2"),
        ({"bits": 2, "group": 0}, "group=0"),
    ],
)
def test_impossible_arguments_are_refused(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        quant_pack(torch.ones(2, 3), **arguments)


@pytest.mark.parametrize("shape", [(0,), (2, 0), (0, 4), (2, 0, 4)])
def test_nothing_packs_to_nothing(shape: tuple[int, ...]) -> None:
    for axis in range(-len(shape), 0):
        packed = quant_pack(torch.ones(shape), 2, axis)
        assert unpack(packed).shape == shape
        assert packed.codes.nbytes == 0
