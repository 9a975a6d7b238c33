"""MC-MoE: the integer programme by brute force, statistics by running blocks again, grids and bytes by hand (arXiv 2410.06270)."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from weight_cases import context

from isoflop.core.errors import Infeasible
from isoflop.methods.base import build
from isoflop.methods.weights.expert_bits import dealt, least_total, significance_costs, solve
from isoflop.methods.weights.expert_grid import BETWEEN, LAZY, rounded, swept
from isoflop.methods.weights.expert_statistics import collect_experts, expert_pairs
from isoflop.methods.weights.mixture_probe import untrained_mixture
from isoflop.methods.weights.obs import Curvature
from isoflop.methods.weights.probe import WeightProbe
from isoflop.methods.weights.views import linear_views
from isoflop.models.hooks.experts import routers_of

WIDTHS = (3, 2, 1)
RELEASED = json.loads((Path(__file__).parent / "numbers" / "mc_moe.json").read_text())
"""Of three blocks of Mixtral 8x7B, from Aaronhuang-778/MC-MoE: ``experts_act_frequency.pkl``, ``experts_act_weight.pkl``,
``experts_quant_loss.pkl`` (at 3, 2 and 1 bits), and what lies in ``experts_mixture_bit_selection`` for 12 to 20 bits together."""


@pytest.mark.parametrize("experts", [2, 3, 4, 5, 6])
@pytest.mark.parametrize("floors", [True, False])
def test_the_programme_is_the_best_of_all_assignments(experts: int, floors: bool) -> None:
    """(a) and (b): over 3^E, at every budget."""
    costs = np.random.default_rng(experts).random((experts, 3)) * np.array([0.1, 1.0, 5.0])
    least = least_total(experts, WIDTHS, floors)
    for total in range(least, 3 * experts + 1):
        allowed = [
            sum(costs[e, o] for e, o in enumerate(options))
            for options in product(range(3), repeat=experts)
            if sum(WIDTHS[o] for o in options) <= total and (not floors or {0, 1} <= set(options))
        ]
        found = solve(costs, WIDTHS, total, floors)
        assert sum(found) <= total
        assert not floors or {3, 2} <= set(found)
        assert sum(costs[e, WIDTHS.index(width)] for e, width in enumerate(found)) == pytest.approx(min(allowed))
    with pytest.raises(ValueError, match="too few"):
        solve(costs, WIDTHS, least - 1, floors)


@pytest.mark.parametrize("block", RELEASED, ids=["block 0", "block 5", "block 31"])
def test_allocations_that_are_released_for_mixtral_8x7b(block: dict[str, Any]) -> None:
    """At every budget, from the factors that are released with them, with the exponents that its solver had."""
    costs = significance_costs(block["counts"], block["masses"], block["errors"], 1.0, 1.5, 1.0)
    for total, widths in block["widths"].items():
        assert solve(costs, WIDTHS, int(total), floors=True) == tuple(widths)


def test_costs_are_the_product_of_powers_and_an_unseen_expert_is_not_free() -> None:
    costs = significance_costs([6, 2, 0], [3.0, 0.5, 0.0], [[1, 2, 4], [2, 4, 8], [0, 0, 0]], 1.0, 1.5, 2.0)
    counts, masses = np.array([6, 2, 0.5]), np.array([3.0, 0.5, 0.5 * 3.5 / 8])
    errors = np.array([[1, 2, 4], [2, 4, 8], [1.5, 3, 6]])
    expected = (counts / 8.5)[:, None] * (masses / masses.sum())[:, None] ** 1.5 * errors**2
    np.testing.assert_allclose(costs, expected)
    assert (costs[2] > 0).all()


def test_dealing_keeps_the_widths() -> None:
    assert dealt((1, 3, 2, 2), [2, 0, 1, 3]) == (2, 2, 3, 1)


def test_statistics_are_those_of_blocks_that_run_again() -> None:
    """(e); and ε is what the block's output changes by where an expert's matrices are overwritten."""
    model = untrained_mixture(layers=2)
    batches = list(model.calibration(context(), 3, 0))
    found = collect_experts(model, batches, WIDTHS, 32, "mc-moe")
    pairs, decoder = expert_pairs(linear_views(model)), model.decoder
    for layer, router in routers_of(decoder).items():
        seen: dict[str, torch.Tensor] = {}
        block = decoder.layers[layer].mlp
        handle = block.register_forward_pre_hook(lambda _m, args: seen.update(x=args[0]))  # noqa: B023
        with torch.no_grad():
            model.logits(batches[0])
            handle.remove()
            logits, _, chosen = router(seen["x"].flatten(0, 1))
            top = logits.double().softmax(-1).topk(2).values
            whole = block(seen["x"])
            own = found.layers[layer]
            assert sum(own.counts_E) == 2 * len(logits) == 2 * own.tokens
            assert own.counts_E == [int((chosen == e).sum()) for e in range(4)]
            assert sum(own.masses_E) == pytest.approx(float(top.sum()))
            for expert, pair in enumerate(pairs[layer]):
                for place, width in enumerate(WIDTHS):
                    kept = [view.weight().clone() for view in pair]
                    for view in pair:
                        view.write(rounded(view.weight(), width, 32).decode())
                    error = float((block(seen["x"]) - whole).norm())
                    for view, weight in zip(pair, kept, strict=True):
                        view.write(weight)
                    assert own.errors_EB[expert][place] == pytest.approx(error, rel=1e-3)


def test_one_bit_has_two_values_per_row_and_group() -> None:
    """(f): plus and minus the mean magnitude."""
    weight = torch.randn(5, 48, generator=torch.Generator().manual_seed(0))
    decoded = rounded(weight, 1, 16).decode()
    for row, group in product(range(5), range(3)):
        part = slice(16 * group, 16 * group + 16)
        mean = float(weight[row, part].abs().mean())
        assert len(decoded[row, part].unique()) == 2
        torch.testing.assert_close(decoded[row, part], weight[row, part].sign() * mean, rtol=1e-3, atol=0)


@pytest.mark.parametrize("bits", [2, 3])
def test_the_range_is_the_best_of_those_tried(bits: int) -> None:
    weight = torch.randn(6, 32, generator=torch.Generator().manual_seed(1))
    low, high = weight.amin(1, keepdim=True).clamp(max=0), weight.amax(1, keepdim=True).clamp(min=0)
    errors = []
    for factor in np.linspace(0.9, 1.1, 101):
        step = float(factor) * (high - low) / (2**bits - 1)
        zero = float(factor) * low
        codes = ((weight - zero) / step).round().clamp(0, 2**bits - 1)
        errors.append((codes * step + zero - weight).abs().pow(2.4).sum(1))
    found = (rounded(weight, bits, 32).decode() - weight).abs().pow(2.4).sum(1)
    torch.testing.assert_close(found, torch.stack(errors).amin(0), rtol=2e-2, atol=0)
    plain = errors[50]
    assert bool((found <= plain * 1.01).all())
    assert bool((found < plain * 0.99).any())


def test_no_error_is_taken_up_inside_a_block_of_the_released_sweep() -> None:
    """The first block is plain rounding; what is behind it has moved. At 4 bits the sweep is the whole one."""
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(4, LAZY + 32, generator=generator)
    inputs = torch.randn(400, LAZY + 32, generator=generator) @ torch.randn(LAZY + 32, LAZY + 32, generator=generator)
    curvature = Curvature.of(inputs.T @ inputs, 0.01)
    lazy, plain = swept(weight, curvature, 2, 32, BETWEEN).decode(), rounded(weight, 2, 32).decode()
    assert torch.equal(lazy[:, :LAZY], plain[:, :LAZY])
    assert not torch.allclose(lazy[:, LAZY:], plain[:, LAZY:])
    assert torch.equal(swept(weight, curvature, 4, 32, BETWEEN).decode(), swept(weight, curvature, 4, 32).decode())
    loss = [
        float(((x - weight) @ inputs.T).square().sum()) for x in (swept(weight, curvature, 2, 32).decode(), lazy, plain)
    ]
    assert loss[0] < loss[1] < loss[2]


def calibrated(model: Any, **knobs: Any) -> tuple[Any, Any]:
    method = build("mc-moe", {"n_calib": 8, "group": 32, **knobs})
    return method, method.calibrate(model, context(), 0)


def test_bytes_by_hand_and_equal_for_every_dealing() -> None:
    """Experts of 3·64·32 weights: codes of their width, and 4 bytes for every 32 weights; attention of 12288 at 4 bits."""
    model = untrained_mixture(layers=2)
    sizes = {}
    for allocation in ("ilp", "random", "frequency", "weight"):
        method, artefact = calibrated(model, bits=2.25, allocation=allocation)
        with method.apply(model, artefact):
            sizes[allocation] = sum(model.stored.values())
    assert len(set(sizes.values())) == 1
    method, artefact = calibrated(model, bits=2.0, allocation="uniform")
    with method.apply(model, artefact):
        expected = 2 * (12288 / 2 + 4 * 6144 * 2 / 8 + (12288 + 4 * 6144) / 32 * 4)
        assert sum(model.stored.values()) == expected


def test_later_blocks_see_rounded_ones() -> None:
    """The second layer's matrices change where only the first one's widths do."""
    model = untrained_mixture(layers=2)
    narrow = calibrated(model, bits=2.0, allocation="uniform", attn_bits=4)[1]
    wide = calibrated(model, bits=2.0, allocation="uniform", attn_bits=16)[1]
    name = next(view.name for view in linear_views(model) if view.layer == 1 and view.expert == 0)
    assert not torch.equal(narrow[name].decode(), wide[name].decode())


@pytest.mark.parametrize(
    ("knobs", "words"),
    [
        ({"bits": 1.5}, "bits = 1.5 is no mean that 4 experts can have.*allowed: 1.75 to 3$"),
        ({"bits": 3.5}, "bits = 3.5 is no mean.*allowed: 1.75 to 3$"),
        ({"bits": 2.5, "menu": "4/3/2"}, "bits = 2.5 is no mean.*allowed: 2.75 to 4$"),
        ({"bits": 2.5, "allocation": "uniform"}, "allowed: 3, 2, 1$"),
        ({"feedback": BETWEEN, "group": 96}, "group = 96 crosses the blocks of 128 columns.*allowed: divisors of 128$"),
    ],
)
def test_what_cannot_work_is_refused_at_plan(knobs: dict[str, Any], words: str) -> None:
    with pytest.raises(Infeasible, match=words):
        build("mc-moe", knobs).check(untrained_mixture().info)


def test_a_model_without_experts_is_refused_at_plan() -> None:
    with pytest.raises(Infeasible, match="is no mixture of experts"):
        build("mc-moe", {}).check(WeightProbe().model.info)
