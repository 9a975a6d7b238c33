"""Lossless segmentation of bytes, and byte-level BPE vocabularies: which bytes a token stands for.

Shape suffixes: W text tokens in the order of their bytes, D bytes of a token.
"""

from __future__ import annotations

import codecs
from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import cached_property
from itertools import accumulate, pairwise, takewhile
from typing import Any

import numpy as np

from isoflop.core.errors import UserError

ENDED = -1
"""In ``ByteVocabulary.next_byte_DW``: the token has no further byte."""

TEXT_BYTES = frozenset((*b"\t\n\r", *range(0x20, 0x7F), *range(0x80, 0xC0), *range(0xC2, 0xEE), 0xEF, 0xF0, 0xF3))
"""The bytes of which texts in UTF-8 consist. C0, C1 and F5 to FF occur in none; control characters, and the first bytes of
ranges in which Unicode has assigned nothing (F1, F2) or which it leaves to private use (EE, F4), are no text. A vocabulary
may lack those: under its model they have the probability 0."""
_CONTINUATIONS = bytes((0x80, 0x84, 0x88, 0x93, 0x99, 0xA0, 0xA9, 0xB3, 0xBF))


class Segmenter(ABC):
    """Cuts bytes into units without losing any: the units joined are the bytes."""

    @abstractmethod
    def segment(self, data: bytes) -> list[tuple[int, int]]:
        """Units as (start, end) byte offsets, in order, without gaps."""

    def lossless(self, data: bytes) -> bool:
        """Whether the units of ``data`` cover it from its start to its end."""
        offsets = [0, *(offset for unit in self.segment(data) for offset in unit), len(data)]
        return all(a == b for a, b in zip(offsets[::2], offsets[1::2], strict=True))


class ByteSegmenter(Segmenter):
    """Every byte is a unit."""

    def segment(self, data: bytes) -> list[tuple[int, int]]:
        """Offsets one by one."""
        return [(i, i + 1) for i in range(len(data))]


class ByteVocabulary(Segmenter):
    """A byte-level BPE tokenizer seen as a set of byte strings, with its pre-tokenizer and its merges.

    Args:
        tokenizer: a Hugging Face fast tokenizer that :func:`not_byte_level` has nothing against.

    Attributes:
        order_W: ids of the text tokens, sorted by their bytes.
        bytes_of: the bytes of each of them, by id.
        next_byte_DW: byte number D of token W, ``ENDED`` right behind its last.
        end_ids: special tokens, which stand for no bytes.
        end_id: the one that ends a text, or None.
        start_ids: tokens that the tokenizer puts before every text.
    """

    def __init__(self, tokenizer: Any) -> None:
        backend = tokenizer.backend_tokenizer
        self._pre, self._model = backend.pre_tokenizer, backend.model
        special = set(backend.get_added_tokens_decoder())
        chars = {char: byte for byte, char in enumerate(_byte_chars())}
        words = ((word, i) for word, i in backend.get_vocab(with_added_tokens=True).items() if i not in special)
        self.bytes_of = {i: bytes(chars[char] for char in word) for word, i in words}
        self.order_W = np.array(sorted(self.bytes_of, key=self.bytes_of.__getitem__), dtype=np.int64)
        self.rank = {int(i): rank for rank, i in enumerate(self.order_W)}
        self.end_ids = np.array(sorted(special), dtype=np.int64)
        self.end_id: int | None = tokenizer.eos_token_id
        self.start_ids = list(takewhile(special.__contains__, backend.encode("a").ids))
        sorted_bytes = [self.bytes_of[int(i)] for i in self.order_W]
        self.longest = max(map(len, sorted_bytes))
        self.next_byte_DW = np.full((self.longest + 1, len(sorted_bytes)), ENDED, dtype=np.int16)
        for column, token in enumerate(sorted_bytes):
            self.next_byte_DW[: len(token), column] = list(token)

    def __len__(self) -> int:
        return len(self.order_W)

    def merged(self, piece: bytes) -> tuple[int, ...]:
        """The tokens that the merges make of one piece of pre-tokenized text."""
        word = piece.decode("latin-1").translate(_SHOWN)
        return tuple(token.id for token in self._model.tokenize(word))

    def require(self, data: bytes) -> None:
        """Refuse bytes that no token stands for.

        Raises:
            UserError: which.
        """
        lacking = sorted(set(data) - self._bytes)
        if lacking:
            place = data.index(bytes((lacking[0],)))
            raise UserError(
                f"the tokenizer has no token for the byte {lacking[0]:#04x}, which stands at {place} in {data[max(place - 16, 0) : place + 8]!r}; "
                "allowed: texts without it, or a model whose vocabulary has all bytes"
            )

    @cached_property
    def _bytes(self) -> frozenset[int]:
        return frozenset(token[0] for token in self.bytes_of.values() if len(token) == 1)

    def pieces(self, text: str) -> list[int]:
        """Ends of the pre-tokenizer's pieces, as byte offsets."""
        return list(accumulate(len(word) for word, _ in self._pre.pre_tokenize_str(text)))

    def encode(self, data: bytes) -> list[int]:
        """The tokens of ``data`` as of a whole text, special tokens left out.

        Bytes of a character that is cut off at the end are taken for the start of some character.

        Raises:
            ValueError: the bytes are not the start of a UTF-8 text, or need a token that the vocabulary lacks.
        """
        completed = next(completions(data), None)
        if completed is None:
            raise ValueError(f"{data[-8:]!r} is not the start of a UTF-8 text")
        ends = [min(end, len(data)) for end in self.pieces(completed)]
        ids = [i for a, b in pairwise([0, *ends]) for i in self.merged(data[a:b])]
        if b"".join(self.bytes_of[i] for i in ids) != data:
            raise ValueError(f"the tokens of {data[:32]!r} are not its bytes")
        return ids

    def segment(self, data: bytes) -> list[tuple[int, int]]:
        """The tokens of :meth:`encode` as byte offsets."""
        ends = np.cumsum([len(self.bytes_of[i]) for i in self.encode(data)]).tolist()
        return list(pairwise([0, *ends]))

    @cached_property
    def alone_W(self) -> np.ndarray:
        """Tokens that the merges make of their own bytes; the others never occur in tokenised text."""
        return np.array([self.merged(self.bytes_of[int(i)]) == (i,) for i in self.order_W])

    def joins(self, first: int) -> np.ndarray:
        """Tokens (W,) that can follow ``first`` inside a piece: the merges leave the pair as it is.

        A sequence is what the merges make of its bytes exactly when that holds of each pair of neighbours, because a
        merge across a boundary would show in the two tokens beside it.
        """
        if first not in self._joins:
            left = self.bytes_of[first]
            self._joins[first] = np.array(
                [
                    alone and self.merged(left + self.bytes_of[second]) == (first, second)
                    for alone, second in zip(self.alone_W, self.order_W.tolist(), strict=True)
                ]
            )
        return self._joins[first]

    @cached_property
    def _joins(self) -> dict[int, np.ndarray]:
        return {}


def not_byte_level(stored: dict[str, Any]) -> str:
    """Why bytes have no probabilities under the tokenizer in a ``tokenizer.json``; empty when they have.

    Args:
        stored: the file's contents.
    """
    model, normalizer = stored.get("model") or {}, stored.get("normalizer")
    steps = _steps(stored.get("pre_tokenizer"), "pretokenizers")
    last = steps[-1] if steps else {}
    kind = model.get("type")
    if kind != "BPE":
        return f"its tokenizer is of the type {kind}"
    if model.get("byte_fallback") or last.get("type") == "Metaspace":
        return "its tokenizer works on characters and falls back to bytes (SentencePiece)"
    if last.get("type") != "ByteLevel":
        return "its tokenizer does not work on bytes"
    if any(step.get("add_prefix_space") for step in steps if step.get("type") == "ByteLevel"):
        return "its tokenizer puts a space before every text, which shifts the bytes"
    if any(step.get("type") != "NFC" for step in _steps(normalizer, "normalizers")):
        return "its tokenizer rewrites the text before it cuts it"
    if model.get("dropout"):
        return "its tokenizer leaves merges out at random"
    missing = sum(char not in model.get("vocab", {}) for byte, char in enumerate(_byte_chars()) if byte in TEXT_BYTES)
    return f"its vocabulary lacks {missing} of the {len(TEXT_BYTES)} bytes of texts in UTF-8" if missing else ""


def completions(data: bytes) -> Iterator[str]:
    """Texts that start with ``data``, each at most one character longer; none when no text does.

    A whole text gives itself. One that is cut inside a character gives a few of the characters it may become.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        whole = decoder.decode(data)
    except UnicodeDecodeError:
        return
    cut = decoder.getstate()[0]
    if not cut:
        yield whole
        return
    missing = (2 if cut[0] < 0xE0 else 3 if cut[0] < 0xF0 else 4) - len(cut)
    for first in _CONTINUATIONS:
        try:
            yield whole + (cut + bytes((first,)).ljust(missing, b"\xa0")).decode()
        except UnicodeDecodeError:
            continue


def whole_characters(data: bytes) -> int:
    """Bytes of ``data``, the start of a UTF-8 text, up to the end of its last whole character."""
    return len(data.decode(errors="ignore").encode())


def _steps(stored: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    if not stored:
        return []
    return list(stored[key]) if stored.get("type") == "Sequence" else [stored]


def _byte_chars() -> list[str]:
    """The printable character that byte-level tokenizers write for each byte."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = iter(range(0x100, 0x200))
    return [chr(byte) if byte in shown else chr(next(hidden)) for byte in range(256)]


_SHOWN = dict(enumerate(_byte_chars()))
