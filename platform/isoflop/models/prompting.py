"""Prompts as tokens: context, question, and the answer whose tokens are scored.

Shape suffixes: B batch, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from isoflop.models.hooks.prompt_text import prompt_of, token_ids
from isoflop.models.lm import NOT_SCORED, LmBatch


@dataclass(frozen=True)
class Prompt:
    """One prompt in token ids: the context with its heading, the question, and the answer."""

    context: tuple[int, ...]
    question: tuple[int, ...]
    answer: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """What the reader reads before it answers."""
        return len(self.context) + len(self.question)

    @property
    def length(self) -> int:
        """Tokens of the forward pass that scores the answer, whose last token is never read."""
        return self.tokens + len(self.answer) - 1


def tokenised(tokenizer: Any, context: str, query: str, answer: str) -> Prompt:
    """A prompt in a reader's tokens; the answer follows the question after a space."""
    before, question = prompt_of(context, query)
    return Prompt(*(tuple(token_ids(tokenizer, part)) for part in (before, question, f" {answer}")))


def answer_batch(prompts: Sequence[Prompt]) -> LmBatch:
    """Prompts as one batch, padded on the left, every answer token scored.

    Each answer token is predicted from the prompt and the answer before it, so that an answer is right where greedy
    decoding would give it. The contexts are the prefix, which methods on the cache compress.

    Raises:
        ValueError: questions or answers of different lengths, which would leave no common prefix.
    """
    if len({(len(prompt.question), len(prompt.answer)) for prompt in prompts}) != 1:
        raise ValueError("the prompts of a batch need questions of one length and answers of one length")
    length = max(prompt.length for prompt in prompts)
    ids_BT = torch.zeros(len(prompts), length, dtype=torch.int64)
    targets_BT = torch.full_like(ids_BT, NOT_SCORED)
    valid_BT = torch.zeros(len(prompts), length, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        start = length - prompt.length
        ids_BT[row, start:] = torch.tensor([*prompt.context, *prompt.question, *prompt.answer[:-1]])
        targets_BT[row, length - len(prompt.answer) :] = torch.tensor(prompt.answer)
        valid_BT[row, start:] = True
    behind = prompts[0].length - len(prompts[0].context)
    return LmBatch(ids_BT, targets_BT, length - behind, None if valid_BT.all() else valid_BT)


def alike(prompts: Sequence[Prompt], most_tokens: int) -> Iterator[list[int]]:
    """Numbers of prompts that can share a batch of at most ``most_tokens`` tokens, padding included."""
    groups: dict[tuple[int, int], list[int]] = {}
    for number, prompt in enumerate(prompts):
        groups.setdefault((len(prompt.question), len(prompt.answer)), []).append(number)
    for numbers in groups.values():
        batch: list[int] = []
        longest = 0
        for number in numbers:
            longest = max(longest, prompts[number].length)
            if batch and longest * (len(batch) + 1) > most_tokens:
                yield batch
                batch, longest = [], prompts[number].length
            batch.append(number)
        yield batch
