"""Text in units that keep their offsets: words, sentences, their cost in a reader's tokens, and putting kept ones together.

Shape suffixes: U units of a page.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from isoflop.models.hooks.prompt_text import Document

Span = tuple[int, int]
_WORD = re.compile(r"\w+(?:['’-]\w+)*|[^\w\s]")
_SENTENCE = re.compile(r"\S(?:[^\n]*?[.!?](?=\s|$)|[^\n]*)")


def words_of(text: str) -> list[Span]:
    """Start and end of every word and every mark of punctuation."""
    return [match.span() for match in _WORD.finditer(text)]


def sentences_of(text: str) -> list[Span]:
    """Start and end of every sentence: up to a full stop, question or exclamation mark, or the end of a line."""
    return [(m.start(), m.start() + len(m.group().rstrip())) for m in _SENTENCE.finditer(text)]


@dataclass(frozen=True)
class Page:
    """A document in units.

    Attributes:
        document: as the task gave it.
        units: start and end of each unit in characters, ascending, without overlap.
        tokens_U: tokens of the reader that end in each unit.
    """

    document: Document
    units: tuple[Span, ...]
    tokens_U: np.ndarray

    @cached_property
    def words(self) -> tuple[str, ...]:
        """The units' text."""
        return tuple(self.document.text[start:end] for start, end in self.units)

    def text(self, keep_U: np.ndarray) -> str:
        """The kept units: neighbours as they stand in the document, one space where something is missing between."""
        if keep_U.all():
            return self.document.text
        source, text, last = self.document.text, "", -2
        for number in np.flatnonzero(keep_U).tolist():
            start, end = self.units[number]
            gap = source[self.units[last][1] : start] if number == last + 1 else " "
            text += (gap if text else "") + source[start:end]
            last = number
        return text

    def spans(self, keep_U: np.ndarray) -> list[tuple[str, int, int]]:
        """The kept units as (document id, start, end)."""
        return [(self.document.id, *self.units[number]) for number in np.flatnonzero(keep_U).tolist()]


def page_of(document: Document, units: Sequence[Span], tokenizer: Any) -> Page:
    """A document in units, their tokens counted by a reader's fast tokenizer."""
    encoded = tokenizer(document.text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    tokens_U = np.zeros(len(units), dtype=np.int64)
    for place in places_of([end - 1 for start, end in encoded["offset_mapping"] if end > start], units):
        if place is not None:
            tokens_U[place] += 1
    return Page(document, tuple(units), tokens_U)


def places_of(characters: Sequence[int], units: Sequence[Span]) -> list[int | None]:
    """The unit in which each character lies, by its number; None between units."""
    starts = [start for start, _ in units]
    found: list[int | None] = []
    for character in characters:
        number = bisect_right(starts, character) - 1
        found.append(number if number >= 0 and character < units[number][1] else None)
    return found


def split_up(flat_N: np.ndarray, pages: Sequence[Page]) -> tuple[np.ndarray, ...]:
    """One array over the units of all pages as one array per page."""
    bounds = np.cumsum([len(page.units) for page in pages])[:-1]
    return tuple(np.split(flat_N, bounds))
