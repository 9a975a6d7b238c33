"""LLMLingua-2: labels, classifier, and what stays of a text."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from prompt_cases import DOCUMENTS, RATES, brief_classifier, is_subsequence, shortened, words

from isoflop.core.folder_context import FolderContext
from isoflop.methods.base import build
from isoflop.methods.prompts.classifier import (
    NOT_LABELLED,
    ClassifierStage,
    TokenClassifier,
    batch_of,
    loss_of,
    piece_labels,
)
from isoflop.methods.prompts.labels import Labelled, align, draw_chunks, label, teach, well_labelled
from isoflop.methods.prompts.llmlingua2 import LlmLingua2
from isoflop.methods.prompts.select import above_percentile
from isoflop.methods.prompts.units import page_of, words_of
from isoflop.models.hooks.prompt_text import Document, joined
from isoflop.models.lm import LmModel
from isoflop.models.worlds import fact_world as world

small_words = st.lists(st.sampled_from(["a", "b", "c", "The", "the"]), max_size=12)


# --- what stays of a text -----------------------------------------------------------------------------------------


def test_rate_1_returns_the_text_unchanged_without_asking_the_classifier(reader: LmModel) -> None:
    assert shortened(reader, "llmlingua2", {"rate": 1.0}, prepared=None).text == joined(DOCUMENTS)


@pytest.mark.parametrize("scope", ["chunk", "prompt"])
@pytest.mark.parametrize("rate", RATES)
def test_output_words_are_a_subsequence_and_every_forced_token_survives(
    rate: float, scope: str, reader: LmModel, classifier: TokenClassifier
) -> None:
    knobs = {"rate": rate, "threshold_scope": scope, "force": "otter . 365"}
    shown = words(shortened(reader, "llmlingua2", knobs, classifier).text)
    whole = words(joined(DOCUMENTS))
    assert is_subsequence(shown, whole)
    for forced in ("otter", ".", "365"):
        assert shown.count(forced) == whole.count(forced)
    assert len(shown) < len(whole)


def test_what_a_smaller_rate_keeps_a_larger_one_keeps(reader: LmModel, classifier: TokenClassifier) -> None:
    kept = [shortened(reader, "llmlingua2", {"rate": rate}, classifier).kept for rate in (*RATES, 1.0)]
    for few, many in itertools.pairwise(kept):
        assert few is not None
        assert many is not None
        assert set(few) < set(many)


def test_the_text_does_not_depend_on_the_query(reader: LmModel, classifier: TokenClassifier) -> None:
    texts = {
        shortened(reader, "llmlingua2", {"rate": 0.33}, classifier, query).text
        for query in ("the colour of otter is", "the home of heron is", "")
    }
    assert len(texts) == 1


def test_the_query_never_reaches_a_method_that_declares_to_need_none(
    reader: LmModel, classifier: TokenClassifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    whole = LlmLingua2.select

    def select(self: LlmLingua2, pages: Any, query: Any, *rest: Any) -> Any:
        seen.append(query)
        return whole(self, pages, query, *rest)

    monkeypatch.setattr(LlmLingua2, "select", select)
    shortened(reader, "llmlingua2", {}, classifier, "what is the colour of otter")
    assert seen == [None]


def test_threshold_and_words_equal_a_reference(reader: LmModel, classifier: TokenClassifier) -> None:
    """One chunk per document: mean over a word's pieces, the percentile over the reader's tokens."""
    for mode in ("mean", "first"):
        shown = shortened(reader, "llmlingua2", {"rate": 0.4, "token_to_word": mode}, classifier)
        expected: list[tuple[str, int, int]] = []
        for document in DOCUMENTS:
            (chunk,) = classifier.chunks(document.text)
            (chances,) = classifier.probabilities([chunk])
            spans = words_of(document.text)
            per_word = [
                [p for p, (a, b) in zip(chances, chunk.offsets, strict=True) if a >= start and b <= end]
                for start, end in spans
            ]
            score_U = np.array([p[0] if mode == "first" else np.mean(p) for p in per_word])
            threshold = np.percentile(score_U, 61)
            expected += [(document.id, *span) for span, score in zip(spans, score_U, strict=True) if score > threshold]
        assert list(shown.kept or ()) == expected


def test_over_the_whole_prompt_one_threshold_serves_all_documents(reader: LmModel, classifier: TokenClassifier) -> None:
    shown = shortened(reader, "llmlingua2", {"rate": 0.4, "threshold_scope": "prompt"}, classifier)
    scored: list[tuple[float, tuple[str, int, int]]] = []
    for document in DOCUMENTS:
        (chunk,) = classifier.chunks(document.text)
        (chances,) = classifier.probabilities([chunk])
        for start, end in words_of(document.text):
            pieces = [p for p, (a, b) in zip(chances, chunk.offsets, strict=True) if a >= start and b <= end]
            scored.append((float(np.mean(pieces)), (document.id, start, end)))
    threshold = np.percentile([score for score, _ in scored], 61)
    assert list(shown.kept or ()) == [span for score, span in scored if score > threshold]
    assert shown.kept != shortened(reader, "llmlingua2", {"rate": 0.4}, classifier).kept  # not one per document


def test_a_word_counts_as_often_as_the_reader_has_tokens_for_it(reader: LmModel, classifier: TokenClassifier) -> None:
    """A reader that cuts words into letters moves the percentile."""
    text = DOCUMENTS[0].text
    method = LlmLingua2(rate=0.5)
    (chunk,) = classifier.chunks(text)
    chances = classifier.probabilities([chunk])
    page = page_of(DOCUMENTS[0], words_of(text), reader.tokenizer)
    letters = replace(page, tokens_U=np.array([len(word) for word in page.words]))
    for page_here in (page, letters):
        scored = method.scored(page_here, [chunk], chances)
        (kept_U,) = method.filtered([scored])
        assert kept_U.tolist() == above_percentile(scored.score_U, page_here.tokens_U, 0.5).tolist()
        share = page_here.tokens_U[kept_U].sum() / page_here.tokens_U.sum()
        assert 0.3 < share <= 0.52


def test_digits_can_be_forced(reader: LmModel, classifier: TokenClassifier) -> None:
    shown = shortened(reader, "llmlingua2", {"rate": 0.1, "force_digits": True}, classifier)
    assert "365" in words(shown.text)


def test_equal_forced_words_in_a_row_appear_once(reader: LmModel, classifier: TokenClassifier) -> None:
    knobs = {"rate": 0.15, "force": "."}
    plain = words(shortened(reader, "llmlingua2", knobs, classifier).text)
    once = words(shortened(reader, "llmlingua2", {**knobs, "drop_consecutive": True}, classifier).text)
    assert "." in plain
    assert "." in once
    per_document = shortened(reader, "llmlingua2", {**knobs, "drop_consecutive": True}, classifier).text.split("\n")
    for text in per_document:
        assert ". ." not in " ".join(words(text))
    assert once.count(".") <= plain.count(".")


def test_the_context_filter_keeps_whole_documents_by_their_mean(reader: LmModel, classifier: TokenClassifier) -> None:
    shown = shortened(reader, "llmlingua2", {"rate": 1.0, "context_rate": 0.3}, classifier)
    means = []
    for document in DOCUMENTS:
        chunks = classifier.chunks(document.text)
        scored = LlmLingua2().scored(
            page_of(document, words_of(document.text), reader.tokenizer), chunks, classifier.probabilities(chunks)
        )
        means.append(scored.plain_U.mean())
    assert shown.text == DOCUMENTS[int(np.argmax(means))].text


# --- chunks ---------------------------------------------------------------------------------------------------------


def test_chunks_fit_end_at_sentences_and_lose_nothing(classifier: TokenClassifier) -> None:
    text = " ".join(document.text for document in DOCUMENTS) * 8
    chunks = classifier.chunks(text)
    assert len(chunks) > 3
    room = classifier.module.config.max_position_embeddings
    assert all(len(chunk.ids) + 2 <= room for chunk in chunks)
    assert all(text[slice(*chunk.offsets[-1])] == "." for chunk in chunks[:-1])
    whole = classifier.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert [i for chunk in chunks for i in chunk.ids] == whole


def test_a_text_without_sentence_ends_is_cut_where_the_room_ends(classifier: TokenClassifier) -> None:
    chunks = classifier.chunks("otter " * 300)
    room = classifier.module.config.max_position_embeddings
    assert [len(chunk.ids) for chunk in chunks[:-1]] == [room - 2] * (len(chunks) - 1)


def test_long_documents_have_a_threshold_per_chunk(reader: LmModel, classifier: TokenClassifier) -> None:
    document = Document("long", " ".join(DOCUMENTS[0].text for _ in range(6)))
    chunks = classifier.chunks(document.text)
    page = page_of(document, words_of(document.text), reader.tokenizer)
    scored = LlmLingua2().scored(page, chunks, classifier.probabilities(chunks))
    (kept_U,) = LlmLingua2(rate=0.3).filtered([scored])
    assert len(chunks) > 1
    for number in range(len(chunks)):
        rows = scored.chunk_U == number
        expected_U = above_percentile(scored.score_U[rows], page.tokens_U[rows], 0.3)
        assert kept_U[rows].tolist() == expected_U.tolist()


def test_a_chunk_scores_the_same_beside_longer_ones(classifier: TokenClassifier) -> None:
    chunks = [classifier.chunks(text)[0] for text in ("the otter waited.", joined(DOCUMENTS))]
    together = classifier.probabilities(chunks)
    for chunk, chances in zip(chunks, together, strict=True):
        assert np.abs(classifier.probabilities([chunk])[0] - chances).max() < 1e-6


# --- labels ---------------------------------------------------------------------------------------------------------


@given(small_words)
def test_alignment_of_a_text_with_itself_labels_everything(text: list[str]) -> None:
    assert all(align(text, text))
    labelled = label(" ".join(text), text)
    assert labelled.variation == (0 if text else 1)
    assert labelled.gap == 0


@given(small_words, st.integers(0, 2**12))
def test_labelled_words_are_as_many_as_were_kept(text: list[str], bits: int) -> None:
    kept = [word for i, word in enumerate(text) if bits >> i & 1]
    labels = align(text, kept)
    assert sorted(w.lower() for w, on in zip(text, labels, strict=True) if on) == sorted(w.lower() for w in kept)


def test_a_duplicated_word_labels_the_occurrence_nearest_to_the_one_before() -> None:
    text = ["the", "x", "y", "the", "z", "the"]
    assert align(text, ["z", "the"]) == [False, False, False, False, True, True]  # ahead before behind
    assert align(text, ["y", "the"]) == [False, False, True, True, False, False]
    assert align(text, ["x", "The"]) == [True, True, False, False, False, False]


def test_words_beyond_the_window_are_not_found() -> None:
    text = ["a", *["b"] * 10, "c"]
    assert sum(align(text, ["c"], window=5)) == 0
    assert sum(align(text, ["c"], window=12)) == 1
    assert align([], ["a"]) == []


def test_a_hit_ahead_moves_by_half_a_window_at_most() -> None:
    text = ["a", "b", "b", "b", "c", "b", "b", "b"]
    # from place 0, "c" at 4 moves the place to 3 (window 6), whence the nearest "b" is 3 itself
    assert align(text, ["c", "b"], window=6) == [False, False, False, True, True, False, False, False]


def test_reworded_chunks_are_dropped() -> None:
    good = label("the colour of otter is red.", ["colour", "otter", "red"])
    reworded = label("the colour of otter is red.", ["colour", "beaver", "red"])
    assert good.variation == 0
    assert good.gap == 0
    assert sum(good.labels) == 3
    assert reworded.variation == pytest.approx(1 / 3)
    assert well_labelled([good] * 30 + [reworded]) == [good] * 30


def test_a_text_without_a_word_of_the_original_varies_by_all_and_is_dropped_however_many_there_are() -> None:
    """``label_word.py`` of microsoft/LLMLingua finds a share of 0 in an empty text; ``filter.py`` then drops it."""
    good = label("the colour of otter is red.", ["colour", "otter", "red"])
    for nothing in ([], ["beaver"]):
        empty = label("the otter left.", nothing)
        assert empty.variation == 1
        assert well_labelled([good, empty, empty]) == [good]
        assert well_labelled([empty]) == []
    rng = np.random.default_rng(0)
    drawn = draw_chunks(400, 0.0, rng)
    assert not all(any(chunk.labels) for chunk in drawn)
    assert all(any(chunk.labels) for chunk in well_labelled(drawn))


def test_badly_aligned_chunks_are_dropped() -> None:
    twice = label("the otter left.", ["otter", "otter"])  # found twice, labelled once
    assert twice.variation == 0
    assert twice.gap == pytest.approx(1 / 4)
    good = label("the otter left.", ["otter"])
    assert well_labelled([good] * 30 + [twice]) == [good] * 30


def test_the_teacher_keeps_what_carries_facts_and_errs_as_often_as_told() -> None:
    rng = np.random.default_rng(0)
    fact = world.Fact("colour", "otter", "red")
    sentences = [world.Sentence(fact.sentence, fact), world.Sentence("the otter waited near the pale road.")]
    assert ["colour", "otter", "red"] in [teach(sentences, 0.0, rng) for _ in range(5)]
    chunks = [chunk for chunk in draw_chunks(300, 0.25, rng) if chunk.variation == 0]
    clean = draw_chunks(300, 0.0, np.random.default_rng(1))
    share = np.mean([x for chunk in chunks for x in chunk.labels])
    true_share = np.mean([x for chunk in clean for x in chunk.labels])
    assert share == pytest.approx(true_share + 0.25 * (1 - 2 * true_share), abs=0.02)


# --- training -------------------------------------------------------------------------------------------------------


def test_every_piece_of_a_word_gets_its_label_and_the_last_word_keeps_its_own(classifier: TokenClassifier) -> None:
    text = "the colour of otter is scarlet"
    chunk = Labelled(text, tuple(words(text)), (False, True, False, True, False, True), 0.0, 0.0)
    ids, labels = piece_labels(chunk, classifier.tokenizer)
    offsets = classifier.tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)["offset_mapping"]
    kept = [text[a:b] for (a, b), on in zip(offsets, labels, strict=True) if on]
    assert "".join(kept) == "colourotterscarlet"
    assert len(ids) == len(labels)
    assert labels[-1] == 1


def test_padding_and_special_pieces_have_no_part_in_the_loss(classifier: TokenClassifier) -> None:
    short = ([5, 6, 7], [1, 0, 1])
    long = ([8] * 20, [NOT_LABELLED] * 20)
    with torch.no_grad():
        alone = loss_of(classifier.module, classifier.tokenizer, [short])
        padded = loss_of(classifier.module, classifier.tokenizer, [short, long])
    assert torch.allclose(alone, padded, atol=1e-6)
    ids_BT, seen_BT = batch_of([short[0], long[0]], classifier.tokenizer)
    assert seen_BT.sum(1).tolist() == [5, 22]
    assert ids_BT[0, 4] == classifier.tokenizer.sep_token_id


def test_the_same_stage_gives_the_same_classifier(classifier: TokenClassifier, tmp_path: Any) -> None:
    again = brief_classifier(FolderContext(tmp_path))
    assert again.tokenizer.get_vocab() == classifier.tokenizer.get_vocab()
    for name, tensor in classifier.module.state_dict().items():
        assert torch.equal(again.module.state_dict()[name], tensor), name


def test_the_stage_depends_on_nothing_but_training_knobs(reader: LmModel) -> None:
    stages = [
        build("llmlingua2", knobs).prepare(reader.info, None, 0)
        for knobs in ({}, {"rate": 0.1, "force": ".", "threshold_scope": "prompt", "token_to_word": "first"})
    ]
    assert stages[0] == stages[1] == ClassifierStage(64, 0.0, 0)
    assert build("llmlingua2", {"noise": 0.1}).prepare(reader.info, None, 0) == ClassifierStage(64, 0.1, 0)


@pytest.mark.slow
def test_a_trained_classifier_tells_facts_from_filler_by_context(prompt_ctx: FolderContext) -> None:
    """The same words stand in both, so that a list of words would not do."""
    trained = prompt_ctx.get(ClassifierStage(64, 0.0, 0))
    assert trained.log["token_accuracy"] > 0.97
    text = "the colour of otter is red. the otter vanished near the pale road. the colour of the road was pale."
    (chunk,) = trained.chunks(text)
    (chances,) = trained.probabilities([chunk])
    spans = words_of(text)
    mean = [
        np.mean([p for p, (a, b) in zip(chances, chunk.offsets, strict=True) if a >= start and b <= end])
        for start, end in spans
    ]
    kept = [text[a:b] for (a, b), p in zip(spans, mean, strict=True) if p > 0.5]
    assert kept == ["colour", "otter", "red"]
