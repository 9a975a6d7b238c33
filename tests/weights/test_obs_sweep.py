"""The OBS sweep against the procedure that its equations describe, with explicit inverses."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import Tensor
from weight_cases import context, llama

from isoflop.methods.weights import obs
from isoflop.methods.weights.gptq import Gptq, GridRule
from isoflop.methods.weights.obs import Curvature, obs_sweep
from isoflop.methods.weights.payloads import GridPayload
from isoflop.methods.weights.sparsegpt import MaskRule, SparseGpt
from isoflop.methods.weights.statistics import ViewStats


def problem(rows: int = 6, cols: int = 24, tokens: int = 60) -> tuple[Tensor, Tensor, Tensor]:
    """Weights, inputs with correlated channels, and 2/n XᵀX, in float64."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(cols, cols, generator=generator, dtype=torch.float64)
    x = torch.randn(tokens, cols, generator=generator, dtype=torch.float64) @ mixing
    return torch.randn(rows, cols, generator=generator, dtype=torch.float64), x, 2 / tokens * x.T @ x


def damped(hessian: Tensor, damp: float) -> Tensor:
    return hessian + damp * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=hessian.dtype)


def column_by_column(weight: Tensor, hessian: Tensor, rule: GridRule | MaskRule) -> Tensor:
    """Fix each column, move the others by the optimum of the remaining quadratic: -(w - q)/[H_F⁻¹]_jj · [H_F⁻¹]_j:."""
    weight = weight.clone()
    cols = weight.shape[1]
    for j in range(cols):
        inverse = torch.linalg.inv(hessian[j:, j:])
        if j % rule.span == 0:
            curvature = torch.stack(
                [torch.linalg.inv(hessian[i:, i:])[0, 0] for i in range(j, min(j + rule.span, cols))]
            )
            rule.enter(weight[:, j : j + rule.span], curvature.sqrt(), j)
        error = (weight[:, j] - rule.fix(weight[:, j], j)) / inverse[0, 0]
        weight[:, j:] -= error[:, None] * inverse[0]
    return weight


@pytest.mark.parametrize(("block", "group"), [(128, 8), (8, 8), (16, 8), (8, 24), (128, 24), (4, 5), (4, 7), (1, 9)])
def test_gptq_equals_brute_force(block: int, group: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also whatever the width of the ranges inside which errors move one by one."""
    monkeypatch.setattr(obs, "RANGE", block)
    weight, _, hessian = problem()
    fast, slow = GridRule(weight, 3, group), GridRule(weight, 3, group)
    swept = obs_sweep(weight, Curvature.of(hessian, 0.01, torch.float64), fast)
    reference = column_by_column(weight, damped(hessian, 0.01), slow)
    assert torch.equal(fast.codes_OI, slow.codes_OI)
    assert torch.allclose(swept, reference, atol=1e-9)


@pytest.mark.parametrize(("pattern", "block"), [(None, 128), (None, 8), ((2, 4), 128)])
def test_sparsegpt_equals_brute_force(pattern: tuple[int, int] | None, block: int) -> None:
    weight, _, hessian = problem()
    fast, slow = MaskRule(weight, 0.5, pattern, block), MaskRule(weight, 0.5, pattern, block)
    swept = obs_sweep(weight, Curvature.of(hessian, 0.01, torch.float64), fast)
    reference = column_by_column(weight, damped(hessian, 0.01), slow)
    assert torch.equal(fast.keep_OI, slow.keep_OI)
    assert torch.allclose(swept, reference, atol=1e-9)
    assert bool((swept[~fast.keep_OI] == 0).all())


def test_removing_the_first_weight_alone_costs_what_the_theory_says() -> None:
    """Optimal brain surgeon: the quadratic rises by w²/(2 [H⁻¹]_jj)."""
    weight, _, hessian = problem(rows=1)

    class First:
        span = 1

        def enter(self, weight_OW: Tensor, curvature_W: Tensor, start: int) -> None: ...

        def fix(self, column_O: Tensor, index: int) -> Tensor:
            return torch.zeros_like(column_O) if index == 0 else column_O

    moved = obs_sweep(weight, Curvature.of(hessian, 0.0, torch.float64), First())
    delta = moved - weight
    cost = 0.5 * (delta @ hessian @ delta.T).item()
    expected = weight[0, 0].item() ** 2 / (2 * torch.linalg.inv(hessian)[0, 0].item())
    assert cost == pytest.approx(expected, rel=1e-8)


def test_matrices_with_one_input_share_one_factor(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model is encoded with one factorisation for each of q-k-v, o, gate-up and down, and one alive at a time."""
    alive: weakref.WeakSet[Curvature] = weakref.WeakSet()
    most, made = 0, 0
    work_out = Curvature.of

    def counted(*args: object) -> Curvature:
        nonlocal most, made
        found = work_out(*args)  # type: ignore[arg-type]
        alive.add(found)
        most, made = max(most, len(alive)), made + 1
        return found

    monkeypatch.setattr(Curvature, "of", counted)
    Gptq(bits=4, group=8, n_calib=2).calibrate(llama(), context(), 0)
    assert (made, most) == (2 * 4, 1)


def stats_of(hessian: Tensor) -> ViewStats:
    return ViewStats(60, hessian, hessian.diagonal().sqrt(), hessian.diagonal().sqrt())


def test_gptq_without_correlations_is_rounding() -> None:
    weight = problem()[0].float()
    stats = stats_of(torch.eye(24) * 3)
    for bits in (2, 4):
        gptq = Gptq(bits=bits, group=8).encode(weight, stats)
        assert torch.equal(gptq.decode(), GridPayload.round(weight, bits, 8).decode())
        assert gptq.nbytes() == GridPayload.round(weight, bits, 8).nbytes()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_gptq_has_less_output_error_than_rounding(bits: int) -> None:
    weight, x, hessian = problem()
    gptq = Gptq(bits=bits, group=8).encode(weight.float(), stats_of(hessian.float())).decode().double()
    rtn = GridPayload.round(weight.float(), bits, 8).decode().double()
    assert (x @ (gptq - weight).T).norm() < (x @ (rtn - weight).T).norm()


def test_sparsegpt_has_less_output_error_than_its_own_mask() -> None:
    weight, x, hessian = problem()
    method = SparseGpt(sparsity=0.5)
    served = method.encode(weight.float(), stats_of(hessian.float())).decode().double()
    masked = weight * (served != 0)
    assert (x @ (served - weight).T).norm() < (x @ (masked - weight).T).norm()


def test_unseen_inputs() -> None:
    """A channel that is always zero loses its weights; without any observation the weights are rounded as they are."""
    weight, _, hessian = problem()
    hessian[3] = hessian[:, 3] = 0
    assert (
        not Gptq(bits=8, group=24).encode(weight.float(), stats_of(hessian.float())).decode()[:, 3].abs().gt(0.1).any()
    )
    empty = stats_of(torch.zeros(24, 24))
    blind = Gptq(bits=4, group=8).encode(weight.float(), empty).decode()
    assert torch.equal(blind, GridPayload.round(weight.float(), 4, 8).decode())
