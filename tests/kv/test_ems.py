"""EMS: two scores of one, classes around kept tokens and the zero class, worked out head by head, and again while decoding."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from kv_cases import GROUPS, WIDTH, a_call, column_sums, left_padded, one_row, stepped, token
from torch import Tensor

from isoflop.methods.kv_cache.base import append_recent, slice_call, whole_prompt
from isoflop.methods.kv_cache.ems import EMS
from isoflop.methods.kv_cache.eviction import Eviction
from isoflop.methods.kv_cache.merging import Merged
from isoflop.methods.kv_cache.select import candidates, lengths
from isoflop.models.hooks.attention import AttentionCall, causal_attention
from isoflop.models.segments import DenseSegment, LayerStore, stored_bytes


def both_scores(call: AttentionCall, window: int) -> tuple[Tensor, Tensor]:
    """Sums over all queries and over each row's last ones, from the whole attention matrix."""
    length = call.k_BGTD.shape[2]
    ones = torch.ones(length)
    return column_sums(call, ones), column_sums(call, ones * (torch.arange(length) >= length - window))


def classes(method: EMS, call: AttentionCall, scores_BGT: Tensor | None = None) -> Merged:
    scores_BGT = method.score(call) if scores_BGT is None else scores_BGT
    return method.merge_tokens(whole_prompt(call), scores_BGT, lengths(call), lengths(call), candidates(call))


def segment_of(store: LayerStore) -> DenseSegment:
    (segment,) = store.segments
    assert isinstance(segment, DenseSegment)
    return segment


# Scores


@pytest.mark.parametrize("pads", [None, (0, 11)])
def test_scores_are_the_larger_of_two_sums_with_one_mean(pads: tuple[int, ...] | None) -> None:
    """Means over real tokens, not over columns."""
    call = a_call(40, pads=pads)
    glo, loc = both_scores(call, 6)
    for row in range(2):
        real = slice(0 if pads is None else pads[row], None)
        for head in range(GROUPS):
            g, t = glo[row, head, real], loc[row, head, real]
            expected = torch.maximum(g * t.mean() / g.mean(), t)
            found = EMS(window=6).score(call)[row, head, real].double()
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    for which, sums in (("global", glo), ("local", loc)):
        found = EMS(window=6, score_by=which).score(call).double()
        torch.testing.assert_close(found, sums, atol=1e-5, rtol=1e-5)


def test_scaling_the_global_score_changes_nothing() -> None:
    glo, loc = (x.float() for x in both_scores(a_call(40), 6))
    method = EMS()
    plain, scaled = method.combined(glo, loc, None), method.combined(glo * 37.0, loc, None)
    torch.testing.assert_close(plain, scaled)
    assert torch.equal(plain.argsort(-1), scaled.argsort(-1))
    assert not torch.equal(plain.argsort(-1), loc.argsort(-1)), "it is not the local score alone"


# Classes


def by_hand(
    method: EMS, call: AttentionCall, row: int, head: int, start: int, scores_BGT: Tensor | None = None
) -> dict[str, Any]:
    """One head, token by token, with lists of what merges."""
    k, v = (x[row, head, start:].double() for x in (call.k_BGTD, call.v_BGTD))
    s = (method.score(call) if scores_BGT is None else scores_BGT)[row, head, start:].double()
    length = len(s)
    budget = max(1, int(method.keep * length + 0.5))
    recent = list(range(length - min(method.window, budget), length))
    ranked = sorted((t for t in range(length) if t not in recent), key=lambda t: (-float(s[t]), t))
    best = budget - len(recent)
    centres = sorted(recent + ranked[:best])
    members: dict[int, list[int]] = {c: [c] for c in centres}
    lost, gone = [], []
    for place, t in enumerate(ranked[best:]):
        if place >= int(method.candidates * budget + 0.5):
            gone.append(t)
            continue
        cosine, nearest = max((float(k[t] @ k[c] / k[t].norm() / k[c].norm()), c) for c in centres)
        if cosine > method.tau:
            members[nearest].append(t)
        else:
            lost.append(t)
    keys, values = [], []
    for c in centres:
        weight = s[members[c]][:, None]
        direction = (weight * k[members[c]] / k[members[c]].norm(dim=-1, keepdim=True)).sum(0)
        keys.append(
            k[c] if len(members[c]) == 1 or not method.merge_keys else direction / direction.norm() * k[c].norm()
        )
        values.append((weight * v[members[c]]).sum(0) / weight.sum())
    return {
        "centres": centres, "k": torch.stack(keys), "v": torch.stack(values), "gone": gone, "lost": s[lost].sum(),
        "mass": torch.stack([s[members[c]].sum() for c in centres]), "number": [len(members[c]) for c in centres],
    }  # fmt: skip


@pytest.mark.parametrize(
    "knobs",
    [{}, {"tau": 0.3}, {"tau": 0.0, "candidates": 0.5}, {"candidates": 1000.0}, {"merge_keys": False}, {"keep": 0.1}],
)
@pytest.mark.parametrize("pads", [None, (0, 13)])
def test_heads_at_once_are_heads_one_by_one(knobs: dict[str, Any], pads: tuple[int, ...] | None) -> None:
    method, call = EMS(**{"keep": 0.4, "window": 6, "count_bias": True, **knobs}), a_call(50, pads=pads)
    found = classes(method, call)
    numbers = []
    for row in range(2):
        for head in range(GROUPS):
            start = 0 if pads is None else pads[row]
            expected = by_hand(method, call, row, head, start)
            count = len(expected["centres"])
            assert found.segment.positions_BGN[row, head, :count].tolist() == expected["centres"]
            for name in ("k", "v"):
                tensor = getattr(found.segment, f"{name}_BGND")[row, head, :count].double()
                torch.testing.assert_close(tensor, expected[name], atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(
                found.mass_BGM[row, head, :count].double(), expected["mass"], atol=1e-5, rtol=1e-5
            )
            torch.testing.assert_close(found.lost_BG[row, head].double(), expected["lost"], atol=1e-5, rtol=1e-5)
            bias_BGN = found.segment.log_bias_BGN
            assert bias_BGN is not None
            assert bias_BGN[row, head].exp().round().tolist()[:count] == expected["number"]
            assert not bool(bias_BGN[row, head, count:].exp().any())
            numbers += expected["number"]
    assert max(numbers) > 1


def test_a_budget_of_all_tokens_changes_nothing() -> None:
    call = a_call(40)
    store = EMS(keep=1.0).compress(call, None)
    assert torch.equal(segment_of(store).k_BGND, call.k_BGTD)
    assert torch.equal(segment_of(store).v_BGND, call.v_BGTD)
    outs, _ = stepped(EMS(keep=1.0, window=3), call, 20)
    torch.testing.assert_close(outs, causal_attention(call)[:, 20:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("knobs", [{"tau": 1.0}, {"candidates": 0.0}])
def test_without_merging_it_is_plain_eviction(knobs: dict[str, Any]) -> None:
    """To the bit."""
    call = a_call(50, pads=(0, 7))
    method = EMS(keep=0.3, window=5, rolling=False, **knobs)
    found, expected = segment_of(method.compress(call, None)), segment_of(Eviction.compress(method, call, None))
    for name in ("positions_BGN", "k_BGND", "v_BGND", "log_bias_BGN"):
        assert torch.equal(getattr(found, name), getattr(expected, name))


def test_duplicates_merge_into_what_they_are() -> None:
    """Every token stands twice: half of them stay, and each keeps its key and its value."""
    call = a_call(20)
    twice = replace(
        call, q_BHTD=call.q_BHTD.repeat(1, 1, 2, 1), k_BGTD=call.k_BGTD.repeat(1, 1, 2, 1),
        v_BGTD=call.v_BGTD.repeat(1, 1, 2, 1), order_BT=torch.arange(40)[None], ids_BT=None,
    )  # fmt: skip
    scores_BGT = torch.rand(2, GROUPS, 20, generator=torch.Generator().manual_seed(0)).repeat(1, 1, 2) + 0.1
    found = classes(EMS(keep=0.5, window=20, tau=0.999), twice, scores_BGT)
    torch.testing.assert_close(found.segment.k_BGND, call.k_BGTD)
    torch.testing.assert_close(found.segment.v_BGND, call.v_BGTD)
    torch.testing.assert_close(found.mass_BGM, 2 * scores_BGT[..., :20])
    assert not bool(found.lost_BG.any())


@pytest.mark.parametrize("tau", [0.0, 0.4, 0.8])
def test_no_score_is_lost_but_to_the_zero_class(tau: float) -> None:
    call = a_call(50, pads=(0, 9))
    method = EMS(keep=0.3, window=5, tau=tau, candidates=1000.0)
    found, scores_BGT = classes(method, call), method.score(call)
    live_BGM = torch.ones_like(found.mass_BGM, dtype=torch.bool)
    if found.segment.log_bias_BGN is not None:
        live_BGM = found.segment.log_bias_BGN == 0
    total_BG = (found.mass_BGM * live_BGM).sum(-1) + found.lost_BG
    torch.testing.assert_close(total_BG, (scores_BGT * call.valid_BT[:, None]).sum(-1))  # type: ignore[index]


def test_a_key_at_the_threshold_does_not_merge_and_classes_without_scores_stay() -> None:
    call = a_call(6, rows=1)
    k_BGTD = torch.zeros_like(call.k_BGTD)
    k_BGTD[..., 0] = 2.0
    k_BGTD[:, :, 0, 1] = 2.0  # at 45 degrees to the others
    call = replace(call, k_BGTD=k_BGTD)
    scores_BGT = torch.zeros(1, GROUPS, 6)
    kept = classes(EMS(keep=0.5, window=3, tau=0.0), call, scores_BGT).segment
    assert torch.equal(kept.v_BGND, call.v_BGTD[:, :, 3:])
    for tau, joins in ((0.70, True), (2**-0.5 + 1e-6, False)):
        found = classes(EMS(keep=0.5, window=3, tau=tau), call, scores_BGT + torch.tensor([1.0] + [0.0] * 5))
        assert bool(found.lost_BG.any()) != joins
    alike = replace(call, k_BGTD=k_BGTD[:, :, 1:2].expand_as(k_BGTD).contiguous())  # of cosine 1
    assert classes(EMS(keep=0.5, window=3, tau=1.0), alike, scores_BGT + 1).lost_BG.tolist() == [[3.0] * GROUPS]


def test_padding_is_no_candidate_either() -> None:
    """Where nothing has a score, all are equal, and padding comes first."""
    call = a_call(30, pads=(0, 12))
    method = EMS(keep=0.5, window=2, tau=0.0, count_bias=True)
    nothing_BGT = torch.zeros(2, GROUPS, 30)
    bias_BGN = classes(method, call, nothing_BGT).segment.log_bias_BGN
    expected = [
        sum(by_hand(method, call, row, head, start, nothing_BGT)["number"])
        for row, start in ((0, 0), (1, 12))
        for head in range(GROUPS)
    ]
    assert bias_BGN is not None
    assert bias_BGN.exp().sum(-1).round().flatten().tolist() == expected


# While decoding


def test_classes_merge_again_when_the_window_is_full() -> None:
    """Scores carried on: those of the classes, and what all queries since have given; the budget grows with what was seen."""
    call, method = a_call(46), EMS(keep=0.4, window=6)
    outs, store = stepped(method, call, 40)
    first = method.prefill(slice_call(call, 0, 40), None)[1]
    before = segment_of(first)
    new = whole_prompt(slice_call(call, 40, 46))
    pairs = [(getattr(before, name), getattr(new, name)) for name in ("positions_BGN", "k_BGND", "v_BGND")]
    positions_BGN, *tensors = (torch.cat(pair, 2) for pair in pairs)
    held = DenseSegment(positions_BGN, None, *tensors)
    k, v = (x.repeat_interleave(2, dim=1).double() for x in (held.k_BGND, held.v_BGND))
    seen = held.positions_BGN[:, :1, None] <= call.order_BT[:, None, 40:, None]
    logits = (call.q_BHTD[:, :, 40:].double() @ k.transpose(-1, -2) * WIDTH**-0.5).masked_fill(~seen, float("-inf"))
    torch.testing.assert_close(outs.double(), (logits.softmax(-1) @ v).transpose(1, 2), atol=1e-5, rtol=1e-5)
    local = logits.softmax(-1).unflatten(1, (GROUPS, 2)).sum((2, 3)).float()
    carried = torch.nn.functional.pad(first.state["scores"][0], (0, 6)) + local
    expected = method.merge_tokens(held, method.combined(carried, local, None), [46, 46], [22, 22], None)
    torch.testing.assert_close(segment_of(store).v_BGND, expected.segment.v_BGND, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(segment_of(store).k_BGND, expected.segment.k_BGND, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(store.state["scores"][0], expected.mass_BGM, atol=1e-5, rtol=1e-5)
    assert segment_of(store).tokens == 18  # of 46
    assert store.recent.tokens == 0


def test_several_tokens_at_once_are_one_after_the_other() -> None:
    call, method = a_call(60, pads=(0, 5)), EMS(keep=0.4, window=8)
    singly, one = stepped(method, call, 40)
    _, store = method.prefill(slice_call(call, 0, 40), None)
    outs, start = [], 40
    while start < 60:
        piece = slice_call(call, start, min(60, start + (method.stride(store) or 0)))
        append_recent(store, piece)
        outs.append(method.step(piece, store, None))
        start += piece.q_BHTD.shape[2]
    assert len(outs) == 3
    torch.testing.assert_close(torch.cat(outs, 1), singly, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(segment_of(store).v_BGND, segment_of(one).v_BGND, atol=1e-5, rtol=1e-5)


def test_bytes_are_those_of_the_formula() -> None:
    """20 of 40 tokens at 2 bytes a number, and a score of 4; while decoding two scores of all that is held."""
    method = EMS(window=8)
    _, store = method.prefill(a_call(40), None)
    assert stored_bytes(store.resident(), 16) == 2 * GROUPS * 20 * (2 * WIDTH * 2 + 4)
    call = a_call(43)
    _, store = method.prefill(slice_call(call, 0, 40), None)
    for place in range(40, 43):
        append_recent(store, token(call, place))
        method.step(token(call, place), store, None)
    assert stored_bytes(store.resident(), 16) == 2 * GROUPS * (20 * 2 * WIDTH * 2 + 23 * 2 * 4)
    plain = EMS(window=8, rolling=False).compress(a_call(40), None)
    assert stored_bytes(plain.resident(), 16) == 2 * GROUPS * 20 * 2 * WIDTH * 2


def test_rows_that_are_padded_are_as_if_alone() -> None:
    method = EMS(keep=0.4, window=5)
    call = a_call(40, rows=1)
    padded, alone = (stepped(method, c, n)[0] for c, n in ((left_padded(call, 5), 31), (call, 26)))
    torch.testing.assert_close(padded, alone, atol=1e-5, rtol=1e-5)
    mixed = a_call(40, pads=(0, 7))
    both, one = stepped(method, mixed, 30)[0], stepped(method, one_row(mixed, 1, 7), 23)[0]
    torch.testing.assert_close(both[1:], one, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_masses_are_summed_in_full_precision(dtype: torch.dtype) -> None:
    call = a_call(60)
    half = replace(call, q_BHTD=call.q_BHTD.to(dtype), k_BGTD=call.k_BGTD.to(dtype), v_BGTD=call.v_BGTD.to(dtype))
    whole = replace(half, q_BHTD=half.q_BHTD.float(), k_BGTD=half.k_BGTD.float(), v_BGTD=half.v_BGTD.float())
    method = EMS(keep=0.2, window=5, tau=0.2, candidates=1000.0)
    found, expected = classes(method, half), classes(method, whole)
    assert found.segment.v_BGND.dtype == dtype
    torch.testing.assert_close(found.mass_BGM, expected.mass_BGM, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.segment.v_BGND.float(), expected.segment.v_BGND, atol=0.02, rtol=0.02)
    outs, exact = stepped(method, half, 45)[0], stepped(method, whole, 45)[0]
    assert (outs.float() - exact).abs().median() < 0.01


@pytest.mark.parametrize("length", [1, 3, 16])
def test_prompts_shorter_than_the_window_work(length: int) -> None:
    for keep in (0.3, 1.0):
        outs, store = stepped(EMS(keep=keep), a_call(length + 20), length)
        assert torch.isfinite(outs).all()
        assert segment_of(store).tokens == max(1, int(keep * (length + 16) + 0.5))
