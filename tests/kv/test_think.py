"""ThinK: channels of the released codes, what is stored is narrower, recent tokens and evictions beneath, bytes by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from kv_cases import GROUPS, HEADS, WIDTH, a_call, left_padded, one_row, stepped

from isoflop.core.errors import Infeasible
from isoflop.kernels.softmax import Softmax
from isoflop.methods.base import build
from isoflop.methods.kv_cache.base import slice_call
from isoflop.methods.kv_cache.probe import KvCacheProbe
from isoflop.methods.kv_cache.snapkv import SnapKV
from isoflop.methods.kv_cache.think import NarrowSegment, ThinK
from isoflop.models.hooks.attention import AttentionCall, causal_attention
from isoflop.models.segments import LayerStore, stored_bytes

NUMBERS = json.loads((Path(__file__).parent / "numbers" / "think.json").read_text())
"""``official``: ``key_pruner_query_driven`` of SalesforceAIResearch/ThinK (commit d200577, ThinK_eager/src/kv_pruning_utils.py) on four heads
of their own, its channels and every 31st of the narrow keys; ``kvpress``: channels of ``ThinKPress.compress`` of NVIDIA/kvpress
0.5.5, whose authors it was reviewed by, on grouped heads."""


def uneven(heads: int, groups: int, seed: int) -> AttentionCall:
    """Queries and keys whose channels are of different sizes."""
    rng = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(1, n, 50, 16, generator=rng) * torch.rand(1, n, 1, 16, generator=rng)
        for n in (heads, groups, groups)
    )
    return AttentionCall(0, q, k, v, Softmax(0.25), torch.arange(50)[None], None)


def narrow(store: LayerStore) -> NarrowSegment:
    segment = store.segments[0]
    assert isinstance(segment, NarrowSegment)
    return segment


def test_channels_and_keys_are_those_of_the_released_code() -> None:
    store = ThinK(channels=0.5, recent=10).compress(uneven(4, 4, 1), None)
    segment = narrow(store)
    assert segment.index_BGC[0].tolist() == NUMBERS["official"]["channels"]
    assert segment.k_BGNC.shape == (1, 4, 40, 8)
    sample = torch.tensor(NUMBERS["official"]["sample"])
    torch.testing.assert_close(segment.k_BGNC.flatten()[::31], sample, atol=1e-5, rtol=0)


def test_channels_of_grouped_heads_are_those_of_kvpress() -> None:
    store = ThinK(channels=0.75, window=12).compress(uneven(4, 2, 2), None)
    assert narrow(store).index_BGC[0].tolist() == NUMBERS["kvpress"]["channels"]


def plain(call: AttentionCall, prompt: int, method: ThinK) -> torch.Tensor:
    """Loops over rows and heads: other channels of older keys are zero; attention goes over everything."""
    k = call.k_BGTD.clone()
    count = round(method.channels * WIDTH)
    for row in range(k.shape[0]):
        for group in range(GROUPS):
            heads = range(group * HEADS // GROUPS, (group + 1) * HEADS // GROUPS)
            asked = sum(call.q_BHTD[row, h, max(0, prompt - method.window) : prompt].square().sum(0) for h in heads)
            size = asked * call.k_BGTD[row, group, :prompt].square().sum(0)
            k[row, group, : prompt - method.recent, size.argsort()[: WIDTH - count]] = 0
    return causal_attention(replace(call, k_BGTD=k))[:, prompt:]


@pytest.mark.parametrize("knobs", [{}, {"channels": 0.25, "window": 3, "recent": 0}, {"channels": 0.5, "recent": 12}])
def test_attention_is_that_over_keys_with_zeros(knobs: dict[str, Any]) -> None:
    call, method = a_call(50), ThinK(**knobs)
    out, store = stepped(method, call, 40)
    torch.testing.assert_close(out, plain(call, 40, method), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(narrow(store).part().keys().square().sum(), narrow(store).k_BGNC.square().sum())
    _, again = method.prefill(slice_call(call, 0, 40), None)
    tail = slice_call(call, 40, 50)
    again.recent.append(tail.k_BGTD, tail.v_BGTD, tail.order_BT[:, None].expand(2, GROUPS, -1))
    torch.testing.assert_close(method.step(tail, again, None), out, atol=1e-5, rtol=1e-5)


def test_channels_are_those_with_the_least_loss_of_products() -> None:
    """Against all pairs of channels: what is pruned has the smallest sum of squared products over window and keys, one by one."""
    call = uneven(2, 2, 5)
    kept = set(narrow(ThinK(channels=0.5, recent=0, window=20).compress(call, None)).index_BGC[0, 0].tolist())
    q, k = call.q_BHTD[0, 0, -20:], call.k_BGTD[0, 0]
    loss = [float((q[:, c, None] * k[None, :, c]).square().sum()) for c in range(16)]
    assert kept == set(sorted(range(16), key=loss.__getitem__)[8:])


def test_an_eviction_beneath_is_snapkvs_and_channels_are_of_what_it_leaves() -> None:
    call = a_call(60)
    method = ThinK(keep=0.5, window=8, channels=0.5, recent=6)
    store = method.compress(call, None)
    snap = SnapKV(keep=0.5, window=8).compress(call, None).segments[0]
    older, newest = store.segments
    assert torch.equal(torch.cat((older.positions_BGN, newest.positions_BGN), 2), snap.positions_BGN)
    assert torch.equal(torch.cat((older.values(), newest.values()), 2), snap.values())
    assert newest.tokens == 6
    alone = replace(
        call,
        k_BGTD=torch.nn.functional.pad(snap.keys(), (0, 0, 30, 0)),
        v_BGTD=torch.nn.functional.pad(snap.values(), (0, 0, 30, 0)),
    )  # zeros count nothing
    same = narrow(ThinK(window=8, channels=0.5, recent=6).compress(alone, None))
    assert torch.equal(narrow(store).index_BGC, same.index_BGC)


@pytest.mark.parametrize("pads", [(0, 5), (11, 2), (0, 17)])
@pytest.mark.parametrize(
    "knobs", [{"recent": 6, "channels": 0.5}, {"recent": 15, "keep": 0.6, "window": 8, "channels": 0.5}]
)
def test_rows_of_unequal_lengths_are_as_they_are_alone(pads: tuple[int, ...], knobs: dict[str, Any]) -> None:
    """Also where one of them has none but recent tokens."""
    call, method = a_call(40, pads=pads), ThinK(**knobs)
    both, _ = stepped(method, call, 30)
    for row, pad in enumerate(pads):
        alone, _ = stepped(method, one_row(call, row, pad), 30 - pad)
        torch.testing.assert_close(both[row : row + 1], alone, atol=1e-5, rtol=1e-5)
    single = one_row(call, 0, pads[0])
    padded, _ = stepped(method, left_padded(single, 6), 36 - pads[0])
    torch.testing.assert_close(padded, stepped(method, single, 30 - pads[0])[0], atol=1e-5, rtol=1e-5)


def test_all_channels_and_prompts_of_recent_tokens_are_exact() -> None:
    call = a_call(40)
    for method, prompt in ((ThinK(channels=1.0), 30), (ThinK(recent=32), 30), (ThinK(recent=3), 3)):
        found = stepped(method, call, prompt)[0]
        torch.testing.assert_close(found, causal_attention(call)[:, prompt:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_near(dtype: torch.dtype) -> None:
    call = a_call(40)
    half = replace(call, **{n: getattr(call, n).to(dtype) for n in ("q_BHTD", "k_BGTD", "v_BGTD")})
    same = replace(half, **{n: getattr(half, n).float() for n in ("q_BHTD", "k_BGTD", "v_BGTD")})
    found, expected = (stepped(ThinK(recent=4), c, 30)[0] for c in (half, same))
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), expected, atol=0.03, rtol=0.03)


def test_bytes_are_those_of_narrow_keys_whole_values_and_channels() -> None:
    """40 tokens of 2 heads of 8 channels at 2 bytes: 34 keys of 4 channels, 6 whole ones, 40 values, and a byte per channel kept."""
    store = ThinK(channels=0.5, recent=6).compress(a_call(40, rows=1), None)
    assert stored_bytes(store.resident(), 16) == 2 * (34 * 4 + 6 * 8 + 40 * 8) * 2 + 2 * 4 == 2024


def test_no_channel_at_all_is_refused() -> None:
    info = KvCacheProbe().model.info
    with pytest.raises(
        Infeasible, match=r"channels = 0.02 of the 16 of a head keeps none of them; allowed: from 0.0312 on"
    ):
        build("think", {"channels": 0.02}).check(info)
    build("think", {"channels": 0.04}).check(info)
