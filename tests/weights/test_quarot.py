"""QuaRot: a turned model computes the same, what is served is what it would compute, and what is turned while running is counted."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from weight_cases import Bare, context, gpt2, llama, mixtral

from isoflop.methods.base import build
from isoflop.methods.weights.quarot import QuaRot
from isoflop.methods.weights.rotation import (
    HADAMARD,
    ORTHOGONAL,
    RANDOM_HADAMARD,
    ROTATIONS,
    RotatedPayload,
    Rotation,
    Turning,
    largest_hadamard,
    plan_turning,
    rotation_of,
)
from isoflop.methods.weights.rtn import RoundToNearest
from isoflop.methods.weights.statistics import ViewStats, collect
from isoflop.methods.weights.views import linear_views, observed


def scaled_llama(kv_heads: int = 2, **extra: Any) -> Bare:
    """Norms that scale unlike each other, one of them by 0."""
    model = llama(kv_heads=kv_heads, **extra)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.module.named_parameters():
        if "norm" in name:
            parameter.data = 1 + 0.5 * torch.randn(parameter.shape, generator=generator)
    model.module.model.layers[0].input_layernorm.weight.data[5] = 0  # type: ignore[union-attr, index]
    return model


def planned(model: Bare, kind: str = RANDOM_HADAMARD) -> Turning:
    batch = next(iter(model.calibration(None, 4, 0)))
    return plan_turning(model, linear_views(model), collect(model, context(), 2, 0).owner, batch, kind, 7)


def logits(model: Bare) -> Tensor:
    batch = next(iter(model.calibration(None, 3, 9)))
    with torch.no_grad():
        return model.supervised(batch)[0]


def turned_model(model: Bare, matrices: dict[str, Tensor], stream: Rotation) -> Bare:
    """The model as an engine would run it: in the turned basis, with ``matrices`` as they are stored.

    Embedding and head are turned, the last norm's scale is in the head, the others are 1, and inputs of down_proj are turned by a hook.
    """
    other = Bare(copy.deepcopy(model.module))
    module: Any = other.module
    module.model.embed_tokens.weight.data = stream.turn(module.model.embed_tokens.weight.data)
    module.lm_head.weight = torch.nn.Parameter(stream.turn(module.lm_head.weight.data * module.model.norm.weight.data))
    for name, parameter in module.named_parameters():
        if "norm" in name and "layers.0.input" not in name:
            parameter.data = torch.ones_like(parameter)
    zero = module.model.layers[0].input_layernorm.weight
    zero.data = (zero.data != 0).float()
    for view in linear_views(other):
        view.write(matrices[view.name])
        if view.role == "down_proj":
            turn = rotation_of(HADAMARD, view.cols, 0)
            view.module.register_forward_pre_hook(lambda _m, args, turn=turn: (turn.turn(args[0]),))
    return other


@pytest.mark.parametrize("kind", ROTATIONS)
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_the_turned_model_computes_the_same(kind: str, kv_heads: int) -> None:
    """Computational invariance (section 3 of SliceGPT, 4 of QuaRot), in the turned basis, with nothing rounded.

    A scale of 0 stays with its norm, which is why that channel's norm cannot be 1: its rotation is left out here.
    """
    model = scaled_llama(kv_heads)
    model.module.model.layers[0].input_layernorm.weight.data[5] = 0.5  # type: ignore[union-attr, index]
    turning = planned(model, kind)
    assert turning.within
    matrices = {view.name: turning.turned(view) for view in linear_views(model)}
    dense = logits(model)
    assert torch.allclose(
        logits(turned_model(model, matrices, turning.into["model.layers.0.self_attn.q_proj"])), dense, atol=2e-4
    )
    assert not torch.allclose(matrices["model.layers.0.mlp.up_proj"], linear_views(model)[5].weight(), atol=0.05)


@pytest.mark.parametrize("rounding", ["rtn", "gptq"])
def test_what_is_served_is_what_the_turned_model_computes_with_what_is_stored(rounding: str) -> None:
    model = scaled_llama()
    model.module.model.layers[0].input_layernorm.weight.data[5] = 0.5  # type: ignore[union-attr, index]
    method = build("quarot", {"bits": 3, "group": 16, "rounding": rounding, "n_calib": 8})
    artefact = method.calibrate(model, context(), 0)  # type: ignore[attr-defined]
    stored = {view.name: artefact[view.name].inner.decode() for view in linear_views(model)}
    stream = artefact["model.layers.0.self_attn.q_proj"].into
    engine = logits(turned_model(model, stored, stream))
    dense = logits(model)
    with method.apply(model, artefact):
        served = logits(model)
    assert torch.allclose(served, engine, atol=1e-3)
    assert not torch.allclose(served, dense, atol=0.05)


def test_a_norm_that_scales_a_channel_by_zero_keeps_it_at_zero() -> None:
    model = scaled_llama()
    method = build("quarot", {"bits": 8, "group": 16, "n_calib": 8})
    dense = logits(model)
    artefact = method.calibrate(model, context(), 0)  # type: ignore[attr-defined]
    with method.apply(model, artefact):
        assert float((logits(model) - dense).abs().median()) < 0.03 * float(dense.abs().median())
        assert model.module.model.layers[0].input_layernorm.weight[5] == 0  # type: ignore[union-attr, index]


@pytest.mark.parametrize(("make", "within"), [(scaled_llama, True), (gpt2, False), (mixtral, False)])
def test_where_the_stream_cannot_be_turned_every_input_is_turned_while_running(make: Any, within: bool) -> None:
    """And 8 bits serve the model that was there."""
    model = make()
    turning = planned(model)
    views = linear_views(model)
    assert turning.within is within
    online = {view.role for view in views if view.name in turning.online}
    expected = {
        scaled_llama: {"down_proj"},
        gpt2: {"c_attn", "c_proj", "c_fc"},
        mixtral: {"q_proj", "o_proj", "gate_up_proj", "down_proj"},
    }
    assert online == expected[make]
    method = build("quarot", {"bits": 8, "group": 16, "n_calib": 4, "rounding": "rtn"})
    dense = logits(model)
    artefact = method.calibrate(model, context(), 0)  # type: ignore[attr-defined]
    with method.apply(model, artefact):
        assert float((logits(model) - dense).abs().median()) < 0.03 * float(dense.abs().median())


def test_a_norm_behind_a_block_keeps_the_stream_from_being_turned() -> None:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        vocab_size=48, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, head_dim=8,
        num_key_value_heads=2, max_position_embeddings=64, pad_token_id=None, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    assert not planned(Bare(Gemma2ForCausalLM(config))).within


@pytest.mark.parametrize("size", [1, 2, 12, 36, 64])
@pytest.mark.parametrize("kind", ROTATIONS)
def test_rotations_are_orthogonal_and_come_back(size: int, kind: str) -> None:
    rotation = Rotation(kind, size, 5)
    matrix = rotation.matrix().double()
    assert torch.allclose(matrix @ matrix.T, torch.eye(size, dtype=torch.float64), atol=1e-5)
    x = torch.randn(3, 2 * size, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(rotation.back(rotation.turn(x)), x, atol=1e-5)
    assert torch.allclose(rotation.turn(x)[:, :size], x[:, :size] @ rotation.matrix(), atol=1e-6)
    assert torch.equal(rotation.matrix(), Rotation(*rotation.settings()).matrix())


def test_seeds_draw_and_widths_without_a_hadamard_matrix_are_turned_in_blocks() -> None:
    for kind in (RANDOM_HADAMARD, ORTHOGONAL):
        assert not torch.equal(Rotation(kind, 64, 0).matrix(), Rotation(kind, 64, 1).matrix())
    assert torch.equal(Rotation(HADAMARD, 64, 0).matrix(), Rotation(HADAMARD, 64, 1).matrix())
    assert [largest_hadamard(width) for width in (64, 96, 688, 7)] == [64, 96, 16, 1]
    assert rotation_of(ORTHOGONAL, 7, 0).size == 7


def test_operations_by_hand() -> None:
    """64 = 2^6: 6 additions per channel; 96 = 12·2^3: 11 + 3; a random one also multiplies by its signs; any other costs products."""
    assert Rotation(HADAMARD, 64).flops(64) == 64 * 6
    assert Rotation(HADAMARD, 96).flops(192) == 192 * (11 + 3)
    assert Rotation(RANDOM_HADAMARD, 64).flops(64) == 64 * 7
    assert Rotation(ORTHOGONAL, 64).flops(64) == 2 * 64 * 64
    model = scaled_llama()  # two layers, down_proj's input of 48 = 12·2^2 channels
    method = QuaRot(bits=4, group=16, n_calib=4)
    with method.apply(model, method.calibrate(model, context(), 0)):
        assert method.footprint(model, context())["online_flops"] == 2 * 48 * (11 + 2)


def test_a_tied_head_turns_the_stream_back() -> None:
    model = llama(tie_word_embeddings=True)
    method = QuaRot(bits=4, group=16, n_calib=4, rotation=HADAMARD)
    with method.apply(model, method.calibrate(model, context(), 0)):
        assert method.footprint(model, context())["online_flops"] == 2 * 48 * (11 + 2) + 32 * 5


def test_outliers_spread_and_cost_less() -> None:
    """One channel thirty times the others: rounding in the turned basis errs by a third, at most, of rounding as it is."""
    weight = torch.randn(48, 64, generator=torch.Generator().manual_seed(0))
    weight[:, 9] *= 30
    nothing = ViewStats(1, torch.eye(64), torch.ones(64), torch.ones(64))
    payload = QuaRot(bits=3, group=64, rounding="rtn").encode(weight, nothing)
    assert isinstance(payload, RotatedPayload)
    turned, plain = payload.decode(), RoundToNearest(bits=3, group=64).encode(weight).decode()
    kept = torch.arange(64) != 9
    assert float((turned - weight)[:, kept].square().sum()) < float((plain - weight)[:, kept].square().sum()) / 3
    assert payload.nbytes(16) == len(payload.serialise()) == 48 * (24 + 4), "rotations cost nothing"


def test_the_turned_hessian_is_that_of_turned_inputs_without_their_norms_scale() -> None:
    model = scaled_llama()
    model.module.model.layers[0].input_layernorm.weight.data[5] = 0.5  # type: ignore[union-attr, index]
    turning, views = planned(model), linear_views(model)
    inputs: dict[str, list[Tensor]] = {}
    with observed(views, lambda view, x: inputs.setdefault(view.name, []).append(x.flatten(0, -2))):
        logits(model)
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.o_proj", "model.layers.1.mlp.down_proj"):
        view = next(view for view in views if view.name == name)
        x_NI = torch.cat(inputs[name])
        scale = model.module.model.layers[0].input_layernorm.weight if view.role == "q_proj" else 1.0  # type: ignore[union-attr, index]
        turned = turning.into[name].turn(x_NI / scale)
        assert torch.allclose(turning.hessian(view, x_NI.T @ x_NI), turned.T @ turned, rtol=1e-3, atol=1e-2), name


def test_gptq_sees_the_hessian_of_turned_inputs() -> None:
    """The output error on tokens is that of the turned problem, and less than with the Hessian as it was."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(32, 64, generator=generator)
    x_NI = torch.randn(300, 64, generator=generator) @ torch.randn(64, 64, generator=generator)
    stats = ViewStats(300, 2 / 300 * x_NI.T @ x_NI, x_NI.norm(dim=0), x_NI.norm(dim=0))
    identity = ViewStats(300, torch.eye(64), x_NI.norm(dim=0), x_NI.norm(dim=0))
    method = QuaRot(bits=3, group=64)

    def error(stats: ViewStats, method: QuaRot = method) -> float:
        return float((x_NI @ (method.encode(weight, stats).decode() - weight).T).square().sum())

    plain = error(stats, QuaRot(bits=3, group=64, rounding="rtn"))
    assert error(stats) < 0.6 * plain
    assert math.isclose(error(identity), plain, rel_tol=0.2), "without correlations it is rounding to the nearest"
