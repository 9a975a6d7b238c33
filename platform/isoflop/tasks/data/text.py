"""The task ``text``: language modelling on documents of a user's own."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from isoflop.core.documents import documents
from isoflop.core.errors import Infeasible, UserError
from isoflop.core.hook import Hook
from isoflop.core.knobs import Knob
from isoflop.core.rows import Rows, named
from isoflop.methods.base import Method
from isoflop.models.base import ModelInfo
from isoflop.models.contexts import Contexts
from isoflop.models.hooks.attention import ATTENTION
from isoflop.models.hooks.feed_forward import FEED_FORWARD
from isoflop.models.lm import LmModel
from isoflop.tasks.base import TASKS
from isoflop.tasks.data.base import DataTask, Example, drawn
from isoflop.tasks.data.language import Asked, ContextTask
from isoflop.tasks.data.prompts import PromptText, PromptTokenizer, TokenPrompt, shown


@TASKS.register("text")
@dataclass(frozen=True, kw_only=True)
class Text(ContextTask, DataTask):
    """Bits that a model spends per byte of a user's documents; an example is a window of a document.

    Windows of ``tokens`` slide over each document. The first ``prefix`` of a window is the context, which methods on the cache
    compress, and the rest is scored, so that windows overlap by the context and a token is scored once. With ``prefix: 0``
    windows follow one another, nothing is compressed, and all but the first token is scored, as suits methods on weights. A
    document shorter than a window is a window of its own. ``limit`` counts windows.

    Documents are text files (each one document), or the field ``field`` of rows. Bits per byte compare models with different
    tokenizers. Secondary metrics: ``nll`` (nats per token), ``accuracy`` (share of tokens that the model would have chosen),
    ``bytes`` (scored in a window: weights, for whoever wants the figure of all text).
    """

    version: ClassVar[str] = "2"
    quantity: ClassVar[str] = "bits per byte"
    metrics: ClassVar[tuple[str, ...] | None] = ("nll", "accuracy", "bytes")
    asks: ClassVar[frozenset[Hook[Any]]] = frozenset({FEED_FORWARD})

    field: Annotated[str, Knob(doc="field of a row that holds the text; not for text files")] = "text"
    tokens: Annotated[int, Knob(low=4, high=10_000_000, doc="length of a window", unit="tokens")] = 512
    prefix: Annotated[float, Knob(low=0.0, high=0.99, doc="share of a window that is the compressed context")] = 0.5

    @property
    def rows(self) -> Rows:
        """Documents: whole text files under ``text``, or rows."""
        return documents(self.data, self.split)

    def check_rows(self, rows: Rows) -> None:
        """The field is there."""
        rows.require(self.field, "field", self.name)

    def check(self, info: ModelInfo) -> None:
        """Documents with text in them; something is left to score."""
        super().check(info)
        if not any(str(row.get(self.field) or "").strip() for row in self.rows.rows):
            raise UserError(f"task {self.name}: data {self.data}: every document is empty")
        if self.context_tokens(self.tokens) > self.tokens - 2:
            raise Infeasible(
                f"task {self.name}: prefix = {self.prefix} leaves nothing of tokens = {self.tokens} to score"
            )

    def check_method(self, method: Method, info: ModelInfo) -> None:
        """Refuse methods on the cache where there is no context that they could compress."""
        super().check_method(method, info)
        if ATTENTION in method.hooks and not self.prefix:
            raise Infeasible(
                f"task {self.name}: prefix = 0 leaves no context for method {method.name} to compress; raise prefix"
            )

    def context_tokens(self, length: int) -> int:
        """Of a window of so many tokens; one at least, which is not scored."""
        return max(1, round(self.prefix * length))

    def examples_for(self, lm: LmModel, tokens: PromptTokenizer) -> list[Example]:
        """Windows of the documents in a model's tokens.

        Raises:
            UserError: no document has two tokens.
        """
        rows = self.rows
        self.check_rows(rows)
        found, keys = [], []
        for row, number in zip(rows.rows, rows.ids_N.tolist(), strict=True):
            ids, ends = tokens.with_ends(shown(row, self.field) if row.get(self.field) else "")
            for start, stop in self._windows(len(ids)):
                context = self.context_tokens(min(len(ids), self.tokens))
                given = start + context + bool(self.prefix)  # tokens that are not scored
                size = ends[stop - 1] - ends[given - 1]
                if size == 0:  # all of it is the rest of a character that the window before has counted
                    continue
                found.append({"ids": ids[start:stop], "given": given - start, "bytes": size})
                keys.append(f"{number}:{start}")
        if not found:
            raise UserError(f"task {self.name}: data {self.data}: no document has two tokens")
        return drawn(named(found, self.data, keys), self.limit, self.seed)

    def text_of(self, example: Example) -> PromptText:
        """Windows are made of tokens, not of text."""
        return PromptText("", "", "", marked=False)

    def prompt_of(self, example: Example, text: PromptText, tokens: PromptTokenizer) -> TokenPrompt:
        """The context and the rest of a window."""
        ids, cut = example.row["ids"], example.row["given"] - bool(self.prefix)
        return TokenPrompt(tuple(ids[:cut]), tuple(ids[cut:]))

    def tails_of(
        self, example: Example, text: PromptText, prompt: TokenPrompt, tokens: PromptTokenizer
    ) -> list[tuple[int, ...]]:
        """The rest of the window."""
        return [prompt.behind]

    def scores_of(self, contexts: Contexts, asked: Sequence[Asked], tokens: PromptTokenizer) -> list[dict[str, float]]:
        """Bits over bytes."""
        tails = [one.prompt.behind for one in asked]
        found = contexts.score(tails, [len(tail) - bool(self.prefix) for tail in tails])
        scores = []
        for row, one in enumerate(asked):
            nll, right, scored = found.nll_B[row], found.right_B[row], found.scored_B[row]
            size = float(one.example.row["bytes"])
            bits = nll / math.log(2)
            noted = {name: float(values_B[row]) for name, values_B in found.noted.items()}
            scores.append(
                {"error": bits / size, "nll": nll / scored, "accuracy": right / scored, "bytes": size, **noted}
            )
        return scores

    def _windows(self, length: int) -> Iterator[tuple[int, int]]:
        """Start and stop of a document's windows; the last one ends with the document."""
        least = 2 + bool(self.prefix)  # context, perhaps a given token, a scored one
        if length < least:
            return
        given = self.context_tokens(self.tokens) + bool(self.prefix)
        start, stop = 0, 0
        while stop < length:
            stop = min(start + self.tokens, length)
            yield start, stop
            start = stop - given  # so that the next window's first scored token is the next of the document
