"""Which tokens can follow a token sequence if it is to be what the tokenizer makes of some text.

A byte-level BPE tokenizer cuts text into pieces by a pattern, then merges inside each piece. A sequence can be the start
of a tokenised text when, for some continuation of its bytes, the pattern cuts at none but its token boundaries, and the
merges leave every pair of neighbours that share a piece as it is. What the pattern does at the end of the bytes depends on what
comes next (``"a  "`` is cut behind the last space, or before it when a word follows), so several sequences of the same
bytes can be possible at once; the continuations in ``LOOKAHEADS`` stand for all.

The pattern is asked, never parsed. Answers are kept by the form of the text, in which ASCII letters of one case, and
digits, are alike and long runs of letters are cut short; ``Segmentations`` tries that on the whole vocabulary first and keeps
answers by the text itself where a pattern tells letters apart.

Shape suffixes: W text tokens in the order of their bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from isoflop.models.byte_trees.vocabulary import ByteVocabulary, completions

LOOKAHEADS = ("", "a", "A", "1", " ", "\n", ".", "'", "s", "e", "l", "S", "é", "漢", "\u0301")
_RUN = 3
_NEAR_APOSTROPHE = 2


@dataclass(frozen=True)
class Tail:
    """The end of a token sequence, from a cut that no continuation can move.

    Attributes:
        text: its bytes.
        ends: where its tokens end inside ``text``, the last left out.
        joined: whether each of these boundaries may lie inside a piece.
        last: the last token, or None when the tail is empty.
    """

    text: bytes
    ends: tuple[int, ...]
    joined: tuple[bool, ...]
    last: int | None


class Segmentations:
    """The token sequences that a tokenizer makes of texts, and of their beginnings; see the module.

    Attributes:
        vocabulary: whose tokens they are.
    """

    def __init__(self, vocabulary: ByteVocabulary) -> None:
        self.vocabulary = vocabulary
        self._kept: dict[tuple[bytes, tuple[int, ...], tuple[int, ...], bool], tuple[np.ndarray, np.ndarray]] = {}
        self._cuts: dict[bytes, list[tuple[int, ...]]] = {}

    def following(self, tail: Tail) -> np.ndarray:
        """Tokens (W,) that can follow the sequence that ``tail`` ends."""
        split_W, inside_W = self._structure(tail)
        mask_W = split_W & self.vocabulary.alone_W
        return mask_W if tail.last is None else mask_W | (inside_W & self.vocabulary.joins(tail.last))

    def may_end(self, tail: Tail) -> bool:
        """Whether the sequence that ``tail`` ends is what the tokenizer makes of its bytes as a whole text."""
        try:
            cuts = self.vocabulary.pieces(tail.text.decode())[:-1]
        except UnicodeDecodeError:
            return False
        apart = (end for end, joined in zip(tail.ends, tail.joined, strict=True) if not joined)
        return set(cuts) <= set(tail.ends) and all(end in cuts for end in apart)

    def settled(self, text: bytes) -> int:
        """The last offset in ``text``, a text from a cut on, at which every continuation cuts; 0 if there is none."""
        cuts = self.cuts(text)
        common = set(cuts[0]).intersection(*cuts[1:]) if cuts else set()
        return max(common, default=0)

    def cuts(self, text: bytes) -> list[tuple[int, ...]]:
        """Offsets at which the pattern cuts ``text``, up to its end, one tuple per continuation; [] if none can be."""
        if text not in self._cuts:
            self._cuts[text] = list(dict.fromkeys(self._ask(text)))
        return self._cuts[text]

    def _ask(self, text: bytes) -> list[tuple[int, ...]]:
        whole = False
        found = []
        for start in completions(text):
            whole = len(start.encode()) == len(text)
            for ahead in LOOKAHEADS if whole else ("", "a"):
                ends = self.vocabulary.pieces(start + ahead)
                found.append(tuple(end for end in ends if end <= len(text)))
        return found

    def _structure(self, tail: Tail) -> tuple[np.ndarray, np.ndarray]:
        """Tokens (W,) that can follow behind a cut, and inside the same piece, as far as the pattern goes."""
        form, places = self._form(tail.text)
        ends = tuple(places.get(end, -1) for end in tail.ends)
        kept = tuple(sorted({end for end in ends if end > 0}))
        forced = tuple(sorted({end for end, joined in zip(ends, tail.joined, strict=True) if not joined}))
        raw = self._folds and any(mark in tail.text[-4:] for mark in (b"'", b"\xe2\x80\x99"))
        key = (form, kept, forced, raw)
        if key not in self._kept:
            forms, number_W = self._raw_forms if raw else self._forms
            answers = np.array([self._can_follow(form, token, kept, forced) for token in forms])
            self._kept[key] = (answers[number_W, 0], answers[number_W, 1])
        return self._kept[key]

    def _can_follow(
        self, text: bytes, token: bytes, ends: tuple[int, ...], forced: tuple[int, ...]
    ) -> tuple[bool, bool]:
        here, stop = len(text), len(text) + len(token)
        split = inside = False
        for cut in self.cuts(text + token):
            strict = [offset for offset in cut if offset < stop]
            if all(offset in ends or offset == here for offset in strict) and all(end in strict for end in forced):
                split |= here in strict or here == 0
                inside |= here not in strict
        return split, inside

    def _form(self, text: bytes, raw: bool = False) -> tuple[bytes, dict[int, int]]:
        """The form of a text, and where each of its offsets lies in it; offsets inside long runs lie nowhere."""
        if not self._folds:
            return text, {i: i for i in range(len(text) + 1)}
        return folded(text, raw)

    @cached_property
    def _forms(self) -> tuple[list[bytes], np.ndarray]:
        return self._distinct(raw=False)

    @cached_property
    def _raw_forms(self) -> tuple[list[bytes], np.ndarray]:
        return self._distinct(raw=True)

    def _distinct(self, raw: bool) -> tuple[list[bytes], np.ndarray]:
        numbers: dict[bytes, int] = {}
        number_W = [
            numbers.setdefault(self._form(self.vocabulary.bytes_of[int(i)], raw)[0], len(numbers))
            for i in self.vocabulary.order_W
        ]
        return list(numbers), np.array(number_W)

    @cached_property
    def _folds(self) -> bool:
        """Whether the pattern cuts the form of every token as it cuts the token."""
        for token in self.vocabulary.bytes_of.values():
            form, places = folded(token, raw=False)
            try:
                ends, wanted = self.vocabulary.pieces(token.decode()), self.vocabulary.pieces(form.decode())
            except UnicodeDecodeError:
                continue
            if [places.get(end) for end in ends] != wanted:
                return False
        return True


def folded(text: bytes, raw: bool = False) -> tuple[bytes, dict[int, int]]:
    """ASCII letters as ``a`` or ``A``, at most three in a row, and digits as ``1``, except right behind an apostrophe.

    Args:
        raw: keep the first two bytes too, because an apostrophe stands before the text.
    """
    form = bytearray()
    places = {0: 0}
    near = _NEAR_APOSTROPHE if raw else 0
    for offset, byte in enumerate(text):
        kind = byte if near > 0 else _kind(byte)
        near = _NEAR_APOSTROPHE if byte in b"'\x99" else near - 1
        if kind in b"aA" and bytes((kind,)) * _RUN == bytes(form[-_RUN:]):
            places.pop(offset, None)  # inside the run
        else:
            form.append(kind)
        places[offset + 1] = len(form)
    return bytes(form), places


def _kind(byte: int) -> int:
    if byte >= 0x80:
        return byte
    char = chr(byte)
    return ord("a" if char.islower() else "A" if char.isupper() else "1" if char.isdigit() else char)
