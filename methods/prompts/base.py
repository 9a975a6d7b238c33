"""Prompt compressors: text in, text out, before the reader sees it.

The base class owns what sits in the hook ``prompt_text``: it splits documents into units with offsets, counts them in
the reader's tokens, asks the method which units stay, puts the text together, and keeps account. A method that writes
new text overrides ``rewrite`` instead. A method sees the query only if it says ``query_aware``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import numpy as np
from torch import nn

from isoflop.core.errors import Infeasible
from isoflop.core.hook import Hook
from isoflop.core.knobs import Knob
from isoflop.core.stage import StageContext
from isoflop.methods.base import Axes, Method
from isoflop.methods.prompts.units import Page, Span, page_of, split_up, words_of
from isoflop.models.base import Model, ModelInfo
from isoflop.models.hooks.occupant import Occupant, tensor_bytes
from isoflop.models.hooks.prompt_text import (
    PROMPT_TEXT,
    SEPARATOR,
    Compressed,
    ContextCompressor,
    Document,
    joined,
    prompt_tokens,
)
from isoflop.models.lm import LmModel

if TYPE_CHECKING:
    from isoflop.methods.probe import Probe


@dataclass(frozen=True)
class KeptUnits:
    """Which units stay.

    Attributes:
        keep: of each page, one bool per unit.
        tokens: tokens that the method's own network (or the reader, in its place) read for it.
    """

    keep: tuple[np.ndarray, ...]
    tokens: int = 0


@dataclass(frozen=True)
class PromptMethod(Method):
    """Base class of methods on the text of a prompt.

    Class attributes:
        query_aware: ``select`` and ``rewrite`` are given the query; otherwise None in its place.
    """

    family: ClassVar[str] = "prompts"
    ratio_of: ClassVar[str] = "tokens of the prompt"
    hooks: ClassVar[tuple[Hook[Any], ...]] = (PROMPT_TEXT,)
    query_aware: ClassVar[bool] = False

    def split(self, text: str) -> list[Span]:
        """The units of a document; by default its words."""
        return words_of(text)

    def select(self, pages: Sequence[Page], query: str | None, reader: LmModel, prepared: Any) -> KeptUnits:
        """Which units stay.

        Args:
            pages: the documents in units.
            query: None unless the method is ``query_aware``.
            reader: as the methods applied before have left it.
            prepared: value of the method's ``prepare`` stage.
        """
        raise NotImplementedError(f"method {self.name} selects no units: override select or rewrite")

    def rewrite(self, documents: Sequence[Document], query: str | None, reader: LmModel, prepared: Any) -> Compressed:
        """The shorter text; by default the units that ``select`` keeps, in order."""
        pages = [page_of(document, self.split(document.text), reader.tokenizer) for document in documents]
        selection = self.select(pages, query, reader, prepared)
        pairs = list(zip(pages, selection.keep, strict=True))
        texts = [page.text(keep_U) for page, keep_U in pairs]
        left = [text for text, page in zip(texts, pages, strict=True) if text or not page.document.text]
        kept = tuple(span for page, keep_U in pairs for span in page.spans(keep_U))
        return Compressed(SEPARATOR.join(left), kept, sum(len(page.units) for page in pages), selection.tokens)

    def network(self, prepared: Any) -> nn.Module | None:
        """The method's own network, which is served besides the reader."""
        return None

    def occupants(self, model: Model, prepared: Any) -> dict[Hook[Any], Occupant]:
        """The method between the documents and the reader."""
        return {PROMPT_TEXT: PromptCompressor(self, reader_of(model, self.name), prepared)}

    def footprint(self, model: Model, ctx: StageContext) -> dict[str, float]:
        """``ratio``: reader tokens of all prompts seen so far, question and instruction included, before over after.

        ``units_kept`` is the share of words or sentences; ``compressor_tokens`` per prompt is what a network read to choose
        them; ``method_params`` and ``method_bytes`` are those of the method's own network.
        """
        compressor = self.compressor(model)
        module = compressor.module
        tensors = [] if module is None else list(module.state_dict().values())
        return {
            **compressor.report(),
            "method_params": float(0 if module is None else sum(p.numel() for p in module.parameters())),
            "method_bytes": float(sum(tensor_bytes(t, model.info.dense_bits) for t in tensors)),
        }

    def compressor(self, model: Model) -> PromptCompressor:
        """The method at work in ``model``. Raises ValueError when it is not applied."""
        found = model.occupant(PROMPT_TEXT)
        if not isinstance(found, PromptCompressor):
            raise ValueError(f"method {self.name} is not applied")
        return found

    @classmethod
    def probe(cls) -> Probe:
        """An untrained reader of the fact world."""
        from isoflop.methods.prompts.probe import PromptProbe

        return PromptProbe()


@dataclass(frozen=True)
class RatedPromptMethod(PromptMethod):
    """Base class of methods with a share of the context to keep; at 1 the text is left alone."""

    rate: Annotated[float, Knob(low=0.05, high=1.0, log=True, ratio=True, doc="share of the context that stays")] = 0.5

    def axes(self, info: ModelInfo) -> Axes:
        """1 / rate, of the context."""
        return Axes(ratio=1 / self.rate)

    @classmethod
    def identity(cls, info: Any) -> RatedPromptMethod:
        """Everything stays."""
        return cls(rate=1.0)


@dataclass(frozen=True)
class _Entry:
    compressed: Compressed
    before: int
    after: int


class PromptCompressor(ContextCompressor):
    """A prompt method at work on a reader."""

    def __init__(self, method: PromptMethod, reader: LmModel, prepared: Any) -> None:
        self.method = method
        self._reader = reader
        self._prepared = prepared
        self._done: dict[tuple[str, tuple[Document, ...]], _Entry] = {}

    @property
    def module(self) -> nn.Module | None:
        """The method's own network."""
        return self.method.network(self._prepared)

    def compress(self, query: str, documents: Sequence[Document]) -> Compressed:
        """The shorter text; each pair of query and documents is compressed, and counted, once."""
        key = query, tuple(documents)
        if key not in self._done:
            compressed, tokenizer = self.fresh(query, documents), self._reader.tokenizer
            before = prompt_tokens(tokenizer, joined(documents), query)
            self._done[key] = _Entry(compressed, before, prompt_tokens(tokenizer, compressed.text, query))
        return self._done[key].compressed

    def fresh(self, query: str, documents: Sequence[Document]) -> Compressed:
        """The same, computed again."""
        known = query if self.method.query_aware else None
        return self.method.rewrite(documents, known, self._reader, self._prepared)

    def report(self) -> dict[str, float]:
        """See ``PromptMethod.footprint``. Raises ValueError when nothing has been compressed yet."""
        entries = list(self._done.values())
        if not entries:
            raise ValueError(f"method {self.method.name}: no prompt has been compressed yet")
        units = sum(entry.compressed.units for entry in entries)
        kept = sum(len(entry.compressed.kept or ()) for entry in entries)
        return {
            "ratio": sum(entry.before for entry in entries) / sum(entry.after for entry in entries),
            "units_kept": kept / units if units else 1.0,
            "compressor_tokens": sum(entry.compressed.tokens for entry in entries) / len(entries),
        }


def over_all_pages(pages: Sequence[Page]) -> np.ndarray:
    """Reader tokens of every unit of every page, one array."""
    return np.concatenate([page.tokens_U for page in pages]) if pages else np.zeros(0, dtype=np.int64)


def selection_of(kept_N: np.ndarray, pages: Sequence[Page], tokens: int = 0) -> KeptUnits:
    """A selection from one array over the units of all pages."""
    return KeptUnits(split_up(kept_N, pages), tokens)


def reader_of(model: Model, method: str) -> LmModel:
    """``model`` as a reader of text; Infeasible otherwise."""
    if not isinstance(model, LmModel):
        raise Infeasible(f"method {method}: model {model.info.ref} reads no text")
    return model
