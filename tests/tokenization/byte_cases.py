"""Tiny vocabularies and models on which every sum over token sequences can be enumerated."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch

from isoflop.methods.tokenization.probe import untrained_reader
from isoflop.models.byte_trees.segmentations import Segmentations, Tail
from isoflop.models.byte_trees.tree import EVERY, NO_BYTE, RENORMALISED, Start
from isoflop.models.byte_trees.vocabulary import ByteVocabulary
from isoflop.models.lm import LmModel

GPT2 = "gpt2"
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TWO_LETTERS = [("a", "a"), ("a", "b"), ("aa", "b"), ("b", "a")]
SHOWN = {" ": "Ġ", "\n": "Ċ"}


def tokenizer_of(letters: str, merges: list[tuple[str, str]], pattern: str | None = None) -> Any:
    """A byte-level BPE tokenizer over a few bytes; the end-of-text token starts every text too."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    pairs = [tuple("".join(SHOWN.get(c, c) for c in part) for part in merge) for merge in merges]
    words = [*(SHOWN.get(c, c) for c in letters), *("".join(pair) for pair in pairs)]
    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=pairs))
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern == GPT2)
    split = [] if pattern in (None, GPT2) else [pre_tokenizers.Split(Regex(pattern), behavior="isolated")]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*split, level])
    tokenizer.add_special_tokens(["<end>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<end> $A", special_tokens=[("<end>", tokenizer.token_to_id("<end>"))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<end>", eos_token="<end>")


def segmentations_of_letters(letters: str, merges: list[tuple[str, str]], pattern: str | None = None) -> Segmentations:
    """Of such a tokenizer."""
    return Segmentations(ByteVocabulary(tokenizer_of(letters, merges, pattern)))


def double_model(tokens: int, seed: int = 0) -> LmModel:
    """An untrained decoder in float64."""
    model = untrained_reader(tokens, seed)
    model.module.double()
    return model


class BruteForce:
    """Probabilities by enumeration, from ordinary forward passes over whole sequences.

    Args:
        mass: what becomes of sequences that are not canonical, see ``CoveringTree``.
    """

    def __init__(self, model: LmModel, vocabulary: ByteVocabulary, mass: str) -> None:
        self.vocabulary, self.mass = vocabulary, mass
        self.end = int(vocabulary.end_ids[0])

        @cache
        def row(ids: tuple[int, ...]) -> np.ndarray:
            logits = model.module(input_ids=torch.tensor([[self.end, *ids]])).logits[0, -1]
            found: np.ndarray = logits.double().softmax(-1).numpy()
            return found

        self._row: Callable[[tuple[int, ...]], np.ndarray] = row

    def canonical(self, ids: tuple[int, ...]) -> bool:
        """Whether the tokenizer makes these tokens of their bytes."""
        return tuple(self.vocabulary.encode(self.spelled(ids))) == ids

    def spelled(self, ids: tuple[int, ...]) -> bytes:
        """The bytes of some tokens."""
        return b"".join(self.vocabulary.bytes_of[i] for i in ids)

    def next_token(self, ids: tuple[int, ...]) -> np.ndarray:
        """Probabilities of the next token under ``mass``."""
        p = self._row(ids)
        if self.mass == EVERY:
            return p
        allowed = [i == self.end or self.canonical((*ids, i)) for i in range(len(p))]
        p = p * np.array(allowed)
        return p / p.sum() if self.mass == RENORMALISED else p

    def starts_with(self, data: bytes, ids: tuple[int, ...] = ()) -> float:
        """The probability that a text starts with some bytes: the sum over their covers."""
        if not data:
            return 1.0
        p, total = self.next_token(ids), 0.0
        for token, word in self.vocabulary.bytes_of.items():
            if word.startswith(data):
                total += p[token]
            elif data.startswith(word) and p[token] > 0:
                total += p[token] * self.starts_with(data[len(word) :], (*ids, token))
        return total

    def is_text(self, data: bytes, ids: tuple[int, ...] = ()) -> float:
        """The probability that some bytes are a whole text."""
        p = self.next_token(ids)
        if not data:
            return float(p[self.end])
        words = self.vocabulary.bytes_of.items()
        return sum(
            p[token] * self.is_text(data[len(word) :], (*ids, token))
            for token, word in words
            if data.startswith(word) and p[token] > 0
        )


def whole(data: bytes, vocabulary: ByteVocabulary) -> Start:
    """All bytes are asked for, from an empty prompt on."""
    return Start(data, vocabulary.start_ids, 0, 0)


def possible(segmentations: Segmentations, longest: int) -> set[tuple[int, ...]]:
    """All token sequences up to so many bytes that can follow step by step."""
    vocabulary, found = segmentations.vocabulary, set()

    def extend(ids: tuple[int, ...], ends: tuple[int, ...], joined: tuple[bool, ...], text: bytes, cut: int) -> None:
        cut += segmentations.settled(text[cut:])
        count = sum(end > cut for end in ends)
        inner = tuple(end - cut for end in ends[len(ends) - count : -1]) if count else ()
        flags = joined[len(joined) - count + 1 :] if count else ()
        tail = Tail(text[cut:], inner, flags, ids[-1]) if count else Tail(b"", (), (), None)
        for rank in np.flatnonzero(segmentations.following(tail)):
            token = int(vocabulary.order_W[rank])
            grown = text + vocabulary.bytes_of[token]
            if len(grown) <= longest:
                found.add((*ids, token))
                pair = bool(ids) and bool(vocabulary.joins(ids[-1])[rank])
                extend((*ids, token), (*ends, len(grown)), (*joined, pair), grown, cut)

    extend((), (), (), b"", 0)
    return found


__all__ = ["NO_BYTE", "BruteForce", "double_model", "possible", "segmentations_of_letters", "tokenizer_of", "whole"]
