"""Text that a reader is given besides the question, and the place where a compressor of that text sits.

A compressor takes a query and documents and returns a shorter text; the reader's weights never take part. Tasks that ask
questions about documents hand them to the compressor in the hook ``prompt_text`` and build the reader's prompt from what
comes back, so that one prompt, one way of scoring and one way of counting serve every method.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from isoflop.core.hook import Hook
from isoflop.models.hooks.occupant import Occupant

SEPARATOR = "\n"
"""Between the documents of a prompt."""


@dataclass(frozen=True)
class Document:
    """One document of a context.

    Attributes:
        id: names it in the spans of ``Compressed``; different within a context.
        text: what the reader would read.
    """

    id: str
    text: str


@dataclass(frozen=True)
class Compressed:
    """A compressed context.

    Attributes:
        text: what the reader reads instead of the documents.
        kept: for extractive methods the kept units as (document id, start, end) in characters, in the order of ``text``;
            None where the text is not made of pieces of the documents.
        units: units (words, sentences) that the compressor saw; 0 where it knows none.
        tokens: tokens that the compressor's own network read.
    """

    text: str
    kept: tuple[tuple[str, int, int], ...] | None
    units: int = 0
    tokens: int = 0


class ContextCompressor(Occupant):
    """The occupant: shortens the documents of a prompt before the reader sees them."""

    @property
    @abstractmethod
    def module(self) -> nn.Module | None:
        """The compressor's own network, whose weights are served besides the reader's; None when it has none."""

    def tensors(self) -> Sequence[Tensor]:
        """Those of ``module``."""
        return [] if self.module is None else list(self.module.state_dict().values())

    @abstractmethod
    def compress(self, query: str, documents: Sequence[Document]) -> Compressed:
        """The shorter text, from a cache where the same was asked before."""

    @abstractmethod
    def fresh(self, query: str, documents: Sequence[Document]) -> Compressed:
        """The same without the cache, to be measured."""


PROMPT_TEXT: Hook[ContextCompressor] = Hook(
    "prompt_text", 40, "shortens the documents of a prompt before the model reads them", asked=True
)


def joined(documents: Sequence[Document]) -> str:
    """The context as it is without a compressor."""
    return SEPARATOR.join(document.text for document in documents)


def prompt_of(context: str, query: str) -> tuple[str, str]:
    """The prompt in its two parts: the context with its heading, and the question, which ends where the answer begins."""
    return f"context: {context}", f"\nquestion: {query}"


def prompt_tokens(tokenizer: Any, context: str, query: str) -> int:
    """Tokens of the whole prompt, instruction and question included, as a reader's tokenizer cuts its two parts."""
    return sum(len(token_ids(tokenizer, part)) for part in prompt_of(context, query))


def token_ids(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text, without special tokens."""
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids
