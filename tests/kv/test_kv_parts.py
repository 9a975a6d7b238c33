"""Shared parts of cache methods: counts, choice, splitting, random numbers, scores."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kv_cases import a_call, column_sums, left_padded, probabilities

from isoflop.methods.base import build
from isoflop.methods.kv_cache.calls import append_recent, attend_joined, slice_call
from isoflop.methods.kv_cache.chance import row_keys, uniform
from isoflop.methods.kv_cache.scores import attention_scores, forgetting, window
from isoflop.methods.kv_cache.select import count_of, protect, select, split
from isoflop.methods.visual_tokens.probe import VisualTokenProbe
from isoflop.models.hooks.attention import AttentionCall
from isoflop.models.segments import attend_segments


@pytest.mark.parametrize(
    ("share", "length", "least", "count"),
    [
        (0.1, 10, 1, 1),
        (0.9, 10, 1, 9),
        (0.5, 5, 1, 3),
        (0.01, 10, 1, 1),
        (0.01, 10, 0, 0),
        (1.0, 7, 1, 7),
        (0.3, 1, 1, 1),
    ],
)
def test_a_share_is_the_nearest_count(share: float, length: int, least: int, count: int) -> None:
    assert count_of(share, length, least) == count


def test_rounding_of_products_loses_no_token() -> None:
    assert all(count_of(kept / length, length) == kept for length in range(1, 200) for kept in range(1, length + 1))


@given(data=st.data(), length=st.integers(1, 12))
@settings(max_examples=60, deadline=None)
def test_selection_equals_a_plain_loop(data: st.DataObject, length: int) -> None:
    levels = st.lists(st.integers(0, 3), min_size=length, max_size=length)  # many ties
    rows = [[data.draw(levels) for _ in range(2)] for _ in range(3)]
    real = [data.draw(st.integers(1, length)) for _ in range(3)]
    counts = [data.draw(st.integers(0, n)) for n in real]
    scores = torch.tensor(rows, dtype=torch.float32)
    candidates = torch.arange(length)[None, None] >= length - torch.tensor(real)[:, None, None]
    best, rest = split(scores, counts, real, candidates)
    for row in range(3):
        places = range(length - real[row], length)
        for head in range(2):
            ranked = sorted(places, key=lambda place, s=rows[row][head]: (-s[place], place))
            assert _chosen(best, row, head) == sorted(ranked[: counts[row]])
            assert _chosen(rest, row, head) == sorted(ranked[counts[row] :])


def _chosen(selection: object, row: int, head: int) -> list[int]:
    index = selection.index_BGM[row, head].tolist()
    empty = [False] * len(index) if selection.empty_BGM is None else selection.empty_BGM[row, head].tolist()
    return [place for place, gap in zip(index, empty, strict=True) if not gap]


def test_protected_tokens_stay_and_the_window_has_its_exact_size() -> None:
    scores = torch.arange(10.0).flip(0).expand(1, 2, 10)  # the newest score least
    positions = torch.arange(10).expand(1, 2, 10)
    kept = select(protect(scores, positions, [10], [1], [3]), [5])
    assert kept.index_BGM[0, 0].tolist() == [0, 1, 7, 8, 9]


def test_random_numbers_belong_to_the_example() -> None:
    call = a_call(20, rows=3)
    drawn = uniform(call, "a")
    assert torch.equal(drawn[1:2], uniform(replace_rows(call, [1]), "a"))
    assert torch.equal(drawn, uniform(left_padded(call, 4), "a")[..., 4:])
    assert not torch.equal(drawn, uniform(call, "b"))
    assert not torch.equal(drawn, uniform(replace(call, layer=1), "a"))
    assert len(set(row_keys(call).tolist())) == 3
    flipped = replace(call, ids_BT=call.ids_BT.flip(1))
    assert not torch.equal(row_keys(call), row_keys(flipped))


def test_random_numbers_follow_example_numbers_where_there_are_some() -> None:
    call = replace(a_call(12, rows=1), examples_B=torch.tensor([7]))
    rows = replace(replace_rows(call, [0, 0]), examples_B=torch.tensor([3, 7]))
    drawn = uniform(rows, "a")
    assert torch.equal(drawn[1:], uniform(call, "a"))
    assert not torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[1:], uniform(replace(call, ids_BT=None), "a"))


@torch.no_grad()
def test_each_image_has_draws_of_its_own() -> None:
    probe, method, kept = VisualTokenProbe(examples=3), build("kv-random", {"keep": 0.25}), []
    compress = type(method).compress

    def note(self: Any, prompt: AttentionCall, prepared: Any) -> Any:
        store = compress(self, prompt, prepared)  # type: ignore[attr-defined]
        kept.append(store.segments[0].positions_BGN)
        return store

    with pytest.MonkeyPatch.context() as patch, method.apply(probe.model, None):
        patch.setattr(type(method), "compress", note)
        probe.outputs([0, 1, 2])
        together = kept[0]
        kept.clear()
        probe.outputs([1])
    assert torch.equal(kept[0][0], together[1])
    assert not torch.equal(together[0], together[1])


def test_random_numbers_are_uniform() -> None:
    numbers = uniform(a_call(2000, rows=4), "a")
    histogram = torch.histc(numbers.float(), 10, 0, 1) / numbers.numel()
    assert (histogram - 0.1).abs().max() < 0.01
    assert abs(float(torch.corrcoef(numbers.flatten(0, 1)).fill_diagonal_(0).abs().max())) < 0.1


def replace_rows(call: object, rows: list[int]) -> object:
    return replace(
        call, q_BHTD=call.q_BHTD[rows], k_BGTD=call.k_BGTD[rows], v_BGTD=call.v_BGTD[rows], ids_BT=call.ids_BT[rows]
    )


@pytest.mark.parametrize("length", [1, 2, 13])
@pytest.mark.parametrize("alpha", [0.0, 0.6, 1.0])
def test_forgetting_scores_equal_the_whole_matrix(length: int, alpha: float) -> None:
    call = a_call(length)
    age = torch.arange(length - 1, -1, -1, dtype=torch.float64)
    torch.testing.assert_close(
        attention_scores(call, forgetting(call, alpha)).double(), column_sums(call, alpha**age), atol=1e-5, rtol=1e-5
    )


def test_window_scores_equal_the_last_rows() -> None:
    call = a_call(13)
    last = (torch.arange(13) >= 9).double()
    torch.testing.assert_close(
        attention_scores(call, window(call, 4)).double(), column_sums(call, last), atol=1e-5, rtol=1e-5
    )
    torch.testing.assert_close(attention_scores(call, window(call, 99)), attention_scores(call, forgetting(call, 1.0)))


@pytest.mark.parametrize("alpha", [0.0, 0.7, 1.0])
def test_padding_neither_scores_nor_is_scored(alpha: float) -> None:
    call = a_call(11)
    padded = left_padded(call, 3)
    scores = attention_scores(padded, forgetting(padded, alpha))
    assert float(scores[..., :3].abs().max()) == 0
    torch.testing.assert_close(scores[..., 3:], attention_scores(call, forgetting(call, alpha)))


def test_the_reference_matrix_is_a_softmax() -> None:
    assert torch.allclose(probabilities(a_call(9)).sum(-1), torch.ones(2, 4, 9, dtype=torch.float64))


@pytest.mark.parametrize("length", [8, 20])
@pytest.mark.parametrize("pads", [None, (0, 3)])
def test_a_cache_in_one_piece_is_read_as_its_segments_are(length: int, pads: tuple[int, ...] | None) -> None:
    """By the fused kernel where nothing is packed or left empty; anything else goes the general way."""
    call = a_call(30 + length, pads=pads)
    store = build("snapkv", {"keep": 0.5, "window": 4}).compress(slice_call(call, 0, 30), None)  # type: ignore[attr-defined]
    rest = slice_call(call, 30, 30 + length)
    append_recent(store, rest)
    found = attend_joined(rest, store)
    expected = attend_segments(rest.q_BHTD, store.all(), rest.softmax, rest.order_BT)[0]
    if pads is not None:
        assert found is None, "rows of two lengths leave entries empty"
        return
    assert found is not None
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert attend_joined(slice_call(rest, 0, 3), store) is None, "too few to be worth a copy"
