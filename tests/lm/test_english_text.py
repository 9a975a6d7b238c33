"""The English corpus and its tokens: honest splits, lossless tokenizer, bytes that add up."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from isoflop.core.folder_context import FolderContext
from isoflop.models.lm import LmModel
from isoflop.models.worlds.english import EnglishStage, split_of
from isoflop.models.worlds.lm_text import EnglishText, Tokens, TokensStage, byte_ends


def test_no_paragraph_is_in_both_splits(lm_ctx: FolderContext) -> None:
    documents = lm_ctx.get(EnglishStage.here())
    paragraphs = {split: {p for text in documents[split].values() for p in text.split("\n\n")} for split in documents}
    assert not paragraphs["train"] & paragraphs["test"]
    assert all(split_of(name) == split for split in documents for name in documents[split])


def test_the_corpus_is_large_enough(lm_ctx: FolderContext) -> None:
    documents = lm_ctx.get(EnglishStage.here())
    sizes = {split: sum(map(len, texts.values())) for split, texts in documents.items()}
    assert sizes["train"] > 1_000_000
    assert 0.04 < sizes["test"] / sizes["train"] < 0.3


def test_tokens_give_the_text_back(lm_ctx: FolderContext, text_lm: LmModel) -> None:
    @given(st.text(max_size=60))
    def round_trip(text: str) -> None:
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text

    tokenizer = lm_ctx.get(text_lm.info.tokenizer)  # type: ignore[arg-type]
    round_trip()


def test_bytes_of_tokens_add_up_to_the_documents(lm_ctx: FolderContext, text_lm: LmModel) -> None:
    assert text_lm.info.tokenizer is not None
    tokens: Tokens = lm_ctx.get(TokensStage(EnglishStage.here(), text_lm.info.tokenizer, "test"))
    documents = [text for _, text in sorted(lm_ctx.get(EnglishStage.here())["test"].items())]
    assert len(tokens.starts) == len(documents) + 1
    assert (tokens.end_N[tokens.starts[1:] - 1] == [len(text.encode()) for text in documents]).all()
    inner = np.diff(tokens.end_N)[np.setdiff1d(np.arange(len(tokens.end_N) - 1), tokens.starts[1:-1] - 1)]
    assert (inner >= 0).all()


def test_windows_stay_inside_documents() -> None:
    tokens = Tokens(np.arange(25), np.arange(25), np.array([0, 9, 12, 25]))
    assert tokens.windows(4).tolist() == [0, 4, 12, 16, 20]


def test_calibration_is_training_text_without_repetition(lm_ctx: FolderContext, text_lm: LmModel) -> None:
    text = text_lm.info.text
    assert isinstance(text, EnglishText)
    assert text.tokens.split == "train"
    first, again, other = (np.concatenate(list(text.batches(lm_ctx, 40, seed))) for seed in (0, 0, 1))
    assert first.shape == (40, text.length)
    assert (first == again).all()
    assert (first != other).any()
    assert len({row.tobytes() for row in first}) == 40


@given(st.text(min_size=1, max_size=30))
def testbyte_ends_are_lengths_of_encoded_prefixes(text: str) -> None:
    ends = list(range(len(text) + 1))
    assert byte_ends(text, ends).tolist() == [len(text[:end].encode()) for end in ends]
