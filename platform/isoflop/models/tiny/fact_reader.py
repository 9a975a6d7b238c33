"""A reader of the fact world: its tokenizer, its lessons, its training.

Trained on questions from the start, so small a decoder stays at chance for thousands of steps. It first learns to look
back on repeated random sequences over its whole vocabulary, then to answer about more and more facts, stated whole or with
words missing, as compressors leave them. Every fourth lesson is the plain text with every word scored, so that the
reader's probabilities of words mean something too.

Shape suffixes: B batch, T tokens.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from isoflop.core.hashing import derive_seed
from isoflop.core.knobs import Knob
from isoflop.core.stage import Stage, StageContext
from isoflop.models.base import Checkpoint
from isoflop.models.lm import NOT_SCORED, LmBatch
from isoflop.models.tiny.lm_config import FACT_SIZES
from isoflop.models.tiny.lm_training import LmRecipe, accuracy_of, save_lm, train_lm, untrained_lm
from isoflop.models.training.loop import Keeper
from isoflop.models.worlds import fact_world as world
from isoflop.models.worlds.calibration import CalibrationText
from isoflop.models.worlds.lm_text import TokenizerSource, read_tokenizer
from isoflop.models.worlds.recall_world import distinct
from isoflop.models.worlds.words import UNKNOWN, word_tokenizer

WORDS: tuple[str, ...] = (UNKNOWN, *world.vocabulary())
WORD_ID = {word: number for number, word in enumerate(WORDS)}
CALIBRATION_BATCH = 16
CALIBRATION_FACTS = 8


@dataclass(frozen=True)
class FactRecipe(LmRecipe):
    """First repeated sequences, then questions; a part is over when its loss falls below ``solved``."""

    steps: Annotated[int, Knob(low=1, high=1_000_000, doc="optimiser steps")] = 1800
    batch: Annotated[int, Knob(low=1, high=4096, doc="contexts per step")] = 16
    length: Annotated[int, Knob(low=8, high=512, doc="repeated sequences: their length", unit="tokens")] = 96
    facts: Annotated[int, Knob(low=2, high=32, doc="most facts of a context")] = 8
    filler: Annotated[int, Knob(low=0, high=64, doc="most sentences of a context that state no fact")] = 8
    queries: Annotated[int, Knob(low=1, high=32, doc="most questions about a context")] = 8
    whole: Annotated[float, Knob(low=0.0, high=1.0, doc="share of contexts without missing words")] = 0.4
    solved: Annotated[float, Knob(low=0.0, high=10.0, doc="loss in nats below which the lessons become harder")] = 0.3


@dataclass(frozen=True)
class WordTokenizer(TokenizerSource):
    """A tokenizer with a token for every word and mark of the fact world, and one for all others.

    Args:
        words: the vocabulary in the order of the ids; the unknown word first.
    """

    kind: ClassVar[str] = "word-tokenizer"

    words: tuple[str, ...] = WORDS

    def not_byte_level(self) -> str:
        """Other words are all the same to it."""
        return "its tokens are the words of a small world"

    def compute(self, ctx: StageContext, folder: Path) -> None:
        """Save in ``save_pretrained`` form."""
        word_tokenizer(self.words).save_pretrained(folder)

    def load(self, ctx: StageContext, folder: Path) -> Any:
        """The tokenizer."""
        return read_tokenizer(folder)


class FactLessons:
    """Batches of the curriculum; ``learned`` closes the loop that makes them harder."""

    def __init__(self, recipe: FactRecipe, seed: int) -> None:
        self.recipe = recipe
        self.level = 0
        self._rng = np.random.default_rng(derive_seed("fact lessons", seed))
        self._judged = True

    def __iter__(self) -> Iterator[LmBatch]:
        """All batches in order."""
        for step in range(self.recipe.steps):
            plain = self.level > 0 and step % 4 == 0
            self._judged = not plain
            yield self._repeat() if self.level == 0 else self._plain() if plain else self._questions()

    def learned(self, loss: float) -> None:
        """Take notice of the loss of the batch that was given last."""
        if self._judged and loss < self.recipe.solved:
            self.level = min(self.recipe.facts, max(2, self.level + 1))

    def check(self, rows: int) -> LmBatch:
        """Questions about whole contexts with as many facts as there will be."""
        return padded([question_row(self._rng, self.recipe, self.recipe.facts, 1.0) for _ in range(rows)])

    def _repeat(self) -> LmBatch:
        length = self.recipe.length
        period = int(self._rng.integers(4, max(5, 2 * length // 5)))
        once_BP = distinct(self._rng, 2 * self.recipe.batch, period, 1, len(WORDS))
        ids_BT = torch.from_numpy(np.tile(once_BP, (1, -(-length // period)))[:, :length])
        targets_BT = torch.full_like(ids_BT, NOT_SCORED)
        targets_BT[:, period - 1 : -1] = ids_BT[:, period:]
        return LmBatch(ids_BT, targets_BT)

    def _questions(self) -> LmBatch:
        shares = [1.0] + [self.recipe.whole] * (self.recipe.batch - 1)  # one row, at least, has something to ask
        return padded([question_row(self._rng, self.recipe, self.level, whole) for whole in shares])

    def _plain(self) -> LmBatch:
        rows = [
            context_words(world.draw_sentences(self._rng, self.level, self.level)) for _ in range(self.recipe.batch)
        ]
        return padded([(words, words[1:]) for words in map(ids_of, rows)])


def question_row(rng: np.random.Generator, recipe: FactRecipe, facts: int, whole: float) -> tuple[list[int], list[int]]:
    """A context and questions about it: token ids, and the target behind each (NOT_SCORED but for answers).

    Args:
        whole: probability that no word is missing; otherwise only facts are asked whose entity and value are there.
    """
    filler = int(rng.integers(0, round(recipe.filler * facts / recipe.facts) + 1))
    sentences = world.draw_sentences(rng, facts, filler)
    words, stated = context_words(sentences), [s.fact for s in sentences if s.fact is not None]
    if rng.random() >= whole:
        words, stated = thinned(rng, sentences)
    asked = [stated[i] for i in rng.permutation(len(stated))[: recipe.queries]]
    ids, targets = ids_of(words), [NOT_SCORED] * len(words)
    for fact in asked:
        question = ids_of(["question", ":", *split_words(fact.question)])
        ids += [*question, WORD_ID[fact.value]]
        targets += [NOT_SCORED] * (len(question) - 1) + [WORD_ID[fact.value], NOT_SCORED]
    return ids, targets


def thinned(rng: np.random.Generator, sentences: list[world.Sentence]) -> tuple[list[str], list[world.Fact]]:
    """A context with words missing, and the facts of which entity and value are left.

    Words of facts and all others are dropped at rates of their own, from none to all but a few, so that what any
    compressor leaves looks familiar.
    """
    content, other = 1.0 - 0.5 * rng.random() ** 2, rng.random()
    words, stated = ["context", ":"], []
    for sentence in sentences:
        own = sentence.fact.content if sentence.fact is not None else ()
        kept = [w for w in split_words(sentence.text) if rng.random() < (content if w in own else other)]
        words += kept
        if sentence.fact is not None and {sentence.fact.entity, sentence.fact.value} <= set(kept):
            stated.append(sentence.fact)
    return words, stated


def context_words(sentences: list[world.Sentence]) -> list[str]:
    """The words of a prompt's first part."""
    return ["context", ":", *(word for sentence in sentences for word in split_words(sentence.text))]


def split_words(text: str) -> list[str]:
    """Words and marks, as the tokenizer cuts them."""
    return text.replace(".", " .").replace(":", " :").split()


def ids_of(words: list[str]) -> list[int]:
    """Token ids."""
    return [WORD_ID[word] for word in words]


def padded(rows: list[tuple[list[int], list[int]]]) -> LmBatch:
    """Rows of ids and targets as one batch; what fills the right ends is scored nowhere and seen by nothing scored."""
    length = max(len(ids) for ids, _ in rows)
    ids_BT = torch.zeros(len(rows), length, dtype=torch.int64)
    targets_BT = torch.full((len(rows), length), NOT_SCORED)
    for row, (ids, targets) in enumerate(rows):
        ids_BT[row, : len(ids)] = torch.tensor(ids)
        targets_BT[row, : len(targets)] = torch.tensor(targets)
    return LmBatch(ids_BT, targets_BT)


@dataclass(frozen=True)
class FactStage(Stage):
    """A reader of the fact world in ``save_pretrained`` form, with its tokenizer.

    Trained on the CPU wherever it runs, so that the weights do not depend on the worker's device.
    """

    kind: ClassVar[str] = "fact-lm"

    size: str
    seed: int
    recipe: tuple[tuple[str, Any], ...]
    tokenizer: WordTokenizer

    def compute(self, ctx: StageContext, folder: Path) -> None:
        """Train, save; ``training.json`` holds loss, the facts reached, and accuracy with whole contexts."""
        started = time.process_time()
        recipe = FactRecipe(**dict(self.recipe))
        module = untrained_lm(FACT_SIZES[self.size], len(WORDS), self.seed)
        lessons = FactLessons(recipe, self.seed)
        losses = train_lm(module, recipe, lessons, lessons.learned, Keeper(ctx.scratch(self)))
        figures = {"facts_reached": float(lessons.level), "accuracy": accuracy_of(module, lessons.check(64))}
        ctx.get(self.tokenizer).save_pretrained(folder)
        save_lm(folder, module, figures, losses, started)

    def load(self, ctx: StageContext, folder: Path) -> Checkpoint:
        """Where the files are."""
        return Checkpoint(folder, json.loads((folder / "training.json").read_text()))


@dataclass(frozen=True)
class FactText(CalibrationText):
    """Whole contexts with questions and answers, as in training, cut to one length."""

    length: int = 128

    def batches(self, ctx: StageContext, examples: int, seed: int) -> Iterator[Tensor]:
        """Rows of ``length`` tokens: contexts with their questions, one after the other."""
        rng = np.random.default_rng(derive_seed("calibration", seed))
        recipe = FactRecipe()
        for first in range(0, examples, CALIBRATION_BATCH):
            rows = []
            for _ in range(min(CALIBRATION_BATCH, examples - first)):
                row: list[int] = []
                while len(row) < self.length:
                    row += question_row(rng, recipe, CALIBRATION_FACTS, 1.0)[0]
                rows.append(row[: self.length])
            yield torch.tensor(rows)
