"""Quest: outputs of the released simulation, bounds that hold, pages that grow, who chooses, bytes by a formula."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from kv_cases import GROUPS, HEADS, WIDTH, a_call, left_padded, one_row, stepped, token
from torch import Tensor

from isoflop.core.errors import Infeasible
from isoflop.kernels.softmax import Softmax
from isoflop.methods.base import build
from isoflop.methods.kv_cache.base import append_recent, slice_call
from isoflop.methods.kv_cache.probe import KvCacheProbe
from isoflop.methods.sparse_attention.quest import Quest
from isoflop.models.hooks.attention import AttentionCall, causal_attention
from isoflop.models.segments import LayerStore

NUMBERS = json.loads((Path(__file__).parent / "numbers" / "quest.json").read_text())
"""Outputs of ``forward`` of mit-han-lab/Quest (commit 01c1623, evaluation/quest_attention.py) for tokens 70 to 79 of ``grouped()``, pages
of 8 tokens, a budget of 32 tokens: every 7th number."""
SMALL: dict[str, Any] = {"page": 4, "k_share": 0.3, "dense_layers": 0}


def grouped() -> AttentionCall:
    rng = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(1, n, 80, 16, generator=rng) * scale for n, scale in ((4, 2.0), (2, 1.0), (2, 1.0)))
    return AttentionCall(0, q, k, v, Softmax(0.25), torch.arange(80)[None], None)


def test_outputs_are_those_of_the_released_simulation() -> None:
    """0.44 of 71 to 80 tokens are 4 pages of 8, as many as 32 tokens."""
    out, _ = stepped(Quest(k_share=0.44, page=8, least=3, dense_layers=0), grouped(), 70)
    torch.testing.assert_close(out.flatten()[::7], torch.tensor(NUMBERS["32"]), atol=2e-5, rtol=0)


def plain(call: AttentionCall, prompt: int, method: Quest) -> Tensor:
    """Loops over steps, rows, heads and pages."""
    rows = call.q_BHTD.shape[0]
    out = torch.zeros(rows, call.q_BHTD.shape[2] - prompt, HEADS, WIDTH)
    for t in range(prompt, call.q_BHTD.shape[2]):
        starts = list(range(0, t + 1, method.page))
        count = min(len(starts), max(method.least, int(method.k_share * (t + 1) / method.page + 0.5)))
        for row in range(rows):
            for head in range(HEADS):
                q, k, v = (
                    call.q_BHTD[row, head, t],
                    *(x[row, head // (HEADS // GROUPS), : t + 1] for x in (call.k_BGTD, call.v_BGTD)),
                )
                bounds = []
                for start in starts:
                    keys = k[start : start + method.page]
                    bounds.append(float(torch.maximum(q * keys.amin(0), q * keys.amax(0)).sum()))
                    assert bounds[-1] >= float((keys @ q).max()) - 1e-4
                best = sorted(range(len(starts)), key=lambda n: -bounds[n])[:count]
                if method.newest and len(starts) - 1 not in best:
                    best[-1] = len(starts) - 1
                places = [p for n in best for p in range(starts[n], min(starts[n] + method.page, t + 1))]
                out[row, t - prompt, head] = (k[places] @ q * call.softmax.scaling).softmax(0) @ v[places]
    return out


@pytest.mark.parametrize(
    "knobs", [{}, {"page": 5, "least": 3}, {"newest": True, "k_share": 0.1}, {"page": 1}, {"page": 64}]
)
@pytest.mark.parametrize("prompt", [21, 24])
def test_the_pages_with_the_largest_bounds_are_read_and_grow(knobs: dict[str, Any], prompt: int) -> None:
    call, method = a_call(36), Quest(**{**SMALL, **knobs})
    out, _ = stepped(method, call, prompt)
    torch.testing.assert_close(out, plain(call, prompt, method), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("pads", [None, (0, 5), (11, 2)])
@pytest.mark.parametrize("per", ["query-head", "kv-head"])
def test_many_queries_at_once_are_those_one_by_one(per: str, pads: tuple[int, ...] | None) -> None:
    """Each finds its own page as it is when it comes, whatever follows in it."""
    call, method = a_call(45, pads=pads), Quest(**SMALL, select_per=per)
    expected, late = stepped(method, call, 22)
    _, store = method.prefill(slice_call(call, 0, 22), None)
    outs = []
    for start, stop in ((22, 25), (25, 39), (39, 40), (40, 45)):
        piece = replace(slice_call(call, start, stop), valid_BT=None)
        append_recent(store, piece)
        outs.append(method.step(piece, store, None))
    torch.testing.assert_close(torch.cat(outs, 1), expected, atol=1e-5, rtol=1e-5)
    for name in ("low", "high"):
        torch.testing.assert_close(store.state[name], late.state[name])


@pytest.mark.parametrize("pads", [(0, 5), (11, 2), (0, 19)])
@pytest.mark.parametrize("per", ["query-head", "kv-head"])
def test_rows_of_unequal_lengths_are_as_they_are_alone(pads: tuple[int, ...], per: str) -> None:
    """Pages are of a row's own tokens."""
    call, method = a_call(40, pads=pads), Quest(**SMALL, select_per=per)
    both, _ = stepped(method, call, 24)
    for row, pad in enumerate(pads):
        alone, _ = stepped(method, one_row(call, row, pad), 24 - pad)
        torch.testing.assert_close(both[row : row + 1], alone, atol=1e-5, rtol=1e-5)
    single = one_row(call, 0, pads[0])
    padded, _ = stepped(method, left_padded(single, 6), 30 - pads[0])
    torch.testing.assert_close(padded, stepped(method, single, 24 - pads[0])[0], atol=1e-5, rtol=1e-5)


def reads(method: Quest, call: AttentionCall) -> Tensor:
    """What the last query of a prompt reads, (B, S, N)."""
    store = method.compress(call, None)
    last = slice_call(call, call.q_BHTD.shape[2] - 1, None)
    return method.chosen(last, store, None)[:, :, 0]


def test_a_group_chooses_by_the_sum_of_its_heads_softmax_over_pages() -> None:
    """Not by summed bounds: a head that is sure counts once, however large its queries."""
    call = a_call(40)
    call = replace(call, q_BHTD=call.q_BHTD * torch.tensor([6.0, 1.0, 6.0, 1.0])[:, None, None])
    found = reads(Quest(**SMALL, select_per="kv-head"), call)
    assert found.shape[1] == GROUPS
    pages = call.k_BGTD.unflatten(2, (10, 4))
    q = call.q_BHTD[:, :, -1].unflatten(1, (GROUPS, -1))[:, :, :, None]
    bounds = torch.maximum(q * pages.amin(3)[:, :, None], q * pages.amax(3)[:, :, None]).sum(-1)
    weights = (bounds * call.softmax.scaling).softmax(-1).sum(2)
    expected = torch.zeros_like(weights, dtype=torch.bool).scatter(-1, weights.topk(3, -1).indices, True)
    assert torch.equal(found, expected.repeat_interleave(4, -1))
    assert reads(Quest(**SMALL), call).shape[1] == HEADS


def test_the_first_layers_read_everything_and_keep_no_bounds() -> None:
    method = Quest(**{**SMALL, "dense_layers": 2})
    for layer in (0, 1, 2):
        call = a_call(40, layer=layer)
        out, store = stepped(method, call, 30)
        assert ("low" in store.state) == bool(store.extra) == (layer == 2)
        same = torch.allclose(out, causal_attention(call)[:, 30:], atol=1e-5)
        assert same == (layer < 2)


def fetched(method: Quest, store: LayerStore) -> float:
    return method.read_bytes(store, [t for s in store.all() for t in s.read_tensors()], 16)


def test_bytes_read_are_those_of_bounds_and_pages() -> None:
    """42 tokens of 2 heads of 8 channels at 2 bytes, in 11 pages of which the last holds 2: two keys of each page, and whole pages."""
    call, method = a_call(42, rows=1), Quest(**SMALL, select_per="kv-head", newest=True)
    _, store = stepped(method, call, 30)
    assert method._pages(token(call, 41)).tolist() == [[3]]
    bounds = 2 * 11 * 2 * 8 * 2
    assert fetched(method, store) == bounds + 2 * (4 + 4 + 2) * 2 * 8 * 2 == 1344
    _, store = stepped(Quest(**{**SMALL, "k_share": 1.0}), call, 30)
    assert fetched(method, store) == bounds + 2 * 42 * 2 * 8 * 2


def test_query_heads_of_a_group_share_the_pages_that_they_both_read() -> None:
    call = a_call(40, rows=1)
    chosen = reads(Quest(**SMALL), call).unflatten(1, (GROUPS, -1))
    store = Quest(**SMALL).compress(call, None)
    assert store.state["chosen"] == int(chosen.any(2).sum())
    assert 12 * GROUPS < store.state["chosen"] < 24 * GROUPS, "3 pages of each head, some of them of both"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_near(dtype: torch.dtype) -> None:
    call = a_call(40)
    half = replace(call, **{n: getattr(call, n).to(dtype) for n in ("q_BHTD", "k_BGTD", "v_BGTD")})
    same = replace(half, **{n: getattr(half, n).float() for n in ("q_BHTD", "k_BGTD", "v_BGTD")})
    found, expected = (stepped(Quest(**SMALL), c, 30)[0] for c in (half, same))
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), expected, atol=0.03, rtol=0.03)


def test_reading_everything_is_dense_and_models_of_dense_layers_are_refused() -> None:
    probe = KvCacheProbe(cost="read", layers=4)
    bare = probe.outputs([0, 1])
    for knobs in ({"k_share": 1.0}, {"k_share": 1.0, "select_per": "kv-head", "page": 7}):
        with build("quest", knobs).apply(probe.model, None):
            torch.testing.assert_close(probe.outputs([0, 1]), bare, atol=1e-5, rtol=1e-5)
    with pytest.raises(
        Infeasible, match="method quest: dense_layers = 4 leaves none of the 4 layers sparse; allowed: 0 … 3"
    ):
        build("quest", {"dense_layers": 4}).check(probe.model.info)
