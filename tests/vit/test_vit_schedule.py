"""Schedules and multiply-adds: published figures, the flop counter, and budgets that are met."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from isoflop.core.errors import Infeasible
from isoflop.methods.base import METHODS, build
from isoflop.methods.vit_tokens.base import VitTokenMethod, counted_macs
from isoflop.methods.vit_tokens.probe import VitProbe
from isoflop.methods.vit_tokens.random_drop import VitRandom
from isoflop.methods.vit_tokens.schedule import block_macs, largest_amount, model_macs, removals, within_budget
from isoflop.models.hooks.vision_blocks import VISION_BLOCKS

NAMES = sorted(name for name in METHODS.names() if issubclass(METHODS.get(name), VitTokenMethod))
DEIT_S = {
    "layers": 12,
    "width": 384,
    "heads": 6,
    "mlp": 1536,
    "patches": 196,
    "prefix": 1,
    "patch_inputs": 768,
    "classes": 1000,
    "heads_out": 1,
}


@pytest.fixture(scope="module")
def probe() -> VitProbe:
    return VitProbe(examples=2)


def half(patches: int) -> int:
    return patches // 2


def test_deit_s_costs_what_is_published() -> None:
    """4.6 G multiply-adds at 224 pixels (4.599 with the formula of the papers)."""
    assert model_macs(DEIT_S, (0,) * 12) == pytest.approx(4.599e9, rel=1e-3)


@pytest.mark.parametrize(
    ("ratio", "left", "share"), [(0.975, 151, 0.872), (0.95, 111, 0.750), (0.925, 82, 0.652), (0.9, 60, 0.565)]
)
def test_the_ratio_schedule_of_197_tokens(ratio: float, left: int, share: float) -> None:
    """Tokens left after 12 blocks, and the share of the blocks' multiply-adds at width 768."""
    removed = removals("ratio", 196 * (1 - ratio), 196, 12, half)
    assert 197 - sum(removed) == left
    tokens, macs = 197, 0
    for count in removed:
        macs += block_macs(tokens, tokens - count, 768, 3072)
        tokens -= count
    assert macs / (12 * block_macs(197, 197, 768, 3072)) == pytest.approx(share, abs=6e-4)


def test_fixed_and_decreasing_schedules() -> None:
    assert removals("fixed", 8, 196, 12, half) == (8,) * 12
    assert removals("fixed", 2.5, 64, 4, half) == (2, 3, 2, 3)
    assert removals("decreasing", 8, 196, 5, half) == (16, 12, 8, 4, 0)
    assert removals("fixed", 40, 64, 3, half) == (32, 16, 8), "a block cannot merge more than half of what is left"
    assert removals("ratio", 7, 100, 1, half) == (7,), "floor must not lose a token to rounding"


def all_amounts(shape: str, patches: int, layers: int) -> list[float]:
    """Every amount at which some block's count changes, so that no schedule lies between two of them."""
    span = max(1, layers - 1)
    if shape == "ratio":
        found = {Fraction(patches * k, left) for left in range(1, patches + 1) for k in range(left + 1)}
    elif shape == "fixed":
        found = {Fraction(k, blocks) for blocks in range(1, layers + 1) for k in range(patches * blocks + 1)}
    else:
        found = {Fraction(k * span, 2 * (span - block)) for block in range(span) for k in range(patches + 1)}
    return [float(amount) for amount in found if amount <= largest_amount(shape, patches, half)]


@given(
    shape=st.sampled_from(["ratio", "fixed", "decreasing"]),
    share=st.floats(0.3, 1.0),
    patches=st.integers(4, 48),
    layers=st.integers(1, 12),
)
@settings(max_examples=40, deadline=None)
def test_a_budget_is_met_and_used(shape: str, share: float, patches: int, layers: int) -> None:
    """The dearest schedule within the budget, of all there are."""
    geometry = {**DEIT_S, "patches": patches, "layers": layers}

    def scoring(left: int, removed: int) -> int:
        return left**2 * 64

    removed, least = within_budget(geometry, shape, share, half, scoring)
    dense = model_macs(geometry, (0,) * layers)
    costs = [
        model_macs(geometry, removals(shape, amount, patches, layers, half), scoring)
        for amount in all_amounts(shape, patches, layers)
    ]
    assert least == min(*costs, dense) / dense
    within = [cost for cost in costs if cost <= share * dense]
    if removed is None:
        assert not within
        return
    assert model_macs(geometry, removed, scoring) == max(within)
    assert len(removed) == layers
    assert patches - sum(removed) >= 1


def test_all_of_the_budget_removes_nothing(probe: VitProbe) -> None:
    for name in NAMES:
        method = METHODS.get(name).identity(probe.model.info)
        assert isinstance(method, VitTokenMethod)
        assert sum(method.plan(probe.model.info)) == 0


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("schedule", ["ratio", "fixed", "decreasing"])
def test_the_formula_is_what_the_counter_counts(probe: VitProbe, name: str, schedule: str) -> None:
    """Formula with the schedule's counts and the method's scoring = ``torch.utils.flop_counter`` on the live model."""
    method = build(name, {"macs": 0.6, "schedule": schedule})
    assert isinstance(method, VitTokenMethod)
    geometry = probe.model.info.geometry

    def scoring(left: int, removed: int) -> int:
        return method.scoring_macs(geometry, left, removed)

    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert counted_macs(probe.model, images) == model_macs(geometry, (0,) * 4)
    with method.apply(probe.model, None):
        counted = counted_macs(probe.model, images)
    assert counted == model_macs(geometry, method.plan(probe.model.info), scoring)
    assert 0.58 < counted / model_macs(geometry, (0,) * 4) <= 0.6


@dataclass(frozen=True)
class RandomAfterBlocks(VitRandom):
    """Drops patches after the MLP."""

    name: ClassVar[str] = "random-after-blocks"
    after_block: ClassVar[bool] = True


def test_methods_may_act_after_the_blocks(probe: VitProbe) -> None:
    """Their last block's MLP still sees every token that its attention saw."""
    method, geometry = RandomAfterBlocks(macs=0.6), probe.model.info.geometry
    plan = method.plan(probe.model.info)
    with method.apply(probe.model, None):
        assert probe.cost() == model_macs(geometry, plan, None, after_block=True) > model_macs(geometry, plan)
        run = probe.model.occupant(VISION_BLOCKS)
        assert run is not None
        assert run.state is not None
        assert all(attention == mlp for attention, mlp in run.counts)
        assert run.state.patches == 64 - sum(plan)


def test_methods_compare_at_equal_cost(probe: VitProbe) -> None:
    for share in (0.9, 0.75, 0.6, 0.5):
        costs = []
        for name in NAMES:
            with build(name, {"macs": share}).apply(probe.model, None):
                costs.append(probe.cost())
        assert max(costs) / min(costs) < 1.02, dict(zip(NAMES, costs, strict=True))


@pytest.mark.parametrize(
    ("name", "knobs", "word"),
    [
        ("pitome", {"ratio": 0.45}, "ratio"),
        ("tome", {"r": 33}, "r = 33"),
        ("tome", {"r": 17, "schedule": "decreasing"}, "r = 17"),
        ("tome", {"r": 4, "ratio": 0.9, "macs": 0.5}, "give one"),
        ("tome", {"r": 4, "ratio": 0.9}, "r = 4 and ratio = 0.9 both set the schedule; give one"),
        ("pitome", {"ratio": 0.9, "macs": 0.5}, "give one"),
        ("pitome", {"macs": 0.2}, "macs = 0.2"),
    ],
)
def test_impossible_knobs_are_refused_in_one_line(probe: VitProbe, name: str, knobs: dict[str, Any], word: str) -> None:
    with pytest.raises(Infeasible, match=word) as refusal:
        build(name, knobs).check(probe.model.info)
    assert "\n" not in str(refusal.value)
    assert name in str(refusal.value)


@given(
    name=st.sampled_from(NAMES),
    schedule=st.sampled_from(["ratio", "fixed", "decreasing"]),
    patches=st.integers(4, 64),
    knob=st.sampled_from(["macs", "ratio", "r"]),
)
@settings(max_examples=60, deadline=None)
def test_suggested_bounds_are_accepted(probe: VitProbe, name: str, schedule: str, patches: int, knob: str) -> None:
    info = probe.model.info
    info = replace(info, geometry={**info.geometry, "patches": patches})
    if knob == "r" and name != "tome":
        return
    value: float = {"macs": 0.05, "ratio": 1e-6, "r": 4096}[knob]
    with pytest.raises(Infeasible) as refusal:
        build(name, {knob: value, "schedule": schedule}).check(info)
    found = re.search(r"allowed: ([\d.]+)", str(refusal.value))
    assert found is not None
    build(name, {knob: type(value)(found[1]), "schedule": schedule}).check(info)


def test_the_papers_own_numbers_can_be_given(probe: VitProbe) -> None:
    info = probe.model.info
    assert build("tome", {"r": 5}).plan(info) == (5, 5, 5, 5)  # type: ignore[attr-defined]
    assert build("tome", {"r": 6, "schedule": "decreasing"}).plan(info) == (12, 8, 4, 0)  # type: ignore[attr-defined]
    assert build("pitome", {"ratio": 0.9}).plan(info) == (6, 5, 5, 4)  # type: ignore[attr-defined]
    assert build("pitome", {"ratio": 0.5}).plan(info) == (32, 16, 8, 4)  # type: ignore[attr-defined]
