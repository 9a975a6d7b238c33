"""RazorAttention: scores of hand-made heads, what each head keeps, the summary's identity, and bytes by the formula."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from kv_cases import GROUPS, HEADS, WIDTH, a_call, left_padded, probabilities, stepped
from torch import Tensor

from isoflop.kernels import blocks
from isoflop.kernels.softmax import Softmax
from isoflop.methods.base import build
from isoflop.methods.kv_cache.probe import KvCacheProbe
from isoflop.methods.kv_cache.razor_attention import RazorAttention
from isoflop.methods.kv_cache.retrieval_heads import HeadScores, head_scores, masses
from isoflop.models.hooks.attention import AttentionCall, causal_attention
from isoflop.models.segments import stored_bytes

ONE = HeadScores(torch.zeros(1, GROUPS), torch.tensor([[0.1, 0.9]]), (0,))
"""Of two heads the second retrieves."""


@pytest.fixture(scope="module")
def probe() -> KvCacheProbe:
    return KvCacheProbe(layers=3)


def razor(**knobs: Any) -> RazorAttention:
    return RazorAttention(**{"least": 0, "buffer": 0.2, "sinks": 2, "induction": 0.5, "echo": 0.0, **knobs})


def repeated(period: int, repeats: int, seed: int = 0) -> Tensor:
    """A first token and a period of random ones, repeated."""
    ids = torch.randperm(50, generator=torch.Generator().manual_seed(seed))[: period + 1]
    return torch.cat((ids[:1], ids[1:].repeat(repeats)))


def by_hand(ids: Tensor, shift: int, loud: float = 60.0) -> AttentionCall:
    """Heads whose logit is large where the key's token (``shift``: the one before the key) is the query's."""
    one_hot = torch.nn.functional.one_hot(ids, 50).float()
    keys = torch.cat((torch.zeros(shift, 50), one_hot[: len(ids) - shift]))
    q = (loud * one_hot)[None, None].expand(1, 2, -1, -1)
    return AttentionCall(0, q, keys[None, None], keys[None, None], Softmax(1.0), torch.arange(len(ids))[None], None)


@pytest.mark.parametrize("seed", range(3))
def test_hand_made_heads_have_their_analytic_scores(seed: int) -> None:
    """In repeat r a token sees r earlier copies of itself, and itself: r / (r + 1) of the mass are echo. A head that looks one further
    on has all of it on what followed, and both are the same whatever the tokens are."""
    period, repeats = 7, 4
    ids = repeated(period, repeats, seed)
    echo, induction = masses(by_hand(ids, 0), period)
    assert float(echo) == pytest.approx(sum(r / (r + 1) for r in range(1, repeats)) / (repeats - 1), abs=1e-5)
    assert float(induction) == pytest.approx(0, abs=1e-5)
    echo, induction = masses(by_hand(ids, 1), period)
    assert float(induction) == pytest.approx(1, abs=1e-5)
    assert float(echo) == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("values", [1, 1 << 22])
def test_scores_equal_sums_over_the_whole_attention(values: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Entry by entry, whatever the blocks of queries; a key-value head has its best query head's."""
    monkeypatch.setattr(blocks, "LEAST_ROWS", 1)
    monkeypatch.setattr(blocks, "BLOCK_VALUES", dict.fromkeys(("cpu", "cuda"), values))
    period, length = 6, 25
    call = a_call(length, rows=1)
    p_HTT = probabilities(call)[0]
    sums = torch.zeros(2, HEADS, dtype=torch.float64)
    for i in range(period + 1, length):
        for back in range(i - period, 0, -period):
            sums[0] += p_HTT[:, i, back]
            sums[1] += p_HTT[:, i, back + 1]
    expected = (sums / (length - period - 1)).unflatten(1, (GROUPS, -1)).amax(-1)
    for found, one in zip(masses(call, period), expected, strict=True):
        torch.testing.assert_close(found.double(), one, atol=1e-5, rtol=1e-5)


def test_shares_choose_the_best_heads_of_all_layers_by_either_score() -> None:
    echo, induction = torch.tensor([[9.0, 1], [2, 3], [0, 0]]), torch.tensor([[1.0, 2], [7, 8], [9, 0]])
    found = HeadScores(echo, induction, (0, 1, 5)).retrieval(1 / 6, 1 / 3)
    assert {layer: mask.tolist() for layer, mask in found.items()} == {
        0: [True, False],
        1: [False, True],
        5: [True, False],
    }
    assert not any(bool(mask.any()) for mask in HeadScores(echo, induction, (0, 1, 2)).retrieval(0.0, 0.0).values())


@pytest.mark.parametrize("pads", [None, (0, 9)])
def test_each_kind_of_head_keeps_what_it_should(pads: tuple[int, ...] | None) -> None:
    call = a_call(40, pads=pads)
    full, short = razor(compensation="none").compress(call, ONE).segments
    assert full.heads_G is not None
    assert short.heads_G is not None
    assert (full.heads_G.tolist(), short.heads_G.tolist()) == ([False, True], [True, False])
    for row in range(2):
        seen = 40 - (pads or (0, 0))[row]
        live = slice(None) if short.log_bias_BGN is None else short.log_bias_BGN[row, 0] == 0
        newest = int(0.2 * seen + 0.5)
        assert short.positions_BGN[row, 0, live].tolist() == [0, 1, *range(seen - newest, seen)]
    assert full.tokens == 40


def test_equal_dropped_tokens_are_stood_for_exactly() -> None:
    """Only with the count of what is stood for, and at any number of steps behind."""
    call = a_call(40)
    middle = torch.zeros(40, dtype=torch.bool)
    middle[2:24] = True
    k, v = (torch.where(middle[:, None], x[:, :, 2:3], x) for x in (call.k_BGTD, call.v_BGTD))
    call = replace(call, k_BGTD=k, v_BGTD=v)
    expected = causal_attention(call)[:, 30:]
    torch.testing.assert_close(stepped(razor(), call, 30, ONE)[0], expected, atol=1e-5, rtol=1e-5)
    for other in ("plain", "none"):
        assert (stepped(razor(compensation=other), call, 30, ONE)[0] - expected).abs().max() > 0.05


def test_the_summary_is_the_mean_of_what_is_dropped_and_padding_is_not_among_it() -> None:
    call = a_call(40, pads=(0, 9))
    summary = razor().compress(call, ONE).segments[1]
    for row, start in enumerate((0, 9)):
        seen = 40 - start
        gone = slice(start + 2, 40 - int(0.2 * seen + 0.5))
        torch.testing.assert_close(summary.keys()[row, 0, 0], call.k_BGTD[row, 0, gone].mean(0))
        torch.testing.assert_close(summary.values()[row, 0, 0], call.v_BGTD[row, 0, gone].mean(0))
        assert summary.log_bias_BGN is not None
        count = gone.stop - gone.start
        assert float(summary.log_bias_BGN[row, 0, 0].exp()) == pytest.approx(count, rel=1e-5)
    alone = razor().compress(left_padded(a_call(40, rows=1), 4), ONE).segments[1]
    torch.testing.assert_close(
        alone.keys(), razor().compress(a_call(40, rows=1), ONE).segments[1].keys(), atol=1e-6, rtol=1e-6
    )


@pytest.mark.parametrize("knobs", [{"induction": 1.0}, {"buffer": 1.0}, {"least": 1000}])
def test_what_keeps_everything_is_dense(knobs: dict[str, Any], probe: KvCacheProbe) -> None:
    method = build("razor-attention", {"search_tokens": 20, **knobs})
    bare = probe.outputs([0, 1])
    with method.apply(probe.model, probe.prepared(method, 0)):
        torch.testing.assert_close(probe.outputs([0, 1]), bare, atol=1e-5, rtol=1e-5)


def test_bytes_cost_each_head_what_it_keeps() -> None:
    """40 tokens of the head that retrieves; 10 of the other, and a summary with its weight."""
    store = razor().compress(a_call(40, rows=1), ONE)
    token_bytes = 2 * WIDTH * 2
    assert stored_bytes(store.resident(), 16) == 40 * token_bytes + 10 * token_bytes + token_bytes + 2


def test_the_search_needs_no_text_and_fits_into_what_the_model_reads(probe: KvCacheProbe) -> None:
    info = replace(probe.model.info, text=None, geometry={**probe.model.info.geometry, "positions": 41})
    scores = head_scores(probe.model, 2500, 4, 0)
    probe.model.info, before = info, probe.model.info
    try:
        few = head_scores(probe.model, 2500, 4, 0)
        again = head_scores(probe.model, 10, 4, 0)
    finally:
        probe.model.info = before
    assert scores.layers == few.layers == (0, 1, 2)
    assert torch.equal(few.echo_LG, again.echo_LG), "10 tokens, four times, and a first one"
    assert bool((few.induction_LG >= 0).all())
