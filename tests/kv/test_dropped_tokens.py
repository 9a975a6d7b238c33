"""Caches behind methods that leave gaps in RoPE's positions: tokens are counted by what reaches a layer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from isoflop.methods.base import METHODS, build
from isoflop.methods.decoder_tokens.probe import DecoderTokenProbe
from isoflop.methods.kv_cache.base import CompressedCache, KvCacheMethod
from isoflop.methods.kv_cache.eviction import Eviction
from isoflop.methods.visual_tokens.probe import VisualTokenProbe
from isoflop.models.hooks.attention import ATTENTION, AttentionCall

EVICTORS = sorted(n for n in METHODS.names() if issubclass(METHODS.get(n), Eviction))
CASES: list[tuple[str, dict[str, Any]]] = [
    *((name, {"keep": 0.5}) for name in EVICTORS),
    ("snapkv", {"keep": 0.5, "window": 2}),
    ("a2sf", {"keep": 0.5, "prompt": "sequential", "alpha": 0.8}),
    ("zipcache", {"probe_random": 0.2}),
    ("zipcache", {"normalizer": "rows_total"}),
    ("mixed-random", {}),
    ("kivi", {"residual": 4, "group": 4}),
    ("quarot-kv", {}),
    ("think", {"recent": 3, "window": 4}),
    ("quest", {"page": 3, "k_share": 0.3, "dense_layers": 0}),
    ("double-sparsity", {"k_share": 0.25, "dense_layers": 0, "channel": "random", "force_recent": 3}),
]
BEFORE: list[tuple[str, dict[str, Any]]] = [
    ("fastv", {"layer": 1, "drop": 0.75}),
    ("vtc-cls", {"keep": 8, "keep_positions": "original"}),
]


@contextmanager
def recorded(
    cache: CompressedCache, found: dict[int, tuple[AttentionCall, int]], outs: dict[int, Any]
) -> Iterator[None]:
    """Note each layer's call, the prompt's length in it and its output."""
    attend = cache.attend

    def note(call: AttentionCall) -> torch.Tensor:
        assert cache.prefix is not None
        outs[call.layer] = attend(call)
        found[call.layer] = call, cache.prefix
        return outs[call.layer]

    cache.attend = note  # type: ignore[method-assign]
    yield
    del cache.attend


def occupant(method: KvCacheMethod, model: Any) -> CompressedCache:
    cache = method.occupants(model, None)[ATTENTION]
    assert isinstance(cache, CompressedCache)
    return cache


@pytest.fixture(scope="module")
def probes() -> dict[str, VisualTokenProbe]:
    return {"fastv": DecoderTokenProbe(examples=2), "vtc-cls": VisualTokenProbe(examples=2, tower="cls")}


@pytest.mark.parametrize("before", BEFORE, ids=[name for name, _ in BEFORE])
@pytest.mark.parametrize(("name", "knobs"), CASES)
@torch.no_grad()
def test_gaps_in_positions_change_nothing(
    name: str, knobs: dict[str, Any], before: tuple[str, dict[str, Any]], probes: dict[str, VisualTokenProbe]
) -> None:
    """Every layer does what the method does with the same queries and keys numbered 0, 1, 2 … in a row."""
    probe, method = probes[before[0]], build(name, knobs)
    assert isinstance(method, KvCacheMethod)
    calls: dict[int, tuple[AttentionCall, int]] = {}
    outs: dict[int, Any] = {}
    model = probe.model
    with build(*before).apply(model, None):
        cache = occupant(method, model)
        with recorded(cache, calls, outs), model.occupy(ATTENTION, cache):
            probe.outputs([0, 1])
    assert sorted(calls) == list(range(model.info.geometry["layers"]))
    assert min(call.q_BHTD.shape[2] for call, _ in calls.values()) < model.info.geometry["visual_tokens"]
    for layer, (call, prefix) in calls.items():
        length = call.q_BHTD.shape[2]
        row = AttentionCall(
            layer, call.q_BHTD, call.k_BGTD, call.v_BGTD, call.softmax, torch.arange(length)[None], None, call.ids_BT,
            rotation=call.rotation,
        )  # fmt: skip
        expected = occupant(method, model)
        expected.prefix, expected.examples_B = prefix, torch.tensor([0, 1])
        torch.testing.assert_close(outs[layer], expected.attend(row))
        assert cache._reports[layer] == expected._reports[layer]
        assert cache._reports[layer].prompt_dense == pytest.approx(prefix / length * cache._reports[layer].dense)


@pytest.mark.parametrize("before", BEFORE, ids=[name for name, _ in BEFORE])
@torch.no_grad()
def test_the_newest_tokens_are_the_last_columns(
    before: tuple[str, dict[str, Any]], probes: dict[str, VisualTokenProbe]
) -> None:
    """Sinks and window behind gaps are columns of the prompt, whatever RoPE's positions are."""
    probe, method = probes[before[0]], build("streaming-llm", {"keep": 0.5, "sinks": 2, "rolling": False})
    model, checked = probe.model, []
    assert isinstance(method, KvCacheMethod)
    cache = CompressedCache(method, None, model.info.dense_bits)
    prefill = cache._prefill

    def note(prompt: AttentionCall) -> Any:
        out, store = prefill(prompt)
        length = prompt.k_BGTD.shape[2]
        kept = [0, 1, *range(length - (-(-length // 2) - 2), length)]
        segment = store.segments[0]
        assert segment.positions_BGN[0, 0].tolist() == kept
        torch.testing.assert_close(segment.keys(), prompt.k_BGTD[:, :, kept])
        checked.append(length)
        return out, store

    cache._prefill = note  # type: ignore[method-assign]
    with build(*before).apply(model, None), model.occupy(ATTENTION, cache):
        probe.outputs([0, 1])
    assert min(checked) in (8, 9)


@pytest.mark.parametrize(
    ("name", "knobs"),
    [("full-cache", {}), ("double-sparsity", {"k_share": 1.0, "dense_layers": 0, "channel": "random"})],
)
@torch.no_grad()
def test_stored_and_read_ratio_mean_the_same(
    name: str, knobs: dict[str, Any], probes: dict[str, VisualTokenProbe]
) -> None:
    """Both compare with the tokens that reached the layers: reading a whole cache behind FastV saves nothing."""
    probe, method = probes["fastv"], build(name, knobs)
    with build(*BEFORE[0]).apply(probe.model, None), method.apply(probe.model, None):
        probe.outputs([0, 1])
        costs = method.footprint(probe.model, probe.ctx)
    if name == "full-cache":
        assert costs["kv_read_ratio"] == costs["kv_store_ratio"] == 1.0
    else:
        assert costs["kv_read_ratio"] < 1.0  # labels come on top
