"""The task ``vqa``: a user's own questions about images, for vision-language models."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np

from isoflop.core.knobs import Knob
from isoflop.core.rows import Rows
from isoflop.core.stage import StageContext
from isoflop.models.base import Model, ModelInfo
from isoflop.tasks.base import TASKS, Shard
from isoflop.tasks.data.base import DataTask, Example, shards
from isoflop.tasks.data.image_questions import ImagePrompt, ImageQuestions, check_model, check_prompt
from isoflop.tasks.data.images import image_rows
from isoflop.tasks.data.language import check_listed, listed
from isoflop.tasks.data.metrics import METRICS
from isoflop.tasks.data.prompts import shown


@TASKS.register("vqa")
@dataclass(frozen=True, kw_only=True)
class Vqa(DataTask):
    """Questions about images, answered by greedy generation; an example's error is 1 − its score by ``metric``.

    ``data`` is a table with paths of images (relative to the table), questions and answers. The prompt has the image once, where
    ``<image>`` stands; what follows it is the question that query-conditioned methods see. Metric ``vqa`` is VQA accuracy: an answer
    counts a third for every person of ten who gave it, averaged over leaving one out; with fewer answers given it is ``exact``.
    Secondary metric: ``tokens``, how many were generated.
    """

    version: ClassVar[str] = "2"
    metrics: ClassVar[tuple[str, ...] | None] = ("tokens",)

    image: Annotated[str, Knob(doc="field of paths of images")] = "image"
    question: Annotated[str, Knob(doc="field of the question")] = "question"
    answers: Annotated[str, Knob(doc="field of the answers, one or a list")] = "answers"
    prompt: Annotated[str, Knob(doc="text around {question}, with <image> where the image stands")] = (
        "USER: <image>\n{question}\nAnswer with a single word or phrase. ASSISTANT:"
    )
    chat: Annotated[bool, Knob(doc="the checkpoint's chat template instead of prompt")] = False
    max_tokens: Annotated[int, Knob(low=1, high=10_000, doc="most generated tokens", unit="tokens")] = 16
    metric: Annotated[
        str, Knob(doc=f"how answer and references are compared: {', '.join(METRICS.names())}, or one of your own")
    ] = "vqa"

    @property
    def rows(self) -> Rows:
        """Questions with their images."""
        return image_rows(self.data, self.split, self.image)

    def check_rows(self, rows: Rows) -> None:
        """The fields are there; the metric exists; the prompt has its image and its question."""
        rows.require(self.question, "question", self.name)
        rows.require(self.answers, "answers", self.name)
        METRICS.get(self.metric, f"task {self.name}: metric")
        check_prompt(self.prompt, f"task {self.name}")

    def check_example(self, example: Example) -> None:
        """A question, and an answer at least."""
        for option in ("question", "answers"):
            check_listed(self, example, option)

    def check(self, info: ModelInfo) -> None:
        """A vision-language model with a tokenizer."""
        check_model(info, f"task {self.name}")
        super().check(info)

    def evaluate(self, model: Model, ctx: StageContext, seed: int) -> Iterator[Shard]:
        """Ask shard by shard; questions of one length share a batch."""
        questions = self.questions(model)
        for examples in shards(self, self.examples(), self.shard, seed):
            prompts = [self.prompted(questions, example) for example in examples]
            said = questions.answers(prompts, self.max_tokens, lambda text: "\n" in text.strip())
            texts = [questions.tokens.text(ids).strip().partition("\n")[0] for ids in said]
            score = METRICS.get(self.metric)
            errors = [1.0 - score(t, listed(e, self.answers), "") for t, e in zip(texts, examples, strict=True)]
            counts = np.array([float(len(ids)) for ids in said])
            yield Shard(np.array([example.id for example in examples]), np.array(errors), {"tokens": counts})

    def measure(self, model: Model, ctx: StageContext) -> dict[str, float]:
        """Footprint of one question, from pixels to the first token of its answer; see ``measure_answer``."""
        questions = self.questions(model)
        return questions.measure(self.prompted(questions, example) for example in self.examples())

    def questions(self, model: Model) -> ImageQuestions:
        """How this task asks a model."""
        return ImageQuestions(model, self.prompt, self.chat, f"task {self.name}")

    def prompted(self, questions: ImageQuestions, example: Example) -> ImagePrompt:
        """An example as the model is asked."""
        return questions.prompt(example.id, example.row[self.image], shown(example.row, self.question))
