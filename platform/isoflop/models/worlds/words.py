"""Tokenizers whose tokens are the words of a small world."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

UNKNOWN = "[UNK]"


def word_tokenizer(words: Sequence[str]) -> Any:
    """A fast tokenizer with a token for each word and mark; ``words`` in the order of the ids, with ``UNKNOWN`` among them."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    known = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(known, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=UNKNOWN)
