"""Tasks on text of a user's own, for language models: contexts that methods compress, and what is asked behind them.

Shape suffixes: B examples of a shard.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar

import numpy as np
import torch

from isoflop.core.errors import Infeasible, UserError
from isoflop.core.hook import Hook
from isoflop.core.knobs import Knob
from isoflop.core.rows import Rows
from isoflop.core.stage import StageContext
from isoflop.methods.base import Method
from isoflop.models.base import Model, ModelInfo
from isoflop.models.budget import tokens_at_once
from isoflop.models.contexts import Contexts, Ids, read_contexts, room_for
from isoflop.models.decoder_model import DecoderModel
from isoflop.models.hooks.attention import ATTENTION
from isoflop.models.hooks.feed_forward import FEED_FORWARD
from isoflop.models.hooks.prompt_text import PROMPT_TEXT, Document
from isoflop.models.lm import LmModel
from isoflop.tasks.base import Shard, Task
from isoflop.tasks.data.base import DataTask, Example, bad_row, shards
from isoflop.tasks.data.costs import MEASURED, Priced, costs_of
from isoflop.tasks.data.prompts import PromptText, PromptTokenizer, Template, TokenPrompt, shown
from isoflop.tasks.language_task import lm_info, lm_model

MOST_PADDING = 0.25
"""Padding of a batch over its tokens, from which shorter rows have one of their own; ``FREE_PADDING`` tokens are not counted."""
FREE_PADDING = 128
"""A pass for itself reads all weights, which takes as long as computing about so many tokens."""
MOST_MASKED = 1024
"""Tokens up to which contexts are padded to one length where no method sits in the attention: Hugging Face then masks every pair of them."""


@dataclass(frozen=True)
class Asked:
    """One example as the model reads it.

    Attributes:
        text: the prompt, with its context as it was shortened.
        prompt: the same in tokens.
        tails: what the task scores or continues behind the context.
    """

    example: Example
    text: PromptText
    prompt: TokenPrompt
    tails: tuple[tuple[int, ...], ...]

    @property
    def length(self) -> int:
        """Tokens of the longest pass."""
        return len(self.prompt.context) + max(len(tail) for tail in self.tails)


@dataclass(frozen=True, kw_only=True)
class ContextTask(Task):
    """Base class of tasks that put prompts before a language model, each with a context that methods compress.

    A context is read once per example; what follows it is scored, or goes on, behind the compressed context. Subclasses give the
    examples (``examples_for``), each one's prompt (``text_of``), what is run behind the context (``tails_of``), and the scores of a
    batch (``scores_of``).
    """

    needs: ClassVar[frozenset[str]] = frozenset({"tokenizer"})
    asks: ClassVar[frozenset[Hook[Any]]] = frozenset({PROMPT_TEXT, FEED_FORWARD})

    chat: Annotated[bool, Knob(doc="lay the checkpoint's chat template around every prompt")] = False
    shard: Annotated[
        int, Knob(low=1, high=100_000, doc="examples per shard; a pruner may stop a job between shards")
    ] = 64

    @abstractmethod
    def examples_for(self, lm: LmModel, tokens: PromptTokenizer) -> list[Example]:
        """All examples."""

    @abstractmethod
    def text_of(self, example: Example) -> PromptText:
        """The prompt of an example as text."""

    def prompt_of(self, example: Example, text: PromptText, tokens: PromptTokenizer) -> TokenPrompt:
        """The prompt in tokens."""
        return tokens.prompt(text)

    @abstractmethod
    def tails_of(
        self, example: Example, text: PromptText, prompt: TokenPrompt, tokens: PromptTokenizer
    ) -> list[tuple[int, ...]]:
        """What is run behind the context of an example, at least one row of tokens."""

    @abstractmethod
    def scores_of(self, contexts: Contexts, asked: Sequence[Asked], tokens: PromptTokenizer) -> list[dict[str, float]]:
        """Of each example of a batch: ``error``, and secondary metrics by name."""

    @property
    def names_context(self) -> bool:
        """Whether the prompts name a part that methods on text may shorten."""
        return True

    @property
    def generated(self) -> int:
        """Most tokens that are generated behind a tail."""
        return 0

    def alike(self, asked: Asked) -> Any:
        """Examples of one batch agree in this."""
        return None

    def check(self, info: ModelInfo) -> None:
        """A model that can read the prompts."""
        super().check(info)
        self.check_reader(info)

    def check_reader(self, info: ModelInfo) -> None:
        """A language model with a tokenizer."""
        lm_info(info, self.name)

    def check_method(self, method: Method, info: ModelInfo) -> None:
        """Refuse methods on the text of a context where none is named."""
        if PROMPT_TEXT in method.hooks and not self.names_context:
            raise Infeasible(
                f"task {self.name}: method {method.name} shortens a context, and the prompt names none; name its field: "
                "context: FIELD"
            )

    @torch.no_grad()
    def evaluate(self, model: Model, ctx: StageContext, seed: int) -> Iterator[Shard]:
        """Ask shard by shard."""
        lm = lm_model(model, self.name)
        tokens = self.tokens_of(lm)
        for examples in shards(self, self.examples_for(lm, tokens), self.shard, seed):
            asked = [self.asked(lm, example, tokens) for example in examples]
            found: list[dict[str, float]] = [{} for _ in asked]
            for numbers in self.groups(lm, asked):
                batch = [asked[number] for number in numbers]
                with read_contexts(lm, [one.prompt.context for one in batch], known=True) as contexts:
                    for number, scores in zip(numbers, self.scores_of(contexts, batch, tokens), strict=True):
                        found[number] = scores
            columns = {name: np.array([scores[name] for scores in found]) for name in found[0]}
            yield Shard(np.array([one.example.id for one in asked]), columns.pop("error"), columns)

    def tokens_of(self, lm: LmModel) -> PromptTokenizer:
        """How prompts become the model's tokens."""
        return PromptTokenizer(lm.tokenizer, self.chat, f"task {self.name}: model {lm.info.ref}")

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
        prompt = self.prompt_of(example, text, tokens)
        asked = Asked(example, text, prompt, tuple(self.tails_of(example, text, prompt, tokens)))
        room_for(lm, asked.length + self.generated, f"task {self.name}: a prompt with its answer")
        return asked

    def groups(self, lm: LmModel, asked: Sequence[Asked]) -> Iterator[list[int]]:
        """Numbers of examples that share a batch."""
        observing = lm.occupant(FEED_FORWARD) is not None
        kinds = [(self.alike(one), tuple(map(len, one.tails)) if observing else None) for one in asked]
        return batches_of(lm, kinds, [one.length for one in asked], [len(one.prompt.context) for one in asked])

    @torch.no_grad()
    def measure(self, model: Model, ctx: StageContext) -> dict[str, float]:
        """Mean footprint of single examples, from the text to the last scored token; see ``costs_of``."""
        lm = lm_model(model, self.name)
        tokens = self.tokens_of(lm)
        return costs_of(lm, [self._priced(lm, one, tokens) for one in self.examples_for(lm, tokens)[:MEASURED]])

    def _priced(self, lm: LmModel, example: Example, tokens: PromptTokenizer) -> Priced:
        asked = self.asked(lm, example, tokens)
        whole = self.prompt_of(example, self.text_of(example), tokens).tokens
        return Priced(
            lambda: self.asked(lm, example, tokens, fresh=True),
            lambda asked: self._run(lm, asked, tokens),
            asked.length,
            len(asked.prompt.context),
            asked.length + whole - asked.prompt.tokens,
        )

    def _run(self, lm: LmModel, asked: Asked, tokens: PromptTokenizer) -> Any:
        with read_contexts(lm, [asked.prompt.context]) as contexts:
            return self.scores_of(contexts, [asked], tokens)


def batches_of(
    model: DecoderModel, kinds: Sequence[Any], lengths: Sequence[int], contexts: Sequence[int] | None = None
) -> Iterator[list[int]]:
    """Numbers of rows that share a batch: of one kind and similar length, as many as a pass has memory for with their padding.

    One long row would make all others as long: of the 24 paragraphs of ``sweeps/real.yaml`` in one batch two thirds was padding.

    Args:
        contexts: tokens of each row's context, where contexts are read first; long ones that would need a mask stand apart.
    """
    of_kind: dict[Any, list[int]] = {}
    masked = contexts is not None and model.occupant(ATTENTION) is None
    for number, kind in enumerate(kinds):
        alone = contexts[number] if masked and contexts is not None and contexts[number] > MOST_MASKED else None
        of_kind.setdefault((kind, alone), []).append(number)
    for numbers in of_kind.values():
        batch: list[int] = []
        real = 0
        for number in sorted(numbers, key=lengths.__getitem__):
            size, real = lengths[number] * (len(batch) + 1), real + lengths[number]
            most = tokens_at_once(model, lengths[number])
            if batch and (size > most or size - real > FREE_PADDING + MOST_PADDING * real):
                yield batch
                batch, real = [], lengths[number]
            batch.append(number)
        yield batch


def score_tails(contexts: Contexts, rows: Sequence[tuple[Sequence[Ids], int]]) -> list[list[tuple[float, bool]]]:
    """Of each row of a batch, each tail's negative log-likelihood in nats, and whether greedy decoding would give it.

    Args:
        rows: tails of each context, and how many tokens at their beginning are given.
    """
    # the shortest of each together, and so on: what one pass scores is of similar length
    orders = [sorted(range(len(tails)), key=lambda n: len(tails[n])) for tails, _ in rows]
    found: list[dict[int, tuple[float, bool]]] = [{} for _ in rows]
    for place in range(max(map(len, orders))):
        # a context with fewer tails has its last one scored again, so that rows stay together
        chosen = [order[min(place, len(order) - 1)] for order in orders]
        tails = [tails[n] for n, (tails, _) in zip(chosen, rows, strict=True)]
        scores = contexts.score(tails, [len(tail) - given for tail, (_, given) in zip(tails, rows, strict=True)])
        for row, n in enumerate(chosen):
            found[row][n] = (float(scores.nll_B[row]), bool(scores.greedy_B[row]))
    return [[own[n] for n in range(len(own))] for own in found]


@dataclass(frozen=True, kw_only=True)
class LanguageDataTask(ContextTask, DataTask):
    """Base class of tasks whose prompts are made of a user's rows by a template."""

    @abstractmethod
    def template(self) -> Template:
        """The prompt over the fields of a row."""

    @property
    def names_context(self) -> bool:
        """Whether the template has one."""
        return self.template().context is not None

    def check_rows(self, rows: Rows) -> None:
        """The template's fields are there."""
        for field in self.template().fields:
            rows.require(field, "prompt", self.name)

    def check_example(self, example: Example) -> None:
        """Every field of the template has a value."""
        self._filled(example)

    def examples_for(self, lm: LmModel, tokens: PromptTokenizer) -> list[Example]:
        """The rows that are taken."""
        return self.examples()

    def text_of(self, example: Example) -> PromptText:
        """The template, filled."""
        return self._filled(example)

    def _filled(self, example: Example) -> PromptText:
        try:
            return self.template().fill(example.row)
        except UserError as error:
            raise bad_row(self, example, str(error)) from None


CONTEXT_ID = "context"
"""Names the one document that a compressor of text is given."""


def check_listed(task: Task, example: Example, option: str) -> None:
    """Raise UserError where a field that an option names, of one text or several, holds none."""
    field = getattr(task, option)
    if example.row.get(field) is None or not any(text.strip() for text in listed(example, field)):
        raise bad_row(task, example, f"{option} = {field!r} holds nothing; allowed: a text, or a list of one or more")


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
