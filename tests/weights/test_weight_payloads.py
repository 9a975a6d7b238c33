"""Payloads: what is counted is what is stored, and what is stored decodes to what is served."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from isoflop.methods.weights.artefact import Artefact
from isoflop.methods.weights.payloads import (
    PAYLOADS,
    BitmapPayload,
    DensePayload,
    GridPayload,
    PatternPayload,
    Payload,
    pack_signs,
    signs_of,
)
from isoflop.methods.weights.rules import keep_highest, keep_pattern
from isoflop.methods.weights.stacks import block_bytes, decompose

sizes = st.integers(1, 33)


def matrix(rows: int, cols: int, seed: int = 0, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_exact(payload: Payload, formula: float) -> None:
    """Bytes: the formula, the tensors' and the serialised length; and decoding survives settings in JSON."""
    assert len(payload.serialise()) == payload.nbytes(32) == formula
    settings = json.loads(json.dumps(payload.settings()))
    again = PAYLOADS[payload.kind].restore(settings, payload.tensors())
    assert torch.equal(again.decode(), payload.decode())


@settings(max_examples=25)
@given(sizes, sizes, st.integers(1, 8), st.integers(8, 40))
def test_grid(rows: int, cols: int, bits: int, group: int) -> None:
    weight = matrix(rows, cols, dtype=torch.float32)
    payload = GridPayload.round(weight, bits, group)
    unit = 8 // math.gcd(bits, 8), bits // math.gcd(bits, 8)
    codes = rows * math.ceil(cols / unit[0]) * unit[1]
    assert_exact(payload, codes + 4 * rows * math.ceil(cols / min(group, cols)))
    step = payload.packed.scale.float().repeat_interleave(min(group, cols), dim=1)[:, :cols]
    assert bool(((payload.decode() - weight).abs() <= step / 2 + 1e-3 * weight.abs()).all()), "half a step, at most"


@settings(max_examples=25)
@given(sizes, sizes, st.floats(0, 0.95))
def test_bitmap(rows: int, cols: int, sparsity: float) -> None:
    weight = matrix(rows, cols)
    keep = keep_highest(weight.float().abs(), sparsity, by_row=False)
    payload = BitmapPayload.of(weight, keep)
    assert_exact(payload, 2 * int(keep.sum()) + math.ceil(rows * cols / 8))
    assert torch.equal(payload.decode(), weight * keep)


@settings(max_examples=25)
@given(sizes, st.integers(1, 8), st.sampled_from([(1, 2), (2, 4), (4, 8)]))
def test_pattern(rows: int, groups: int, pattern: tuple[int, int]) -> None:
    n, m = pattern
    weight = matrix(rows, groups * m)
    keep = keep_pattern(weight.float().abs(), pattern)
    assert bool((keep.unflatten(1, (-1, m)).sum(-1) == n).all()), "exactly N in every M along the inputs"
    payload = PatternPayload.of(weight, keep, pattern)
    kept = rows * groups * n
    units = 8 // math.gcd(int(math.log2(m)), 8), int(math.log2(m)) // math.gcd(int(math.log2(m)), 8)
    assert_exact(payload, 2 * kept + math.ceil(kept / units[0]) * units[1])
    assert torch.equal(payload.decode(), weight * keep)


@pytest.mark.parametrize(("pattern", "bits"), [((1, 2), 8.5), ((2, 4), 9.0), ((4, 8), 9.5)])
def test_bits_of_patterns(pattern: tuple[int, int], bits: float) -> None:
    weight = matrix(64, 64)
    payload = PatternPayload.of(weight, keep_pattern(weight.float().abs(), pattern), pattern)
    assert 8 * payload.nbytes() / weight.numel() == bits


def test_a_mask_that_is_no_pattern_is_refused() -> None:
    with pytest.raises(ValueError, match="2:4"):
        PatternPayload.of(matrix(2, 8), torch.ones(2, 8, dtype=torch.bool), (2, 4))


@settings(max_examples=25)
@given(sizes, sizes)
def test_dense(rows: int, cols: int) -> None:
    weight = matrix(rows, cols)
    assert_exact(DensePayload.of(weight), 2 * rows * cols)
    assert torch.equal(DensePayload.of(weight).decode(), weight)


@settings(max_examples=25)
@given(st.integers(1, 200))
def test_signs_survive_packing_whatever_their_number(count: int) -> None:
    """BitStack (c)."""
    x = matrix(1, count).flatten()
    x[:: max(count // 3, 1)] = 0.0
    packed = pack_signs(x)
    assert packed.numel() == math.ceil(count / 8)
    assert torch.equal(signs_of(packed, count), torch.where(x >= 0, 1.0, -1.0)), "zero counts as positive"


@settings(max_examples=25)
@given(st.integers(2, 20), st.integers(2, 20), st.integers(1, 2), st.integers(1, 4), st.booleans())
def test_stack(rows: int, cols: int, k: int, n_iter: int, avd: bool) -> None:
    """BitStack (f): the bytes of every prefix are the formula's."""
    stack, _ = decompose(matrix(rows, cols, dtype=torch.float32), k, n_iter, avd)
    for blocks in range(1, n_iter + 1):
        assert_exact(stack.prefix(blocks), blocks * block_bytes(rows, cols, k, avd))
    assert torch.equal(stack.prefix(n_iter).decode(), stack.decode())


def test_full_precision_weights_count_as_the_model_says() -> None:
    weight = matrix(8, 8, dtype=torch.float32)
    payload = BitmapPayload.of(weight, weight > 0)
    kept = int((weight > 0).sum())
    assert payload.nbytes(16) == 2 * kept + 8
    assert payload.nbytes(32) == 4 * kept + 8


def test_the_file_holds_the_payloads_and_a_header(tmp_path: Path) -> None:
    """BitStack (f): file bytes are the formula's, behind the header of the format."""
    stack, _ = decompose(matrix(48, 40, dtype=torch.float32), 2, 3, True, divisor_I=torch.ones(40).half())
    Artefact({"a": stack, "b": GridPayload.round(matrix(48, 40), 3, 16)}, {"norm": torch.ones(40)}).save(tmp_path)
    raw = (tmp_path / "payloads.safetensors").read_bytes()
    header = 8 + int.from_bytes(raw[:8], "little")
    grid = 48 * 15 + 4 * 48 * 3
    assert len(raw) - header == 3 * block_bytes(48, 40, 2) + 2 * 40 + grid + 4 * 40
    loaded = Artefact(tmp_path)
    assert torch.equal(loaded["a"].decode(), stack.decode())
    assert loaded["a"].nbytes() == stack.nbytes()
    assert torch.equal(loaded.vectors["norm"], torch.ones(40))
