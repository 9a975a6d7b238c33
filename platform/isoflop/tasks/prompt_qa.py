"""The task ``prompt-qa``: questions about facts in documents, which a method may shorten before the reader sees them.

Shape suffixes: B examples of a shard.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Annotated, Any, ClassVar

import numpy as np
import torch

from isoflop.core.errors import Infeasible, IsoflopError
from isoflop.core.hashing import derive_seed
from isoflop.core.hook import Hook
from isoflop.core.knobs import Knob
from isoflop.core.stage import StageContext
from isoflop.models.base import Model, ModelInfo
from isoflop.models.budget import tokens_at_once
from isoflop.models.counting import flops_of
from isoflop.models.features import batches
from isoflop.models.hooks.attention import CacheReport
from isoflop.models.hooks.feed_forward import FEED_FORWARD
from isoflop.models.hooks.prompt_text import PROMPT_TEXT, Compressed, joined
from isoflop.models.lm import LmModel
from isoflop.models.metering import meter
from isoflop.models.prompting import Prompt, alike, answer_batch, tokenised
from isoflop.models.worlds import fact_world as world
from isoflop.models.worlds.fact_world import FactQuestion
from isoflop.tasks.base import TASKS, Shard, Task
from isoflop.tasks.footprint import byte_costs, decoder_cache, peak_bytes_of, seconds_of
from isoflop.tasks.language_task import lm_info, lm_model, observed, score

MEASURED = 8
"""Examples over which costs are averaged, since prompts differ in length."""
GATED = 64
"""Examples on which the reader has to show that it can answer at all."""


class ReaderGate(IsoflopError):
    """The reader cannot answer with whole documents, so that a curve over compressed ones would mean nothing."""


@TASKS.register("prompt-qa")
@dataclass(frozen=True)
class PromptQa(Task):
    """Answer a question about one fact among many; an example's error is 0 where every token of the answer is right.

    The method in the hook ``prompt_text`` gets question and documents and returns the text that the reader is shown. The job
    fails where the reader answers less than ``gate`` of the first questions with whole documents. Secondary metrics:
    ``nll`` of the answer in nats, ``answer_kept`` (the answer's word is still there), ``evidence_kept`` (share of the
    answering sentence's characters), ``prompt_tokens`` (as the reader cuts them, question and heading included).
    """

    version: ClassVar[str] = "1"
    metrics: ClassVar[tuple[str, ...] | None] = ("nll", "answer_kept", "prompt_tokens", "evidence_kept")
    hooks: ClassVar[frozenset[Hook[Any]]] = frozenset({PROMPT_TEXT})
    asks: ClassVar[frozenset[Hook[Any]]] = frozenset({PROMPT_TEXT, FEED_FORWARD})
    chance: ClassVar[float] = 1.0 - 1.0 / world.CHOICES

    examples: Annotated[int, Knob(low=1, high=100_000, doc="number of questions, each with documents of its own")] = 256
    shard: Annotated[
        int, Knob(low=1, high=100_000, doc="questions per shard; a pruner may stop a job between shards")
    ] = 64
    documents: Annotated[int, Knob(low=1, high=64, doc="documents of a context")] = 4
    facts: Annotated[int, Knob(low=1, high=32, doc="facts in the documents")] = 8
    filler: Annotated[int, Knob(low=0, high=256, doc="sentences in the documents that state no fact")] = 8
    gate: Annotated[
        float,
        Knob(low=0.0, high=1.0, doc="share of right answers with whole documents that a reader must reach; 0: any"),
    ] = 0.95

    def check(self, info: ModelInfo) -> None:
        """The hook, and room for the documents; a word takes a token at least."""
        super().check(info)
        words = 7 * self.facts + 6 * self.filler
        room = lm_info(info, self.name).geometry["positions"]
        if words > room:
            raise Infeasible(
                f"task {self.name}: facts = {self.facts} and filler = {self.filler} make {words} words or more; "
                f"model {info.ref} has room for {room} tokens"
            )

    def question(self, number: int) -> FactQuestion:
        """Example ``number``; a smaller number of examples is a prefix of a larger one."""
        return world.question_number(number, self.facts, self.filler, self.documents, self.name)

    @torch.no_grad()
    def evaluate(self, model: Model, ctx: StageContext, seed: int) -> Iterator[Shard]:
        """Ask the questions shard by shard, in a seeded order."""
        lm = lm_model(model, self.name)
        self.pass_gate(lm)
        order_N = np.random.default_rng(derive_seed("order", self.name, seed)).permutation(self.examples)
        for part in batches(self.examples, self.shard):
            ids_B = order_N[part]
            questions = [self.question(int(number)) for number in ids_B]
            shown = [context_of(lm, question) for question in questions]
            prompts = prompts_of(lm, questions, [compressed.text for compressed in shown])
            noted: dict[str, np.ndarray] = {}
            nll_B, wrong_B = answers(lm, prompts, noted)
            pairs = list(zip(questions, shown, strict=True))
            metrics = {
                "nll": nll_B,
                "answer_kept": np.array([float(_has_word(c.text, q.answer)) for q, c in pairs]),
                "prompt_tokens": np.array([float(prompt.tokens) for prompt in prompts]),
                **noted,
            }
            if all(compressed.kept is not None for compressed in shown):
                metrics["evidence_kept"] = np.array([evidence_kept(q, c) for q, c in pairs])
            yield Shard(ids_B, wrong_B, metrics)

    def pass_gate(self, lm: LmModel) -> None:
        """Nothing, where the reader can answer with whole documents or there is no compressor to judge.

        Raises:
            ReaderGate: it cannot.
        """
        if lm.occupant(PROMPT_TEXT) is None or not self.gate:
            return
        questions = [self.question(number) for number in range(min(GATED, self.examples))]
        _, wrong_B = answers(lm, prompts_of(lm, questions, [joined(q.documents) for q in questions]))
        right = 1.0 - float(wrong_B.mean())
        if right < self.gate:
            raise ReaderGate(
                f"task {self.name}: model {lm.info.ref} answers {right:.0%} of {len(questions)} questions with whole "
                f"documents, less than gate = {self.gate:g}; train it longer, ask about fewer facts, or set gate to 0 "
                "to run it all the same"
            )

    @torch.no_grad()
    def measure(self, model: Model, ctx: StageContext) -> dict[str, float]:
        """Mean footprint of single questions, from documents to the answer's logits: the compressor's pass, the reader's.

        ``text_tokens`` is the mean over all examples, of the prompt that the reader is shown. FLOPs and bytes are means over
        the first examples, seconds those of the first.
        """
        lm = lm_model(model, self.name)
        questions = [self.question(number) for number in range(self.examples)]
        prompts = prompts_of(lm, questions, [context_of(lm, question).text for question in questions])
        costs, caches = [], []
        for question, prompt in list(zip(questions, prompts, strict=True))[:MEASURED]:
            batch = answer_batch([prompt]).to(lm.device)
            method, _ = flops_of(lambda question=question: context_of(lm, question, fresh=True))  # type: ignore[misc]
            language, _ = flops_of(lambda batch=batch: lm.logits(batch))  # type: ignore[misc]
            costs.append((method, language))
            caches.append(decoder_cache(lm, lambda batch=batch: lm.logits(batch)))  # type: ignore[misc]
        method, language = np.mean(costs, axis=0).tolist()
        cache = CacheReport(*(float(np.mean([getattr(c, f.name) for c in caches])) for f in fields(CacheReport)))
        whole = prompts_of(lm, questions[:MEASURED], [joined(q.documents) for q in questions[:MEASURED]])
        first = questions[0]

        def answer() -> torch.Tensor:
            shown = context_of(lm, first, fresh=True).text
            return lm.logits(answer_batch(prompts_of(lm, [first], [shown])).to(lm.device))

        with meter(lm):  # what a method on the cache says for itself is of the first question
            answer()
        return {
            "visual_tokens": 0.0,
            "text_tokens": float(np.mean([prompt.tokens for prompt in prompts])),
            "flops": method + language,
            "flops_llm": language,
            "flops_method": method,
            **byte_costs(lm, cache, float(np.mean([lm.dense_cache_bytes(p.length) for p in whole]))),
            "seconds": seconds_of(answer, lm.devices),
            "peak_bytes": float(lm.resident_bytes() + peak_bytes_of(answer, lm.devices)),
        }


def context_of(lm: LmModel, question: FactQuestion, fresh: bool = False) -> Compressed:
    """The text that the reader is shown: the documents, or what the compressor in place makes of them.

    Args:
        fresh: compress anew, though the same was compressed before.
    """
    compressor = lm.occupant(PROMPT_TEXT)
    if compressor is None:
        spans = tuple((document.id, 0, len(document.text)) for document in question.documents)
        return Compressed(joined(question.documents), spans)
    compress = compressor.fresh if fresh else compressor.compress
    return compress(question.query, question.documents)


def prompts_of(lm: LmModel, questions: Sequence[FactQuestion], contexts: Sequence[str]) -> list[Prompt]:
    """Prompts in the reader's tokens.

    Raises:
        Infeasible: one is longer than the reader's room.
    """
    tokenizer, room = lm.tokenizer, lm.room
    pairs = zip(questions, contexts, strict=True)
    prompts = [tokenised(tokenizer, context, question.query, question.answer) for question, context in pairs]
    longest = max(prompt.length for prompt in prompts)
    if longest > room:
        raise Infeasible(
            f"task prompt-qa: a prompt takes {longest} tokens of model {lm.info.ref}, which has room for {room}; "
            "lower facts or filler"
        )
    return prompts


def answers(
    lm: LmModel, prompts: Sequence[Prompt], noted: dict[str, np.ndarray] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Of each prompt: negative log-likelihood of the answer in nats, and 1 where a token of it is wrong; each (B,).

    Args:
        noted: is given what the method on the feed-forward blocks noted of each prompt, by name; None where the prompts
            are none of the task's examples.
    """
    nll_B, wrong_B = np.zeros(len(prompts)), np.zeros(len(prompts))
    for numbers in alike(prompts, tokens_at_once(lm, max((prompt.length for prompt in prompts), default=1))):
        nll, right, scored = score(lm, answer_batch([prompts[number] for number in numbers]))
        nll_B[numbers], wrong_B[numbers] = nll, (right < scored).astype(np.float64)
        if noted is not None:
            for name, x_B in observed(lm).items():
                noted.setdefault(name, np.zeros(len(prompts)))[numbers] = x_B
    return nll_B, wrong_B


def evidence_kept(question: FactQuestion, compressed: Compressed) -> float:
    """Share of the answering sentence's characters, spaces aside, that lie in kept units."""
    name, first, last = question.evidence
    text = next(document.text for document in question.documents if document.id == name)
    inside = {
        place
        for document, start, end in compressed.kept or ()
        if document == name
        for place in range(max(start, first), min(end, last))
    }
    wanted = [place for place in range(first, last) if not text[place].isspace()]
    return sum(place in inside for place in wanted) / len(wanted)


def _has_word(text: str, word: str) -> bool:
    return word in text.replace(".", " ").split()
