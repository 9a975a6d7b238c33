"""The task ``vqa``: a user's own questions about images, for vision-language models.

Shape suffixes: B examples, T prompt tokens, Q question tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
import torch

from isoflop.core.errors import Infeasible, UserError
from isoflop.core.knobs import Knob
from isoflop.core.stage import StageContext
from isoflop.models.base import Model, ModelInfo
from isoflop.models.vlm import VlmBatch, VlmInfo, VlmModel
from isoflop.tasks.base import TASKS, Shard
from isoflop.tasks.data.base import DataTask, Example, shards
from isoflop.tasks.data.images import image_rows, opened, pixels_of
from isoflop.tasks.data.language import batches_of, listed
from isoflop.tasks.data.metrics import METRICS
from isoflop.tasks.data.prompts import PromptTokenizer, shown
from isoflop.tasks.data.rows import Rows
from isoflop.tasks.footprint import measure_answer

IMAGE = "<image>"
"""Stands in a prompt where the image does."""


@TASKS.register("vqa")
@dataclass(frozen=True, kw_only=True)
class Vqa(DataTask):
    """Questions about images, answered by greedy generation; an example's error is 1 − its score by ``metric``.

    ``data`` is a table with paths of images (relative to the table), questions and answers. The prompt has the image once, where
    ``<image>`` stands; what follows it is the question that query-conditioned methods see. Metric ``vqa`` is VQA accuracy: an answer
    counts a third for every person of ten who gave it, averaged over leaving one out; with fewer answers given it is ``exact``.
    Secondary metric: ``tokens``, how many were generated.
    """

    version: ClassVar[str] = "1"

    image: Annotated[str, Knob(doc="field of paths of images")] = "image"
    question: Annotated[str, Knob(doc="field of the question")] = "question"
    answers: Annotated[str, Knob(doc="field of the answers, one or a list")] = "answers"
    prompt: Annotated[str, Knob(doc="text around {question}, with <image> where the image stands")] = (
        "USER: <image>\n{question}\nAnswer with a single word or phrase. ASSISTANT:"
    )
    chat: Annotated[bool, Knob(doc="the checkpoint's chat template instead of prompt")] = False
    max_tokens: Annotated[int, Knob(low=1, high=10_000, doc="most generated tokens", unit="tokens")] = 16
    metric: Annotated[str, Knob(doc="how answer and references are compared; `isoflop tasks generate` names them")] = (
        "vqa"
    )

    @property
    def rows(self) -> Rows:
        """Questions with their images."""
        return image_rows(self.data, self.split, self.image)

    def check_rows(self, rows: Rows) -> None:
        """The fields are there; the metric exists; the prompt has its image and its question."""
        rows.require(self.question, "question", self.name)
        rows.require(self.answers, "answers", self.name)
        METRICS.get(self.metric, f"task {self.name}: metric")
        for wanted in (IMAGE, "{question}"):
            if self.prompt.count(wanted) != 1:
                raise UserError(
                    f"task {self.name}: prompt = {self.prompt!r} has {wanted} {self.prompt.count(wanted)} times; allowed: once"
                )

    def check(self, info: ModelInfo) -> None:
        """A vision-language model with a tokenizer."""
        if not isinstance(info, VlmInfo) or info.tokenizer is None:
            raise Infeasible(
                f"task {self.name} needs a vision-language model with a tokenizer, which {info.ref} is not"
            )
        super().check(info)

    @torch.no_grad()
    def evaluate(self, model: Model, ctx: StageContext, seed: int) -> Iterator[Shard]:
        """Ask shard by shard; questions of one length share a batch."""
        vlm = _vlm(model, self.name)
        tokens = PromptTokenizer(vlm.tokenizer, self.chat, f"task {self.name}: model {vlm.info.ref}")
        for examples in shards(self, self.examples(), self.shard, seed):
            prompts = [self._ids(vlm, example, tokens) for example in examples]
            scores, counts = np.zeros(len(examples)), np.zeros(len(examples))
            patches = vlm.info.geometry["visual_tokens"]
            lengths = [len(before) + len(behind) + patches for before, behind in prompts]
            for batch in batches_of([(len(before), len(behind)) for before, behind in prompts], lengths):
                said = self._answers(vlm, [examples[n] for n in batch], [prompts[n] for n in batch], tokens)
                for number, ids in zip(batch, said, strict=True):
                    text = tokens.text(ids).strip().partition("\n")[0]
                    scores[number] = METRICS.get(self.metric)(text, listed(examples[number], self.answers), "")
                    counts[number] = len(ids)
            yield Shard(np.array([example.id for example in examples]), 1.0 - scores, {"tokens": counts})

    @torch.no_grad()
    def measure(self, model: Model, ctx: StageContext) -> dict[str, float]:
        """Footprint of one question, from pixels to the first token of its answer; see ``measure_answer``."""
        vlm = _vlm(model, self.name)
        tokens = PromptTokenizer(vlm.tokenizer, self.chat, f"task {self.name}: model {vlm.info.ref}")
        example = self.examples()[0]
        ids = self._ids(vlm, example, tokens)
        return measure_answer(
            vlm, self._images(vlm, [example]), lambda hidden: self._batch(vlm, hidden, [ids], [example])
        )

    def _ids(self, vlm: VlmModel, example: Example, tokens: PromptTokenizer) -> tuple[list[int], list[int]]:
        """Tokens before and behind the image."""
        question = shown(example.row, self.question)
        if self.chat:
            content = [{"type": "image"}, {"type": "text", "text": question}]
            text = vlm.tokenizer.apply_chat_template(
                [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
            )
            if text.count(IMAGE) != 1:
                raise UserError(
                    f"task {self.name}: the chat template of {vlm.info.ref} does not place {IMAGE}; allowed: chat: false"
                )
        else:
            text = self.prompt.replace("{question}", question)
        before, _, behind = text.partition(IMAGE)
        first = [] if self.chat else list(tokens.first_ids)
        return [*first, *tokens.plain(before)], tokens.plain(behind)

    def _answers(
        self,
        vlm: VlmModel,
        examples: Sequence[Example],
        prompts: Sequence[tuple[list[int], list[int]]],
        tokens: PromptTokenizer,
    ) -> list[list[int]]:
        """What is generated for each of a batch."""
        ids_B = torch.tensor([example.id for example in examples])
        hidden = vlm.look(self._images(vlm, examples), ids_B)
        prompt = vlm.prompt_of(self._batch(vlm, hidden, prompts, examples))
        found: list[list[int]] = [[] for _ in examples]
        going = [True] * len(examples)
        for ids in vlm.generated(prompt, self.max_tokens):
            for row, token in enumerate(ids.tolist()):
                going[row] = going[row] and token not in tokens.end_ids
                if going[row]:
                    found[row].append(token)
                    going[row] = "\n" not in tokens.text(found[row]).strip()
            if not any(going):
                break
        return found

    def _batch(
        self, vlm: VlmModel, hidden: Any, prompts: Sequence[tuple[list[int], list[int]]], examples: Sequence[Example]
    ) -> VlmBatch:
        image = vlm.info.geometry["image_token"]
        prompt_BT = torch.tensor([[*before, image, *behind] for before, behind in prompts], device=vlm.device)
        question_BQ = torch.tensor([behind for _, behind in prompts], device=vlm.device)
        return VlmBatch(hidden, prompt_BT, question_BQ, torch.tensor([e.id for e in examples], device=vlm.device))

    def _images(self, vlm: VlmModel, examples: Sequence[Example]) -> torch.Tensor:
        side = vlm.vision.image_size
        return torch.stack([pixels_of(opened(e.row[self.image]), side, vlm.info.resizing) for e in examples])


def _vlm(model: Model, task: str) -> VlmModel:
    if not isinstance(model, VlmModel):
        raise Infeasible(f"task {task} needs a vision-language model, which {model.info.ref} is not")
    return model
