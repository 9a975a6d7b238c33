"""NF4: the published table, bitsandbytes' numbers, and bytes worked out by hand (arXiv 2305.14314)."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from isoflop.methods.weights import normal_float
from isoflop.methods.weights.nf4 import Nf4
from isoflop.methods.weights.normal_float import NF4, NormalFloatPayload, dynamic_8bit

NUMBERS = json.loads((Path(__file__).parent / "numbers" / "nf4.json").read_text())


def matrix(rows: int = 24, cols: int = 300) -> Tensor:
    return torch.from_numpy(np.random.default_rng(0).normal(0, 0.05, (rows, cols)).astype(np.float32))


@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize("double_quant", [False, True])
def test_numbers_of_bitsandbytes(block: int, double_quant: bool) -> None:
    """Made by ``functional.quantize_4bit`` and ``dequantize_4bit`` of bitsandbytes-foundation/bitsandbytes 0.50.2, on the CPU."""
    expected = NUMBERS[f"block {block}, double_quant {double_quant}"]
    found = NormalFloatPayload.of(matrix(), 4, block, double_quant).decode()
    assert found[7, 130:150].tolist() == pytest.approx(expected["row_7"], abs=1e-8)
    assert found[-1, -6:].tolist() == pytest.approx(expected["last_row"], abs=1e-8)
    assert float(found.double().sum()) == pytest.approx(expected["sum"], abs=1e-6)
    assert float(found.double().square().sum()) == pytest.approx(expected["squares"], rel=1e-7)


def test_the_formula_gives_the_published_table() -> None:
    """So the tables of 2 and 3 bits, which nobody published, follow the same rule."""
    assert normal_float._quantiles(4) == pytest.approx(NF4, abs=2e-7)
    for bits in (2, 3, 4):
        table = normal_float.normal_float(bits)
        assert len(table) == 2**bits
        assert list(table) == sorted(table)
        assert (table[0], table[2 ** (bits - 1) - 1], table[-1]) == (-1.0, 0.0, 1.0)


def test_the_dynamic_type_has_256_values_around_zero() -> None:
    values = dynamic_8bit()
    assert len(set(values)) == 256
    assert all(-x in values for x in values if x != 1.0), "1 alone has no counterpart"
    steps = np.diff([x for x in values if 0.1 < x < 1])
    assert steps == pytest.approx(np.full(63, 0.9 / 64), rel=1e-4)


def by_hand(weight: Tensor, bits: int, block: int) -> Tensor:
    """Nearest value of the table, weight by weight, without double quantisation."""
    flat, table = weight.flatten().double().tolist(), normal_float.normal_float(bits)
    served = []
    for start in range(0, len(flat), block):
        part = flat[start : start + block]
        largest = max(abs(x) for x in part)
        served += [min(table, key=lambda t: abs(t * largest - x)) * largest for x in part]
    return torch.tensor(served).view(weight.shape)


@pytest.mark.parametrize(("bits", "block"), [(4, 32), (3, 64), (2, 128)])
def test_every_weight_goes_to_the_nearest_value_of_its_block(bits: int, block: int) -> None:
    """Blocks run on over the ends of rows, and the last is shorter."""
    weight = matrix(7, 50)
    found = NormalFloatPayload.of(weight, bits, block, False).decode()
    assert torch.allclose(found, by_hand(weight, bits, block), rtol=1e-5)


@pytest.mark.parametrize(("knobs", "size"), [
    # 4096 weights: 2048 bytes of codes, 64 blocks of one byte, one coarse scale and the mean in float32
    ({}, 2048 + 64 + 4 + 4),
    ({"double_quant": False}, 2048 + 64 * 4),
    ({"block": 32}, 2048 + 128 + 4 + 4),
    ({"bits": 2, "block": 4096}, 1024 + 1 + 4 + 4),
    ({"bits": 3, "block": 4096, "double_quant": False}, 1536 + 4),
])  # fmt: skip
@pytest.mark.parametrize("dense_bits", [16, 32])
def test_bytes_by_hand(knobs: dict[str, int], size: int, dense_bits: int) -> None:
    """Float32 constants take 4 bytes also where weights count 2."""
    payload = Nf4(**knobs).encode(matrix(64, 64))  # type: ignore[arg-type]
    assert payload.nbytes(dense_bits) == len(payload.serialise()) == size


def test_the_papers_bits_per_weight() -> None:
    """4 + 8/64 + 32/(64·256) = 4.127, and 0.373 fewer than with scales in float32 (section 3)."""
    weight = matrix(256, 512)
    bits = 8 * NormalFloatPayload.of(weight, 4, 64, True).nbytes() / weight.numel()
    assert bits == pytest.approx(4 + 8 / 64 + 32 / (64 * 256), abs=32 / weight.numel() + 1e-12)
    plain = 8 * NormalFloatPayload.of(weight, 4, 64, False).nbytes() / weight.numel()
    assert plain - bits == pytest.approx(0.373, abs=1e-3)


def test_double_quantisation_moves_scales_by_less_than_a_hundredth_of_the_largest_deviation() -> None:
    weight = matrix(200, 512) * torch.linspace(0.1, 10, 200)[:, None]
    exact = NormalFloatPayload.of(weight, 4, 64, False).scales()
    coarse = NormalFloatPayload.of(weight, 4, 64, True)
    deviation = torch.nn.functional.pad((exact - exact.mean()).abs(), (0, -len(exact) % 256)).view(-1, 256).amax(1)
    error = (coarse.scales() - exact).abs()
    assert bool((error <= deviation.repeat_interleave(256)[: len(exact)] * 0.9 / 128 * 1.001).all())
    assert coarse.coarse is not None
    assert len(coarse.coarse) == math.ceil(len(exact) / 256) + 1


def test_zero_stays_zero_in_any_block() -> None:
    weight = matrix(16, 256)
    weight[:, ::3] = 0
    weight[3] = 0
    for bits in (2, 3, 4):
        assert bool((NormalFloatPayload.of(weight, bits, 64, True).decode()[weight == 0] == 0).all())
