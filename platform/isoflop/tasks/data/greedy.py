"""Tasks on rows whose answers are generated greedily behind the compressed context."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from isoflop.core.knobs import Knob
from isoflop.models.contexts import Contexts
from isoflop.tasks.data.base import Example
from isoflop.tasks.data.language import Asked, LanguageDataTask
from isoflop.tasks.data.prompts import PromptText, PromptTokenizer, TokenPrompt


@dataclass(frozen=True, kw_only=True)
class GreedyTask(LanguageDataTask):
    """Base class: says when an answer has ended, and what it is worth. Secondary metric: ``tokens``, how many were generated."""

    metrics: ClassVar[tuple[str, ...] | None] = ("tokens",)

    max_tokens: Annotated[int, Knob(low=1, high=100_000, doc="most generated tokens", unit="tokens")] = 32

    @abstractmethod
    def ended(self, text: str) -> bool:
        """Whether what was generated so far holds the end of the answer."""

    @abstractmethod
    def score(self, asked: Asked, text: str) -> float:
        """What an answer is worth, in [0, 1]; its error is 1 − that."""

    def tails_of(
        self, example: Example, text: PromptText, prompt: TokenPrompt, tokens: PromptTokenizer
    ) -> list[tuple[int, ...]]:
        """What follows the context."""
        return [prompt.behind]

    def alike(self, asked: Asked) -> Any:
        """Tokens behind the context, since a row that ends earlier would go on behind padding."""
        return len(asked.prompt.behind)

    @property
    def generated(self) -> int:
        """``max_tokens``."""
        return self.max_tokens

    def scores_of(self, contexts: Contexts, asked: Sequence[Asked], tokens: PromptTokenizer) -> list[dict[str, float]]:
        """Generate for all, then score each."""
        answers = contexts.generate(
            [one.prompt.behind for one in asked],
            self.max_tokens,
            tokens.end_ids,
            lambda ids: self.ended(tokens.text(ids)),
        )
        return [
            {"error": 1.0 - float(self.score(one, tokens.text(ids))), "tokens": float(len(ids))}
            for one, ids in zip(asked, answers, strict=True)
        ]
