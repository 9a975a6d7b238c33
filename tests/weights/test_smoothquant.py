"""SmoothQuant: the released scales and grids, integer arithmetic, and what enters matrices while they run (arXiv 2211.10438)."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from weight_cases import Bare, context, gpt2, llama, mixtral

from isoflop.core.errors import Infeasible
from isoflop.methods.base import build
from isoflop.methods.weights.artefact import Artefact
from isoflop.methods.weights.payloads import DensePayload
from isoflop.methods.weights.probe import WeightProbe
from isoflop.methods.weights.smoothquant import (
    SmoothQuant,
    StaticInputPayload,
    SymmetricPayload,
    input_rounding,
    on_steps,
)
from isoflop.methods.weights.statistics import ViewStats, calibration_seed, collect
from isoflop.methods.weights.views import linear_views, observed
from isoflop.models.hooks.experts import EXPERTS

NUMBERS = json.loads((Path(__file__).parent / "numbers" / "smoothquant.json").read_text())


def drawn() -> tuple[list[Tensor], Tensor]:
    rng = np.random.default_rng(0)
    weights = [torch.from_numpy(rng.normal(0, 0.05, (rows, 48)).astype(np.float32)) for rows in (24, 16)]
    x_NI = rng.normal(0, 1, (20, 48)) * np.exp(rng.normal(0, 1.2, 48))
    return weights, torch.from_numpy(x_NI.astype(np.float32))


def stats_of(x_NI: Tensor) -> ViewStats:
    norms_I, size_NI = x_NI.norm(dim=0), x_NI.abs()
    return ViewStats(len(x_NI), 2 / len(x_NI) * x_NI.T @ x_NI, norms_I, norms_I, size_NI.mean(0), size_NI.amax(0))


@pytest.mark.parametrize("alpha", [0.5, 0.8])
def test_scales_of_the_released_code(alpha: float) -> None:
    """Made by ``smooth_ln_fcs_llama_like`` of mit-han-lab/smoothquant; ours are on the float16 grid."""
    weights, x_NI = drawn()
    s_I = SmoothQuant(alpha=alpha).scales(weights, stats_of(x_NI))
    assert s_I[:10].tolist() == pytest.approx(NUMBERS[str(alpha)]["scales"], rel=1e-3)
    assert float(s_I.double().sum()) == pytest.approx(NUMBERS[str(alpha)]["sum"], rel=3e-4)


def test_grids_of_the_released_code() -> None:
    """Made by ``quantize_weight_per_tensor_absmax``, ``…_per_channel_absmax`` and ``quantize_activation_per_token_absmax``."""
    weights, x_NI = drawn()
    for by_row, name in ((False, "weight tensor"), (True, "weight channel")):
        found = SymmetricPayload.round(weights[0], 8, by_row).decode()
        assert found[3, :12].tolist() == pytest.approx(NUMBERS[name], rel=1e-3)
    rounded = input_rounding(DensePayload.of(weights[0]), 8)(x_NI)
    assert rounded[5, :12].tolist() == pytest.approx(NUMBERS["act token"], abs=1e-5)


def test_half_of_the_difficulty_moves_to_the_weights() -> None:
    """Equation 4 at α = ½: behind it the largest activation and weight of each channel are equal."""
    weights, x_NI = drawn()
    s_I = SmoothQuant().scales(weights, stats_of(x_NI))
    largest_I = (torch.cat(weights).abs() * s_I).amax(0)
    assert torch.allclose((x_NI.abs() / s_I).amax(0), largest_I, rtol=2e-3)
    everything = SmoothQuant(alpha=1.0).scales(weights, stats_of(x_NI))
    assert torch.allclose(x_NI.abs().amax(0) / everything, torch.ones(48), rtol=1e-3)


@pytest.mark.parametrize("act_grid", ["token", "tensor"])
def test_what_runs_is_integer_arithmetic(act_grid: str) -> None:
    """Whole numbers times whole numbers, added up exactly, times two scales: that is what the layer gives."""
    (weight, _), x_NI = drawn()
    payload = SymmetricPayload.round(weight, 8, by_row=True)
    step = x_NI.abs().amax(-1, keepdim=True) / 127
    served: Any = payload
    if act_grid == "tensor":
        step = (x_NI.abs().max() / 127).half().float()
        served = StaticInputPayload(payload.shape, payload, step.half()[None])
    whole_NI = on_steps(x_NI, step, 8)
    assert float(whole_NI.abs().max()) <= 127
    sums_NO = whole_NI.long() @ payload.whole_OI.long().T
    expected = sums_NO.double() * step.double() * payload.scale_G.double()
    found = input_rounding(served, 8)(x_NI).double() @ served.decode().double().T
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-6)


def smoothed(model: Bare, **knobs: Any) -> tuple[SmoothQuant, Artefact]:
    method = SmoothQuant(**{"n_calib": 4, **knobs})
    return method, method.calibrate(model, context(), 0)


@pytest.mark.parametrize("make", [llama, gpt2])
def test_every_matrix_is_given_rounded_inputs_and_nothing_else(make: Any) -> None:
    """Each token's inputs are whole numbers of 127ths of their largest, in every matrix, and only while the method is in place."""
    model = make()
    method, artefact = smoothed(model)
    batch = next(iter(model.calibration(None, 2, 9)))
    given: dict[str, Tensor] = {}

    def keep(view: Any, x: Tensor) -> None:
        given[view.name] = x

    with method.apply(model, artefact), observed(linear_views(model), keep):
        model.supervised(batch)
    for view in linear_views(model):
        steps = given[view.name] / (given[view.name].abs().amax(-1, keepdim=True) / 127)
        assert torch.allclose(steps, steps.round(), atol=2e-3), view.name
    with observed(linear_views(model), keep):
        model.supervised(batch)
    steps = given[view.name] / (given[view.name].abs().amax(-1, keepdim=True) / 127)
    assert not torch.allclose(steps, steps.round(), atol=2e-2)


@pytest.mark.parametrize("make", [llama, lambda: llama(kv_heads=2), gpt2])
def test_eight_bits_serve_what_the_model_computed_and_norms_took_the_scales(make: Any) -> None:
    model = make()
    method, artefact = smoothed(model)
    dense, _ = model.supervised(next(iter(model.calibration(None, 3, 9))))
    with method.apply(model, artefact):
        found, _ = model.supervised(next(iter(model.calibration(None, 3, 9))))
    assert float((found - dense).abs().median()) < 0.1 * float(dense.abs().median())
    owner = collect(model, context(), 2, 0).owner
    for view in linear_views(model):
        payload = artefact[view.name]
        assert isinstance(payload, SymmetricPayload), "nothing divides: only inputs of norms are smoothed"
        same = torch.allclose(payload.decode(), view.weight(), atol=float(view.weight().abs().max()) / 127)
        assert same == (view.role in ("o_proj", "down_proj", "c_proj")), (view.name, owner[view.name])


def test_smoothing_saves_what_an_outlying_channel_costs() -> None:
    """One channel of the inputs a hundred times the others: rounded as it is, it leaves a few steps to the rest of its token."""
    rng = torch.Generator().manual_seed(0)
    weight, x_NI = torch.randn(32, 64, generator=rng), torch.randn(200, 64, generator=rng)
    x_NI[:, 7] *= 100

    def error(s_I: Tensor) -> float:
        served = SymmetricPayload.round(weight * s_I, 8, by_row=False)
        return float((input_rounding(served, 8)(x_NI / s_I) @ served.decode().T - x_NI @ weight.T).square().mean())

    smooth, everything = (SmoothQuant(alpha=alpha).scales([weight], stats_of(x_NI)) for alpha in (0.5, 1.0))
    assert error(smooth) < 0.25 * error(torch.ones(64))
    assert error(smooth) < 0.25 * error(everything), "nor may the weights take it all"


def test_static_steps_are_those_of_smoothed_inputs_and_counted() -> None:
    model = llama()
    method, artefact = smoothed(model, act_grid="tensor", weight_grid="channel")
    statistics = collect(model, context(), 4, calibration_seed(0))
    views = linear_views(model)
    scales = method.model_scales(views, statistics)
    for view in views:
        payload = artefact[view.name]
        assert isinstance(payload, StaticInputPayload)
        maxima_I = statistics.of(view).maxima_I
        assert maxima_I is not None
        smooth = view.role not in ("o_proj", "down_proj")
        largest = float((maxima_I / scales[view.name] if smooth else maxima_I).max())
        assert float(payload.step) == pytest.approx(largest / 127, rel=1e-3)
        # bytes by hand: a byte for each weight, two for each row's step and two for the inputs'
        assert payload.nbytes(16) == len(payload.serialise()) == view.numel + 2 * view.rows + 2


def test_one_stage_serves_all_bits_that_are_rounded_by_token() -> None:
    assert len({SmoothQuant(act_bits=bits).relevant() for bits in (4, 8, 16)}) == 1
    assert len({SmoothQuant(act_bits=bits, act_grid="tensor").relevant() for bits in (4, 8)}) == 2
    assert SmoothQuant(bits=16, act_bits=8).relevant() != SmoothQuant(bits=16, act_bits=16).relevant()


def test_bytes_by_hand() -> None:
    """24 x 48 weights in 4 bits: 24 bytes per row; one step of 2 bytes, or one per row."""
    weight = drawn()[0][0]
    assert SymmetricPayload.round(weight, 4, by_row=False).nbytes(16) == 24 * 24 + 2
    assert SymmetricPayload.round(weight, 4, by_row=True).nbytes(16) == 24 * 24 + 48


def test_mixtures_of_experts_are_refused_at_plan() -> None:
    info = WeightProbe().model.info
    mixture = replace(info, hooks=info.hooks | {EXPERTS})
    with pytest.raises(Infeasible, match=r"smoothquant: model .* is a mixture of experts.*allowed: bits = 16"):
        build("smoothquant", {}).check(mixture)
    with pytest.raises(Infeasible, match="mixture of experts"):
        smoothed(mixtral())
