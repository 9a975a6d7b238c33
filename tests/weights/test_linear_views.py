"""Linear views: every architecture's matrices, each once, and what their inputs are."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from weight_cases import Bare, gpt2, llama, mixtral

from isoflop.core.errors import Infeasible
from isoflop.methods.visual_tokens.probe import untrained_model
from isoflop.methods.weights.views import LinearView, linear_views, observed, replaceable
from isoflop.models.base import ModelInfo


def roles(model: Any) -> set[str]:
    return {view.role for view in linear_views(model)}


def test_llama_blocks_only() -> None:
    model = llama()
    views = linear_views(model)
    assert len(views) == 14
    assert roles(model) == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert [view.layer for view in views] == [0] * 7 + [1] * 7
    counted = sum(view.numel for view in views)
    assert counted == sum(p.numel() for n, p in model.module.named_parameters() if "layers" in n and p.dim() == 2)


def test_conv1d_is_seen_as_outputs_by_inputs() -> None:
    model = gpt2()
    fused = next(view for view in linear_views(model) if view.role == "c_attn")
    assert (fused.rows, fused.cols) == (96, 32)
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(fused.module(x), x @ fused.weight().T + fused.module.bias, atol=1e-6)
    assert not any("lm_head" in view.name or "wte" in view.name for view in linear_views(model)), "the tied head"


def test_experts_are_views_of_one_parameter() -> None:
    model = mixtral(experts=4)
    views = linear_views(model)
    assert roles(model) == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"}, "no router"
    experts = [view for view in views if view.expert is not None]
    assert len(experts) == 2 * 2 * 4
    assert {(v.rows, v.cols) for v in experts} == {(96, 32), (32, 48)}
    assert len({view.parameter for view in experts}) == 4
    assert len({view.name for view in views}) == len(views)


def test_a_parameter_shared_by_two_blocks_is_one_view() -> None:
    model = llama()
    layers = model.module.model.layers  # type: ignore[union-attr]
    layers[1].mlp = layers[0].mlp  # type: ignore[index]
    assert len(linear_views(model)) == 14 - 3


def test_vision_language_models_give_their_language_model() -> None:
    views = linear_views(untrained_model())
    assert len(views) == 14
    assert all(view.name.startswith("model.language_model.layers.") for view in views)
    names = dict(untrained_model().module.named_parameters())
    assert all(names[view.parameter].shape == (view.rows, view.cols) for view in views)


def test_image_classifiers_give_their_encoder() -> None:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, image_size=16, patch_size=8
    )
    views = linear_views(Bare(ViTForImageClassification(config)))
    assert len(views) == 12
    assert {view.layer for view in views} == {0, 1}
    assert not any("classifier" in view.name or "embeddings" in view.name for view in views)


def test_a_model_without_blocks_is_refused() -> None:
    model = Bare(nn.Sequential(nn.Linear(4, 4)))
    model.info = ModelInfo("bare/mlp", "bare", "1", 1, frozenset())
    with pytest.raises(Infeasible, match=r"bare/mlp.*numbered blocks"):
        linear_views(model)


@pytest.mark.parametrize("make", [llama, gpt2, mixtral])
def test_writing_is_undone_bit_for_bit(make: Any) -> None:
    model = make()
    views = linear_views(model)
    before = {name: p.clone() for name, p in model.module.named_parameters()}
    with replaceable(model, sorted({view.parameter for view in views})):
        for view in views:
            view.write(torch.full((view.rows, view.cols), 0.5))
        assert all(bool((view.weight() == 0.5).all()) for view in views)
        assert model.weight_bytes() == model.dense_weight_bytes()
    for name, parameter in model.module.named_parameters():
        assert torch.equal(parameter, before[name])


class LinearCalls(TorchFunctionMode):
    """Records the inputs of ``F.linear`` by where the weight lies in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs: dict[int, list[Tensor]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.linear:
            self.inputs.setdefault(args[1].data_ptr(), []).append(args[0].detach().clone())
        return func(*args, **(kwargs or {}))


def test_experts_see_the_tokens_routed_to_them() -> None:
    """Against what the plain loop over experts really multiplies."""
    model = mixtral()
    model.module.set_experts_implementation("eager")
    views = linear_views(model)
    seen: dict[str, list[Tensor]] = {}

    def observe(view: LinearView, x: Tensor) -> None:
        seen.setdefault(view.name, []).append(x.clone())

    batch = next(iter(model.calibration(None, 4, 0)))
    with LinearCalls() as calls:
        model.supervised(batch)
    with observed(views, observe):
        model.supervised(batch)
    routed = 0
    for view in views:
        wanted = torch.cat([x.flatten(0, -2) for x in calls.inputs[view.weight().data_ptr()]])
        got = torch.cat([x.flatten(0, -2) for x in seen[view.name]])
        assert got.shape == wanted.shape
        assert torch.allclose(got.T @ got, wanted.T @ wanted, rtol=1e-4, atol=1e-4), view.name  # in any order
        routed += len(got) if view.role == "gate_up_proj" and view.layer == 0 else 0
    assert routed == 2 * batch.numel(), "every token goes to two experts"


def test_observing_leaves_no_hooks() -> None:
    model = copy.deepcopy(mixtral())
    with observed(linear_views(model), lambda view, x: None):
        pass
    assert not any(module._forward_pre_hooks for module in model.module.modules())
