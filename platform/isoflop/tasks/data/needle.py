"""The task ``needle``: facts hidden in long text, and questions about them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np

from isoflop.core.errors import Infeasible, UserError
from isoflop.core.hashing import derive_seed
from isoflop.core.hook import Hook
from isoflop.core.knobs import Knob
from isoflop.core.rows import Rows, named, read, text_files, text_of
from isoflop.models.base import ModelInfo
from isoflop.models.contexts import Contexts
from isoflop.models.hooks.prompt_text import PROMPT_TEXT
from isoflop.models.lm import LmModel
from isoflop.tasks.base import TASKS
from isoflop.tasks.data.base import Example
from isoflop.tasks.data.language import Asked, ContextTask, listed
from isoflop.tasks.data.needles import KINDS, QUESTIONS, Puzzle, check_kinds, hidden
from isoflop.tasks.data.prompts import PromptText, PromptTokenizer, TokenPrompt
from isoflop.tasks.language_task import lm_info

_SENTENCE = re.compile(r"(?<=[.!?])\s+|\n\s*\n")


@TASKS.register("needle")
@dataclass(frozen=True, kw_only=True)
class Needle(ContextTask):
    """Questions about facts hidden in text of a user's own; an example's error is the share of answers that are not given.

    The kinds are those of RULER: a number to be found under one key (``single``), among other keys (``multi-key``), several
    under one key (``multi-value``) or several keys (``multi-query``), chains of variables (``variable-tracking``), the most common
    words of a list (``common-words``), or of a made-up language (``frequent-words``), and, with ``questions``, a
    user's own questions whose passages stand among others (``question-answering``). The text is the context that
    methods compress, before the question is read. There are ``repeats`` examples per kind, length and depth.

    A length counts all tokens of the prompt. Secondary metrics: ``tokens`` generated, ``found`` (all answers given).
    """

    version: ClassVar[str] = "2"
    metrics: ClassVar[tuple[str, ...] | None] = ("tokens", "found")
    asks: ClassVar[frozenset[Hook[Any]]] = frozenset({PROMPT_TEXT})

    haystack: Annotated[str, Knob(path=True, doc="text file or folder of text files to hide facts in")]
    lengths: Annotated[tuple[int, ...], Knob(low=64, high=10_000_000, doc="lengths of prompts", unit="tokens")] = (
        1024,
    )
    depths: Annotated[
        tuple[float, ...], Knob(low=0.0, high=1.0, doc="where the asked fact stands, from beginning to end")
    ] = (0.0, 0.25, 0.5, 0.75, 1.0)
    kinds: Annotated[tuple[str, ...], Knob(doc=f"of {', '.join((*KINDS, QUESTIONS))}")] = ("single",)
    repeats: Annotated[int, Knob(low=1, high=10_000, doc="examples per kind, length and depth")] = 4
    questions: Annotated[
        str, Knob(path=True, doc="rows with passage, question and answers, for question-answering")
    ] = ""
    seed: Annotated[int, Knob(low=0, high=2**31 - 1, doc="draws facts and places")] = 0

    def content(self) -> str:
        """The text, and the questions."""
        own = self._text().content
        return f"{own}+{read(self.questions).content}" if self.questions else own

    def check(self, info: ModelInfo) -> None:
        """Kinds that exist, room for the lengths, questions where they are asked."""
        super().check(info)
        check_kinds(self.kinds, f"task {self.name}: kinds")
        for option in ("lengths", "depths", "kinds"):
            if not getattr(self, option):
                raise UserError(f"task {self.name}: {option} is an empty list")
        if (QUESTIONS in self.kinds) != bool(self.questions):
            raise UserError(f"task {self.name}: the kind {QUESTIONS} needs questions: FILE, and only it does")
        if self.questions:
            rows = read(self.questions)
            for field in ("passage", "question", "answers"):
                rows.require(field, "questions", self.name)
        room = lm_info(info, self.name).geometry["positions"]
        if max(self.lengths) > room:
            raise Infeasible(
                f"task {self.name}: lengths name {max(self.lengths)} tokens; model {info.ref} has room for {room}"
            )
        self._text()

    @property
    def generated(self) -> int:
        """Lengths count the answer, so that nothing more is needed."""
        return 0

    def alike(self, asked: Asked) -> Any:
        """Tokens behind the context, since a row that ends earlier would go on behind padding."""
        return len(asked.prompt.behind), asked.example.row["tokens"]

    def examples_for(self, lm: LmModel, tokens: PromptTokenizer) -> list[Example]:
        """Every kind at every length and depth."""
        sentences = _sentences(tuple(row["text"] for row in self._text().rows))
        sizes = _sizes(sentences, tokens)
        rows, keys = [], []
        for kind in self.kinds:
            for length in self.lengths:
                for depth in self.depths:
                    for number in range(self.repeats):
                        key = f"{self.content()}:{kind}:{length}:{depth}:{number}:{self.seed}"
                        rng = np.random.default_rng(derive_seed("needle", key))
                        row = self._row(kind, length, depth, number, rng, sentences, sizes, tokens)
                        rows.append({**row, "kind": kind, "length": length, "depth": depth})
                        keys.append(key)
        found = named(rows, self.haystack, keys)
        return [Example(int(number), row) for number, row in zip(found.ids_N, found.rows, strict=True)]

    def text_of(self, example: Example) -> PromptText:
        """Instruction, text with its needles, question."""
        return PromptText(example.row["before"], example.row["context"], example.row["question"])

    def tails_of(
        self, example: Example, text: PromptText, prompt: TokenPrompt, tokens: PromptTokenizer
    ) -> list[tuple[int, ...]]:
        """The question."""
        return [prompt.behind]

    def scores_of(self, contexts: Contexts, asked: Sequence[Asked], tokens: PromptTokenizer) -> list[dict[str, float]]:
        """How many of the answers are said."""
        most = asked[0].example.row["tokens"]
        said = contexts.generate(
            [one.prompt.behind for one in asked], most, tokens.end_ids, lambda ids: "\n" in tokens.text(ids).lstrip()
        )
        scores = []
        for one, ids in zip(asked, said, strict=True):
            text = tokens.text(ids).lstrip().partition("\n")[0].lower()
            given = self._given(one.example, text)
            scores.append({"error": 1.0 - given, "tokens": float(len(ids)), "found": float(given == 1.0)})
        return scores

    def _given(self, example: Example, text: str) -> float:
        """The share of answers in a text; of a user's own question any one of them is enough."""
        answers = example.row["answers"]
        hits = [answer.lower() in text for answer in answers]
        return float(any(hits)) if example.row["kind"] == QUESTIONS else sum(hits) / len(hits)

    def _row(
        self,
        kind: str,
        length: int,
        depth: float,
        number: int,
        rng: np.random.Generator,
        sentences: Sequence[str],
        sizes: np.ndarray,
        tokens: PromptTokenizer,
    ) -> dict[str, Any]:
        if kind == QUESTIONS:
            return self._question(length, depth, number, rng, tokens)
        puzzle = KINDS[kind](rng)
        if puzzle.fill is not None:
            return self._filled(puzzle, length, tokens)
        start = int(rng.integers(len(sentences)))
        order = [(start + n) % len(sentences) for n in range(len(sentences))]
        state = int(rng.integers(2**31))
        count = int(np.searchsorted(np.cumsum(np.resize(sizes[order], 4 * length)), length, side="right"))
        while True:
            chosen = [sentences[order[n % len(order)]] for n in range(count)]
            context = hidden(puzzle, chosen, depth, np.random.default_rng(state))
            over = self._over(puzzle.before, context, puzzle.question, puzzle.tokens, length, tokens)
            if over <= 0 or not count:
                return self._fits(puzzle, context, over, length)
            count = max(0, count - max(1, int(over / max(sizes.mean(), 1) / 2)))

    def _filled(self, puzzle: Puzzle, length: int, tokens: PromptTokenizer) -> dict[str, Any]:
        assert puzzle.fill is not None
        low, high = 1, length
        while low < high:  # the most words that fit
            middle = (low + high + 1) // 2
            over = self._over(puzzle.before, puzzle.fill(middle), puzzle.question, puzzle.tokens, length, tokens)
            low, high = (middle, high) if over <= 0 else (low, middle - 1)
        context = puzzle.fill(low)
        return self._fits(
            puzzle, context, self._over(puzzle.before, context, puzzle.question, puzzle.tokens, length, tokens), length
        )

    def _question(
        self, length: int, depth: float, number: int, rng: np.random.Generator, tokens: PromptTokenizer
    ) -> dict[str, Any]:
        rows = read(self.questions)
        place = int(np.random.default_rng(derive_seed("question", self.seed, number)).integers(len(rows)))
        own = rows.rows[place]
        puzzle = Puzzle(
            "Answer the question by the passages below.\n\n",
            (str(own["passage"]),),
            f"\n\nQuestion: {own['question']}\nAnswer:",
            tuple(listed(Example(0, own), "answers")),
        )
        others = [
            str(rows.rows[n]["passage"])
            for n in rng.permutation(len(rows))
            if rows.rows[n]["passage"] != own["passage"]
        ]
        count = len(others)
        while True:
            context = hidden(puzzle, others[:count], depth, rng).strip()
            over = self._over(puzzle.before, context, puzzle.question, puzzle.tokens, length, tokens)
            if over <= 0 or not count:
                return self._fits(puzzle, context, over, length)
            count = count - 1 if count < 16 else int(count * 0.9)

    def _over(self, before: str, context: str, question: str, answer: int, length: int, tokens: PromptTokenizer) -> int:
        """Tokens by which a prompt with its answer exceeds a length."""
        return tokens.prompt(PromptText(before, context, question)).tokens + answer - length

    def _fits(self, puzzle: Puzzle, context: str, over: int, length: int) -> dict[str, Any]:
        if over > 0:
            raise Infeasible(
                f"task {self.name}: lengths = {length} leaves no room for question and answer; {over} tokens more are needed"
            )
        return {
            "before": puzzle.before,
            "context": context,
            "question": puzzle.question,
            "answers": list(puzzle.answers),
            "tokens": puzzle.tokens,
        }

    def _text(self) -> Rows:
        files = text_files(self.haystack)
        return _read(tuple((path, path.stat().st_size, path.stat().st_mtime_ns) for path in files), self.haystack)


@lru_cache(maxsize=8)  # by size and time of change
def _read(files: tuple[tuple[Path, int, int], ...], name: str) -> Rows:
    found = named([{"text": text_of(path)} for path, _, _ in files], name)
    if not any(row["text"].strip() for row in found.rows):
        raise UserError(f"haystack {name}: holds no text")
    return found


@lru_cache(maxsize=8)
def _sentences(texts: tuple[str, ...]) -> tuple[str, ...]:
    """All sentences, white space evened out."""
    return tuple(" ".join(part.split()) for text in texts for part in _SENTENCE.split(text) if part.strip())


def _sizes(sentences: Sequence[str], tokens: PromptTokenizer) -> np.ndarray:
    """Tokens of each sentence, one at least."""
    return np.array([max(1, len(tokens.with_ends(f" {sentence}")[0])) for sentence in sentences])
