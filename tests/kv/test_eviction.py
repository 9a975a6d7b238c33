"""A2SF and its relatives: scores by closed forms, choices and decoding against plain simulations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kv_cases import GROUPS, HEADS, a_call, column_sums, left_padded, probabilities, token

from isoflop.kernels.softmax import Softmax
from isoflop.methods.base import build
from isoflop.methods.kv_cache.a2sf import A2SF
from isoflop.methods.kv_cache.base import append_recent, slice_call
from isoflop.methods.kv_cache.eviction import Eviction
from isoflop.methods.kv_cache.h2o import H2O
from isoflop.methods.kv_cache.knorm import Knorm
from isoflop.methods.kv_cache.probe import KvCacheProbe
from isoflop.methods.kv_cache.scores import forgetting
from isoflop.methods.kv_cache.select import count_of
from isoflop.methods.kv_cache.snapkv import SnapKV
from isoflop.methods.kv_cache.streaming_llm import StreamingLLM
from isoflop.methods.kv_cache.tova import Tova
from isoflop.models.hooks.attention import AttentionCall
from isoflop.models.segments import stored_bytes

EVICTORS = ["a2sf", "h2o", "tova", "streaming-llm", "snapkv", "knorm", "kv-random"]


@pytest.fixture(scope="module")
def probe() -> KvCacheProbe:
    return KvCacheProbe()


def kept(method: Eviction, call: AttentionCall) -> torch.Tensor:
    return method.compress(call, None).segments[0].positions_BGN


def test_alpha_one_is_the_column_sum_and_alpha_zero_the_last_row() -> None:
    call = a_call(15)
    torch.testing.assert_close(
        A2SF(alpha=1.0).score(call).double(), column_sums(call, torch.ones(15)), atol=1e-5, rtol=1e-5
    )
    last = probabilities(call)[:, :, -1].unflatten(1, (GROUPS, -1)).sum(2)
    torch.testing.assert_close(A2SF(alpha=0.0).score(call).double(), last, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.95, 1.0])
def test_recursion_equals_the_closed_form_over_200_steps(alpha: float) -> None:
    call = a_call(200, rows=1)
    p_GTN = probabilities(call).unflatten(1, (GROUPS, -1)).sum(2)[0].float()
    method = A2SF(alpha=alpha)
    scores = torch.zeros(1, GROUPS, 200)
    for row in range(200):
        scores = method.update(scores, p_GTN[None, :, row])
    torch.testing.assert_close(scores, method.score(call), atol=1e-5, rtol=1e-5)


def test_powers_do_not_underflow_in_half_precision() -> None:
    call = a_call(300, rows=1)
    half = replace(call, q_BHTD=call.q_BHTD.half(), k_BGTD=call.k_BGTD.half(), v_BGTD=call.v_BGTD.half())
    scores = A2SF(alpha=0.9).score(half)
    assert scores.dtype is torch.float32
    assert scores[..., 0].min() > 0


@pytest.mark.parametrize("alpha", [0.3, 0.9, 1.0])
def test_uniform_attention_has_a_closed_form(alpha: float) -> None:
    length = 30
    call = a_call(length)
    call = replace(call, q_BHTD=torch.zeros_like(call.q_BHTD))
    expected = [
        sum(alpha ** (length - 1 - q) / (q + 1) for q in range(j, length)) * HEADS / GROUPS for j in range(length)
    ]
    torch.testing.assert_close(A2SF(alpha=alpha).score(call)[0, 0], torch.tensor(expected), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("pads", [0, 5])
@pytest.mark.parametrize("alpha", [0.0, 1e-30, 0.5, 0.9, 1.0])
def test_queries_that_are_forgotten_are_left_out_and_no_others(alpha: float, pads: int) -> None:
    length = 200
    valid_BT = torch.arange(length)[None] >= pads
    zeros = torch.zeros(1, 1, length, 2)
    order_BT = (valid_BT.long().cumsum(-1) - 1).clamp(min=0)
    queries = forgetting(
        AttentionCall(0, zeros, zeros, zeros, Softmax(1.0), order_BT, valid_BT if pads else None), alpha
    )
    age_T = torch.arange(length - 1, -1, -1).clamp(max=length - 1 - pads)
    every_T = torch.tensor(alpha, dtype=torch.float32) ** age_T * valid_BT[0]
    chosen = queries.weight_BP.shape[1]
    assert torch.equal(queries.weight_BP[0], every_T[length - chosen :])
    assert not every_T[: length - chosen].any()
    assert chosen == {0.0: 1, 1.0: length}.get(alpha, chosen)
    assert alpha not in (1e-30, 0.5) or chosen < length


def test_forgetting_keeps_younger_tokens() -> None:
    call = replace(a_call(100), q_BHTD=torch.zeros(2, HEADS, 100, 8))
    ages = [float(99 - kept(A2SF(alpha=a, keep=0.2, recent=0.0), call).double().mean()) for a in (1.0, 0.99, 0.95, 0.8)]
    assert ages == sorted(ages, reverse=True)
    assert ages[0] == 89.5  # uniform attention without forgetting keeps the oldest


@pytest.mark.parametrize("name", EVICTORS)
def test_a_budget_of_everything_is_the_identity(name: str, probe: KvCacheProbe) -> None:
    batch = probe.batch(range(2))
    with torch.no_grad():
        dense = probe.model.logits(batch)
        with build(name, {"keep": 1.0}).apply(probe.model, None):
            assert (probe.model.logits(batch) - dense).abs().max() <= 1e-5 * dense.abs().max()


@pytest.mark.parametrize("name", EVICTORS)
@pytest.mark.parametrize("length", [1, 2, 9])
def test_at_least_one_token_stays_and_never_more_than_the_budget(name: str, length: int) -> None:
    for keep in (0.01, 0.3, 0.5, 1.0):
        positions = kept(build(name, {"keep": keep}), a_call(length))
        assert positions.shape == (2, GROUPS, count_of(keep, length))
        assert (positions.diff(dim=-1) > 0).all()


@pytest.mark.parametrize("alpha", [0.0, 0.9, 1.0])
@pytest.mark.parametrize("recent", [0.0, 0.5])
def test_the_kept_set_is_the_window_and_the_best_of_the_rest(alpha: float, recent: float) -> None:
    call = a_call(37)
    positions = kept(A2SF(alpha=alpha, recent=recent, sinks=2, keep=0.4), call)
    age = torch.arange(36, -1, -1, dtype=torch.float64)
    scores = column_sums(call, alpha**age)
    budget = count_of(0.4, 37)
    newest = count_of(recent, budget, 0)
    for row in range(2):
        for head in range(GROUPS):
            fixed = {0, 1} | set(range(37 - newest, 37))
            rest = sorted(set(range(37)) - fixed, key=lambda j, s=scores[row, head]: -float(s[j]))
            assert set(positions[row, head].tolist()) == fixed | set(rest[: budget - len(fixed)])


Budget = Callable[[int], tuple[int, int]]
"""From the number of tokens seen: how many stay, and how many of them are the newest."""


def simulate(
    call: AttentionCall, row: int, group: int, alpha: float, budget: Budget
) -> tuple[list[np.ndarray], list[list[int]]]:
    """Token by token on lists from which evicted rows are deleted; outputs of the group's query heads, and the survivors."""
    share = HEADS // GROUPS
    k, v = (x[row, group].double().numpy() for x in (call.k_BGTD, call.v_BGTD))
    q = call.q_BHTD[row, group * share : (group + 1) * share].double().numpy()
    alive: list[int] = []
    score: dict[int, float] = {}
    outs, survivors = [], []
    for now in range(q.shape[1]):
        alive.append(now)
        score[now] = 0.0
        logits = q[:, now] @ k[alive].T * call.softmax.scaling
        p = np.exp(logits - logits.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        outs.append(p @ v[alive])
        for place, weight in zip(alive, p.sum(0), strict=True):
            score[place] = alpha * score[place] + weight
        most, recent = budget(now + 1)
        while len(alive) > most:
            candidates = [j for j in alive if j <= now - recent]
            gone = min(candidates, key=lambda j: (score[j], -j))
            alive.remove(gone)
        survivors.append(list(alive))
    return outs, survivors


@pytest.mark.parametrize("alpha", [0.0, 0.8, 1.0])
@pytest.mark.parametrize("pads", [None, 4])
def test_sequential_eviction_equals_a_simulation_that_deletes_rows(alpha: float, pads: int | None) -> None:
    call = a_call(31)
    method = A2SF(alpha=alpha, keep=0.3, recent=0.34, prompt="sequential")
    out, store = method.prefill(call if pads is None else left_padded(call, pads), None)
    out = out[:, pads or 0 :]
    budget = count_of(0.3, 31)
    assert budget == 9
    for row in range(2):
        for group in range(GROUPS):
            expected, alive = simulate(call, row, group, alpha, lambda seen: (budget, 3))
            found = out[row, :, 2 * group : 2 * group + 2].double().numpy()
            np.testing.assert_allclose(found, np.stack(expected), atol=1e-5)
            segment = store.segments[0]
            live = slice(None) if segment.log_bias_BGN is None else segment.log_bias_BGN[row, group] == 0
            assert segment.positions_BGN[row, group][live].tolist() == alive[-1]


def test_attention_is_normalised_anew_over_survivors() -> None:
    """With all values equal to one, each output is the sum of its weights."""
    call = a_call(25)
    call = replace(call, v_BGTD=torch.ones_like(call.v_BGTD))
    out, _ = A2SF(keep=0.2, prompt="sequential").prefill(call, None)
    torch.testing.assert_close(out, torch.ones_like(out))


@pytest.mark.parametrize("prompt", ["exact", "sequential"])
@pytest.mark.parametrize("alpha", [0.0, 0.7, 1.0])
def test_decoding_evicts_as_a_simulation_from_the_prompts_scores(alpha: float, prompt: str) -> None:
    """Nothing goes in the prompt; behind it the budget is a share of the tokens seen, and the newest are a share of it."""
    whole, length = a_call(34), 20
    method = A2SF(alpha=alpha, keep=1.0, recent=0.25, prompt=prompt)
    _, store = method.prefill(slice_call(whole, 0, length), None)
    tight = replace(method, keep=0.3)

    def budget(seen: int) -> tuple[int, int]:
        most = seen if seen <= length else count_of(0.3, seen)
        return most, count_of(0.25, most, 0)

    simulated = {(r, g): simulate(whole, r, g, alpha, budget) for r in range(2) for g in range(GROUPS)}
    for place in range(length, 34):
        query = token(whole, place)
        append_recent(store, query)
        out = tight.step(query, store, None)
        assert store.recent.tokens == 0
        for (row, group), (outs, survivors) in simulated.items():
            found = out[row, 0, 2 * group : 2 * group + 2].double().numpy()
            np.testing.assert_allclose(found, outs[place], atol=1e-5)
            assert store.segments[0].positions_BGN[row, group].tolist() == survivors[place]


def test_one_token_goes_per_step_when_the_budget_is_fixed() -> None:
    """In the sequential form the budget is that of the whole prompt, so survivors after each token are the simulation's."""
    call = a_call(40)
    method = A2SF(alpha=0.9, keep=0.25, recent=0.5, prompt="sequential")
    _, store = method.prefill(call, None)
    _, alive = simulate(call, 1, 1, 0.9, lambda seen: (10, 5))
    assert store.segments[0].positions_BGN[1, 1].tolist() == alive[-1]


@pytest.mark.parametrize("name", ["a2sf", "h2o", "tova", "streaming-llm"])
def test_rolling_keeps_the_share_and_old_positions(name: str) -> None:
    whole = a_call(44)
    method = build(name, {"keep": 0.4})
    store = method.compress(slice_call(whole, 0, 20), None)
    seen = set(range(20))
    for place in range(20, 44):
        query = token(whole, place)
        append_recent(store, query)
        before = [set(h) for h in store.segments[0].positions_BGN.flatten(0, 1).tolist()]
        method.step(query, store, None)
        seen.add(place)
        after = [set(h) for h in store.segments[0].positions_BGN.flatten(0, 1).tolist()]
        assert all(len(h) == count_of(0.4, place + 1) for h in after)
        assert all(a <= b | {place} for a, b in zip(after, before, strict=True))  # nothing comes back
    k = store.segments[0].k_BGND
    torch.testing.assert_close(k, whole.k_BGTD.gather(2, store.segments[0].positions_BGN[..., None].expand_as(k)))


def test_scores_count_four_bytes_each() -> None:
    call = a_call(20, rows=1)
    rolling, fixed, last = (
        stored_bytes(m.compress(call, None).resident(), 16) for m in (H2O(), H2O(rolling=False), Tova())
    )
    assert fixed == last == 2 * 2 * GROUPS * 10 * 8
    assert rolling == fixed + 4 * GROUPS * 10


def test_h2o_is_a2sf_that_never_forgets() -> None:
    call = a_call(33)
    assert torch.equal(kept(H2O(), call), kept(A2SF(alpha=1.0), call))


def test_tova_keeps_what_the_last_query_attends_to_on_average_over_heads() -> None:
    call = a_call(33)
    mean = probabilities(call)[:, :, -1].mean(1)
    expected = mean.topk(count_of(0.5, 33)).indices.sort(-1).values
    assert torch.equal(kept(Tova(), call), expected[:, None].expand(-1, GROUPS, -1))


def test_streaming_llm_keeps_sinks_and_the_newest() -> None:
    assert kept(StreamingLLM(keep=0.3, sinks=2), a_call(20))[0, 0].tolist() == [0, 1, 16, 17, 18, 19]
    assert kept(StreamingLLM(keep=0.05), a_call(20))[0, 0].tolist() == [19]  # one token: the newest
    assert kept(StreamingLLM(keep=0.2), a_call(20))[0, 0].tolist() == [0, 1, 2, 19]


def test_snapkv_pools_the_votes_of_its_window() -> None:
    call = a_call(30)
    method = SnapKV(window=4, kernel=3, keep=0.4)
    votes = column_sums(call, (torch.arange(30) >= 26).double())[..., :26]
    padded = torch.nn.functional.pad(votes, (1, 1))
    pooled = (padded[..., :-2] + padded[..., 1:-1] + padded[..., 2:]) / 3
    best = pooled.topk(count_of(0.4, 30) - 4).indices
    expected = torch.cat((best, torch.arange(26, 30).expand(2, GROUPS, 4)), dim=-1).sort(-1).values
    assert torch.equal(kept(method, call), expected)


def test_knorm_keeps_small_keys() -> None:
    call = a_call(21)
    expected = call.k_BGTD.norm(dim=-1).topk(count_of(0.5, 21), largest=False).indices.sort(-1).values
    assert torch.equal(kept(Knorm(), call), expected)


@given(name=st.sampled_from(EVICTORS), keep=st.floats(0.01, 1.0), length=st.integers(1, 40), pads=st.integers(1, 5))
@settings(max_examples=60, deadline=None)
def test_padding_changes_no_choice(name: str, keep: float, length: int, pads: int) -> None:
    call = a_call(length)
    method = build(name, {"keep": keep})
    assert torch.equal(kept(method, call), kept(method, left_padded(call, pads)))


def test_rows_of_different_lengths_keep_their_own_shares() -> None:
    call = a_call(20, pads=(0, 8))
    segment = H2O().compress(call, None).segments[0]
    assert (segment.log_bias_BGN == 0).sum(-1)[:, 0].tolist() == [10, 6]
