"""HQQ: the released solver's numbers, its equations one weight at a time, and when it stops (Badri and Shaji, 2023)."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from isoflop.methods.weights.hqq import HalfQuadratic, Hqq
from isoflop.methods.weights.payloads import GridPayload

NUMBERS = json.loads((Path(__file__).parent / "numbers" / "hqq.json").read_text())


def matrix(rows: int = 24, cols: int = 192) -> Tensor:
    """Heavy tails."""
    return torch.from_numpy((np.random.default_rng(0).standard_t(4, (rows, cols)) * 0.05).astype(np.float32))


def solver(bits: int = 2, iters: int = 20, official: bool = False, **other: Any) -> HalfQuadratic:
    return HalfQuadratic(
        **{"bits": bits, "p": 0.7, "beta": 10.0, "kappa": 1.01, **other}, iters=iters, official=official
    )


def mean_error(weight: Tensor, codes_OI: Tensor, step_OG: Tensor, zero_OG: Tensor, group: int) -> float:
    step, zero = (x.repeat_interleave(group, 1)[:, : weight.shape[1]] for x in (step_OG, zero_OG))
    return float(((codes_OI - zero) * step - weight).abs().double().mean())


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("group", [32, 64])
@pytest.mark.parametrize("official", [True, False])
def test_numbers_of_the_released_code(bits: int, group: int, official: bool) -> None:
    """Made by ``Quantizer.quantize`` of mobiusml/hqq (axis 1, on the CPU).

    With its ``optimize_weights_proximal_legacy``, which it uses, and with ``optimize_weights_proximal_v2``, which keeps the best.
    """
    expected = NUMBERS[f"{bits} bits, group {group}, {'official' if official else 'best'}"]
    codes_OI, step_OG, zero_OG = solver(bits, official=official).fit(matrix(), group)
    assert codes_OI[5, :48].tolist() == expected["codes_row_5"]
    assert int(codes_OI.sum()) == expected["codes_sum"]
    assert step_OG.flatten()[:12].tolist() == pytest.approx(expected["step"], rel=1e-4)
    assert zero_OG.flatten()[:12].tolist() == pytest.approx(expected["zero"], abs=2e-5)


def turned_by_hand(row: list[float], bits: int, p: float, beta: float, kappa: float, turns: int) -> float:
    """z of one group after some turns, in plain numbers."""
    low, high = min(row), max(row)
    scale = (2**bits - 1) / (high - low)
    zero = -low * scale
    for turn in range(turns):
        terms = []
        for w in row:
            code = min(max(round(w * scale + zero), 0), 2**bits - 1)
            error = w - (code - zero) / scale
            shrunk = max(abs(error) - abs(error) ** (p - 1) / (beta * kappa**turn), 0) if error else 0.0
            terms.append(code - (w - np.sign(error) * shrunk) * scale)
        zero = sum(terms) / len(terms)
    return zero


@pytest.mark.parametrize(("p", "beta", "kappa", "turns"), [
    (0.7, 10.0, 1.01, 1), (0.7, 1e4, 1.01, 1), (1.0, 30.0, 1.01, 1), (0.3, 100.0, 1.01, 1), (0.7, 3.0, 2.0, 3),
])  # fmt: skip
def test_turns_by_hand(p: float, beta: float, kappa: float, turns: int) -> None:
    """Also in the shorter group at the end of a row."""
    weight = matrix(4, 40) * 20
    found = solver(2, turns, official=True, p=p, beta=beta, kappa=kappa).fit(weight, 24)[2]
    for row in range(4):
        groups = [weight[row, part].tolist() for part in (slice(24), slice(24, 40))]
        by_hand = [turned_by_hand(group, 2, p, beta, kappa, turns) for group in groups]
        assert found[row].tolist() == pytest.approx(by_hand, abs=1e-4)


def test_without_turns_it_is_a_minmax_grid() -> None:
    weight = matrix()
    found, grid = (
        payload.decode() for payload in (Hqq(bits=3, iters=0).encode(weight), GridPayload.round(weight, 3, 64))
    )
    step = solver(3, 0).fit(weight, 64)[1].repeat_interleave(64, 1)
    apart = (found - grid).abs() > 0.01 * step
    assert float(apart.float().mean()) < 0.01, "near ties, which float16 grids decide otherwise"


def test_the_error_falls_from_turn_to_turn_and_the_best_is_kept() -> None:
    weight = matrix()
    errors = [mean_error(weight, *solver(iters=n).fit(weight, 64), 64) for n in range(12)]
    assert all(after <= before for before, after in pairwise(errors))
    assert errors[-1] < 0.95 * errors[0]
    late = mean_error(weight, *solver(official=True).fit(weight, 64), 64)
    assert errors[-1] < late, "the released code stops one turn behind the best"


def test_outliers_do_not_pull_the_zero_point() -> None:
    """64 weights on the grid 0, 1, 2, 3 and one at 1.4: a mean of errors gives way by .4/65, the p-norm does not."""
    weight = torch.tensor([[0.0, 1.0, 2.0, 3.0] * 16 + [1.4]])
    pulled, firm = (float(solver(2, 1, beta=beta, official=True).fit(weight, 65)[2]) for beta in (1e-6, 1e6))
    assert pulled == pytest.approx(-0.4 / 65, rel=1e-4)
    assert firm == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("width", [1e-5, 1e-3])
def test_only_the_release_gives_up_on_narrow_groups(width: float) -> None:
    weight = torch.linspace(0, width, 64)[None] + 0.0
    ours, released = (mean_error(weight, *solver(8, official=o).fit(weight, 64), 64) for o in (False, True))
    assert ours <= width / 255
    assert released > 2 * ours


def test_bytes_by_hand() -> None:
    """64 x 64 weights: 3 bits make 24 bytes per row, a grid of 4 bytes for each of the 64 groups."""
    weight = matrix(64, 64)
    assert Hqq(bits=3).encode(weight).nbytes(16) == 64 * 24 + 64 * 4
    assert Hqq(bits=3, group=16).encode(weight).nbytes(16) == 64 * 24 + 4 * 64 * 4
    assert Hqq(bits=16).encode(weight).nbytes(16) == 2 * 64 * 64
