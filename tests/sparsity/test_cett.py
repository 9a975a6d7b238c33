"""The CETT metric and the masks that it gives: exact identities, brute force, and the traps of the released search."""

from __future__ import annotations

import copy
import gc
import math
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sparsity_cases import met_to_the_tolerance, observe, sequences, under
from torch import Tensor, nn
from torch.nn import functional as F

from isoflop.core.folder_context import FolderContext
from isoflop.methods.activation_sparsity import cett
from isoflop.methods.activation_sparsity.base import Sparsity
from isoflop.methods.activation_sparsity.calibration import Calibration, Thresholds
from isoflop.methods.activation_sparsity.cett import Contributions
from isoflop.methods.activation_sparsity.cett_rule import MlpCett, MlpCettActive, SparsingLaw, cett_rules
from isoflop.methods.activation_sparsity.fat import MlpFat
from isoflop.methods.activation_sparsity.rules import top_of_each, units_kept
from isoflop.models.hooks.feed_forward import mlps_of
from isoflop.models.lm import LmBatch, LmModel
from isoflop.models.taps import ActivationTap
from isoflop.models.worlds.english import EnglishStage
from isoflop.models.worlds.lm_text import TokensStage


def some_states(
    act: str = "relu", tokens: int = 60, neurons: int = 40, width: int = 12, seed: int = 3
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
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
    found = method.calibrate(relu_lm, sparsity_ctx, 0)
    for rule, a_BTF in zip(method.rules(mlps_of(relu_lm.decoder), found), before, strict=True):
        assert torch.equal(rule(a_BTF, a_BTF), a_BTF != 0)
    with method.apply(relu_lm, found), torch.no_grad():
        assert torch.equal(relu_lm.logits(batch), dense)
        observe(relu_lm)
        active = method.footprint(relu_lm, sparsity_ctx)["activation_ratio"]
    nonzero = torch.stack([(a != 0).double().mean() for a in before]).mean()
    assert active == pytest.approx(float(nonzero), abs=1e-12)
    assert 0.05 < active < 0.95


@pytest.mark.parametrize("percent", [1.0, 10.0])
def test_the_found_cett_is_the_last_before_the_ppl_ratio_passes_the_tolerance(
    percent: float, short_lm: LmModel, sparsity_ctx: FolderContext
) -> None:
    method = SparsingLaw(ppl_tolerance=percent, n_calib=8)
    text = method.calibration(short_lm, sparsity_ctx, 0)
    shared, ratio = met_to_the_tolerance(method, [text])
    found = method.calibrate(short_lm, sparsity_ctx, 0)
    assert found.figures["cett"] == shared.cett
    assert torch.equal(found.eps_L, text.thresholds(shared.cett))
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
    tails, wholes = [], []
    for a_F in a_SF:
        n_Fd = a_F[:, None] * out_Fd
        tails.append(float(n_Fd[n_Fd.norm(dim=1) < eps].sum(0).norm()))
        wholes.append(float(n_Fd.sum(0).norm()))
    block = Contributions(a_SF, out_Fd)
    assert block.cett(eps) == pytest.approx(np.mean(np.divide(tails, wholes)), rel=1e-5)
    assert block.cett(eps) != pytest.approx(np.sum(tails) / np.sum(wholes), rel=0.05)  # the ratio of means
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


@st.composite
def states_with_dips(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Neurons of which some pairs cancel almost, so that CETT falls where the second one follows the first."""
    a_SF, out_Fd = some_states(draw(st.sampled_from(["relu", "silu"])), 5, 24, 4, seed=draw(st.integers(0, 2**31)))
    pairs = draw(st.integers(0, 12))
    out_Fd[1 : 2 * pairs : 2] = -out_Fd[0 : 2 * pairs : 2]
    a_SF[:, 1 : 2 * pairs : 2] = 1.05 * a_SF[:, 0 : 2 * pairs : 2]
    return a_SF, out_Fd


@given(states=states_with_dips(), targets=st.lists(st.floats(0.0, 1.0), min_size=2, max_size=5), data=st.data())
def test_a_threshold_is_the_same_whatever_was_searched_for_before(
    states: tuple[Tensor, Tensor], targets: list[float], data: st.DataObject
) -> None:
    alone = {target: Contributions(*states).threshold(target) for target in targets}
    used = Contributions(*states)
    for target in (*targets, *data.draw(st.permutations(targets))):
        assert used.threshold(target) == alone[target]


@pytest.mark.parametrize("act", ["relu", "silu"])
def test_few_whole_sums_are_worked_out_and_the_search_ends_where_it_would_with_all(
    act: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On as many contributions as it takes for the short cut, made to take it from the third rank on as well."""
    states = some_states(act, tokens=300, neurons=80)
    targets = [0.0, 1e-4, 0.01, 0.2, 0.37, 0.8, 0.95]
    whole = Contributions(*states)
    wanted = [whole.search(target) for target in targets]
    sums = 0
    tail = Contributions._tail

    def counted(self: Contributions, threshold: float) -> Tensor:
        nonlocal sums
        sums += 1
        return tail(self, threshold)

    monkeypatch.setattr(Contributions, "_tail", counted)
    monkeypatch.setattr(cett, "WORTH_IT", 0)
    for near in (2**-9, 2**-5, 1.0):
        monkeypatch.setattr(cett, "NEAR", near)
        sums, block = 0, Contributions(*states)
        for target, expected in zip(targets, wanted, strict=True):
            found = block.search(target)
            assert (found.x, found.status, found.evaluations) == (expected.x, expected.status, expected.evaluations)
            assert found.y == pytest.approx(expected.y, abs=1e-6)
        most = sum(one.evaluations for one in wanted)
        assert sums < (0.75 if near < 2**-6 else 0.5) * most


def test_states_of_all_blocks_lie_in_files_and_memory_holds_those_of_one(
    short_lm: LmModel, sparsity_ctx: FolderContext
) -> None:
    """What is worked out for a block goes when its threshold is found; what stays is mapped from files that go with the text."""
    text = calibration_of(short_lm, sparsity_ctx)
    text.thresholds(0.3)
    assert text._folder is not None
    folder = Path(text._folder.name)
    sizes = [path.stat().st_size for path in folder.iterdir()]
    states = [block._a_SF.numel() * 4 for block in text.contributions]
    assert sum(sizes) == 2 * sum(states)
    for block in text.contributions:
        held = [value for value in vars(block).values() if isinstance(value, Tensor)]
        laid = [tensor for tensor in held if tensor.numel() >= block._a_SF.numel()]
        assert {id(tensor) for tensor in laid} == {id(block._a_SF), id(block._ranked)}
        assert block._base is None
    del text, block, held, laid
    gc.collect()
    assert not folder.exists()


def test_thresholds_are_those_of_dense_states_of_training_text(short_lm: LmModel, sparsity_ctx: FolderContext) -> None:
    text = calibration_of(short_lm, sparsity_ctx)
    (batch,) = short_lm.calibration(sparsity_ctx, 8, 1)
    dense = [a_BTF.flatten(0, 1) for a_BTF in hidden(short_lm, batch)]
    blocks = [Contributions(a_SF, mlp.out_Fd()) for a_SF, mlp in zip(dense, text.mlps, strict=True)]
    eps_L = text.thresholds(0.3)
    assert eps_L.tolist() == pytest.approx([block.threshold(0.3) for block in blocks], rel=1e-6)
    text.nll(cett_rules(text.mlps, eps_L))  # a pass with neurons left out changes nothing
    assert torch.equal(text.thresholds(0.3), eps_L)
    assert short_lm.info.tokenizer is not None
    for split, holds in (("train", True), ("test", False)):
        stage = TokensStage(EnglishStage.here(), short_lm.info.tokenizer, split)
        ids = ",".join(map(str, sparsity_ctx.get(stage).ids_N))
        assert all((",".join(map(str, row)) in ids) == holds for row in batch.ids_BT.tolist()), split


@torch.no_grad()
def leaning_on_its_first_block(model: LmModel) -> LmModel:
    """A copy whose second block sees what the first block loses.

    The first one adds up its neurons, none of them negative, into one coordinate that outweighs all others, so at a CETT of
    c that coordinate shrinks to 1 - c. The second reads the other coordinates only, which the norm in front of it scales by
    1 over that one, and multiplies two of what it reads: its contributions grow by (1 - c)^-2.
    """
    copied = LmModel(model.info, copy.deepcopy(model.module))
    first, second = copied.decoder.layers
    first.mlp.up_proj.weight.copy_(first.mlp.gate_proj.weight)
    first.mlp.down_proj.weight.zero_()[0] = 100.0
    second.self_attn.o_proj.weight.zero_()
    for linear in (second.mlp.gate_proj, second.mlp.up_proj):
        linear.weight[:, 0] = 0.0
    return copied


def test_thresholds_are_not_those_behind_a_thinned_block(short_lm: LmModel, sparsity_ctx: FolderContext) -> None:
    model = leaning_on_its_first_block(short_lm)
    text = calibration_of(model, sparsity_ctx)
    (batch,) = model.calibration(sparsity_ctx, 8, 1)
    eps_L = text.thresholds(0.5)
    dense = Contributions(hidden(model, batch)[1].flatten(0, 1), text.mlps[1].out_Fd())
    assert float(eps_L[1]) == pytest.approx(dense.threshold(0.5), rel=1e-6)
    with Sparsity(model, text.mlps, cett_rules(text.mlps, eps_L)).at_work(None):
        seen = hidden(model, batch)[1]
    thinned = Contributions(seen.flatten(0, 1), text.mlps[1].out_Fd())
    assert thinned.threshold(0.5) > 2 * float(eps_L[1])  # 3.7 to 4.3 times over three trainings and texts


@pytest.mark.parametrize("act", ["relu", "silu"])
def test_at_an_equal_share_the_rule_loses_less_than_thresholds_on_the_gate(act: str) -> None:
    """On random states: the other rules see neither the second factor of a neuron's value nor its weights."""
    generator = torch.Generator().manual_seed(11)
    gate_SF = getattr(F, act)(torch.randn(64, 320, generator=generator))
    a_SF, out_Fd = gate_SF * torch.randn(64, 320, generator=generator), torch.randn(320, 128, generator=generator)
    whole_S = (a_SF @ out_Fd).norm(dim=-1)

    def lost(kept_SF: Tensor) -> float:
        return float(((a_SF.masked_fill(kept_SF, 0.0) @ out_Fd).norm(dim=-1) / whole_S).mean())

    block = Contributions(a_SF, out_Fd)
    kept_SF = block.norm_SF >= block.threshold(0.1)
    share = float(kept_SF.double().mean())
    assert lost(kept_SF) == pytest.approx(0.1, abs=1e-3)
    rivals = {
        "fat": gate_SF.abs() >= gate_SF.abs().flatten().sort(descending=True).values[int(share * gate_SF.numel())],
        "top-k": top_of_each(gate_SF.abs(), units_kept(share, 320)),
    }
    for name, mask_SF in rivals.items():
        assert float(mask_SF.double().mean()) == pytest.approx(share, abs=0.01), name
        assert lost(mask_SF) > 1.5 * lost(kept_SF), name


def test_fat_looks_at_the_gate_unless_told_otherwise() -> None:
    a_F, gate_F = torch.tensor([0.1, -3.0, 2.0]), torch.tensor([-0.6, 0.2, 0.5])
    found = Thresholds(torch.tensor([0.5]), {})
    for method, kept in ((MlpFat(), [True, False, True]), (MlpFat(score="value"), [False, True, True])):
        (rule,) = method.rules([], found)
        assert rule(a_F, gate_F).tolist() == kept


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
