"""The task ``generate``: what a model writes behind a prompt, compared with references."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from isoflop.core.hook import Hook
from isoflop.core.knobs import Knob
from isoflop.core.rows import Rows
from isoflop.models.hooks.prompt_text import PROMPT_TEXT
from isoflop.tasks.base import TASKS
from isoflop.tasks.data.base import Example
from isoflop.tasks.data.greedy import GreedyTask
from isoflop.tasks.data.language import Asked, check_listed, listed
from isoflop.tasks.data.metrics import METRICS
from isoflop.tasks.data.prompts import Template


@TASKS.register("generate")
@dataclass(frozen=True, kw_only=True)
class Generate(GreedyTask):
    """Greedy generation behind a prompt; an example's error is 1 − its score by ``metric``, the best over its references.

    Generation ends at the model's own end of text, at a text of ``stop``, or after ``max_tokens``. The prompt's context is
    compressed before what follows it is read. Secondary metric: ``tokens``, how many were generated.
    """

    version: ClassVar[str] = "3"
    asks: ClassVar[frozenset[Hook[Any]]] = frozenset({PROMPT_TEXT})

    prompt: Annotated[str, Knob(doc="template over fields, as {question}; {{ is a brace")] = "{prompt}"
    references: Annotated[str, Knob(doc="field of the right answers, one or a list")] = "references"
    context: Annotated[str, Knob(doc="field of the context, which methods compress; empty for {context} or none")] = ""
    stop: Annotated[tuple[str, ...], Knob(doc="texts that end an answer; not part of it")] = ("\n",)
    metric: Annotated[
        str, Knob(doc=f"how answer and references are compared: {', '.join(METRICS.names())}, or one of your own")
    ] = "exact"
    pattern: Annotated[str, Knob(doc="metric regex: what is taken of the answer; its first group, if it has one")] = ""

    def template(self) -> Template:
        """As given."""
        return Template.of(self.prompt, self.context, f"task {self.name}: prompt")

    def check_rows(self, rows: Rows) -> None:
        """The fields of template and references; the metric exists."""
        super().check_rows(rows)
        rows.require(self.references, "references", self.name)
        METRICS.get(self.metric, f"task {self.name}: metric")

    def check_example(self, example: Example) -> None:
        """A prompt, and a reference at least."""
        super().check_example(example)
        check_listed(self, example, "references")

    def ended(self, text: str) -> bool:
        """A text of ``stop`` stands in it; a line that begins empty has not ended."""
        return any(stop and stop in text.lstrip() for stop in self.stop)

    def score(self, asked: Asked, text: str) -> float:
        """By ``metric``, up to the first text of ``stop``."""
        text = text.lstrip()
        for stop in self.stop:
            text = text.partition(stop)[0] if stop else text
        return float(METRICS.get(self.metric)(text.strip(), listed(asked.example, self.references), self.pattern))
