"""The task ``choice``: a question with several options, of which a model finds one the most likely."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np

from isoflop.core.errors import UserError
from isoflop.core.knobs import Knob
from isoflop.core.rows import Row, Rows, chosen, read
from isoflop.core.stage import StageContext
from isoflop.models.base import Model, ModelInfo
from isoflop.models.contexts import Contexts
from isoflop.models.encoder import EncoderInfo, EncoderModel
from isoflop.tasks.base import TASKS, Shard
from isoflop.tasks.data import choice_encoders
from isoflop.tasks.data.base import Example, bad_row
from isoflop.tasks.data.language import Asked, LanguageDataTask, listed, score_tails
from isoflop.tasks.data.prompts import PromptText, PromptTokenizer, Template, TokenPrompt

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@TASKS.register("choice")
@dataclass(frozen=True, kw_only=True)
class Choice(LanguageDataTask):
    """Multiple choice by log-likelihood; an example's error is 0 where the right option is the most likely one.

    Options are scored behind one prompt, which is read, and whose context is compressed, once per example. ``normalise`` says by
    what an option's log-likelihood is divided before options are compared: by nothing, its tokens, or its bytes. ``shots`` puts
    answered examples before the context, of ``shots_split`` or else of the data themselves, without the one that is asked.
    Secondary metrics: ``nll`` of the right option in nats; ``margin``, by how many (normalised) nats it leads the best other.

    Unless ``prompt`` is given, the prompt is the context with an empty line behind it, ``Question: …`` and ``Answer:``. An option
    follows after a space. ``answer`` holds the option's number, counted from 0, its letter, or its text.

    Encoders choose in ways of their own. One that fills masks (…ForMaskedLM) scores an option by its pseudo-log-likelihood behind the
    prompt: the sum over its tokens, each masked while all others are seen (arXiv 1910.14659). One with a head for options
    (…ForMultipleChoice) is given each option in a pair, behind the question: context, and question with option, where there is a
    context; the filled ``prompt``, and the option, where one is given.
    """

    version: ClassVar[str] = "3"
    metrics: ClassVar[tuple[str, ...] | None] = ("nll", "margin")

    question: Annotated[str, Knob(doc="field of the question")] = "question"
    options: Annotated[str, Knob(doc="field of the options, a list")] = "options"
    answer: Annotated[str, Knob(doc="field of the right option: number from 0, letter, or text")] = "answer"
    context: Annotated[str, Knob(doc="field of the context, which methods compress; empty for none")] = ""
    prompt: Annotated[str, Knob(doc="template over fields, up to where an option follows; empty for the usual one")] = (
        ""
    )
    normalise: Annotated[
        str, Knob(choices=("none", "tokens", "bytes"), doc="what an option's log-likelihood is divided by")
    ] = "none"
    shots: Annotated[int, Knob(low=0, high=64, doc="answered examples before the context")] = 0
    shots_split: Annotated[str, Knob(doc="split that answered examples come from; empty for the data's own")] = ""

    def template(self) -> Template:
        """The given one, or context, question and ``Answer:``."""
        before = f"{{{self.context}}}\n\n" if self.context else ""
        usual = f"{before}Question: {{{self.question}}}\nAnswer:"
        return Template.of(self.prompt or usual, self.context, f"task {self.name}: prompt")

    def check_rows(self, rows: Rows) -> None:
        """The fields of template, options and answer."""
        for option in (
            "options",
            "answer",
            *(() if self.prompt else ("question",)),
            *(("context",) if self.context else ()),
        ):
            rows.require(getattr(self, option), option, self.name)
        super().check_rows(rows)

    def check(self, info: ModelInfo) -> None:
        """Rows that can be asked, and enough of them for the answered examples."""
        super().check(info)
        if isinstance(info, EncoderInfo):
            choice_encoders.check_chooses(self, info)
        if self.shots:
            self._shots(self.examples()[0])

    def check_example(self, example: Example) -> None:
        """A prompt, options, and the right one among them."""
        super().check_example(example)
        self._right(example, self.options_of(example))

    def content(self) -> str:
        """The data, and those that the answered examples come from."""
        own = super().content()
        return f"{own}+{self._pool().content}" if self.shots and self.shots_split else own

    def text_of(self, example: Example) -> PromptText:
        """Answered examples, then the prompt."""
        text = super().text_of(example)
        shots = "".join(f"{self._solved(row)}\n\n" for row in self._shots(example))
        return PromptText(shots + text.before, text.context, text.behind, text.marked)

    def tails_of(
        self, example: Example, text: PromptText, prompt: TokenPrompt, tokens: PromptTokenizer
    ) -> list[tuple[int, ...]]:
        """What follows the context, with each of the options."""
        options = self.options_of(example)
        self._right(example, options)
        return [(*prompt.behind, *tokens.answer(text, f" {option}")) for option in options]

    def scores_of(self, contexts: Contexts, asked: Sequence[Asked], tokens: PromptTokenizer) -> list[dict[str, float]]:
        """Every option of every example, the first of each together, then the second …"""
        found = score_tails(contexts, [(one.tails, len(one.prompt.behind)) for one in asked])
        return [self._scored(one, np.array([nll for nll, _ in row])) for one, row in zip(asked, found, strict=True)]

    def _scored(self, asked: Asked, nll_O: np.ndarray) -> dict[str, float]:
        lengths_O = np.array([len(tail) - len(asked.prompt.behind) for tail in asked.tails], dtype=float)
        return self.scored(asked.example, nll_O, lengths_O)

    def scored(self, example: Example, nll_O: np.ndarray, tokens_O: np.ndarray) -> dict[str, float]:
        """Error and metrics of an example, by its options' negative log-likelihoods and their tokens."""
        by = {
            "none": np.ones(len(nll_O)),
            "tokens": tokens_O,
            "bytes": np.array([len(option.encode()) for option in self.options_of(example)], dtype=float),
        }[self.normalise]
        return self.judged(example, nll_O, -nll_O / by)

    def judged(self, example: Example, nll_O: np.ndarray, scores_O: np.ndarray) -> dict[str, float]:
        """Error and metrics of an example whose best option has the highest score."""
        right = self._right(example, self.options_of(example))
        margin = scores_O[right] - np.delete(scores_O, right).max()
        return {"error": float(scores_O.argmax() != right), "nll": float(nll_O[right]), "margin": float(margin)}

    def evaluate(self, model: Model, ctx: StageContext, seed: int) -> Iterator[Shard]:
        """Ask shard by shard."""
        if isinstance(model, EncoderModel):
            return choice_encoders.evaluate(self, model, ctx, seed)
        return super().evaluate(model, ctx, seed)

    def measure(self, model: Model, ctx: StageContext) -> dict[str, float]:
        """Mean footprint of single examples; of an encoder see ``choice_encoders``."""
        if isinstance(model, EncoderModel):
            return choice_encoders.measure(self, model)
        return super().measure(model, ctx)

    def check_reader(self, info: ModelInfo) -> None:
        """A language model, or an encoder."""
        if not isinstance(info, EncoderInfo):
            super().check_reader(info)

    def options_of(self, example: Example) -> list[str]:
        """The options of an example.

        Raises:
            UserError: there are less than two, or empty ones.
        """
        value = example.row.get(self.options)
        if isinstance(value, dict) and "text" in value:  # as several data sets of the hub have them, beside labels
            options = [str(option) for option in value["text"]]
        else:
            options = [] if value is None else listed(example, self.options)
        if len(options) < 2 or not all(options):
            raise bad_row(
                self, example, f"options = {self.options!r} holds {options}; allowed: a list of two texts or more"
            )
        return options

    def _right(self, example: Example, options: Sequence[str]) -> int:
        value = example.row.get(self.answer)
        text = str(value).strip()
        labels = (
            (example.row.get(self.options) or {}).get("label")
            if isinstance(example.row.get(self.options), dict)
            else None
        )
        for named in (options, labels or [], list(LETTERS[: len(options)])):
            if text in named and not isinstance(value, int):
                return list(named).index(text)
        number = int(text) if text.lstrip("-").isdigit() else -1
        if not 0 <= number < len(options):
            raise bad_row(
                self,
                example,
                f"answer = {self.answer!r} holds {value!r}, which is none of the options {list(options)}; allowed: "
                f"0 … {len(options) - 1}, a letter, or an option's text",
            )
        return number

    def _pool(self) -> Rows:
        return read(self.data, self.shots_split) if self.shots_split else self.rows

    def _shots(self, example: Example) -> list[Row]:
        if not self.shots:
            return []
        pool = self._pool()
        places = chosen(len(pool), self.shots + 1, self.seed + 1, pool.ids_N)
        others = [place for place in places if int(pool.ids_N[place]) != example.id]
        if len(others) < self.shots:
            raise UserError(f"task {self.name}: shots = {self.shots}, but {pool.name} has {len(pool)} rows")
        return [pool.rows[place] for place in others[: self.shots]]

    def _solved(self, row: Row) -> str:
        example = Example(0, row)
        options = self.options_of(example)
        return f"{self.template().fill(row).text} {options[self._right(example, options)]}"
