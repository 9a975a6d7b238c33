"""The conformance suite's model for prompt methods: an untrained reader of the fact world, and questions about it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from isoflop.core.folder_context import FolderContext
from isoflop.core.knobs import KnobValue
from isoflop.methods.base import Method, build
from isoflop.methods.probe import AbsoluteCost, Probe
from isoflop.methods.prompts.base import PromptMethod
from isoflop.methods.prompts.classifier import ClassifierStage
from isoflop.methods.prompts.units import words_of
from isoflop.methods.untrained import untrained_llama
from isoflop.models.hooks.attention import ATTENTION
from isoflop.models.hooks.matrices import MATRICES
from isoflop.models.hooks.prompt_text import PROMPT_TEXT, Compressed, joined
from isoflop.models.lm import LmInfo, LmModel
from isoflop.models.prompting import Prompt, answer_batch, tokenised
from isoflop.models.tiny.fact_reader import WORDS, WordTokenizer
from isoflop.models.worlds.fact_world import FactQuestion, question_number

Settings = Mapping[str, Sequence[Mapping[str, KnobValue]]]
FEW = {"chunks": 48, "epochs": 1}
"""Of a classifier that only has to exist."""


def untrained_reader(ctx: FolderContext, seed: int = 0) -> LmModel:
    """A Llama over the words of the fact world, with weights large enough to attend unevenly."""
    module, n_params, geometry = untrained_llama(
        len(WORDS), width=32, mlp=48, layers=2, heads=2, kv_heads=1, positions=256, spread=0.15, seed=seed
    )
    info = LmInfo(
        ref="probe/reader",
        family="probe",
        version="1",
        n_params=n_params,
        hooks=frozenset({ATTENTION, MATRICES, PROMPT_TEXT}),
        offers=frozenset({"tokenizer"}),
        geometry=geometry,
        text=None,
        tokenizer=WordTokenizer(),
    )  # fmt: skip
    return LmModel(info, module, lambda: ctx.get(WordTokenizer()))


class PromptProbe(Probe):
    """Logits of the answer behind a compressed prompt; the cost is the reader's tokens of all prompts.

    Args:
        settings: see ``Probe.settings``, by knob.
    """

    def __init__(self, settings: Settings | None = None, examples: int = 4) -> None:
        self.ctx = FolderContext.temporary()
        self.model: LmModel = untrained_reader(self.ctx)
        self.examples = examples
        self._settings = settings or {}
        self._round = 0
        self._questions = [question_number(n, 6, 6, 3, "probe") for n in range(examples)]

    def settings(self, knob: str) -> Sequence[Mapping[str, KnobValue]]:
        """What was given for the knob."""
        return self._settings.get(knob, ())

    def prepared(self, method: Method, seed: int) -> Any:
        """The value of the method's stage; a classifier is trained for a moment."""
        stage = method.prepare(self.model.info, None, seed)
        if isinstance(stage, ClassifierStage):
            stage = replace(stage, **FEW)
        return None if stage is None else self.ctx.get(stage)

    def forget(self) -> None:
        """Compute stages anew."""
        self.ctx = FolderContext.temporary()

    def verify(self, method: Method, prepared: Any) -> None:
        """Spans lie in the documents and give the text; other words never come in; who may not see the query does not."""
        assert isinstance(method, PromptMethod)
        for question in self._questions:
            compressed = self._shown(question)
            check_spans(question, compressed)
            compressor = self.model.occupant(PROMPT_TEXT)
            assert compressor is not None
            if not method.query_aware:
                other = compressor.fresh("something else altogether", question.documents)
                assert other == compressed, "the text depends on the query, which the method does not declare"

    def absolute(self) -> Sequence[AbsoluteCost]:
        """Every word and every mark is a token of the reader: counted in the text of heading, documents and question.

        Without documents, heading and question are left.
        """
        asked = [f"context: \nquestion: {question.query}" for question in self._questions]
        shown = [document.text for question in self._questions for document in question.documents]
        empty, documents = (sum(len(re.findall(r"\w+|[^\w\s]", text)) for text in texts) for texts in (asked, shown))
        return (
            AbsoluteCost(build("full-context", {}), "cost", empty + documents),
            AbsoluteCost(build("no-context", {}), "cost", empty),
        )

    @torch.no_grad()
    def outputs(self, rows: Sequence[int]) -> Tensor:
        """Logits where the answer is due, (B, words)."""
        batch = answer_batch([self._prompt(row) for row in rows])
        return self.model.logits(batch)[:, -1]

    def cost(self) -> float:
        """Tokens of all prompts."""
        return float(sum(self._prompt(row).tokens for row in range(self.examples)))

    def _shown(self, question: FactQuestion) -> Compressed:
        compressor = self.model.occupant(PROMPT_TEXT)
        if compressor is None:
            return Compressed(joined(question.documents), None)
        return compressor.compress(question.query, question.documents)

    def _prompt(self, row: int) -> Prompt:
        question = self._questions[row]
        return tokenised(self.model.tokenizer, self._shown(question).text, question.query, question.answer)


def check_spans(question: FactQuestion, compressed: Compressed) -> None:
    """Raise AssertionError unless the kept spans, in the documents' order, hold exactly the words of the text."""
    if compressed.kept is None:
        return
    texts = {document.id: document.text for document in question.documents}
    places = {document.id: number for number, document in enumerate(question.documents)}
    spans = [(places[name], start, end) for name, start, end in compressed.kept]
    assert spans == sorted(spans), "the kept spans are out of order"
    for (name, start, end), (after, following, _) in zip(compressed.kept, compressed.kept[1:], strict=False):
        assert name != after or end <= following, f"two kept spans of {name} overlap at {following}"
        assert start < end, f"an empty span of {name} at {start}"
    pieces = [texts[name][start:end] for name, start, end in compressed.kept]
    kept = [piece[a:b] for piece in pieces for a, b in words_of(piece)]
    shown = [compressed.text[a:b] for a, b in words_of(compressed.text)]
    assert kept == shown, "the text is not made of the kept spans"
