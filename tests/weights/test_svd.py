"""Truncated singular value decompositions: plain, ASVD (arXiv 2312.05821) and SVD-LLM (arXiv 2403.07378)."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from weight_cases import context, held_out_loss, trained_decoder

from isoflop.methods.weights.gptq import Gptq
from isoflop.methods.weights.payloads import DensePayload
from isoflop.methods.weights.statistics import ViewStats
from isoflop.methods.weights.svd import Svd, magnitudes, rank_of, scaled_low_rank, whitened_low_rank
from isoflop.models.family import family_of

NUMBERS = json.loads((Path(__file__).parent / "numbers" / "svd.json").read_text())


def matrix(rows: int = 40, cols: int = 24, seed: int = 1) -> Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).float()


def seen(x_NI: Tensor) -> ViewStats:
    gram_II = x_NI.T @ x_NI
    norms_I = gram_II.diagonal().sqrt()
    return ViewStats(len(x_NI), 2 / len(x_NI) * gram_II, norms_I, norms_I, x_NI.abs().mean(0), x_NI.abs().amax(0))


def test_plain_is_the_best_of_its_rank() -> None:
    weight = matrix()
    u, s, vt = torch.linalg.svd(weight, full_matrices=False)
    assert torch.allclose(Svd().encode(weight).decode(), u[:, :7] * s[:7] @ vt[:7], atol=5e-3)


def test_bytes_by_hand() -> None:
    """Half of 40·24 weights are 480 numbers; a rank takes 64, so 7 of them, at 2 bytes."""
    assert rank_of(40, 24, 0.5) == 7
    assert Svd(keep=0.5).encode(matrix()).nbytes(16) == 7 * 64 * 2
    assert isinstance(Svd(keep=1.0).encode(matrix()), DensePayload)
    assert isinstance(Svd(keep=0.5).encode(matrix(1, 24)), DensePayload), "a row is no larger than its rank-1 factors"


def test_numbers_of_asvd() -> None:
    """Made by ``SVDLinear.from_linear`` of hahnyuan/ASVD4LLM, at half of the parameters and alpha = .5.

    Its decomposition is a randomised one, so that the values must fall fast to be compared.
    """
    falling = (matrix().double() * 0.2 ** torch.arange(24.0).double() @ matrix(24, 24, seed=5).double()).float()
    scale = matrix(1, 24, seed=2)[0].abs() + 0.1
    expected = NUMBERS["asvd"]
    left, right = scaled_low_rank(falling, scale**0.5 + 1e-6, rank_of(40, 24, 0.5))
    assert left.shape[1] == expected["rank"]
    assert (left @ right)[:3, :4].numpy() == pytest.approx(np.array(expected["corner"]), abs=2e-5)
    assert float((left @ right).norm()) == pytest.approx(expected["norm"], rel=1e-5)


def test_numbers_of_svd_llm() -> None:
    """Made by ``local_update`` of AIoT-MLSys-Lab/SVD-LLM, with the Cholesky factor that its ``profle_svdllm`` takes."""
    x = matrix(64, 24, seed=3).double()
    expected = NUMBERS["svd-llm"]
    left, right = whitened_low_rank(matrix(), x.T @ x, rank_of(40, 24, 0.5))
    assert left.shape[1] == expected["rank"]
    assert (left @ right)[:3, :4].numpy() == pytest.approx(np.array(expected["corner"]), abs=2e-5)
    assert float((left @ right).norm()) == pytest.approx(expected["norm"], rel=1e-5)


def test_what_whitening_cuts_is_the_error_of_the_outputs() -> None:
    """SVD-LLM's theorem: ‖X(W - W')ᵀ‖² is the sum of the squares of the singular values cut, and no rank does better."""
    weight, x = matrix().double(), matrix(64, 24, seed=3).double() * torch.linspace(0.1, 3, 24)
    left, right = whitened_low_rank(weight, x.T @ x, 7)
    error = float((x @ (weight - left.double() @ right.double()).T).square().sum())
    values = torch.linalg.svdvals(x @ weight.T)
    assert error == pytest.approx(float(values[7:].square().sum()), rel=1e-5)


@pytest.mark.parametrize("dead", [1, 23])
def test_inputs_that_are_never_seen_do_no_harm(dead: int) -> None:
    """The Gram matrix is not positive then; what inputs there are still decides."""
    weight, x = matrix(), matrix(64, 24, seed=3)
    x[:, :dead] = 0
    left, right = whitened_low_rank(weight, x.T @ x, 7)
    error = float((x @ (weight - left @ right).T).square().sum())
    best = float(torch.linalg.svdvals(x @ weight.T)[7:].square().sum())
    assert torch.isfinite(left).all()
    assert torch.isfinite(right).all()
    assert error <= 1.05 * best + 1e-3


def test_a_gram_matrix_that_rounding_has_made_indefinite_is_lifted() -> None:
    x = matrix(64, 24, seed=3).double()
    values, vectors = torch.linalg.eigh(x.T @ x)
    values[0] = -0.1
    left, right = whitened_low_rank(matrix(), vectors * values @ vectors.T, 7)
    assert torch.isfinite(left @ right).all()


@pytest.mark.parametrize("scaling", ["asvd", "svd-llm"])
def test_without_any_input_every_scaling_is_plain(scaling: str) -> None:
    """An expert that no token was routed to."""
    nothing = ViewStats(0, torch.zeros(24, 24), *[torch.zeros(24)] * 4)
    found = Svd(scaling=scaling).encode(matrix(), nothing).decode()
    assert torch.allclose(found, Svd().encode(matrix()).decode(), atol=5e-3)


def test_scales_follow_the_inputs() -> None:
    """The channel with large inputs is kept well, and alpha 0 is no scaling."""
    x = matrix(64, 24, seed=3)
    x[:, 5] *= 100
    weight, plain = matrix(), Svd().encode(matrix()).decode()
    aware = Svd(scaling="asvd").encode(weight, seen(x)).decode()
    assert float((aware - weight)[:, 5].norm()) < 0.2 * float((plain - weight)[:, 5].norm())
    assert torch.allclose(magnitudes(seen(x)), x.abs().mean(0))
    level = Svd(scaling="asvd", alpha=0.0).encode(weight, seen(x)).decode()
    assert torch.allclose(level, plain, atol=5e-3)


@pytest.mark.parametrize(("scaling", "shared"), [("svd-llm", True), ("asvd", False)])
def test_the_calibration_is_the_one_of_other_methods_unless_magnitudes_are_asked_for(
    scaling: str, shared: bool
) -> None:
    info = family_of("tiny-lm/text-d32").info("tiny-lm/text-d32", {})
    stage = Svd(scaling=scaling).prepare(info, None, 0)
    other = Gptq().prepare(info, None, 0)
    assert stage is not None
    assert (stage.calibration.key == other.calibration.key) == shared  # type: ignore[union-attr, attr-defined]


def test_knowing_the_inputs_loses_less_on_a_trained_model() -> None:
    model, loss = trained_decoder(), {}
    for scaling in ("none", "asvd", "svd-llm"):
        method = Svd(keep=0.5, scaling=scaling, n_calib=64)
        with method.apply(model, method.calibrate(model, context(), 0)):
            loss[scaling] = held_out_loss(model)
    assert held_out_loss(model) < loss["svd-llm"] < loss["none"]
    assert loss["svd-llm"] < loss["asvd"]
