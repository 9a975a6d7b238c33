"""SliceGPT (arXiv 2401.15024): rotations of the residual stream, and the narrow model that is left."""

from __future__ import annotations

import copy
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from weight_cases import Bare, context, gpt2, held_out_loss, llama, mixtral, trained_decoder

from isoflop.core.errors import Infeasible
from isoflop.methods.weights.probe import WeightProbe, check_payload
from isoflop.methods.weights.slicegpt import Sliced, SliceGpt
from isoflop.methods.weights.slicing import (
    Half,
    SlicedPayload,
    SlicedServing,
    check_sliceable,
    find_frames,
    halves_of,
    principal_axes,
    slice_matrices,
)
from isoflop.methods.weights.views import linear_views
from isoflop.models.base import Model

WIDTH = 32


def batches(model: Model, examples: int = 6) -> list[Any]:
    return list(model.calibration(context(), examples, 3))


def logits(model: Model) -> Tensor:
    return model.supervised(batches(model)[0])[0]


def orthonormal(kept: int, seed: int) -> Tensor:
    drawn = torch.randn(WIDTH, kept, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.linalg.qr(drawn).Q


@pytest.mark.parametrize("make", [llama, lambda: llama(kv_heads=2), lambda: llama(attention_bias=True), gpt2])
def test_rotations_alone_change_nothing(make: Any) -> None:
    """Section 3.2: another rotation at every half. GPT-2's norms subtract means and have biases, its matrices lie the other way."""
    model = make()
    for name, parameter in model.module.named_parameters():
        if "norm" in name or "ln_" in name or name.endswith("bias"):
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
    halves = halves_of(model, batches(model)[0])
    assert len(halves) == 4
    check_sliceable(model, halves, batches(model)[0])
    frames = [orthonormal(WIDTH, number) for number in range(4)]
    bare = logits(model)
    before = {name: p.clone() for name, p in model.module.named_parameters()}
    with SlicedServing(model, halves, slice_matrices(model, halves, frames, torch.float32)).at_work(model):
        assert (logits(model) - bare).abs().max() <= 2e-4 * bare.abs().max()
    assert torch.equal(logits(model), bare)
    assert all(torch.equal(p, before[name]) for name, p in model.module.named_parameters())


class Narrow(nn.Module):
    """The model that is stored, written out: every matrix as it is kept, streams as wide as what is left."""

    def __init__(self, model: Bare, sliced: Sliced) -> None:
        super().__init__()
        self.whole = copy.deepcopy(model.module)
        self.parts = {name: sliced.artefact[name] for name in sliced.artefact.names}

    def kept(self, name: str) -> Tensor:
        return self.parts[name].kept.float()  # type: ignore[attr-defined]

    def forward(self, ids: Tensor) -> Tensor:
        body = self.whole.model
        x = body.embed_tokens(ids)
        x = x @ self.parts["model.layers.0.self_attn.q_proj"].entrance_kd.float().T  # type: ignore[attr-defined]
        places = torch.arange(ids.shape[1])[None]
        turns = body.rotary_emb(x, places)
        mask = torch.full((ids.shape[1], ids.shape[1]), float("-inf")).triu(1)[None, None]
        for number, layer in enumerate(body.layers):
            name = f"model.layers.{number}"
            attention = layer.self_attn
            for role in ("q_proj", "k_proj", "v_proj", "o_proj"):
                getattr(attention, role).weight = nn.Parameter(self.kept(f"{name}.self_attn.{role}"))
            y, _ = attention(self.normed(x), position_embeddings=turns, attention_mask=mask)
            x = x @ self.parts[f"{name}.self_attn.o_proj"].shortcut_kk.float() + y  # type: ignore[attr-defined]
            gate, up = (F.linear(self.normed(x), self.kept(f"{name}.mlp.{role}_proj")) for role in ("gate", "up"))
            y = F.linear(F.silu(gate) * up, self.kept(f"{name}.mlp.down_proj"))
            x = x @ self.parts[f"{name}.mlp.down_proj"].shortcut_kk.float() + y  # type: ignore[attr-defined]
        return self.whole.lm_head(body.norm(x))

    def normed(self, x: Tensor) -> Tensor:
        """The mean is over the width of the whole model."""
        return x * torch.rsqrt(x.square().sum(-1, keepdim=True) / WIDTH + self.whole.config.rms_norm_eps)


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_what_is_served_is_the_narrow_model(kv_heads: int) -> None:
    """Brute force: a model of 24 channels in place of 32, from nothing but what is stored."""
    model = llama(kv_heads=kv_heads)
    method = SliceGpt(sliced=0.25, n_calib=6)
    sliced = method.calibrate(model, context(), 0)
    ids = batches(model)[0]
    narrow = Narrow(model, sliced)(ids)
    with method.apply(model, sliced):
        served = model.module(input_ids=ids).logits
    assert narrow.shape == served.shape
    assert (narrow - served).abs().max() <= 2e-4 * served.abs().max()
    assert sliced.artefact["model.layers.1.mlp.up_proj"].kept.shape == (48, 24)  # type: ignore[attr-defined]
    assert sliced.artefact["model.layers.0.mlp.down_proj"].kept.shape == (24, 48)  # type: ignore[attr-defined]
    assert sliced.artefact["model.layers.1.mlp.down_proj"].kept.shape == (32, 48), (
        "the last half writes the whole width"
    )  # type: ignore[attr-defined]


def test_axes_are_those_of_largest_variance() -> None:
    x = torch.randn(50, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * torch.tensor(
        [1, 5, 0.1, 3, 2, 4]
    )
    axes = principal_axes(x.T @ x, 3)
    assert torch.allclose(axes.T @ axes, torch.eye(3, dtype=torch.float64), atol=1e-12)
    values = torch.linalg.svdvals(x)
    lost = (x - x @ axes @ axes.T).square().sum()
    assert float(lost) == pytest.approx(float(values[3:].square().sum()), rel=1e-9)
    assert float((x @ axes[:, 0]).square().sum()) == pytest.approx(float(values[0] ** 2), rel=1e-9), "the largest first"


def test_axes_of_the_released_code() -> None:
    """Made by ``pca_calc`` (slicegpt/rotate.py) of microsoft/TransformerCompression on two batches; its damping turns nothing."""
    size = torch.tensor([1, 5, 0.1, 3, 2, 4.0])
    x = torch.cat(
        [torch.randn(3, 10, 6, generator=torch.Generator().manual_seed(n), dtype=torch.float64) * size for n in (0, 1)]
    )
    axes = principal_axes(x.flatten(0, 1).T @ x.flatten(0, 1), 3)
    assert (axes @ axes.T)[1].tolist() == pytest.approx(
        [0.0297869, 0.9802161, -0.000148, 0.0062638, -0.1346156, -0.0185631], abs=1e-6
    )
    assert axes[:, 0].abs().tolist() == pytest.approx(
        [0.039597, 0.730917, 0.002379, 0.299414, 0.028285, 0.611342], abs=1e-5
    )


def test_frames_are_found_behind_what_is_sliced_already() -> None:
    """Brute force with whole passes: the stream at each norm, where all halves before are cut and this one is not."""
    model = llama()
    given = batches(model)
    halves = halves_of(model, given[0])
    frames = find_frames(model, halves, given, 20)
    assert [tuple(frame.shape) for frame in frames] == [(WIDTH, 20)] * 4
    for number in range(4):
        stream = watched(model, given[0], halves, frames, number).flatten(0, 1).double()
        expected = principal_axes(stream.T @ stream, 20)
        assert torch.allclose(expected @ expected.T, frames[number] @ frames[number].T, atol=1e-3), number


def watched(model: Bare, batch: Tensor, halves: list[Half], frames: list[Tensor], number: int) -> Tensor:
    """What the norm of a half is given in a whole pass."""
    modules, streams = dict(model.module.named_modules()), {}

    def cut(x: Tensor, place: int) -> Tensor:
        return x @ (frames[place] @ frames[place].T).to(x) if place < number else x

    def remember(place: int) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            streams[place] = args[0]

        return hook

    def write(place: int) -> Any:
        def hook(module: Any, args: Any, output: Tensor) -> Tensor:
            return cut(streams[place] + output, place + 1) - streams[place]

        return hook

    with ExitStack() as stack:
        enter = modules["model.layers.0"].register_forward_pre_hook(lambda m, args: (cut(args[0], 0), *args[1:]))
        stack.callback(enter.remove)
        for place, half in enumerate(halves):
            stack.callback(modules[half.norm].register_forward_hook(remember(place)).remove)
            stack.callback(half.writer.module.register_forward_hook(write(place)).remove)
        model.supervised(batch)
    return streams[number]


def test_bytes_by_hand() -> None:
    """A Llama of 2 blocks, width 32, MLP 48, cut to 24: matrices 2·(4·32·24 + 3·48·24), of which the last down_proj has its 32 rows,
    three rotations of 24², one in and one out of 24·32; 2 bytes each."""
    model = llama()
    method = SliceGpt(sliced=0.25, n_calib=4)
    numbers = 2 * (4 * 32 * 24 + 3 * 48 * 24) + 8 * 48 + 3 * 24**2 + 2 * 24 * 32
    with method.apply(model, method.calibrate(model, context(), 0)):
        assert sum(model.stored.values()) == 2 * numbers
        dense = 2 * (4 * 32 * 32 + 3 * 48 * 32)
        assert method.footprint(model, context())["ratio"] == pytest.approx(dense / numbers)


def test_plans_count_rotations_and_refuse_what_does_not_pay() -> None:
    model = WeightProbe(layers=2).model
    method = SliceGpt(sliced=0.45, n_calib=4)
    with method.apply(model, method.calibrate(model, context(), 0)):
        ratio = method.footprint(model, context())["ratio"]
    assert method.axes(model.info).ratio == pytest.approx(ratio)
    with pytest.raises(
        Infeasible, match=r"sliced = 0\.1 the matrices .* and their rotations .* allowed: sliced from 0\.\d+, or 0"
    ) as error:
        SliceGpt(sliced=0.1).check(model.info)
    least = float(str(error.value).split("sliced from ")[1].split(",")[0])
    SliceGpt(sliced=least).check(model.info)
    with pytest.raises(Infeasible, match=r"leaves less than round_to = 32 channels of 64; allowed: sliced up to 0\.5"):
        SliceGpt(sliced=0.8, round_to=32).check(model.info)


@pytest.mark.parametrize(
    ("sliced", "round_to", "kept"), [(0.25, 8, 432), (0.3, 8, 400), (0.3, 1, 403), (0.0, 8, 576), (0.2, 32, 448)]
)
def test_what_is_left_of_a_width_is_rounded_as_released(sliced: float, round_to: int, kept: int) -> None:
    """``run_slicegpt.py`` of microsoft/TransformerCompression: int((1 - sparsity)·d), less its remainder by the interval."""
    assert SliceGpt(sliced=sliced, round_to=round_to).kept(576) == kept


def test_models_of_other_halves_are_refused() -> None:
    """Experts write the stream from several matrices; a norm that adds 1 to its weight folds in another way."""
    with pytest.raises(Infeasible, match=r"cannot be sliced: .* write what lies behind"):
        SliceGpt(n_calib=2).calibrate(mixtral(), context(), 0)
    model = llama()
    layer = model.module.model.layers[0]  # type: ignore[union-attr, index]

    class OffsetNorm(nn.Module):
        def __init__(self, weight: Tensor) -> None:
            super().__init__()
            self.weight = nn.Parameter(weight - 0.5)

        def forward(self, x: Tensor) -> Tensor:
            return F.rms_norm(x, (x.shape[-1],)) * (0.5 + self.weight)

    layer.input_layernorm = OffsetNorm(layer.input_layernorm.weight.detach())  # type: ignore[union-attr, operator]
    with pytest.raises(Infeasible, match="norms folded into the matrices it gives other outputs"):
        SliceGpt(n_calib=2).calibrate(model, context(), 0)


@pytest.mark.parametrize("make", [llama, gpt2])
def test_a_sliced_model_survives_files(make: Any, tmp_path: Path) -> None:
    model = make()
    method = SliceGpt(sliced=0.5, n_calib=4)
    sliced = method.calibrate(model, context(), 0)
    sliced.save(tmp_path)
    again, found = Sliced.load(tmp_path), []
    for value in (sliced, again):
        with method.apply(model, value):
            found.append(logits(model))
            for view in linear_views(model):
                payload = value.artefact[view.name]
                assert isinstance(payload, SlicedPayload)
                check_payload(payload, view.weight(), 16)
    assert torch.equal(*found)
    assert again.named == sliced.named


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    model = llama()
    model.module.to(dtype)
    method = SliceGpt(sliced=0.25, n_calib=4)
    bare = logits(model)
    with method.apply(model, method.calibrate(model, context(), 0)):
        found = logits(model)
    assert found.dtype == dtype
    assert torch.isfinite(found).all()
    assert not torch.equal(found, bare)
    assert torch.equal(logits(model), bare)


def test_principal_components_lose_less_than_other_rotations() -> None:
    """On a trained model, at a quarter of the width."""
    model, loss = trained_decoder(), {}
    given = list(model.calibration(context(), 64, 3))
    halves = halves_of(model, given[0])
    kept = SliceGpt(sliced=0.25).kept(64)
    turned = [
        torch.linalg.qr(torch.randn(64, 64, generator=torch.Generator().manual_seed(n)).double()).Q[:, :kept]
        for n in range(2)
    ]
    for name, frames in {"principal": find_frames(model, halves, given, kept), "other": turned}.items():
        artefact = slice_matrices(model, halves, frames)
        with SlicedServing(model, halves, artefact).at_work(model):
            loss[name] = held_out_loss(model)
    dense = held_out_loss(model)
    assert loss["principal"] - dense < 0.5 * (loss["other"] - dense)


def test_nothing_sliced_is_nothing_done() -> None:
    model = llama()
    method = SliceGpt(sliced=0.0)
    bare = logits(model)
    with method.apply(model, method.calibrate(model, context(), 0)):
        assert torch.equal(logits(model), bare)
    assert SliceGpt(sliced=0.0, n_calib=3).relevant() == SliceGpt(sliced=0.0, round_to=1).relevant()
    assert replace(method, sliced=0.3).relevant().n_calib == method.n_calib
