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


SPECIAL_TOKENS = {"pad_token": "[PAD]", "unk_token": UNKNOWN, "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}  # fmt: skip
"""Those of BERT's tokenizers, by their names in transformers."""


def encoder_tokenizer(words: Sequence[str]) -> Any:
    """A tokenizer of words as encoders of BERT's class read them: ``[CLS] text [SEP]``, padded on the right.

    Args:
        words: words and marks; their ids follow those of the special tokens.
    """
    from tokenizers import processors

    tokenizer = word_tokenizer([*SPECIAL_TOKENS.values(), *words])
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    ends = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("[CLS]", "[SEP]")]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=ends
    )
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    return tokenizer
