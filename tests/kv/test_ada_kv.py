"""Ada-KV: one choice over all heads and a floor, equal to the released codes; heads of unequal lengths, stored and read as they are."""

from __future__ import annotations

import json
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from kv_cases import GROUPS, WIDTH, a_call, column_sums, left_padded, one_row, stepped
from torch import Tensor

from isoflop.kernels.decode_segments import Part, decode_segments
from isoflop.kernels.dispatch import Operation
from isoflop.kernels.softmax import Softmax
from isoflop.methods.kv_cache.ada_kv import AdaKV
from isoflop.methods.kv_cache.base import slice_call
from isoflop.methods.kv_cache.head_budgets import adaptive
from isoflop.methods.kv_cache.pyramidkv import Layers
from isoflop.methods.kv_cache.snapkv import SnapKV
from isoflop.models.hooks.attention import AttentionCall, causal_attention
from isoflop.models.ragged import TILE, RaggedSegment
from isoflop.models.segments import DenseSegment, LayerStore, attend_segments, stored_bytes

NUMBERS = json.loads((Path(__file__).parent / "numbers" / "ada_kv.json").read_text())
"""``official``: what ``AdaptiveSnapKVCluster.update_kv`` of FFY0/AdaKV (commit efe4e2e, adaptive_snapkv/monkeypatch/snapkv_utils.py,
gqa_support, gqa_func mean) keeps of the first row of ``a_call``, with layers of a pyramid; ``kvpress``: what ``AdaKVPress`` of
kvpress 0.5.5 leaves unmasked by ``uneven`` scores."""


def segment_of(store: LayerStore) -> RaggedSegment:
    (segment,) = store.segments
    assert isinstance(segment, RaggedSegment)
    return segment


def kept_by(store: LayerStore) -> list[list[list[int]]]:
    """Positions of each row's heads."""
    segment = segment_of(store)
    pairs = zip(segment.positions_BGN.tolist(), segment.lengths_BG.tolist(), strict=True)
    return [[p[:n] for p, n in zip(*row, strict=True)] for row in pairs]


def uneven(length: int, seed: int) -> Tensor:
    """Scores of three heads, which concentrate more and more."""
    even = torch.rand(2, 3, length, generator=torch.Generator().manual_seed(seed))
    return even ** torch.tensor([1.0, 3.0, 6.0])[:, None]


@pytest.mark.parametrize("case", NUMBERS["official"], ids=lambda case: f"{case['seed']}-{case['layer']}")
def test_each_head_keeps_what_the_released_code_keeps(case: dict[str, Any]) -> None:
    call = replace(one_row(a_call(case["length"], seed=case["seed"]), 0), layer=case["layer"] or 0)
    knobs = {name: case[name] for name in ("window", "kernel", "pooling", "floor")}
    base = "snapkv" if case["layers"] is None else "pyramidkv"
    method = AdaKV(keep=case["mean"] / case["length"], shares="official", base=base, **knobs)
    store = method.compress(call, Layers(range(case["layers"] or 1)))
    assert segment_of(store).lengths_BG.tolist() == [case["lengths"]]
    for scores_T, mine, theirs in zip(method.score(call)[0], kept_by(store)[0], case["kept"], strict=True):
        swapped = (
            sorted({*mine} - {*theirs}),
            sorted({*theirs} - {*mine}),
        )  # only among equals, whose order is free there
        assert len({float(scores_T[place]) for places in swapped for place in places}) <= 1
    assert abs(sum(case["lengths"]) - GROUPS * case["mean"]) > 0 or case["seed"] in (1, 2), "roundings show"


@pytest.mark.parametrize("case", NUMBERS["kvpress"], ids=lambda case: str(case["seed"]))
def test_a_safe_floor_is_that_of_kvpress(case: dict[str, Any]) -> None:
    scores_BGT = uneven(case["length"], case["seed"])
    kept_BGT = adaptive(scores_BGT, [case["mean"]] * 2, case["floor"], "at-least")
    assert [[head.nonzero()[:, 0].tolist() for head in row] for row in kept_BGT] == case["kept"]


def by_hand(scores_GT: Tensor, mean: int, floor: Fraction) -> list[list[int]]:
    """Head by head: the share of one sorted list, whole numbers by largest remainders, and each head's best."""
    heads, tokens = scores_GT.shape
    listed = sorted((-float(scores_GT[g, t]), g, t) for g in range(heads) for t in range(tokens))
    given = [sum(g == head for _, g, _ in listed[: heads * mean]) for head in range(heads)]
    exact = [(1 - floor) * n + floor * mean for n in given]
    whole = [int(x) for x in exact]
    for head in sorted(range(heads), key=lambda g: (whole[g] - exact[g], g))[: heads * mean - sum(whole)]:
        whole[head] += 1
    return [
        sorted([t for _, g, t in listed if g == head][:count]) for head, count in enumerate(whole)
    ]  # the list is sorted


@pytest.mark.parametrize("floor", [0.0, 0.2, 0.25, 0.5, 1.0])
@pytest.mark.parametrize(("length", "mean"), [(40, 11), (23, 23), (31, 1), (57, 30)])
def test_budgets_are_those_worked_out_head_by_head(length: int, mean: int, floor: float) -> None:
    scores_BGT = uneven(length, 5)
    scores_BGT[0, 1, ::3] = scores_BGT[0, 0, ::3]  # equal ones, too
    kept_BGT = adaptive(scores_BGT, [mean, mean], floor, "shared")
    for row in range(2):
        expected = by_hand(scores_BGT[row], mean, Fraction(str(floor)))
        assert [head.nonzero()[:, 0].tolist() for head in kept_BGT[row]] == expected
    assert kept_BGT.sum((1, 2)).tolist() == [3 * mean] * 2


@pytest.mark.parametrize("shares", ["shared", "at-least"])
@pytest.mark.parametrize("keep", [0.02, 0.13, 0.37, 0.5, 0.81, 1.0])
def test_heads_together_keep_the_budget_exactly(keep: float, shares: str) -> None:
    call = a_call(61, pads=(0, 20))
    for floor in (0.0, 0.15, 0.2, 0.7):
        counts = segment_of(AdaKV(keep=keep, window=5, floor=floor, shares=shares).compress(call, None)).lengths_BG
        budget = [max(1, int(keep * n + 0.5)) for n in (61, 41)]
        assert counts.sum(-1).tolist() == [GROUPS * n for n in budget]
        assert bool((counts >= torch.tensor([min(5, n) for n in budget])[:, None]).all())


def test_with_a_floor_of_one_heads_keep_what_snapkv_keeps() -> None:
    call = a_call(60, pads=(0, 9))
    ada = AdaKV(keep=0.4, window=6, floor=1.0, pooling="mean", kernel=5).compress(call, None)
    snap = SnapKV(keep=0.4, window=6, kernel=5).compress(call, None).segments[0]
    assert kept_by(ada)[0] == snap.positions_BGN[0].tolist()
    assert kept_by(ada)[1] == [p[:20] for p in snap.positions_BGN[1].tolist()]


def test_without_a_floor_nothing_dropped_beats_anything_kept() -> None:
    """By scores worked out from the whole attention matrix: sums over the window, the highest of seven neighbours."""
    call = a_call(50, rows=1)
    weights = (torch.arange(50) >= 44).double()
    votes = column_sums(call, weights)[0, :, :44]
    scores = torch.stack([votes[:, max(0, t - 3) : t + 4].amax(-1) for t in range(44)], -1)
    (kept,) = kept_by(AdaKV(keep=0.4, window=6, floor=0.0).compress(call, None))
    stays = torch.tensor([[t in head for t in range(44)] for head in kept])
    assert scores[stays].min() >= scores[~stays].max() - 1e-6
    assert len(kept[0]) != len(kept[1])
    assert all(head[-6:] == list(range(44, 50)) for head in kept)


def test_a_head_that_looks_at_one_place_leaves_its_budget_to_the_others() -> None:
    call = a_call(48, rows=1)
    keys = call.k_BGTD.clone()
    queries = call.q_BHTD.clone()
    queries[:, :2, :, 0], keys[:, 0, :, 0] = 9.0, 0.0
    keys[:, 0, 3, 0] = 9.0  # the first head's queries see nothing but token 3
    call = replace(call, q_BHTD=queries, k_BGTD=keys)
    first, second = segment_of(AdaKV(keep=0.5, window=4, kernel=1).compress(call, None)).lengths_BG[0].tolist()
    assert first + second == 2 * 24
    assert first <= 4 + 0.2 * 20 + 0.8 * 20 / 4
    assert second > 30


# How it is stored and read


def test_bytes_are_those_of_the_lengths() -> None:
    """40 tokens of two rows with two heads each, whoever has them: keys and values of 8 numbers at 2 bytes, and an end per head."""
    store = AdaKV(keep=0.5, window=4).compress(a_call(40), None)
    assert len(set(segment_of(store).lengths_BG.flatten().tolist())) > 1
    assert stored_bytes(store.resident(), 16) == 2 * 40 * 2 * WIDTH * 2 + 4 * 4
    assert segment_of(store).k_RD.shape == (80, WIDTH)


@pytest.mark.parametrize("tiles", [False, True])
@pytest.mark.parametrize("lengths", [[[1, 40], [0, 7]], [[TILE, TILE + 1], [2 * TILE - 1, 3]], [[0, 0], [0, 5]]])
def test_ragged_heads_are_read_as_if_each_were_alone(
    lengths: list[list[int]], tiles: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over what it holds, whichever way it is read; and in the form for readers that know no ragged heads."""
    monkeypatch.setattr(RaggedSegment, "_on_processor", not tiles)
    call = a_call(2 * TILE + 6)
    rng = torch.Generator().manual_seed(1)
    kept_BGT = torch.zeros(2, GROUPS, 2 * TILE, dtype=torch.bool)
    for b in range(2):
        for g in range(GROUPS):
            kept_BGT[b, g, torch.randperm(2 * TILE, generator=rng)[: lengths[b][g]]] = True
    prompt, tail = slice_call(call, 0, 2 * TILE), slice_call(call, 2 * TILE, 2 * TILE + 6)
    positions = prompt.order_BT[:, None].expand(2, GROUPS, -1)
    segment = RaggedSegment.kept(kept_BGT, positions, prompt.k_BGTD, prompt.v_BGTD)
    assert segment.lengths_BG.tolist() == lengths
    recent = DenseSegment(tail.order_BT[:, None].expand(2, GROUPS, -1), None, tail.k_BGTD, tail.v_BGTD)
    found, p_BHTN = attend_segments(tail.q_BHTD, [segment, recent], tail.softmax, tail.order_BT)
    torch.testing.assert_close(p_BHTN.sum(-1), torch.ones(2, 4, 6))
    for b in range(2):
        for h in range(4):
            keys, values = (
                torch.cat((x[b, h // 2, : 2 * TILE][kept_BGT[b, h // 2]], x[b, h // 2, 2 * TILE :]))
                for x in (call.k_BGTD, call.v_BGTD)
            )
            seen = torch.ones(6, len(keys), dtype=torch.bool).tril(len(keys) - 6)
            logits = (tail.q_BHTD[b, h] @ keys.T * WIDTH**-0.5).masked_fill(~seen, float("-inf"))
            torch.testing.assert_close(found[b, :, h], logits.softmax(-1) @ values, atol=1e-5, rtol=1e-5)
    for part in (segment.part(), segment.read_part()):
        last = decode_segments(tail.q_BHTD[:, :, -1:], [part, recent.part()], tail.softmax)[0]
        torch.testing.assert_close(found[:, -1], last[:, :, 0], atol=1e-5, rtol=1e-5)


def test_the_kernel_is_given_ragged_heads_as_they_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    """A decoding step takes it where it runs, and the tiles where it does not; both read the same."""
    call = a_call(41)
    store = AdaKV(keep=0.3, window=4, floor=0.0).compress(slice_call(call, 0, 40), None)
    last = slice_call(call, 40, 41)
    store.recent.append(last.k_BGTD, last.v_BGTD, last.order_BT[:, None].expand(2, GROUPS, -1))
    by_tiles = AdaKV().read(last, store, None)
    kinds: list[str] = []

    def kernel(q_BHTD: Tensor, segments: list[Part], softmax: Softmax) -> tuple[Tensor, Tensor]:
        kinds.extend(type(part).__name__ for part in segments)
        return decode_segments.twin(q_BHTD, segments, softmax)

    monkeypatch.setattr(Operation, "fused", property(lambda _: kernel))
    monkeypatch.setattr(Operation, "fuses", lambda *given: True)
    torch.testing.assert_close(AdaKV().read(last, store, None), by_tiles, atol=1e-5, rtol=1e-5)
    assert kinds == ["RaggedPart", "SegmentPart"]


@pytest.mark.parametrize("cap", [None, 5.0])
def test_what_is_not_there_gets_no_weight_under_a_cap_either(cap: float | None) -> None:
    call = a_call(50, rows=1)
    call = replace(call, softmax=replace(call.softmax, cap=cap))
    store = AdaKV(keep=0.3, window=4, floor=0.0).compress(slice_call(call, 0, 40), None)
    tail = slice_call(call, 40, 50)
    _, p_BHTN = attend_segments(tail.q_BHTD, store.segments, tail.softmax, tail.order_BT)
    here_BHN = (torch.arange(p_BHTN.shape[-1]) < segment_of(store).lengths_BG[..., None]).repeat_interleave(2, dim=1)
    assert not bool(p_BHTN[~here_BHN[:, :, None].expand_as(p_BHTN)].any())
    torch.testing.assert_close(p_BHTN.sum(-1), torch.ones(1, 4, 10))


def outs(method: AdaKV, call: AttentionCall, prompt: int) -> Tensor:
    return stepped(method, call, prompt)[0]


def test_rows_that_are_padded_are_as_if_alone() -> None:
    method = AdaKV(keep=0.4, window=5)
    call = a_call(40, rows=1)
    torch.testing.assert_close(outs(method, left_padded(call, 5), 35), outs(method, call, 30), atol=1e-5, rtol=1e-5)
    mixed = a_call(40, pads=(0, 7))
    alone = outs(method, one_row(mixed, 1, 7), 23)
    torch.testing.assert_close(outs(method, mixed, 30)[1:], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shares", ["shared", "official", "at-least"])
def test_padding_never_stays_whatever_its_score(shares: str) -> None:
    """Smoothing lends padding the scores of the first tokens beside it, and these are often the highest."""
    call = a_call(40, pads=(0, 7))
    assert call.valid_BT is not None
    scores_BGT = torch.arange(40, 0, -1).float().expand(2, GROUPS, 40)
    kept_BGT = AdaKV(window=4, shares=shares).kept(scores_BGT, call, [20, 16])
    assert not bool((kept_BGT & ~call.valid_BT[:, None]).any())
    assert kept_BGT.sum((1, 2)).tolist() == [GROUPS * 20, GROUPS * 16]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_reads_what_full_precision_does(dtype: torch.dtype) -> None:
    call = a_call(40)
    q, k, v = (x.to(dtype) for x in (call.q_BHTD, call.k_BGTD, call.v_BGTD))
    half = replace(call, q_BHTD=q, k_BGTD=k, v_BGTD=v)
    whole = replace(call, q_BHTD=q.float(), k_BGTD=k.float(), v_BGTD=v.float())
    method = AdaKV(keep=0.5, window=4)
    found, expected = outs(method, half, 30), outs(method, whole, 30)
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), expected, atol=0.03, rtol=0.03)


@pytest.mark.parametrize("length", [1, 3, 16])
def test_prompts_shorter_than_the_window_keep_their_newest_tokens(length: int) -> None:
    for keep in (0.3, 1.0):
        count = max(1, int(keep * length + 0.5))
        found = kept_by(AdaKV(keep=keep).compress(a_call(length), None))
        assert found == [[list(range(length - count, length))] * GROUPS] * 2
        padded = kept_by(AdaKV(keep=keep).compress(left_padded(a_call(length), 3), None))
        assert padded == found


def test_a_whole_budget_changes_nothing() -> None:
    call = a_call(40)
    torch.testing.assert_close(outs(AdaKV(keep=1.0), call, 30), causal_attention(call)[:, 30:], atol=1e-5, rtol=1e-5)


def test_one_token_of_every_head_is_safe_in_small_budgets() -> None:
    scores_BGT = torch.stack((torch.arange(9.0), torch.arange(9.0) - 100))[None]
    kept_BGT = adaptive(scores_BGT, [3], 0.2, "at-least")
    assert kept_BGT.sum(-1).tolist() == [[5, 1]]
    assert bool(kept_BGT[0, :, 8].all())
