"""A model of this platform as EleutherAI's harness sees it: the harness asks in text, methods compress its contexts.

Needs the package lm-eval: nothing but the task imports this module, and only when it runs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from isoflop.models.contexts import read_contexts, room_for
from isoflop.models.lm import LmModel
from isoflop.tasks.data.language import batches_of, score_tails
from isoflop.tasks.data.prompts import PromptText, PromptTokenizer, TokenPrompt
from isoflop.tasks.harness.common import cut, generation


class HarnessModel(LM):
    """Answers the harness' requests behind compressed contexts.

    Args:
        question: text at whose last place in a prompt the context ends; empty for all of the prompt but its last token.
        what: for messages.
    """

    def __init__(self, lm: LmModel, tokens: PromptTokenizer, question: str, what: str) -> None:
        super().__init__()
        self._lm = lm
        self.tokens = tokens
        self._question = question
        self._what = what

    @property
    def tokenizer_name(self) -> str:
        """Names the tokenizer in the harness' own cache keys."""
        return self._lm.info.ref.replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The tokenizer's, as the harness logs it."""
        return str(getattr(self._lm.tokenizer, "chat_template", "") or "")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as the checkpoint's template lays it out."""
        laid: str = self._lm.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return laid

    def text(self, context: str) -> PromptText:
        """A prompt of the harness, cut where its context ends."""
        place = context.rfind(self._question) if self._question else -1
        if place <= 0:
            return PromptText("", context, "", marked=False)
        return PromptText("", context[:place], context[place:])

    @torch.no_grad()
    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Log-likelihoods of continuations in nats; those of one context share its pass."""
        by_context: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            by_context.setdefault(request.args[0], []).append(number)
        prompts, tails = [], []
        for context, numbers in by_context.items():
            text = self.text(context)
            prompt = self.tokens.prompt(text)
            prompts.append(prompt)
            answers = [self.tokens.answer(text, requests[number].args[1]) for number in numbers]
            tails.append([(*prompt.behind, *answer) for answer in answers])
        found: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        groups = list(by_context.values())
        lengths = [len(p.context) + max(map(len, own)) for p, own in zip(prompts, tails, strict=True)]
        room_for(self._lm, max(lengths, default=0), f"{self._what}: a prompt with its answer")
        of_contexts = [len(prompt.context) for prompt in prompts]
        for batch in batches_of(self._lm, [None] * len(prompts), lengths, of_contexts):
            with read_contexts(self._lm, [prompts[n].context for n in batch]) as contexts:
                rows = [(tails[n], len(prompts[n].behind)) for n in batch]
                for n, scores in zip(batch, score_tails(contexts, rows), strict=True):
                    for number, (nll, greedy) in zip(groups[n], scores, strict=True):
                        found[number] = -nll, greedy
        return found

    @torch.no_grad()
    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Log-likelihoods of whole texts in nats, in windows of the model's room."""
        room, first = self._lm.room, self.tokens.first_id
        totals = []
        for request in requests:
            ids, _ = self.tokens.with_ends(request.args[0], special=False)
            windows = map(make_disjoint_window, get_rolling_token_windows(ids, first, room - 1, 1))
            total = 0.0
            for context, continuation in windows:
                with read_contexts(self._lm, [context]) as contexts:
                    total -= float(contexts.score([continuation], [len(continuation)]).nll_B[0])
            totals.append(total)
        return totals

    @torch.no_grad()
    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Greedy answers up to the first text that ends them."""
        prompts, wanted = [], []
        for request in requests:
            context, options = request.args
            prompts.append(self.tokens.prompt(self.text(context), whole=True))  # as the harness' own models read it
            wanted.append(generation(options, self._what))
        said = [""] * len(requests)
        kinds = [(len(p.behind), most, ends) for p, (most, ends) in zip(prompts, wanted, strict=True)]
        lengths = [prompt.tokens + most for prompt, (most, _) in zip(prompts, wanted, strict=True)]
        for batch in batches_of(self._lm, kinds, lengths, [len(prompt.context) for prompt in prompts]):
            most, ends = wanted[batch[0]]
            room_for(self._lm, max(prompts[n].tokens for n in batch) + most, f"{self._what}: a prompt with its answer")
            for n, text in zip(batch, self._generated([prompts[n] for n in batch], most, ends), strict=True):
                said[n] = text
        return said

    def _generated(self, prompts: Sequence[TokenPrompt], most: int, ends: Sequence[str]) -> list[str]:
        def enough(ids: list[int]) -> bool:
            text = self.tokens.text(ids)
            return any(end in text for end in ends)

        with read_contexts(self._lm, [prompt.context for prompt in prompts]) as contexts:
            found = contexts.generate([prompt.behind for prompt in prompts], most, self.tokens.end_ids, enough)
        return [cut(self.tokens.text(ids), ends) for ids in found]
