"""BitStack (arXiv 2410.23918): the identities of its decomposition, and one artefact for every size."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor
from weight_cases import Bare, context, gpt2, held_out_loss, llama, mixtral, trained_decoder

from isoflop.core.errors import Infeasible
from isoflop.methods.base import build
from isoflop.methods.weights.bitstack import EPSILON, BitStack
from isoflop.methods.weights.folding import Folding, as_stored, fold_scales
from isoflop.methods.weights.level_bank import LevelBank
from isoflop.methods.weights.payloads import StackPayload
from isoflop.methods.weights.probe import WeightProbe
from isoflop.methods.weights.stacks import (
    SortedStacks,
    Stacks,
    absolute_value_block,
    block_bytes,
    decompose,
    low_rank,
    plain_rank,
    sort_blocks,
)
from isoflop.methods.weights.statistics import collect
from isoflop.methods.weights.views import linear_views
from isoflop.models.base import Model
from isoflop.models.hooks.matrices import MATRICES

QUICK = {"n_calib": 8, "n_sort": 4, "n_iter": 6, "k": 1}


def matrix(rows: int = 24, cols: int = 40, seed: int = 0) -> Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@lru_cache(maxsize=4)
def sorted_stacks(sort: str = "perplexity") -> SortedStacks:
    return BitStack(**QUICK, sort=sort).calibrate(trained_decoder(), context(), 0)  # type: ignore[arg-type]


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_residual_is_the_tail_of_the_absolute_values_spectrum(rank: int) -> None:
    """(a): ‖R_{t+1}‖² = Σ_{j>k} σ_j(|R_t|)², strictly decreasing."""
    residual = matrix()
    for _ in range(5):
        signs, left, right = absolute_value_block(residual, rank)
        tail = torch.linalg.svdvals(residual.abs())[rank:].square().sum()
        following = residual - signs * (left @ right)
        assert following.square().sum().item() == pytest.approx(tail.item(), rel=1e-9)
        assert following.square().sum() < residual.square().sum()
        residual = following


@pytest.mark.parametrize(("rows", "cols"), [(48, 80), (80, 48), (64, 64), (300, 40), (5, 90)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_factors_of_a_low_rank_are_those_of_the_whole_decomposition(rows: int, cols: int, dtype: torch.dtype) -> None:
    """From the smaller Gram matrix, tall and wide, also where nothing is left of a matrix."""
    weight = matrix(rows, cols).abs().to(dtype)
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    for rank in (1, min(rows, cols) // 4):
        ours = low_rank(weight, rank)
        assert [tuple(part.shape) for part in ours] == [(rows, rank), (rank, cols)]
        best = left[:, :rank] @ torch.diag(values[:rank]) @ right[:rank]
        assert torch.allclose(ours[0] @ ours[1], best, atol=1e-5 if dtype == torch.float32 else 1e-11)
        assert torch.allclose(ours[0].norm(dim=0), ours[1].norm(dim=1), rtol=1e-5), "singular values are split evenly"
        assert ours[0].dtype == dtype
        assert all(bool((part == 0).all()) for part in low_rank(torch.zeros_like(weight), rank)[:1])


def test_full_rank_is_exact_in_one_block() -> None:
    """(b)."""
    weight = matrix()
    signs, left, right = absolute_value_block(weight, 24)
    assert torch.allclose(signs * (left @ right), weight, atol=1e-12)
    stack, errors = decompose(weight, 24, 1, True)
    assert torch.allclose(stack.decode().double(), weight, atol=1e-2), "up to the rounding to float16"
    assert errors[1] < 1e-5 * errors[0]


def test_the_residual_is_formed_with_the_factors_as_stored() -> None:
    """Trap: each block corrects the rounding of the blocks before it."""
    weight = matrix().float() * 100
    stack, errors = decompose(weight, 2, 8, True)
    for blocks in range(1, 9):
        served = float((weight - stack.prefix(blocks).decode()).square().sum())
        assert served == pytest.approx(errors[blocks], rel=1e-3)
    assert all(b < a for a, b in pairwise(errors))


def test_zero_counts_as_positive() -> None:
    """Trap: a zero entry must not lose its share of the block."""
    signs, _, _ = absolute_value_block(torch.zeros(3, 3, dtype=torch.float64), 1)
    assert bool((signs == 1).all())


def test_without_absolute_values_a_block_is_low_rank_of_at_most_the_same_bytes() -> None:
    for rows, cols, k in [(24, 40, 1), (64, 64, 2), (96, 64, 1)]:
        with_signs, without = block_bytes(rows, cols, k), block_bytes(rows, cols, k, avd=False)
        assert without <= with_signs < without + 2 * (rows + cols)
    stack, _ = decompose(matrix(), 1, 2, avd=False)
    rank = plain_rank(24, 40, 1)
    left, values, right = torch.linalg.svd(matrix())
    best = left[:, : 2 * rank] @ torch.diag(values[: 2 * rank]) @ right[: 2 * rank]
    assert torch.allclose(stack.decode().double(), best, atol=5e-3), "two blocks are the best of twice the rank"


def folded(model: Model, mode: str) -> tuple[Folding, int]:
    views = linear_views(model)
    statistics = collect(model, context(), 8, 0)
    batch = next(iter(model.calibration(context(), 4, 0))) if mode == "fold" else None
    scales = {view.name: as_stored(statistics.scales(view) + EPSILON) for view in views}
    return fold_scales(model, views, scales, statistics.owner, batch), len(views)


def served_logits(model: Model, folding: Folding) -> Tensor:
    """The model with scaled matrices at full precision, folded or divided."""
    from isoflop.methods.weights.artefact import Artefact, Serving
    from isoflop.methods.weights.payloads import DensePayload

    views = linear_views(model)
    payloads = {}
    for view in views:
        divisor = folding.divisor(view)
        scaled = folding.scaled(view)
        payloads[view.name] = DensePayload.of(scaled if divisor is None else scaled / divisor.float())
    artefact = Artefact(payloads, folding.vectors)
    with model.occupy(MATRICES, Serving(views, lambda view: artefact[view.name], artefact.vectors)):
        return model.supervised(next(iter(model.calibration(context(), 3, 9))))[0]


@pytest.mark.parametrize("mode", ["fold", "divide"])
@pytest.mark.parametrize(("make", "divided"), [
    (llama, 0), (lambda: llama(kv_heads=2), 2), (gpt2, 4), (mixtral, 2 + 2 * 2 * 4), (lambda: llama(attention_bias=True), 0),
])  # fmt: skip
def test_scaling_leaves_dense_logits_unchanged(make: object, divided: int, mode: str) -> None:
    """(d). Grouped queries keep o_proj's scale (2 layers), GPT-2 those of both output projections, experts theirs."""
    model = make()  # type: ignore[operator]
    folding, views = folded(model, mode)
    assert len(folding.divided) == (divided if mode == "fold" else views)
    dense = model.supervised(next(iter(model.calibration(context(), 3, 9))))[0]
    assert (served_logits(model, folding) - dense).abs().max() <= 1e-4 * dense.abs().max()
    assert any(float(s.max() / s.min()) > 1.1 for s in folding.scales.values()), "the scales are not trivial"


class OffsetNorm(torch.nn.Module):
    """A norm whose weight is kept as its difference from one, as in Gemma."""

    def __init__(self, norm: torch.nn.Module) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(norm.weight.detach() - 1, requires_grad=False)  # type: ignore[operator]

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.rms_norm(x, (x.shape[-1],)) * (1 + self.weight)


def test_a_fold_that_would_change_the_model_is_not_made() -> None:
    """What cannot take up the scales is found by trying; the other folds stay."""
    model = llama()
    layer = model.module.model.layers[0]  # type: ignore[union-attr, index]
    layer.input_layernorm = OffsetNorm(layer.input_layernorm)  # type: ignore[union-attr, arg-type]
    folding, _ = folded(model, "fold")
    assert {name.split(".", 2)[2] for name in folding.divided} == {f"0.self_attn.{role}_proj" for role in "qkv"}
    assert isinstance(model, Bare)


def test_loaded_blocks_fill_the_budget() -> None:
    """(e): at most the budget, the next block would exceed it, prefixes are nested; (f): bytes are the formula's."""
    model, stacks = trained_decoder(), sorted_stacks()
    views = {view.name: view for view in linear_views(model)}
    count = sum(view.numel for view in views.values())
    previous = dict.fromkeys(views, 0)
    for bits in (1.75, 2.0, 2.3, 3.1, 4.0, 5.5, 16.0):
        method = BitStack(**QUICK, bits=bits)  # type: ignore[arg-type]
        budget = bits * count / 8
        blocks = stacks.blocks_within(budget)
        with method.apply(model, stacks):
            stored = sum(model.stored[view.parameter] for view in views.values())
        formula = sum(blocks[n] * block_bytes(v.rows, v.cols, 1) for n, v in views.items())
        divisors = sum(2 * v.cols for v in views.values() if v.role == "o_proj")
        assert stored == formula + divisors <= budget
        loaded = sum(blocks.values()) - len(views)
        if loaded < len(stacks.order):
            following = views[stacks.order[loaded]]
            assert stored + block_bytes(following.rows, following.cols, 1) > budget
        assert all(blocks[name] >= previous[name] for name in views), "prefixes are nested"
        assert max(blocks.values()) - min(blocks.values()) <= 1, "level by level"
        previous = blocks


def test_a_budget_below_one_block_is_refused_before_and_when_applied() -> None:
    probe = WeightProbe()
    method = BitStack(bits=1.1, k=1)
    with pytest.raises(
        Infeasible, match=r"bits = 1\.1 is less than one block.*allowed: bits from 1\.\d+, or a smaller k"
    ):
        method.check(probe.model.info)
    unknown = replace(probe.model.info, geometry={})
    method.check(unknown)
    with (
        pytest.raises(Infeasible, match=r"bits = 1\.1 is less than one block"),
        method.apply(trained_decoder(), sorted_stacks()),
    ):
        pass


def test_a_rank_beyond_the_matrices_is_refused() -> None:
    info = replace(WeightProbe().model.info, geometry={"matrices": ((8, 64, 1),)})
    with pytest.raises(Infeasible, match="k = 16 exceeds the rank of a 8x64 matrix; allowed: up to 8"):
        BitStack(k=16, bits=16.0).check(info)


def test_one_pair_of_stages_serves_every_budget() -> None:
    from isoflop.models.family import family_of

    family = family_of("tiny-llava/d24")
    info = family.info("tiny-llava/d24", {})
    weights = family.weights(info, (build("avgpool", {}),), 0)
    trained_with = (build("avgpool", {}),)
    keys = {
        stage.key
        for bits in (3.0, 4.0, 8.0)
        if (stage := BitStack(bits=bits, k=1).prepare(info, weights, 0, trained_with)) is not None
    }
    assert len(keys) == 1
    stage = BitStack(bits=3.0, k=1).prepare(info, weights, 0, trained_with)
    other = BitStack(bits=3.0, k=1, sort="random").prepare(info, weights, 0, trained_with)
    assert stage is not None
    assert other is not None
    assert stage.key != other.key
    assert stage.stacks.key == other.stacks.key, "another order, the same decomposition"  # type: ignore[attr-defined]


def test_the_order_survives_files(tmp_path: Path) -> None:
    stacks = sorted_stacks()
    stacks.stacks.save(tmp_path)
    stacks.save_order(tmp_path)
    again = SortedStacks.load(Stacks.load(tmp_path), tmp_path)
    assert again.order == stacks.order
    assert again.sizes == stacks.sizes
    model, method = trained_decoder(), BitStack(**QUICK, bits=2.5)  # type: ignore[arg-type]
    losses = []
    for value in (stacks, again):
        with method.apply(model, value):
            losses.append(held_out_loss(model))
    assert losses[0] == losses[1]


def test_perplexity_order_is_that_of_the_losses() -> None:
    """Brute force on one level: add a block to one view, all others at one block, and measure."""
    from isoflop.methods.weights.artefact import Serving, in_place
    from isoflop.methods.weights.level_bank import calibration_loss

    model, stacks = trained_decoder(), sorted_stacks().stacks
    views = linear_views(model)
    batches = list(model.calibration(context(), 4, 1))
    short = Stacks(stacks.artefact, stacks.errors)
    order = sort_blocks(model, views, short, "perplexity", batches, 0).order[: len(views)]
    losses = {}
    for chosen in views:
        serving = Serving(views, lambda v, c=chosen: stacks.stack(v.name).prefix(1 + (v is c)), stacks.artefact.vectors)
        with model.occupy(MATRICES, serving):
            losses[chosen.name] = calibration_loss(model, batches)
    assert [losses[name] for name in order] == sorted(losses.values())
    with in_place(model, {}):
        assert not model.stored


def test_losses_that_are_not_finite_come_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trap: perplexity may be NaN at the first levels."""
    from isoflop.methods.weights import stacks as module

    model = trained_decoder()
    views = linear_views(model)
    values = iter([float("nan"), 3.0, float("inf"), 1.0, 2.0, 5.0, 4.0] * 10)
    monkeypatch.setattr(module, "calibration_loss", lambda model, batches: next(values))
    order = sort_blocks(model, views, sorted_stacks().stacks, "perplexity", [None], 0).order[:7]
    names = [view.name for view in views]
    assert order == [names[i] for i in (3, 4, 1, 6, 5, 0, 2)]


def test_weight_error_order_takes_the_largest_gain_first() -> None:
    stacks = sorted_stacks("weight-error")
    errors = stacks.stacks.errors
    first = stacks.order[: len(errors)]
    gains = [errors[name][1] - errors[name][2] for name in first]
    assert gains == sorted(gains, reverse=True)


def test_the_loss_falls_along_the_budget() -> None:
    """On a trained model, in steps of half a bit or more: monotone, and near the dense loss at the end."""
    model, stacks = trained_decoder(), sorted_stacks()
    losses = []
    for bits in (1.75, 2.25, 3.0, 4.0, 6.0, 9.0):
        with BitStack(**QUICK, bits=bits).apply(model, stacks):  # type: ignore[arg-type]
            losses.append(held_out_loss(model))
    assert losses == sorted(losses, reverse=True)
    dense = held_out_loss(model)
    assert losses[-1] - dense < 0.1 * (losses[0] - dense)


def test_the_bank_encodes_once_and_restores() -> None:
    model = llama()
    views = linear_views(model)
    calls: list[tuple[str, int]] = []

    def encode(view: object, level: int) -> StackPayload:
        calls.append((view.name, level))  # type: ignore[attr-defined]
        return decompose(view.weight(), 1, level, True)[0]  # type: ignore[attr-defined]

    bank: LevelBank[int] = LevelBank(views, encode)
    before = views[0].weight().clone()
    with bank.in_place(model):
        for level in (1, 2, 2, 1):
            bank.switch(views[0], level)
        assert torch.equal(views[0].weight(), bank.payload(views[0], 1).decode())
    assert calls == [(views[0].name, 1), (views[0].name, 2)]
    assert torch.equal(views[0].weight(), before)
