"""AWQ: the released search's choices, its objective token by token, and where scales go (arXiv 2306.00978)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from weight_cases import context, gpt2, llama, mixtral

from isoflop.methods.base import build
from isoflop.methods.weights.awq import Awq, Rounding, best_clip, best_scale, grouped, ungrouped
from isoflop.methods.weights.grids import IntegerGridPayload
from isoflop.methods.weights.payloads import GridPayload
from isoflop.methods.weights.rtn import RoundToNearest
from isoflop.methods.weights.scaling import ScaledPayload, over
from isoflop.methods.weights.statistics import ViewStats
from isoflop.methods.weights.views import linear_views
from isoflop.models.base import Model

NUMBERS = json.loads((Path(__file__).parent / "numbers" / "awq.json").read_text())
ROWS, COLS, TOKENS, GROUP = 64, 96, 512, 32


def drawn() -> tuple[Tensor, Tensor]:
    """A matrix with heavy tails, and inputs of very different channels."""
    rng = np.random.default_rng(0)
    weight = (rng.standard_t(5, (ROWS, COLS)) * 0.05).astype(np.float32)
    x_NI = (rng.normal(0, 1, (TOKENS, COLS)) * np.exp(rng.normal(0, 1.2, COLS))).astype(np.float32)
    return torch.from_numpy(weight), torch.from_numpy(x_NI)


def stats_of(x_NI: Tensor) -> ViewStats:
    hessian_II, norms_I = 2 / len(x_NI) * x_NI.T @ x_NI, x_NI.norm(dim=0)
    return ViewStats(len(x_NI), hessian_II, norms_I, norms_I, x_NI.abs().mean(0), x_NI.abs().amax(0))


def as_released(bits: int) -> Rounding:
    """The release's grids, which hold 0 at a whole code."""

    def rounded(value: Tensor) -> Tensor:
        low, high = value.aminmax(dim=-1, keepdim=True)
        step = (high - low).clamp(min=1e-5) / (2**bits - 1)
        zero = (-torch.round(low / step)).clamp(0, 2**bits - 1)
        return (torch.clamp(torch.round(value / step) + zero, 0, 2**bits - 1) - zero) * step

    return rounded


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_choices_of_the_released_code(bits: int) -> None:
    """Made by ``auto_scale_block`` and ``auto_clip_layer`` of mit-han-lab/llm-awq on one linear layer, on the CPU."""
    weight, x_NI = drawn()
    expected = NUMBERS[str(bits)]
    s_I = best_scale([weight], stats_of(x_NI), as_released(bits), GROUP, 20)
    assert s_I[:12].tolist() == pytest.approx(expected["scales"], rel=1e-3), "on the float16 grid"
    assert float(s_I.double().sum()) == pytest.approx(expected["scales_sum"], rel=1e-4)
    scaled = weight * s_I
    limit = best_clip(scaled, over(stats_of(x_NI), s_I).hessian_II, as_released(bits), GROUP, 20)
    assert limit[3:7].flatten().tolist() == pytest.approx(expected["limits"], rel=2e-3)
    assert float(limit.double().sum()) == pytest.approx(expected["limits_sum"], rel=1e-3)


def test_the_search_is_that_of_equation_4_token_by_token() -> None:
    """Two matrices with a common input, each exponent by brute force; ties and the scales' own rounding aside."""
    weight, x_NI = drawn()
    weights, method = (
        [weight[:40], 3 * weight[40:] / x_NI.abs().mean(0)],
        Awq(bits=2, group=GROUP, n_grid=8, grid="float"),
    )
    errors = []
    for step in range(8):
        s_I = x_NI.abs().mean(0) ** (step / 8)
        s_I = s_I / (s_I.max() * s_I.min()) ** 0.5
        error = 0.0
        for w in weights:
            served = GridPayload.round(w * s_I, 2, GROUP).decode() / s_I
            error += float((x_NI.double() @ (served - w).T.double()).square().sum())
        errors.append((error, s_I))
    least, expected = min(errors, key=lambda pair: pair[0])
    assert least < 0.9 * errors[0][0], "the case tells exponents apart"
    assert torch.allclose(method.scales(weights, stats_of(x_NI)), expected, rtol=1e-3)
    assert not torch.allclose(method.scales(weights[:1], stats_of(x_NI)), expected, rtol=1e-3), "both have a say"
    assert not torch.allclose(method.scales(weights[1:], stats_of(x_NI)), expected, rtol=1e-3)


def test_limits_by_brute_force() -> None:
    weight, x_NI = drawn()
    method = Awq(bits=2, group=GROUP, grid="float")
    found = best_clip(weight, stats_of(x_NI).hessian_II, method.rounded, GROUP, 20)
    for row in (0, 17, 63):
        for number in range(COLS // GROUP):
            part = slice(number * GROUP, (number + 1) * GROUP)
            w_W, errors = weight[row, part], {}
            for step in range(10):
                limit = float(w_W.abs().max()) * (1 - step / 20)
                served = GridPayload.round(w_W.clamp(-limit, limit)[None], 2, GROUP).decode()[0]
                errors[limit] = float((x_NI[:, part] @ (served - w_W)).square().mean())
            assert float(found[row, number]) == pytest.approx(min(errors, key=lambda k: errors[k]), rel=1e-5)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_it_never_changes_outputs_more_than_rounding(bits: int) -> None:
    """Exponent 0 and no clipping are among what is tried; with outlying channels the gain is large."""
    weight, x_NI = drawn()

    def error(served: Tensor) -> float:
        return float((x_NI @ (served - weight).T).square().sum())

    plain = error(RoundToNearest(bits=bits, group=GROUP, grid="integer").encode(weight).decode())
    scaled, both = (
        error(Awq(bits=bits, group=GROUP, clip=clip).encode(weight, stats_of(x_NI)).decode()) for clip in (False, True)
    )
    assert scaled < 0.7 * plain
    assert both < scaled
    assert error(Awq(bits=bits, group=GROUP, clip=False, n_grid=1).encode(weight, stats_of(x_NI)).decode()) == plain


def served(method: Any, model: Model, prepared: Any) -> tuple[Tensor, dict[str, float]]:
    batch = next(iter(model.calibration(context(), 3, 9)))
    with method.apply(model, prepared):
        return model.supervised(batch)[0], method.footprint(model, context())


@pytest.mark.parametrize(("make", "divided"), [
    (llama, set()),
    (lambda: llama(kv_heads=2), {"o_proj"}),
    (gpt2, {"c_proj"}),
    (mixtral, {"o_proj", "gate_up_proj", "down_proj"}),
])  # fmt: skip
def test_scales_are_folded_where_that_works_and_counted_elsewhere(make: Any, divided: set[str]) -> None:
    """Norms and rows of matrices take 1/s; 8 bits then serve what the model computed, and bytes are the grids' and s."""
    model = make()
    method = build("awq", {"bits": 8, "group": 16, "n_calib": 4, "clip": False})
    artefact = method.calibrate(model, context(), 0)  # type: ignore[attr-defined]
    views = linear_views(model)
    assert {v.role for v in views if isinstance(artefact[v.name], ScaledPayload)} == divided
    assert artefact.vectors, "norms took something up"
    batch = next(iter(model.calibration(context(), 3, 9)))
    dense = model.supervised(batch)[0]
    found, costs = served(method, model, artefact)
    change = (found - dense).abs().flatten()
    assert float(change.median()) < 0.02 * float(dense.abs().median()), "a few tokens may be routed otherwise"
    stored = sum(
        v.numel + 3 * v.rows * v.cols / 16 + 2 * v.cols * isinstance(artefact[v.name], ScaledPayload) for v in views
    )
    assert costs["bits"] == pytest.approx(8 * stored / sum(v.numel for v in views))


def test_queries_and_keys_are_not_clipped() -> None:
    model = llama()
    knobs = {"bits": 2, "group": 16, "n_calib": 4}
    clipped, plain = (build("awq", {**knobs, "clip": c}).calibrate(model, context(), 0) for c in (True, False))  # type: ignore[attr-defined]
    same = {
        v.role
        for v in linear_views(model)
        if v.layer == 0 and torch.equal(clipped[v.name].decode(), plain[v.name].decode())
    }
    assert same == {"q_proj", "k_proj"}


def test_an_input_that_nobody_saw_scales_and_clips_nothing() -> None:
    weight = drawn()[0]
    nothing = ViewStats(0, torch.zeros(COLS, COLS), *(torch.zeros(COLS) for _ in range(4)))
    payload = Awq(bits=3, group=GROUP).encode(weight, nothing)
    assert torch.equal(payload.decode(), IntegerGridPayload.round(weight, 3, GROUP, symmetric=False).decode())
    assert isinstance(payload, IntegerGridPayload), "scales of 1 are not kept"


def test_bytes_by_hand() -> None:
    """64 x 96 weights in 3 bits: 36 bytes per row, three scales of 2 bytes, three zeros of 3 bits in 3; alone, 96 scales of 2 bytes."""
    weight, x_NI = drawn()
    payload = Awq(bits=3, group=GROUP).encode(weight, stats_of(x_NI))
    assert payload.nbytes(16) == len(payload.serialise()) == 64 * (36 + 6 + 3) + 192
    floats = Awq(bits=3, group=GROUP, grid="float").encode(weight, stats_of(x_NI))
    assert floats.nbytes(16) == 64 * (36 + 12) + 192


def test_the_search_rounds_as_what_is_stored() -> None:
    weight = drawn()[0]
    for grid in ("integer", "float", "symmetric"):
        method = Awq(bits=3, group=GROUP, grid=grid, clip=False)
        stored = method.encode_scaled(weight, stats_of(drawn()[1])).decode()
        assert torch.equal(ungrouped(method.rounded(grouped(weight, GROUP)), COLS), stored)
    straddling = weight.unflatten(1, (-1, GROUP))
    apart = (Awq(bits=3, group=GROUP).rounded(straddling) - as_released(3)(straddling)).abs() > 2e-3
    assert float(apart.float().mean()) < 0.01, "near ties, which scales in float16 decide otherwise"


def test_groups_come_back() -> None:
    weight = drawn()[0]
    for group in (7, 32, 96, 1000):
        assert torch.equal(ungrouped(grouped(weight, group), COLS), weight)
        assert torch.equal(grouped(weight, group).aminmax(dim=-1).max.amax(1), weight.amax(1))
