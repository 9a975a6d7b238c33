"""Tasks on text of a user's own, for language models: contexts that methods compress, and what is asked behind them.

Shape suffixes: B examples of a shard.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Annotated, Any, ClassVar

import numpy as np
import torch

from isoflop.core.errors import Infeasible, UserError
from isoflop.core.hook import Hook
from isoflop.core.knobs import Knob
from isoflop.core.stage import StageContext
from isoflop.methods.base import Method
from isoflop.models.base import Model, ModelInfo
from isoflop.models.contexts import Contexts, read_contexts
from isoflop.models.counting import flops_of
from isoflop.models.hooks.attention import CacheReport
from isoflop.models.hooks.feed_forward import FEED_FORWARD
from isoflop.models.hooks.prompt_text import PROMPT_TEXT, Document
from isoflop.models.lm import LmModel
from isoflop.models.metering import meter
from isoflop.tasks.base import Shard
from isoflop.tasks.data.base import DataTask, Example
from isoflop.tasks.data.prompts import PromptText, PromptTokenizer, Template, TokenPrompt, shown
from isoflop.tasks.data.rows import Rows
from isoflop.tasks.footprint import byte_costs, decoder_cache, peak_bytes_of, seconds_of
from isoflop.tasks.language_task import lm_info, lm_model

MEASURED = 4
"""Examples over which costs are averaged, since prompts differ in length."""
MOST_TOKENS = 2**14
"""Tokens of one batch of contexts, padding included."""


@dataclass(frozen=True)
class Asked:
    """One example as the model reads it.

    Attributes:
        id: its number.
        prompt: context and what follows it.
        tails: what the task scores or continues behind the context; each begins with ``prompt.behind``.
        row: the fields that it was made of.
    """

    id: int
    text: PromptText
    prompt: TokenPrompt
    tails: tuple[tuple[int, ...], ...]
    example: Example

    @property
    def length(self) -> int:
        """Tokens of the longest pass."""
        return len(self.prompt.context) + max(len(tail) for tail in self.tails)


@dataclass(frozen=True)
class LanguageDataTask(DataTask):
    """Base class of tasks that put a prompt made of a row before a language model.

    Subclasses give a template (``template``), what stands behind the prompt (``tails_of``) and its errors (``scores_of``).
    """

    needs: ClassVar[frozenset[str]] = frozenset({"tokenizer"})
    asks: ClassVar[frozenset[Hook[Any]]] = frozenset({PROMPT_TEXT, FEED_FORWARD})

    chat: Annotated[bool, Knob(doc="lay the checkpoint's chat template around every prompt")] = False

    @abstractmethod
    def template(self) -> Template:
        """The prompt over the fields of a row."""

    @abstractmethod
    def tails_of(self, example: Example, text: PromptText, prompt: TokenPrompt, tokens: PromptTokenizer) -> list[tuple[int, ...]]:
        """What is run behind the context of an example, at least one row of tokens."""

    @abstractmethod
    def scores_of(self, contexts: Contexts, asked: Sequence[Asked], tokens: PromptTokenizer) -> list[dict[str, float]]:
        """Of each example of a batch: ``error``, and secondary metrics by name."""

    def alike(self, asked: Asked) -> Any:
        """Examples of one batch agree in this."""
        return None

    def check(self, info: ModelInfo) -> None:
        """A language model with a tokenizer; the data have the fields that the options name."""
        super().check(info)
        lm_info(info, self.name)
        self.check_rows(self.rows)

    def check_rows(self, rows: Rows) -> None:
        """The template's fields are there."""
        for field in self.template().fields:
            rows.require(field, "prompt", self.name)

    def check_method(self, method: Method, info: ModelInfo) -> None:
        """Refuse methods on the text of a context where none is named."""
        if PROMPT_TEXT in method.hooks and self.template().context is None:
            raise Infeasible(
                f"task {self.name}: method {method.name} shortens a context, and the prompt names none; name its field: "
                "context: FIELD"
            )

    @torch.no_grad()
    def evaluate(self, model: Model, ctx: StageContext, seed: int) -> Iterator[Shard]:
        """Ask shard by shard; a context is read, and compressed, once per example."""
        lm = lm_model(model, self.name)
        tokens = self.tokens_of(lm)
        for examples in self.shards(seed):
            asked = [self.asked(lm, example, tokens) for example in examples]
            found: list[dict[str, float]] = [{} for _ in asked]
            for numbers in self.groups(lm, asked):
                batch = [asked[number] for number in numbers]
                with read_contexts(lm, [one.prompt.context for one in batch]) as contexts:
                    for number, scores in zip(numbers, self.scores_of(contexts, batch, tokens), strict=True):
                        found[number] = scores
            columns = {name: np.array([scores[name] for scores in found]) for name in found[0]}
            yield Shard(np.array([one.id for one in asked]), columns.pop("error"), columns)

    def tokens_of(self, lm: LmModel) -> PromptTokenizer:
        """How prompts become the model's tokens."""
        return PromptTokenizer(lm.tokenizer, self.chat, f"task {self.name}: model {lm.info.ref}")

    def text_of(self, example: Example) -> PromptText:
        """The prompt of an example as text."""
        try:
            return self.template().fill(example.row)
        except UserError as error:
            raise self.where(example, str(error)) from None

    def asked(self, lm: LmModel, example: Example, tokens: PromptTokenizer, fresh: bool = False) -> Asked:
        """An example as the model is shown it, its context shortened by whatever is applied.

        Raises:
            Infeasible: it is longer than the model's room.
        """
        text = self.text_of(example)
        compressor = lm.occupant(PROMPT_TEXT)
        if compressor is not None:
            compress = compressor.fresh if fresh else compressor.compress
            text = replace(text, context=compress(text.behind.strip(), [Document(CONTEXT_ID, text.context)]).text)
        prompt = tokens.prompt(text)
        asked = Asked(example.id, text, prompt, tuple(self.tails_of(example, text, prompt, tokens)), example)
        room = lm.info.geometry["positions"]
        if asked.length > room:
            raise Infeasible(
                f"task {self.name}: a prompt of data {self.data} takes {asked.length} tokens with its answer; model {lm.info.ref} has "
                f"room for {room}"
            )
        return asked

    def groups(self, lm: LmModel, asked: Sequence[Asked]) -> Iterator[list[int]]:
        """Numbers of examples that share a batch: of similar length, at most ``MOST_TOKENS`` with their padding."""
        observing = lm.occupant(FEED_FORWARD) is not None
        kinds: dict[Any, list[int]] = {}
        for number, one in enumerate(asked):
            lengths = tuple(map(len, one.tails)) if observing else None
            kinds.setdefault((self.alike(one), lengths), []).append(number)
        for numbers in kinds.values():
            numbers.sort(key=lambda number: asked[number].length)
            batch: list[int] = []
            for number in numbers:
                if batch and asked[number].length * (len(batch) + 1) > MOST_TOKENS:
                    yield batch
                    batch = []
                batch.append(number)
            yield batch

    @torch.no_grad()
    def measure(self, model: Model, ctx: StageContext) -> dict[str, float]:
        """Mean footprint of single examples, from the text to the last scored token, batch of one.

        ``flops_method`` is the compressor's of the text; ``text_tokens`` are those of the prompt as the model is shown it, and
        of the longest answer.
        """
        lm = lm_model(model, self.name)
        tokens = self.tokens_of(lm)
        examples = self.examples()[:MEASURED]
        costs, caches, lengths = [], [], []
        for example in examples:
            method, asked = flops_of(lambda example=example: self.asked(lm, example, tokens, fresh=True))  # type: ignore[misc]
            language, _ = flops_of(lambda asked=asked: self._run(lm, asked, tokens))  # type: ignore[misc]
            costs.append((method, language))
            caches.append(decoder_cache(lm, lambda asked=asked: self._run(lm, asked, tokens)))  # type: ignore[misc]
            lengths.append((asked.length, len(asked.prompt.context), tokens.prompt(self.text_of(example)).tokens - asked.prompt.tokens))
        method, language = np.mean(costs, axis=0).tolist()
        length, context, shortened = np.mean(lengths, axis=0).tolist()
        cache = CacheReport(*(float(np.mean([getattr(c, f.name) for c in caches])) for f in fields(CacheReport)))

        def whole() -> Any:
            return self._run(lm, self.asked(lm, examples[0], tokens, fresh=True), tokens)

        with meter(lm):  # what a method on the cache says for itself is of the first example
            whole()
        return {
            "visual_tokens": 0.0,
            "text_tokens": length,
            "prompt_tokens": context,
            "flops": method + language,
            "flops_llm": language,
            "flops_method": method,
            **byte_costs(lm, cache, lm.dense_cache_bytes(1) * (length + shortened)),
            "seconds": seconds_of(whole, lm.device),
            "peak_bytes": float(lm.resident_bytes() + peak_bytes_of(whole, lm.device)),
        }

    def _run(self, lm: LmModel, asked: Asked, tokens: PromptTokenizer) -> Any:
        with read_contexts(lm, [asked.prompt.context]) as contexts:
            return self.scores_of(contexts, [asked], tokens)


CONTEXT_ID = "context"
"""Names the one document that a compressor of text is given."""


def listed(example: Example, field: str) -> list[str]:
    """A field that holds one text or several; in a CSV file several are written as a JSON list."""
    value = example.row.get(field)
    if isinstance(value, (list, tuple)):
        return [str(item) for item in value]
    text = shown(example.row, field)
    if text.startswith("["):
        try:
            found = json.loads(text)
        except ValueError:
            return [text]
        if isinstance(found, list):
            return [str(item) for item in found]
    return [text]
