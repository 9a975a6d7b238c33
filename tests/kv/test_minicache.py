"""MiniCache: geometry of the shared direction, exceptions, exact norms, new tokens, and bytes by the formula."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from kv_cases import GROUPS, WIDTH, a_call, small, token
from torch import Tensor

from isoflop.core.errors import Infeasible
from isoflop.methods.base import build
from isoflop.methods.kv_cache.base import append_recent, slice_call
from isoflop.methods.kv_cache.layer_pairs import PairPart, PairSegment, angles, between
from isoflop.methods.kv_cache.minicache import MiniCache
from isoflop.methods.kv_cache.probe import PROMPT, KvCacheProbe
from isoflop.models.hooks.attention import AttentionCall
from isoflop.models.segments import DenseSegment, LayerStore, attend_segments, stored_bytes

LAYERS = 4


@pytest.fixture(scope="module")
def probe() -> KvCacheProbe:
    return KvCacheProbe(layers=LAYERS)


def calls(length: int = 24, **more: Any) -> list[AttentionCall]:
    return [a_call(length, seed=n, layer=n, **more) for n in range(LAYERS)]


def merged(method: MiniCache, given: list[AttentionCall]) -> dict[int, LayerStore]:
    stores = {call.layer: method.compress(call, None) for call in given}
    method.merge(stores, None)
    return stores


def vectors(seed: int = 0, tokens: int = 12) -> Tensor:
    return torch.randn(2, GROUPS, tokens, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("t", [0.0, 0.3, 0.5, 1.0])
def test_the_shared_direction_is_on_the_great_circle_at_t(t: float) -> None:
    """A straight line would come out at another angle."""
    low, up = vectors(0), vectors(1)
    shared = between(low, up, t).double()
    whole = angles(low, up).double()
    torch.testing.assert_close(angles(shared, low).double(), t * whole, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(angles(shared, up).double(), (1 - t) * whole, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(shared.norm(dim=-1), torch.ones_like(whole))
    torch.testing.assert_close(between(up, low, 1 - t), between(low, up, t))


def test_directions_that_coincide_or_vanish_have_no_holes() -> None:
    low = vectors(0)
    torch.testing.assert_close(
        between(low, 3 * low, 0.6), torch.nn.functional.normalize(low, dim=-1), atol=1e-5, rtol=1e-5
    )
    for other in (-low, torch.zeros_like(low)):
        assert bool(between(low, other, 0.6).isfinite().all())
    assert bool((angles(low, torch.zeros_like(low)) == 0).all())


def test_norms_come_back_exactly_and_layers_that_point_alike_lose_nothing() -> None:
    given = calls()
    stores = merged(MiniCache(gamma=0.0), given)
    for layer in (2, 3):
        for name in ("keys", "values"):
            found = getattr(stores[layer].segments[0], name)()
            exact = given[layer].k_BGTD if name == "keys" else given[layer].v_BGTD
            torch.testing.assert_close(found.norm(dim=-1), exact.norm(dim=-1), atol=1e-5, rtol=1e-5)
    alike = [*given[:3], replace(given[2], layer=3, k_BGTD=2.5 * given[2].k_BGTD, v_BGTD=0.1 * given[2].v_BGTD)]
    stores = merged(MiniCache(gamma=0.0), alike)
    for layer in (2, 3):
        torch.testing.assert_close(stores[layer].segments[0].keys(), alike[layer].k_BGTD, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(stores[layer].segments[0].values(), alike[layer].v_BGTD, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("gamma", [0.0, 0.2, 0.7])
@pytest.mark.parametrize("retain", ["distinct", "similar"])
def test_exceptions_are_those_beyond_the_share_of_the_range(gamma: float, retain: str) -> None:
    """Head by head, against loops; keys and values by themselves."""
    given = calls()
    stores = merged(MiniCache(gamma=gamma, retain=retain), given)
    for side, layer in enumerate((2, 3)):
        segment = stores[layer].segments[0]
        assert isinstance(segment, PairSegment)
        for part, name in ((segment.pair.k, "k_BGTD"), (segment.pair.v, "v_BGTD")):
            assert isinstance(part, PairPart)
            low, up = (getattr(given[n], name) for n in (2, 3))
            expected = set()
            for row in range(2):
                for group in range(GROUPS):
                    angle = [
                        math.acos(float(torch.nn.functional.cosine_similarity(a, b, dim=0)))
                        for a, b in zip(low[row, group], up[row, group], strict=True)
                    ]
                    most, least = max(angle), min(angle)
                    keep = [
                        a >= most - gamma * (most - least) - 1e-6
                        if retain == "distinct"
                        else a <= least + gamma * (most - least) + 1e-6
                        for a in angle
                    ]
                    expected |= {(row * GROUPS + group, n) for n, one in enumerate(keep) if one}
            assert set(zip(part.owner_R.tolist(), part.place_R.tolist(), strict=True)) == expected
            whole, exact = part.whole(side).flatten(0, 1), getattr(given[layer], name).flatten(0, 1)
            for owner, place in expected:
                assert torch.equal(whole[owner, place], exact[owner, place])


@pytest.mark.parametrize("what", ["kv", "k", "v"])
@pytest.mark.parametrize("mode", ["slerp", "average"])
def test_attention_over_shared_directions_is_attention_on_what_they_restore(mode: str, what: str) -> None:
    given = calls()
    stores = merged(MiniCache(gamma=0.3, mode=mode, what=what), given)
    for layer in (2, 3):
        segment = stores[layer].segments[0]
        query = replace(given[layer], q_BHTD=given[layer].q_BHTD[:, :, -3:], order_BT=given[layer].order_BT[:, -3:])
        plain = DenseSegment(segment.positions_BGN, None, segment.keys(), segment.values())
        outs = [attend_segments(query.q_BHTD, [s], query.softmax, query.order_BT)[0] for s in (segment, plain)]
        torch.testing.assert_close(*outs, atol=1e-5, rtol=1e-5)
        exact = {"k": (segment.values(), given[layer].v_BGTD), "v": (segment.keys(), given[layer].k_BGTD)}.get(what)
        assert exact is None or torch.equal(*exact)


def test_new_tokens_are_read_exactly_and_merged_then() -> None:
    """Each layer attends to them as they are in their own step; from the next one on as merged."""
    given, prompt = calls(30), 20
    method = MiniCache(gamma=0.1)
    stores = merged(method, [slice_call(call, 0, prompt) for call in given])
    for place in range(prompt, 30):
        for call in given:
            store, one = stores[call.layer], token(call, place)
            append_recent(store, one)
            k, v = (
                torch.cat((getattr(store.segments[0], n)(), x[:, :, place : place + 1]), 2)
                for n, x in (("keys", call.k_BGTD), ("values", call.v_BGTD))
            )
            dense = DenseSegment(torch.arange(place + 1).expand(2, GROUPS, -1), None, k, v)
            if call.layer < 2:
                dense = DenseSegment(
                    dense.positions_BGN, None, call.k_BGTD[:, :, : place + 1], call.v_BGTD[:, :, : place + 1]
                )
            expected = attend_segments(one.q_BHTD, [dense], one.softmax, one.order_BT)[0]
            torch.testing.assert_close(method.step(one, store, None), expected, atol=1e-5, rtol=1e-5)
        method.merge(stores, None)
    for layer in (2, 3):
        assert stores[layer].recent.tokens == 0
        assert stores[layer].segments[0].tokens == 30
        norms = stores[layer].segments[0].keys().norm(dim=-1)
        torch.testing.assert_close(norms, given[layer].k_BGTD.norm(dim=-1), atol=1e-5, rtol=1e-5)
    alone = stores[1]
    assert alone.segments[0].tokens + alone.recent.tokens == 30


@pytest.mark.parametrize("knobs", [{"start": 1.0}, {"gamma": 1.0}, {"gamma": 1.0, "retain": "similar"}])
def test_nothing_merged_and_everything_kept_are_dense(knobs: dict[str, Any], probe: KvCacheProbe) -> None:
    bare = probe.model.logits(probe.batch([0, 1]))
    with build("minicache", knobs).apply(probe.model, None), torch.no_grad():
        torch.testing.assert_close(probe.outputs([0, 1]), bare[:, PROMPT:].flatten(1), atol=1e-4, rtol=1e-4)


def test_padding_is_no_exception_and_moves_no_range() -> None:
    given, wide = calls(20), calls(20, pads=(0, 6))
    loud = [replace(c, k_BGTD=torch.where(c.valid_BT[:, None, :, None], c.k_BGTD, -9 * c.k_BGTD)) for c in wide]  # type: ignore[index]
    for a, b in zip(
        merged(MiniCache(gamma=0.2), wide).values(), merged(MiniCache(gamma=0.2), loud).values(), strict=True
    ):
        one, two = a.segments[0], b.segments[0]
        if isinstance(one, PairSegment) and isinstance(two, PairSegment):
            assert isinstance(one.pair.k, PairPart)
            assert isinstance(two.pair.k, PairPart)
            assert torch.equal(one.pair.k.place_R, two.pair.k.place_R)
            places = zip(one.pair.k.owner_R.tolist(), one.pair.k.place_R.tolist(), strict=True)
            assert all(place >= 6 for owner, place in places if owner >= GROUPS)
    assert len(given) == LAYERS


@pytest.mark.parametrize("later", [True, False])
def test_bytes_are_those_of_the_formula(later: bool) -> None:
    """Of a pair: directions once, a norm per layer and token, exceptions twice with 8 bytes of places, limits if tokens follow."""
    given = calls(40)
    stores = merged(MiniCache(gamma=0.3, merge_new=later), given)
    pair = [stores[layer] for layer in (2, 3)]
    segment = pair[0].segments[0]
    assert isinstance(segment, PairSegment)
    exceptions = sum(len(part.owner_R) for part in (segment.pair.k, segment.pair.v) if isinstance(part, PairPart))
    tokens = 2 * GROUPS * 40
    found = stored_bytes([t for store in pair for t in store.resident()], 16)
    limits = 2 * 2 * GROUPS * 2 if later else 0
    assert found == 2 * tokens * (2 * WIDTH + 2 * 2) + exceptions * (2 * 2 * WIDTH + 8) + limits


def test_pairs_go_upwards_from_the_start() -> None:
    assert MiniCache(start=0.5).pairs(list(range(8))) == [(4, 5), (6, 7)]
    assert MiniCache(start=0.4).pairs(list(range(8))) == [(4, 5), (6, 7)], "an odd one stays alone"
    assert MiniCache(start=0.0).pairs([0, 2, 5, 6]) == [(0, 2), (5, 6)], "layers within windows are not among them"
    assert isinstance(small("minicache"), MiniCache)
    with pytest.raises(
        Infeasible,
        match=r"start = 0.9 leaves no pair of the 4 layers that attend to all tokens; allowed: up to 0.5, or 1 for none",
    ):
        build("minicache", {"start": 0.9}).check(KvCacheProbe(layers=4).model.info)


def test_spherical_directions_lose_less_than_means() -> None:
    """On layers that share some of their direction: the trend that the paper's ablation rests on."""
    given = calls(60)
    given[3] = replace(
        given[3], k_BGTD=given[2].k_BGTD + 0.7 * given[3].k_BGTD, v_BGTD=3 * given[2].v_BGTD + given[3].v_BGTD
    )
    errors = {}
    for mode in ("slerp", "average"):
        stores = merged(MiniCache(gamma=0.05, mode=mode), given)
        errors[mode] = sum(float((stores[n].segments[0].values() - given[n].v_BGTD).square().sum()) for n in (2, 3))
    assert errors["slerp"] < 0.7 * errors["average"]
