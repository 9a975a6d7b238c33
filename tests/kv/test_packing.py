"""Two methods of the cache in one trial: what eviction keeps, in fewer bits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from kv_cases import a_call, one_row, stepped

from isoflop.cli import main
from isoflop.core.errors import Infeasible
from isoflop.jobs.job import Job, MethodSpec, ResolvedJob
from isoflop.methods.base import METHODS, build, in_turn
from isoflop.methods.kv_cache.eviction import Eviction
from isoflop.methods.kv_cache.packing import EvictThenPack, Packs
from isoflop.methods.kv_cache.probe import KvCacheProbe
from isoflop.methods.kv_cache.pyramidkv import Layers
from isoflop.methods.kv_cache.rtn import KvRtn
from isoflop.methods.kv_cache.snapkv import SnapKV
from isoflop.models.segments import LayerStore, stored_bytes

PACKS = sorted(name for name in METHODS if issubclass(METHODS.get(name), Packs))
LEAN: dict[str, dict[str, Any]] = {"gear": {"rank": 0, "rank_new": 0, "sparsity": 0.0}}
"""Factors and outliers of few tokens would take more than what they stand for."""
KEEPS = sorted(name for name in METHODS if issubclass(METHODS.get(name), Eviction) and METHODS.get(name).even)


def both(keeps: str, packs: str, **knobs: Any) -> EvictThenPack:
    rolling = {"rolling": False} if "rolling" in METHODS.get(keeps).__dataclass_fields__ else {}
    (method,) = in_turn([build(packs, knobs), build(keeps, {"keep": 0.5, **rolling})])
    assert isinstance(method, EvictThenPack)
    return method


def tokens_of(store: LayerStore) -> torch.Tensor:
    """Which tokens a store's segments hold, sorted, (B, G, N); the last repeated where a row holds fewer."""
    positions = torch.cat([segment.positions_BGN for segment in store.segments], 2)
    return positions.sort(-1).values


def test_there_are_some_of_both_kinds() -> None:
    assert {"kv-rtn", "gear"} <= set(PACKS)
    assert {"snapkv", "h2o", "tova", "knorm", "pyramidkv", "streaming-llm", "a2sf", "kv-random", "ems"} <= set(KEEPS)


@pytest.mark.parametrize("packs", PACKS)
@pytest.mark.parametrize("keeps", KEEPS)
def test_the_survivors_are_those_of_the_eviction_and_the_bytes_those_of_the_packed(keeps: str, packs: str) -> None:
    method = both(keeps, packs, **LEAN.get(packs, {}))
    call = a_call(48, pads=(0, 9))
    layers = Layers([0]) if keeps == "pyramidkv" else None
    kept = method.keeps.compress(call, layers)
    found = method.compress(call, layers)
    assert torch.equal(tokens_of(found), tokens_of(kept))
    assert not found.extra, "scores that only went on evicting would use are not kept"
    ours, exact = (stored_bytes(store.resident(), 16) for store in (found, kept))
    assert ours < exact


@pytest.mark.parametrize("keeps", KEEPS)
def test_in_a_model_the_eviction_sees_what_it_sees_alone(keeps: str) -> None:
    probe, pair = KvCacheProbe(layers=2), both(keeps, "kv-rtn")
    kept = []
    for method in (pair, pair.keeps):
        with method.apply(probe.model, None), torch.no_grad():
            cache = method.cache(probe.model)
            with cache.session():
                probe.model.module(probe.batch([0]).ids_BT[:, :40], use_cache=False)
                kept.append([tokens_of(store) for _, store in sorted(cache.stores().items())])
    for packed, exact in zip(*kept, strict=True):
        assert torch.equal(packed, exact)


def test_bytes_by_hand() -> None:
    """12 tokens × 2 heads × 8 channels at 4 bits; a grid (scale and zero, 16 bits each) per channel and 4 tokens, and per token and 8 channels."""
    method = both("snapkv", "kv-rtn", bits=4, group=4)
    store = method.compress(a_call(24, rows=1), None)
    codes = 2 * 12 * 2 * 8 // 2
    k_grids, v_grids = 2 * 8 * (12 // 4) * 4, 2 * 12 * (8 // 4) * 4
    assert stored_bytes(store.resident(), 16) == codes + k_grids + v_grids


def test_packed_survivors_are_what_packing_them_alone_gives() -> None:
    call = a_call(40)
    method = both("snapkv", "kv-rtn", bits=3, group=8)
    kept = method.keeps.compress(call, None).segments[0]
    alone = replace(call, k_BGTD=kept.keys(), v_BGTD=kept.values(), order_BT=torch.arange(kept.tokens)[None])
    expected = KvRtn(bits=3, group=8).compress(alone, None).segments[0]
    found = method.compress(call, None).segments[0]
    assert torch.equal(found.keys(), expected.keys())
    assert torch.equal(found.values(), expected.values())


def test_a_row_is_packed_as_if_it_were_alone() -> None:
    method, call = both("snapkv", "kv-rtn", bits=2, group=8), a_call(40, pads=(0, 13))
    together = method.compress(call, None).segments[0]
    alone = method.compress(one_row(call, 1, 13), None).segments[0]
    assert together.log_bias_BGN is not None
    live = together.log_bias_BGN[1, 0] == 0
    assert torch.equal(together.keys()[1][:, live], alone.keys()[0])
    assert torch.equal(together.values()[1][:, live], alone.values()[0])


def test_merged_tokens_keep_their_weight() -> None:
    method, call = both("ems", "kv-rtn", bits=8), a_call(40, pads=(0, 13))
    method = replace(method, keeps=replace(method.keeps, count_bias=True))
    expected, found = method.keeps.compress(call, None).segments[0], method.compress(call, None).segments[0]
    assert expected.log_bias_BGN is not None
    assert found.log_bias_BGN is not None
    assert bool((expected.log_bias_BGN > 0).any()), "an entry stands for several tokens"
    assert torch.equal(found.log_bias_BGN, expected.log_bias_BGN)


@pytest.mark.parametrize(
    ("knobs", "expected"),
    [({"keep": 1.0}, [("kv-rtn", {"bits": 4})]), ({"keep": 0.4}, [("snapkv", {"keep": 0.4})])],
    ids=["all tokens: packing alone", "16 bits: eviction alone"],
)
def test_with_one_of_them_idle_it_is_the_other(
    knobs: dict[str, Any], expected: list[tuple[str, dict[str, Any]]]
) -> None:
    probe = KvCacheProbe(layers=2)
    pair = both("snapkv", "kv-rtn", bits=4) if knobs["keep"] == 1.0 else both("snapkv", "kv-rtn", bits=16)
    pair = replace(pair, keeps=SnapKV(**knobs))
    batch = probe.batch([0, 1])
    logits = []
    for method in (pair, *in_turn([build(name, given) for name, given in expected])):
        with method.apply(probe.model, None), torch.no_grad():
            logits.append(probe.model.logits(batch))
    torch.testing.assert_close(*logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("packs", PACKS)
def test_one_pass_and_steps_agree_with_blocks_of_new_tokens(packs: str) -> None:
    gap = {"kv-rtn": {"streaming_gap": 5, "bits": 8}, "gear": {"n_b": 5, "bits": 8, **LEAN["gear"]}}.get(packs, {})
    method, probe = both("h2o", packs, **gap), KvCacheProbe(layers=2)
    batch = probe.batch([0, 1])
    with method.apply(probe.model, None), torch.no_grad():
        once, steps = probe.model.logits(batch), probe.model.stepwise_logits(batch)
        report = method.cache(probe.model).report()
    torch.testing.assert_close(steps, once, rtol=0, atol=2e-3)
    assert report.prompt_stored < 0.5 * report.prompt_dense
    _, store = stepped(method, a_call(40), 30)
    assert store.recent.tokens < 10 or packs not in ("kv-rtn", "gear"), "new tokens were packed"


def job(*methods: tuple[str, dict[str, Any]]) -> Job:
    return Job(
        "tiny-lm/text-d64", tuple(MethodSpec.of(name, build(name, knobs).knobs()) for name, knobs in methods),
        "bits-per-byte", 0, 0,
    )  # fmt: skip


def test_a_trial_has_both_and_a_quantised_model_beneath() -> None:
    trial = job(("kv-rtn", {"bits": 4}), ("rtn", {"bits": 4}), ("snapkv", {}))
    cache, weights = sorted(ResolvedJob.of(trial).methods, key=lambda method: method.name == "rtn")
    assert cache.name == "snapkv+kv-rtn"
    assert cache.knobs()["snapkv.keep"] == 0.5
    assert weights.name == "rtn"
    assert trial.method_label == "kv-rtn+rtn+snapkv", "identity is what was written"


@pytest.mark.parametrize(
    ("pair", "says"),
    [
        ((("kv-rtn", {}), ("gear", {})), "both take attention; a trial has one method there, or one that keeps"),
        ((("snapkv", {}), ("knorm", {})), "both take attention"),
        ((("ada-kv", {}), ("kv-rtn", {})), "both take attention"),
        ((("a2sf", {"prompt": "sequential"}), ("gear", {})), "beside it set a2sf.prompt: exact"),
        ((("h2o", {}), ("kv-rtn", {})), "beside kv-rtn set h2o.rolling: false"),
        ((("ems", {"rolling": False, "count_bias": True}), ("kv-rtn", {})), "beside kv-rtn set ems.count_bias: false"),
    ],
)
def test_what_cannot_follow_is_refused_in_one_line(pair: tuple[tuple[str, dict[str, Any]], ...], says: str) -> None:
    for order in (pair, pair[::-1]):
        with pytest.raises(Infeasible, match=says) as refused:
            ResolvedJob.of(job(*order))
        assert "\n" not in str(refused.value)


def test_pages_of_methods_name_what_may_share_their_place(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def page(name: str) -> str:
        monkeypatch.setattr("sys.argv", ["isoflop", "methods", name])
        with pytest.raises(SystemExit):
            main()
        return " ".join(capsys.readouterr().out.split())

    assert f"Behind it, at the same place: {', '.join(PACKS)}." in page("snapkv")
    assert f"Before it, at the same place: {', '.join(KEEPS)}." in page("kv-rtn")
    assert "at the same place" not in page("rtn")
