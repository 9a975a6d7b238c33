"""Units with offsets, and the rules by which they stay."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prompt_cases import DOCUMENTS, is_subsequence, words

from isoflop.methods.prompts.select import above_percentile, at_least_percentile, within_budget
from isoflop.methods.prompts.units import Page, page_of, sentences_of, words_of
from isoflop.models.hooks.prompt_text import Document, token_ids
from isoflop.models.lm import LmModel

texts = st.text(alphabet="ab é'-.,?! \n7", max_size=40)
scores = st.lists(st.tuples(st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0]), st.integers(1, 4)), max_size=25)
rate_pairs = st.tuples(st.floats(0.05, 0.999), st.floats(0.05, 0.999)).map(sorted)


def plain_page(text: str) -> Page:
    units = words_of(text)
    return Page(Document("x", text), tuple(units), np.ones(len(units), dtype=np.int64))


@given(texts)
def test_units_are_ordered_and_cover_every_sign(text: str) -> None:
    for split in (words_of, sentences_of):
        spans = split(text)
        assert all(a < b for a, b in spans)
        assert all(b <= c for (_, b), (c, _) in itertools.pairwise(spans))
        covered = {i for a, b in spans for i in range(a, b)}
        assert all(text[i].isspace() for i in range(len(text)) if i not in covered)


@given(texts)
def test_a_page_with_every_unit_is_the_document_byte_for_byte(text: str) -> None:
    page = plain_page(text)
    assert page.text(np.ones(len(page.units), dtype=bool)) == text


@given(texts, st.integers(0, 2**25))
def test_kept_words_are_a_subsequence_of_the_document(text: str, bits: int) -> None:
    page = plain_page(text)
    keep_U = np.array([bits >> i & 1 == 1 for i in range(len(page.units))], dtype=bool)
    shown = page.text(keep_U)
    assert words(shown) == [word for word, kept in zip(page.words, keep_U, strict=True) if kept]
    assert is_subsequence(words(shown), words(text))
    assert [text[start:end] for _, start, end in page.spans(keep_U)] == words(shown)


def test_neighbours_stand_as_in_the_document() -> None:
    page = plain_page("it rained. we left, soon.\nthen sun.")
    keep_U = np.array([word not in {"we", "then"} for word in page.words])
    assert page.text(keep_U) == "it rained. left, soon. sun."


def test_sentences_end_at_marks_and_lines() -> None:
    text = "one two. three? 3.5 kg!\n\nno mark\n last one."
    assert [text[a:b] for a, b in sentences_of(text)] == ["one two.", "three?", "3.5 kg!", "no mark", "last one."]


def test_units_count_the_readers_tokens(reader: LmModel) -> None:
    for document in DOCUMENTS:
        page = page_of(document, words_of(document.text), reader.tokenizer)
        assert page.tokens_U.sum() == len(token_ids(reader.tokenizer, document.text))
        assert (page.tokens_U == 1).all()


@given(scores, st.floats(0.05, 0.999))
def test_the_percentile_is_that_of_repeated_scores(units: list[tuple[float, int]], rate: float) -> None:
    score_U, tokens_U = np.array([s for s, _ in units]), np.array([t for _, t in units], dtype=np.int64)
    kept_U = above_percentile(score_U, tokens_U, rate)
    assert kept_U.shape == score_U.shape
    if not units:
        return
    repeated = [score for score, tokens in units for _ in range(tokens)]
    threshold = np.percentile(repeated, min(100, int(round(100 * (1 - rate), 9) + 1)))
    expected = [s > threshold or (threshold == 1.0 and s == 1.0) for s in score_U]
    if any(expected):
        assert kept_U.tolist() == expected


@pytest.mark.parametrize(("rate", "share"), [(0.5, 0.49), (0.33, 0.32), (0.2, 0.19)])
def test_with_distinct_scores_about_one_percentile_less_than_the_rate_stays(rate: float, share: float) -> None:
    score_U = np.random.default_rng(0).permutation(10_000) / 10_001
    kept_U = above_percentile(score_U, np.ones(10_000, dtype=np.int64), rate)
    assert kept_U.mean() == pytest.approx(share, abs=0.002)
    assert score_U[kept_U].min() > score_U[~kept_U].max()


def test_equal_scores_exceed_no_percentile_and_the_fallback_keeps_the_first_that_fit() -> None:
    kept_U = above_percentile(np.full(10, 0.3), np.full(10, 2), 0.5)
    assert kept_U.tolist() == [True] * 5 + [False] * 5


def test_whole_percents_do_not_fall_to_the_next_lower_one() -> None:
    """100 * (1 - .8) is 19.999…; the percentile is 21, not 20."""
    score_U = np.arange(101) / 200
    assert above_percentile(score_U, np.ones(101, dtype=np.int64), 0.8).sum() == 101 - 22


@given(scores, rate_pairs)
def test_what_a_smaller_rate_keeps_a_larger_one_keeps(units: list[tuple[float, int]], rates: list[float]) -> None:
    score_U, tokens_U = np.array([s for s, _ in units]), np.array([t for _, t in units], dtype=np.int64)
    for rule in (
        lambda rate: above_percentile(score_U, tokens_U, rate),
        lambda rate: within_budget(score_U, tokens_U, rate * tokens_U.sum()),
        lambda rate: at_least_percentile(score_U, rate),
    ):
        few_U, many_U = (rule(rate) for rate in rates)
        assert not (few_U & ~many_U).any()


@given(scores, st.floats(0.0, 1.0), st.integers(0, 2**25))
def test_a_budget_is_kept_and_forced_units_stay(units: list[tuple[float, int]], rate: float, bits: int) -> None:
    score_U, tokens_U = np.array([s for s, _ in units]), np.array([t for _, t in units], dtype=np.int64)
    forced_U = np.array([bits >> i & 1 == 1 for i in range(len(units))], dtype=bool)
    budget = rate * tokens_U.sum()
    kept_U = within_budget(score_U, tokens_U, budget, forced_U)
    assert (kept_U | ~forced_U).all()
    assert tokens_U[kept_U].sum() <= max(budget + 1e-9, tokens_U[forced_U].sum())
    assert within_budget(score_U, tokens_U, tokens_U.sum(), forced_U).all()
