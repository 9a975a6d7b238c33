"""ODP: what is dropped, protected and counted, against loops over tokens and attention as transformers has it (arXiv 2410.06270)."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from isoflop.core.errors import Infeasible
from isoflop.core.folder_context import FolderContext
from isoflop.methods.base import build
from isoflop.methods.experts.odp import GRID, Odp, RouterRatios, nats_per_token
from isoflop.methods.experts.pruning import Pruning
from isoflop.methods.weights.mixture_probe import untrained_mixture
from isoflop.methods.weights.probe import WeightProbe
from isoflop.models.counting import flops_of
from isoflop.models.hooks.experts import EXPERTS, ExpertPolicy, Routing
from isoflop.models.lm import NOT_SCORED, LmBatch, LmModel

NUMBERS = json.loads((Path(__file__).parent / "numbers" / "odp.json").read_text())
"""Outputs of ``DynamicRankMixtralSparseMoeBlockWrapper`` of Aaronhuang-778/MC-MoE, on the block of :func:`wave`; ``tau_l`` 0."""
LAYERS, EXPERT = 2, 3 * 64 * 32
"""Of the model here, and weights of one expert."""


class Recorded(ExpertPolicy):
    """What routers chose before anybody changed it, and what experts saw."""

    def __init__(self) -> None:
        self.seen: dict[int, tuple[Tensor, Routing]] = {}

    def route(self, layer: int, hidden_Sd: Tensor, routing: Routing) -> Routing:
        self.seen[layer] = (hidden_Sd.clone(), routing)
        return routing


@lru_cache(maxsize=1)
def mixture() -> LmModel:
    return untrained_mixture(layers=LAYERS)


@lru_cache(maxsize=1)
def calibrated() -> RouterRatios:
    return build("odp", {"n_calib": 8}).calibrate(mixture(), FolderContext.temporary(), 0)  # type: ignore[attr-defined]


def batch_of(rows: int = 3, length: int = 24, padded: int = 0, side: str = "left") -> LmBatch:
    """Ids; ``padded`` tokens of the first row are padding."""
    ids_BT = torch.arange(rows * length).view(rows, length) * 7 % 48
    valid_BT = torch.ones(rows, length, dtype=torch.bool)
    if padded:
        valid_BT[0, slice(0, padded) if side == "left" else slice(-padded, None)] = False
    return LmBatch(ids_BT, torch.full_like(ids_BT, NOT_SCORED), valid_BT=valid_BT if padded else None)


@torch.no_grad()
def logits(model: LmModel, batch: LmBatch, **knobs: Any) -> Tensor:
    with build("odp", knobs).apply(model, calibrated()):
        return model.logits(batch)


def dropped_in(model: LmModel, batch: LmBatch, **knobs: Any) -> dict[int, tuple[Tensor, Tensor, Routing]]:
    """By layer: hidden states, which tokens lost an expert, the routing that was left."""
    method, found = build("odp", knobs), {}
    pruning = method.occupants(model, calibrated())[EXPERTS]
    assert isinstance(pruning, Pruning)
    route = pruning.route

    def noting(layer: int, hidden_Sd: Tensor, routing: Routing) -> Routing:
        left = route(layer, hidden_Sd, routing)
        found[layer] = (hidden_Sd.clone(), (left.weights_Sk == 0).any(-1), left)
        return left

    pruning.route = noting  # type: ignore[method-assign]
    with torch.no_grad(), model.occupy(EXPERTS, pruning):
        model.logits(batch)
    return found


def test_thresholds_are_quantiles_of_each_layers_ratios() -> None:
    model, recorded, ratios = mixture(), Recorded(), calibrated()
    batches = list(model.calibration(FolderContext.temporary(), 8, _seed()))
    seen: dict[int, list[Tensor]] = {}
    with torch.no_grad(), model.occupy(EXPERTS, recorded):
        for batch in batches:
            model.logits(batch)
            for layer, (_, routing) in recorded.seen.items():
                first_S, second_S = routing.weights_Sk.sort(-1, descending=True).values.unbind(-1)
                seen.setdefault(layer, []).append(second_S / first_S)
    for layer, parts in seen.items():
        values = torch.cat(parts).double().numpy()
        assert ratios.threshold(layer, 0.5) == pytest.approx(np.median(values), rel=1e-6)
        assert ratios.threshold(layer, 0.25) == pytest.approx(np.quantile(values, 0.25), rel=1e-6)
        share = (values < ratios.threshold(layer, 0.5)).mean()
        assert share == pytest.approx(0.5, abs=1 / len(values) + 1e-9)
    assert ratios.quantiles[0] != ratios.quantiles[1]


def _seed() -> int:
    from isoflop.core.hashing import derive_seed

    return derive_seed("odp calibration", 0)


def test_a_quantile_of_nothing_is_the_model_itself() -> None:
    """(c)."""
    batch = batch_of()
    with torch.no_grad():
        assert torch.equal(logits(mixture(), batch, quantile=0.0), mixture().logits(batch))


def test_the_second_expert_goes_where_its_share_is_small_and_the_first_has_weight_one() -> None:
    """(d); token by token, in the first layer, which sees the same with and without."""
    model, recorded, batch = mixture(), Recorded(), batch_of()
    with torch.no_grad(), model.occupy(EXPERTS, recorded):
        model.logits(batch)
    before = recorded.seen[0][1]
    _, drops_S, left = dropped_in(model, batch, protect=0.0)[0]
    mu = calibrated().threshold(0, 0.5)
    for token in range(len(drops_S)):
        first, second = sorted(before.weights_Sk[token].tolist(), reverse=True)
        assert bool(drops_S[token]) == (second / first < mu)
        kept = sorted(left.weights_Sk[token].tolist(), reverse=True)
        assert kept == ([1.0, 0.0] if drops_S[token] else [first, second])
    assert 0 < int(drops_S.sum()) < len(drops_S)
    assert torch.equal(left.experts_Sk, before.experts_Sk)


@pytest.mark.parametrize(("padded", "side"), [(0, "left"), (5, "left"), (5, "right")])
@torch.no_grad()
def test_protected_are_those_that_receive_most_attention_times_norm(padded: int, side: str) -> None:
    """By loops, over the attention of transformers' eager implementation; of each row by itself, without its padding."""
    model, batch, protect = untrained_mixture(layers=LAYERS), batch_of(padded=padded, side=side), 0.3
    rows, length = batch.ids_BT.shape
    valid = np.ones((rows, length), dtype=bool) if batch.valid_BT is None else batch.valid_BT.numpy()
    found = dropped_in(model, batch, quantile=1.0, protect=protect, importance="received")[0]
    protected = ~found[1].view(rows, length).numpy()
    norms = found[0].abs().sum(-1).view(rows, length).numpy()
    positions = (torch.from_numpy(valid).long().cumsum(-1) - 1).clamp(min=0)
    model.module.set_attn_implementation("eager")
    maps = model.module(
        input_ids=batch.ids_BT, attention_mask=torch.from_numpy(valid).long(), position_ids=positions, output_attentions=True
    ).attentions[0].mean(1).numpy()  # fmt: skip
    for row in range(rows):
        real = [t for t in range(length) if valid[row, t]]
        score = {j: np.mean([maps[row, i, j] for i in real if i >= j]) * norms[row, j] for j in real}
        most = sorted(real, key=lambda j: -score[j])[: math.floor(protect * len(real))]
        assert {t for t in real if protected[row, t]} == set(most)


@torch.no_grad()
def test_released_importance_is_the_norm_over_the_tokens_that_are_left() -> None:
    model, batch = mixture(), batch_of(rows=2, length=20)
    hidden_Sd, drops_S, _ = dropped_in(model, batch, quantile=1.0, protect=0.2, importance="released")[0]
    score = hidden_Sd.abs().sum(-1).view(2, 20) / (20 - torch.arange(20))
    for row in range(2):
        assert set((~drops_S.view(2, 20)[row]).nonzero()[:, 0].tolist()) == set(score[row].topk(4).indices.tolist())


@torch.no_grad()
def test_one_token_at_a_time_knows_the_ratio_alone() -> None:
    batch = LmBatch(torch.tensor([[3], [9]]), torch.full((2, 1), NOT_SCORED))
    assert torch.equal(logits(mixture(), batch, protect=1.0), logits(mixture(), batch, protect=0.0))


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@torch.no_grad()
def test_flops_fall_by_those_of_the_experts_that_do_not_run(implementation: str) -> None:
    """2 FLOPs a weight; with no expert dropped, the count is that of both experts, whatever runs them."""
    model = untrained_mixture(layers=LAYERS)
    model.module.set_experts_implementation(implementation)
    batch, tokens = batch_of(rows=2, length=20), 40
    whole, _ = flops_of(lambda: model.logits(batch))
    attention, head, scores = 2 * 12288, 2 * 64 * 48, 2 * 2 * 20 * 64
    assert whole == tokens * (LAYERS * (attention + scores + 2 * 64 * 4 + 2 * 2 * EXPERT) + head)
    method = build("odp", {"quantile": 0.5, "protect": 0.0})
    with method.apply(model, calibrated()):
        pruned, _ = flops_of(lambda: model.logits(batch))
        pruning = model.occupant(EXPERTS)
        footprint = method.footprint(model, FolderContext.temporary())
    assert isinstance(pruning, Pruning)
    gone = 2 * LAYERS * tokens - pruning.pairs.total()
    assert 0 < gone < LAYERS * tokens
    assert whole - pruned == 2 * EXPERT * gone
    active = pruning.pairs.total() / (LAYERS * tokens)
    params = model.info.n_params - LAYERS * EXPERT * (4 - active)
    assert footprint == pytest.approx({"ratio": 2 / active, "active_experts": active, "active_params": params})


@torch.no_grad()
def test_protection_costs_one_product_of_queries_and_keys_and_one_of_weights() -> None:
    model, batch = mixture(), batch_of(rows=1, length=32)
    cost = {}
    for protect in (0.0, 0.25):
        with build("odp", {"quantile": 0.5, "protect": protect}).apply(model, calibrated()):
            model.logits(batch)  # the first pass under a tap compares
            flops, _ = flops_of(lambda: model.logits(batch))
            pruning = model.occupant(EXPERTS)
            assert isinstance(pruning, Pruning)
            cost[protect] = flops - 2 * EXPERT * pruning.pairs.total() / 2  # two passes
    heads = 2 * 32 * 32 * 64  # of all heads, 2 FLOPs a weight
    extra = cost[0.25] - cost[0.0]
    assert LAYERS * heads <= extra <= LAYERS * heads * 1.2


def test_padding_is_not_counted_and_changes_nothing() -> None:
    model, batch = mixture(), batch_of(rows=1, length=20)
    ids_BT = torch.cat([torch.full((1, 4), 11), batch.ids_BT], dim=1)
    valid_BT = torch.arange(24)[None] >= 4
    padded = LmBatch(ids_BT, torch.full_like(ids_BT, NOT_SCORED), valid_BT=valid_BT)
    knobs: dict[str, Any] = {"quantile": 0.7, "protect": 0.2}
    torch.testing.assert_close(
        logits(model, padded, **knobs)[:, 4:], logits(model, batch, **knobs), rtol=1e-4, atol=1e-5
    )
    counts = []
    for one in (batch, padded):
        with torch.no_grad(), build("odp", knobs).apply(model, calibrated()):
            model.logits(one)
            pruning = model.occupant(EXPERTS)
            assert isinstance(pruning, Pruning)
            counts.append((dict(pruning.tokens), dict(pruning.pairs)))
    assert counts[0] == counts[1]
    assert counts[0][0] == {0: 20, 1: 20}


@torch.no_grad()
def test_layers_that_prune_are_those_that_lose_least_alone() -> None:
    model = mixture()
    method = build("odp", {"n_calib": 8, "layers": 0.5, "quantile": 0.9})
    assert isinstance(method, Odp)
    found = method.measured().calibrate(model, FolderContext.temporary(), 0)
    batches = list(model.calibration(FolderContext.temporary(), 8, _seed()))
    for layer in range(LAYERS):
        one = RouterRatios({layer: found.quantiles[layer]})
        with build("odp", {"quantile": 0.9, "protect": 0.0}).apply(model, one):
            assert found.losses[layer] == pytest.approx(nats_per_token(model, batches), rel=1e-6)
    least = min(found.losses, key=lambda layer: found.losses[layer])
    assert found.chosen(0.5) == [least]
    assert found.chosen(0.01) == [least]
    assert found.chosen(1.0) == [0, 1]
    pruning = method.occupants(model, found)[EXPERTS]
    assert set(pruning.thresholds) == {least}


def test_one_calibration_serves_all_quantiles_and_layers_are_told_apart_at_one() -> None:
    one = {build("odp", {"quantile": q, "protect": p}).measured() for q in (0.1, 0.9) for p in (0.0, 0.1)}  # type: ignore[attr-defined]
    assert len(one) == 1
    apart = {build("odp", {"quantile": q, "layers": n}).measured() for q in (0.1, 0.9) for n in (0.2, 0.9)}  # type: ignore[attr-defined]
    assert len(apart) == 2


def test_what_calibration_found_is_kept(tmp_path: Any) -> None:
    found = replace(calibrated(), losses={0: 1.5, 1: 1.25})
    found.save(tmp_path)
    assert RouterRatios.load(tmp_path) == found
    assert len(found.quantiles[0]) == len(GRID)


def test_with_mc_moe_in_one_trial_it_drops_experts_of_the_rounded_model() -> None:
    """As if the model itself had the rounded matrices."""
    model, batch = mixture(), batch_of()
    static = build("mc-moe", {"bits": 2.0, "group": 32, "n_calib": 4})
    artefact = static.calibrate(model, FolderContext.temporary(), 0)  # type: ignore[attr-defined]
    with static.apply(model, artefact):
        rounded = {name: value.clone() for name, value in model.module.state_dict().items()}
        both = logits(model, batch)
        stored = sum(model.stored.values())
    other = untrained_mixture(layers=LAYERS)
    other.module.load_state_dict(rounded)
    assert torch.equal(both, logits(other, batch))
    assert not torch.allclose(both, logits(model, batch))
    assert stored == LAYERS * (12288 / 2 + 4 * EXPERT * 2 / 8 + (12288 + 4 * EXPERT) / 32 * 4)


@pytest.mark.parametrize(
    ("change", "knobs", "words"),
    [
        ({"experts_per_token": 4}, {}, "sends a token to 4 experts; allowed: 2 experts per token$"),
        (
            {"windows": (16, None)},
            {},
            "protect = 0.02 asks for attention.*allowed: protect = 0, or importance = released$",
        ),
    ],
)
def test_what_cannot_work_is_refused_at_plan(change: dict[str, Any], knobs: dict[str, Any], words: str) -> None:
    info = mixture().info
    info = replace(info, geometry={**info.geometry, **change})
    with pytest.raises(Infeasible, match=words):
        build("odp", knobs).check(info)
    if "windows" in change:
        build("odp", {"protect": 0.0}).check(info)
        build("odp", {"importance": "released"}).check(info)


def test_a_model_without_experts_is_refused_at_plan() -> None:
    with pytest.raises(Infeasible, match="is no mixture of experts; allowed: "):
        build("odp", {}).check(WeightProbe().model.info)


def wave(*shape: int, step: float) -> Tensor:
    return torch.sin(torch.arange(math.prod(shape), dtype=torch.float64) * step + 0.3).float().view(*shape)


@pytest.mark.parametrize("wanted", NUMBERS, ids=lambda w: f"mu {w['mu']}, protect {w['protect']}")
def test_numbers_of_the_released_code(wanted: dict[str, Any]) -> None:
    """A block of four linear experts; importance as released."""
    tokens, width, experts = 15, 8, 4
    x_Sd = wave(tokens, width, step=0.7) * (1 + wave(tokens, step=1.9)[:, None] ** 2)
    gate_Ed, maps_Edd = wave(experts, width, step=1.3), wave(experts, width, width, step=0.37)
    logits_SE = x_Sd @ gate_Ed.T
    weights_Sk, chosen_Sk = logits_SE.softmax(-1).topk(2)
    routing = Routing(logits_SE, weights_Sk / weights_Sk.sum(-1, keepdim=True), chosen_Sk)
    pruning = Pruning(mixture(), {0: wanted["mu"]}, wanted["protect"], "released", "odp")
    left = pruning.route(0, x_Sd, routing)
    found_Sd = torch.einsum(
        "sk,skd->sd", left.weights_Sk, torch.einsum("sd,skde->ske", x_Sd, maps_Edd[left.experts_Sk])
    )
    torch.testing.assert_close(found_Sd, torch.tensor(wanted["served"]), rtol=1e-5, atol=1e-5)
