"""A pool of training documents from which a method keeps some, and the lessons that are cut from what is kept.

Shape suffixes: N documents of the pool, K kept documents, B batch, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from isoflop.core.hashing import derive_seed
from isoflop.core.stage import Stage, StageContext
from isoflop.models.worlds.lm_text import Tokens, TokensStage
from isoflop.models.worlds.text_domains import DomainsStage, domain_of


@dataclass(frozen=True, slots=True)
class Text:
    """All that a scorer sees of a document: its text, and its length in the model's tokens."""

    text: str
    tokens: int


@dataclass(frozen=True, slots=True)
class Document:
    """A document of the pool or of the target: its text, domain, and length in the model's tokens.

    It is no :class:`Text`, so that a type checker refuses to hand a labelled document to a scorer.
    """

    text: str
    domain: str
    tokens: int

    def unlabelled(self) -> Text:
        """The document without its domain."""
        return Text(self.text, self.tokens)


@dataclass(frozen=True)
class TrainingPool:
    """Where a model's training documents and the examples of what it is wanted for come from.

    Attributes:
        corpus: the texts.
        tokens: the pool in the model's tokens.
        target: the domain that is wanted; None for whoever does not ask.
    """

    corpus: DomainsStage
    tokens: TokensStage
    target: str | None

    @property
    def examples(self) -> TokensStage | None:
        """The target examples in the model's tokens."""
        if self.target is None:
            return None
        return TokensStage(self.corpus, self.tokens.tokenizer, f"target-{self.target}")

    def stages(self) -> tuple[Stage, ...]:
        """Stages that ``pool`` and ``wanted`` ask for."""
        return tuple(stage for stage in (self.corpus, self.tokens, self.examples) if stage is not None)

    def pool(self, ctx: StageContext) -> list[Document]:
        """The documents of the pool, in the order of their numbers."""
        return _documents(ctx, self.corpus, self.tokens)

    def wanted(self, ctx: StageContext) -> list[Document]:
        """The target examples, in a random order that depends on their names only; none without a target."""
        return [] if self.examples is None else _documents(ctx, self.corpus, self.examples)


def _documents(ctx: StageContext, corpus: DomainsStage, tokens: TokensStage) -> list[Document]:
    texts = sorted(ctx.get(corpus)[tokens.split].items())
    lengths = np.diff(ctx.get(tokens).starts)
    return [Document(text, domain_of(name), int(n)) for (name, text), n in zip(texts, lengths, strict=True)]


def pool_lessons(
    tokens: Tokens, kept_K: np.ndarray, steps: int, batch: int, context: int, seed: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Inputs and targets (B, T) of every step: ``steps`` · ``batch`` · ``context`` tokens whatever is kept.

    The kept documents follow each other without gaps, each once per epoch and in a new order in each; the rows of a step
    are consecutive, and the next step goes on where they end. So arms of a comparison train on equally many tokens and
    differ in which, and how often.

    Args:
        kept_K: ascending, so that keeping everything gives the same lessons whoever decides it.
    """
    rng = np.random.default_rng(derive_seed("pool lessons", seed))
    documents = [tokens.ids_N[tokens.starts[n] : tokens.starts[n + 1]] for n in kept_K]
    stream = np.zeros(0, dtype=np.int64)
    for _ in range(steps):
        wanted = batch * context + 1
        while len(stream) < wanted:
            stream = np.concatenate([stream, *(documents[n] for n in rng.permutation(len(documents)))])
        rows = torch.from_numpy(stream[:wanted].copy())
        yield rows[:-1].view(batch, context), rows[1:].view(batch, context)
        stream = stream[wanted - 1 :]
