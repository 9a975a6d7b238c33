"""EvoPress for depth: what is left out adds nothing, costs nothing, and is the best choice there is."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations, product
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from weight_cases import context, gpt2

from isoflop.core.errors import Infeasible
from isoflop.methods.kv_cache.probe import VOCABULARY, untrained_decoder
from isoflop.methods.weights.evolution import distinct
from isoflop.methods.weights.evopress_drop import DropProblem, EvoPressDrop, halves
from isoflop.methods.weights.fitness import Fitness
from isoflop.methods.weights.search_base import Found
from isoflop.methods.weights.space import Levels
from isoflop.methods.weights.views import linear_views, replaceable
from isoflop.models.base import Model
from isoflop.models.family import family_of
from isoflop.models.hooks.attention import ATTENTION
from isoflop.models.hooks.matrices import MATRICES
from isoflop.models.lm import NOT_SCORED, LmBatch, LmModel

LAYERS = 4
IDS_BT = torch.from_numpy(np.random.default_rng(0).integers(0, VOCABULARY, (2, 12)))


@pytest.fixture(scope="module")
def model() -> LmModel:
    return untrained_decoder(layers=LAYERS)


def dropping(model: Model, *names: str) -> Found:
    """Leave out the halves whose names end so: ``0.self_attn``, ``3.mlp``."""
    return Found({half.name: int(not half.name.endswith(names)) if names else 1 for half in halves(model)}, {})


def logits(model: LmModel) -> torch.Tensor:
    with torch.no_grad():
        return model.logits(LmBatch(IDS_BT, torch.full_like(IDS_BT, NOT_SCORED)))


def test_what_is_left_out_adds_nothing_to_the_residual_stream(model: LmModel) -> None:
    """The same logits as with output matrices of zeros."""
    whole = logits(model)
    with EvoPressDrop(dropped=0.25).apply(model, dropping(model, "1.self_attn", "2.mlp")):
        dropped = logits(model)
    outputs = [
        v for v in linear_views(model) if v.name.endswith(("layers.1.self_attn.o_proj", "layers.2.mlp.down_proj"))
    ]
    assert len(outputs) == 2
    with replaceable(model, [view.parameter for view in outputs]):
        for view in outputs:
            view.write(torch.zeros(view.rows, view.cols))
        zeroed = logits(model)
    assert torch.allclose(dropped, zeroed, atol=1e-5)
    assert not torch.allclose(dropped, whole, atol=1e-2)
    assert torch.equal(logits(model), whole)


def test_gpt2_loses_biases_too() -> None:
    """Attention and MLP under other names; what is left out has biases, which go with it."""
    model = gpt2()
    model.info = replace(model.info, hooks=frozenset({MATRICES, ATTENTION}))
    ids_BT = IDS_BT % 48
    with torch.no_grad():
        with EvoPressDrop(dropped=0.5).apply(model, dropping(model, "0.attn", "0.mlp", "1.attn", "1.mlp")):
            found = model.module(input_ids=ids_BT).logits
        module = model.module.transformer
        x_BTd = module.wte(ids_BT) + module.wpe(torch.arange(ids_BT.shape[1]))
        expected = model.module.lm_head(module.ln_f(x_BTd))
    assert torch.allclose(found, expected, atol=1e-5)


def test_what_is_left_out_is_neither_stored_nor_computed(model: LmModel) -> None:
    method = EvoPressDrop(dropped=0.25)
    with FlopCounterMode(display=False) as whole:
        logits(model)
    views = linear_views(model)
    gone = [view for view in views if any(f"layers.{part}." in view.name for part in ("1.self_attn", "2.mlp"))]
    with method.apply(model, dropping(model, "1.self_attn", "2.mlp")):
        with FlopCounterMode(display=False) as less:
            logits(model)
        footprint = method.footprint(model, context())
    total, left = sum(view.numel for view in views), sum(view.numel for view in views if view not in gone)
    assert footprint["ratio"] == pytest.approx(total / left)
    saved = whole.get_total_flops() - less.get_total_flops()
    matrices = 2 * IDS_BT.numel() * sum(view.numel for view in gone)
    scores = 2 * 2 * IDS_BT.shape[0] * IDS_BT.shape[1] ** 2 * 64
    assert matrices <= saved <= matrices + scores  # fused attention is not counted everywhere


@pytest.mark.parametrize("layer", [0, 2])
def test_a_dropped_attention_leaves_no_gap_in_generation(model: LmModel, layer: int) -> None:
    """Positions go on where the first layer caches nothing, and a dropped attention caches no keys and values."""
    with EvoPressDrop(dropped=0.25).apply(model, dropping(model, f"{layer}.self_attn", "1.mlp")), torch.no_grad():
        ids_BT = IDS_BT
        for _ in range(4):
            whole = model.module(input_ids=ids_BT, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
            ids_BT = torch.cat((ids_BT, whole), dim=1)
        assert torch.equal(model.greedy(IDS_BT, 4), ids_BT[:, -4:])
        cache = model.module(input_ids=IDS_BT, use_cache=True).past_key_values
    held = [
        sum(t.numel() for t in (part.keys, part.values) if t is not None) if part.is_initialized else 0
        for part in cache.layers
    ]
    assert held[layer] <= 2 * IDS_BT.numel()
    assert min(held[:layer] + held[layer + 1 :]) == 2 * IDS_BT.numel() * 2 * 16


def judge_of(model: Model, problem: DropProblem, stack: Any, examples: int = 8) -> Fitness:
    return Fitness(model, list(model.calibration(context(), examples, 0)), "kl", stack)


def test_as_many_attentions_as_mlps_are_left_out_in_parent_and_offspring(model: LmModel) -> None:
    """(a)"""
    problem = DropProblem(halves(model), EvoPressDrop(dropped=0.5))
    rng = np.random.default_rng(0)
    for start in [*problem.starts(4, rng), problem.uniform()]:
        for levels in [start, *distinct(start, problem.space.mutate, 8, rng), problem.space.shuffle(start, rng)]:
            assert (sum(levels[:LAYERS]), sum(levels[LAYERS:])) == (2, 2)
    assert problem.uniform() == (1, 0, 1, 0) * 2


@pytest.mark.parametrize("count", [1, 2])
def test_the_search_reaches_the_optimum_of_all_configurations(model: LmModel, count: int) -> None:
    method = EvoPressDrop(dropped=count / LAYERS, generations=8, offspring=6, survivors=2, n_search=8)
    problem = DropProblem(halves(model), method)
    with problem.serving() as serve:
        judge = judge_of(model, problem, serve)
        everything = [
            configuration(attentions, mlps)
            for attentions, mlps in product(combinations(range(LAYERS), count), repeat=2)
        ]
        best = min(judge.scores(everything, 8, np.random.default_rng(0)))
        found = method.solve(problem, judge, 0)
        assert found.fitness[-1] <= best * 1.01
        singles = problem.additive(judge)
        assert sum(level == 0 for level in singles) == 2 * count
        assert judge.scores([singles], 8, np.random.default_rng(0))[0] >= best


def configuration(attentions: tuple[int, ...], mlps: tuple[int, ...]) -> Levels:
    return (*(int(i not in attentions) for i in range(LAYERS)), *(int(i not in mlps) for i in range(LAYERS)))


def test_the_single_drop_of_least_harm_is_the_additive_choice(model: LmModel) -> None:
    problem = DropProblem(halves(model), EvoPressDrop(dropped=0.25))
    with problem.serving() as serve:
        judge = judge_of(model, problem, serve)
        harm = judge.scores([configuration((i,), ()) for i in range(LAYERS)], 8, np.random.default_rng(0))
        assert problem.additive(judge)[:LAYERS] == configuration((int(np.argmin(harm)),), ())[:LAYERS]


def test_impossible_shares_and_models_are_refused_in_one_line() -> None:
    info = untrained_decoder(layers=2).info
    with pytest.raises(Infeasible, match=r"dropped = 0.25 leaves out none of 2 blocks; allowed: 0, or from 0.5"):
        EvoPressDrop(dropped=0.25).check(info)
    vit = family_of("tiny-vit/c48")
    with pytest.raises(Infeasible, match="evopress-drop needs attention"):
        EvoPressDrop().check(vit.info("tiny-vit/c48", {}))
