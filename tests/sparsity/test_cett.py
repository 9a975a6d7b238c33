"""The CETT metric and the masks that it gives: exact identities, brute force, and the traps of the released search."""

from __future__ import annotations

import copy
import math
from contextlib import ExitStack

import numpy as np
import pytest
import torch
from sparsity_cases import observe, sequences, under
from torch import Tensor, nn
from torch.nn import functional as F

from isoflop.core.folder_context import FolderContext
from isoflop.methods.activation_sparsity.calibration import Calibration
from isoflop.methods.activation_sparsity.cett import Contributions
from isoflop.methods.activation_sparsity.cett_rule import MlpCett, MlpCettActive, SparsingLaw, cett_rules
from isoflop.methods.activation_sparsity.fat import MlpFat
from isoflop.models.lm import LmBatch, LmModel
from isoflop.models.mlps import mlps_of
from isoflop.models.taps import ActivationTap


def some_states(act: str = "relu", tokens: int = 60, neurons: int = 40, width: int = 12) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    gate, up = (torch.randn(tokens, neurons, generator=generator) for _ in range(2))
    return getattr(F, act)(gate) * up, torch.randn(neurons, width, generator=generator)


@torch.no_grad()
def hidden(model: LmModel, batch: LmBatch) -> list[Tensor]:
    """What enters the down projections."""
    with ExitStack() as stack:
        seen = [stack.enter_context(ActivationTap(mlp.down).read()) for mlp in mlps_of(model.decoder)]
        model.logits(batch)
    return [found[0] for found in seen]


def calibration_of(model: LmModel, ctx: FolderContext, examples: int = 8) -> Calibration:
    return Calibration(model, ctx, examples, 1, "test")


def test_a_threshold_of_zero_gives_bit_identical_logits(short_lm: LmModel) -> None:
    batch = sequences(short_lm)
    with torch.no_grad():
        dense = short_lm.logits(batch)
    logits, sparsity = under(short_lm, cett_rules(mlps_of(short_lm.decoder), torch.zeros(2)), batch)
    assert torch.equal(logits, dense)
    assert sparsity.active_share() == 1.0


def test_a_cett_of_zero_on_relu_removes_exactly_the_zero_activations(
    relu_lm: LmModel, sparsity_ctx: FolderContext
) -> None:
    batch = sequences(relu_lm)
    before = hidden(relu_lm, batch)
    with torch.no_grad():
        dense = relu_lm.logits(batch)
    method = MlpCett(cett=0.0)
    with method.apply(relu_lm, method.calibrate(relu_lm, sparsity_ctx, 0)), torch.no_grad():
        assert torch.equal(relu_lm.logits(batch), dense)
        observe(relu_lm)
        active = method.footprint(relu_lm, sparsity_ctx)["activation_ratio"]
    nonzero = torch.stack([(a != 0).double().mean() for a in before]).mean()
    assert active == pytest.approx(float(nonzero), abs=1e-12)
    assert 0.05 < active < 0.95


@pytest.mark.parametrize("percent", [1.0, 10.0])
def test_the_ppl_ratio_at_the_found_cett_is_the_tolerance(
    percent: float, short_lm: LmModel, sparsity_ctx: FolderContext
) -> None:
    method = SparsingLaw(ppl_tolerance=percent, n_calib=8)
    found = method.calibrate(short_lm, sparsity_ctx, 0)
    text = method.calibration(short_lm, sparsity_ctx, 0)
    ratio = math.exp(text.nll(cett_rules(text.mlps, found.eps_L))[0] - text.dense_nll)
    assert ratio == pytest.approx(1 + percent / 100, abs=1e-3)
    assert ratio <= 1 + percent / 100
    assert found.figures["calibration_ppl_ratio"] == pytest.approx(ratio, rel=1e-9)


def test_a_masked_forward_equals_one_without_those_rows_and_columns(
    short_lm: LmModel, sparsity_ctx: FolderContext
) -> None:
    batch = sequences(short_lm, count=1, length=1)
    eps_L = calibration_of(short_lm, sparsity_ctx).thresholds(0.3)
    rules = cett_rules(mlps_of(short_lm.decoder), eps_L)
    masked, sparsity = under(short_lm, rules, batch)
    small = LmModel(short_lm.info, copy.deepcopy(short_lm.module))
    kept_share = []
    for layer, rule in zip(small.decoder.layers, rules, strict=True):
        with torch.no_grad(), ActivationTap(layer.mlp.down_proj).read() as seen:
            small.logits(batch)  # the layers before are deleted already
        kept_F = rule(seen[0], seen[0]).flatten()
        kept_share.append(float(kept_F.double().mean()))
        delete_neurons(layer.mlp, kept_F)
    assert torch.allclose(small.logits(batch), masked, atol=1e-5 * float(masked.abs().max()))
    assert sparsity.active_share() == pytest.approx(np.mean(kept_share), abs=1e-12)
    assert min(kept_share) < 0.9


def delete_neurons(mlp: nn.Module, kept_F: Tensor) -> None:
    for name in ("gate_proj", "up_proj", "down_proj"):
        linear = getattr(mlp, name)
        weight = linear.weight[:, kept_F] if name == "down_proj" else linear.weight[kept_F]
        linear.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)


def test_removed_and_kept_contributions_add_up_to_the_output(short_lm: LmModel, sparsity_ctx: FolderContext) -> None:
    batch = sequences(short_lm)
    eps_L = calibration_of(short_lm, sparsity_ctx).thresholds(0.3)
    for mlp, a_BTF, rule in zip(
        mlps_of(short_lm.decoder), hidden(short_lm, batch), cett_rules(mlps_of(short_lm.decoder), eps_L), strict=True
    ):
        kept_BTF = rule(a_BTF, a_BTF)
        n_BTFd = a_BTF[..., None] * mlp.out_Fd()
        removed_BTd = n_BTFd.masked_fill(kept_BTF[..., None], 0).sum(-2)
        left_BTd = n_BTFd.masked_fill(~kept_BTF[..., None], 0).sum(-2)
        with torch.no_grad():
            whole_BTd = mlp.down(a_BTF)
        assert torch.allclose(removed_BTd + left_BTd, whole_BTd, atol=1e-5 * float(whole_BTd.abs().max()))
        assert bool((~kept_BTF).any())


@torch.no_grad()
def test_rescaling_a_neuron_leaves_its_mask(short_lm: LmModel, sparsity_ctx: FolderContext) -> None:
    batch = sequences(short_lm)
    scaled = LmModel(short_lm.info, copy.deepcopy(short_lm.module))
    for layer in scaled.decoder.layers:
        factors_F = torch.tensor([1.0, 4.0, 0.25, 32.0]).repeat(layer.mlp.down_proj.weight.shape[1] // 4)
        layer.mlp.down_proj.weight.mul_(factors_F)
        layer.mlp.up_proj.weight.div_(factors_F[:, None])
    masks = []
    for model in (short_lm, scaled):
        eps_L = calibration_of(model, sparsity_ctx).thresholds(0.25)
        rules = cett_rules(mlps_of(model.decoder), eps_L)
        masks.append([rule(a, a) for rule, a in zip(rules, hidden(model, batch), strict=True)])
    for before, after in zip(*masks, strict=True):
        assert torch.equal(before, after)
    values = [torch.cat([a.flatten() for a in hidden(model, batch)]).abs() for model in (short_lm, scaled)]
    assert not torch.equal(*(v >= v.quantile(0.9) for v in values))  # what a threshold on values would keep


@pytest.mark.parametrize("act", ["relu", "silu"])
def test_cett_is_the_mean_over_tokens_of_the_ratio_of_norms(act: str) -> None:
    a_SF, out_Fd = some_states(act)
    eps = 1.3
    ratios = []
    for a_F in a_SF:
        n_Fd = a_F[:, None] * out_Fd
        tail_d = n_Fd[n_Fd.norm(dim=1) < eps].sum(0)
        ratios.append(float(tail_d.norm() / n_Fd.sum(0).norm()))
    block = Contributions(a_SF, out_Fd)
    assert block.cett(eps) == pytest.approx(np.mean(ratios), rel=1e-5)
    means = [float(np.mean(x)) for x in zip(*((r, 1.0) for r in ratios), strict=True)]
    assert block.cett(eps) == pytest.approx(means[0] / means[1], rel=1e-5)
    assert block.cett(0.0) == 0.0
    assert block.cett(math.inf) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("target", [0.0, 1e-9, 0.01, 0.2, 0.5, 0.8, 0.95])
@pytest.mark.parametrize("act", ["relu", "silu"])
def test_the_search_ends_at_the_crossing_however_small_or_large_the_target(act: str, target: float) -> None:
    a_SF, out_Fd = some_states(act)
    block = Contributions(a_SF, out_Fd)
    rank = int(block.search(target).x)
    assert block.cett(block.threshold_of_rank(rank)) <= target
    assert block.cett(block.threshold_of_rank(rank + 1)) > target
    every = [block.cett(block.threshold_of_rank(r)) for r in range(0, a_SF.numel() + 1, 7)]
    assert all(
        value <= target + 2e-3 for value in every[: rank // 7 + 1]
    )  # nearly monotone, and no wrap to the other end


def test_earlier_searches_do_not_change_later_ones() -> None:
    a_SF, out_Fd = some_states("silu")
    used = Contributions(a_SF, out_Fd)
    for target in (0.5, 0.1, 0.3, 0.301):
        assert used.threshold(target) == Contributions(a_SF, out_Fd).threshold(target)


def test_tokens_whose_contributions_are_all_zero_are_left_out() -> None:
    a_SF, out_Fd = some_states("relu")
    with_silent = torch.cat((a_SF, torch.zeros(9, a_SF.shape[1])))
    assert Contributions(with_silent, out_Fd).threshold(0.2) == Contributions(a_SF, out_Fd).threshold(0.2)
    assert Contributions(torch.zeros(4, a_SF.shape[1]), out_Fd).cett(1.0) == 0.0


@pytest.mark.parametrize("score", ["gate", "value"])
def test_only_zeros_go_where_fewer_are_active_than_asked_for(
    score: str, relu_lm: LmModel, sparsity_ctx: FolderContext
) -> None:
    natural = MlpCett(cett=0.0).calibrate(relu_lm, sparsity_ctx, 0).figures["calibration_active"]
    for method in (MlpFat(active=0.9, score=score), MlpCettActive(active=0.9)):
        found = method.calibrate(relu_lm, sparsity_ctx, 0)
        assert found.figures["calibration_active"] == pytest.approx(natural, abs=1e-6)
        assert found.figures["calibration_ppl_ratio"] == 1.0


@pytest.mark.parametrize("method", [MlpCettActive(active=0.3), MlpFat(active=0.3), MlpFat(active=0.3, score="value")])
def test_rules_are_compared_at_an_equal_share_of_active_neurons(
    method: MlpCettActive | MlpFat, short_lm: LmModel, sparsity_ctx: FolderContext
) -> None:
    found = method.calibrate(short_lm, sparsity_ctx, 0)
    assert found.figures["calibration_active"] == pytest.approx(0.3, abs=0.005)
