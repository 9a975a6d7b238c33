"""What a vision-language model is taught on easy-VQA: the data's training split, its words, and lessons of it.

The data are those that ``isoflop fetch easy-vqa`` puts into the cache. Stages and jobs name them by their content; whoever
computes reads them anew and refuses others.

Shape suffixes: N questions, B batch, Q question tokens, C channels, H height, W width.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from isoflop.core.errors import UserError
from isoflop.core.hashing import content_hash, derive_seed, file_hash
from isoflop.core.public import local_path
from isoflop.core.stage import StageContext
from isoflop.models.features import FeatureTable, LayerKey, TowerSource
from isoflop.models.worlds.lessons import Lesson, LessonSource
from isoflop.models.worlds.lm_text import TokenizerSource, read_tokenizer
from isoflop.models.worlds.words import UNKNOWN, word_tokenizer

DATA = "public:easy-vqa/train.jsonl"
IMAGE_SIDE = 64
IMAGE_WORD = "<image>"
SPECIAL = (UNKNOWN, IMAGE_WORD)
IMAGE = SPECIAL.index(IMAGE_WORD)
VOCAB_SIZE = 64
"""Rows of the embedding, so that a model can be described where the data are not; more words than that are refused."""
CHUNK = 256
_WORD = re.compile(r"\w+|[^\w\s]+")


@dataclass(frozen=True)
class Questions:
    """The training split.

    Attributes:
        content: names the data: questions, answers and the images' bytes, whatever their order.
        images: paths, in the order of the numbers of images.
        asked: number of the image, question and answer, in words, in an order of their own.
    """

    content: str
    images: tuple[Path, ...]
    asked: tuple[tuple[int, tuple[str, ...], str], ...]

    @cached_property
    def words(self) -> tuple[str, ...]:
        """The vocabulary in the order of the ids: special words first.

        Raises:
            UserError: there are more than ``VOCAB_SIZE``.
        """
        found = {word for _, question, answer in self.asked for word in (*question, answer)}
        if len(found) + len(SPECIAL) > VOCAB_SIZE:
            raise UserError(f"data {DATA}: {len(found)} different words; allowed: up to {VOCAB_SIZE - len(SPECIAL)}")
        return (*SPECIAL, *sorted(found))

    def pixels(self, numbers: range) -> np.ndarray:
        """Images (B, 3, 64, 64) in [0, 1]."""
        from PIL import Image

        found = []
        for number in numbers:
            with Image.open(self.images[number]) as picture:
                rgb = picture.convert("RGB").resize((IMAGE_SIDE, IMAGE_SIDE))
            found.append(np.asarray(rgb, dtype=np.float32).transpose(2, 0, 1) / 255.0)
        return np.stack(found)

    def lessons(self) -> list[Lesson]:
        """All questions, those of one length in words together."""
        ids = {word: number for number, word in enumerate(self.words)}
        by_length: dict[int, list[tuple[int, list[int], int]]] = {}
        for image, question, answer in self.asked:
            by_length.setdefault(len(question), []).append((image, [ids[word] for word in question], ids[answer]))
        return [
            Lesson(*(torch.tensor(column) for column in zip(*by_length[length], strict=True)))
            for length in sorted(by_length)
        ]


def content() -> str:
    """Names the data that lie in the cache; empty while they have not been fetched."""
    try:
        return questions().content
    except UserError:
        return ""


def questions(wanted: str = "") -> Questions:
    """The training split out of the cache.

    Args:
        wanted: the content that it must have; empty for any.

    Raises:
        UserError: it has not been fetched, cannot be read, or is another one.
    """
    path = local_path(DATA, f"data {DATA}")
    stat = path.stat()
    found = _read(path, stat.st_size, stat.st_mtime_ns)
    if wanted and found.content != wanted:
        raise UserError(f"data {DATA}: has content {found.content}, and {wanted} was planned with; plan again")
    return found


@lru_cache(maxsize=2)  # by size and time of change
def _read(path: Path, size: int, changed_ns: int) -> Questions:
    numbers: dict[str, int] = {}
    asked = []
    try:
        with path.open(encoding="utf-8") as lines:
            for row in map(json.loads, filter(str.strip, lines)):
                image = numbers.setdefault(row["image"], len(numbers))
                question, answers = _WORD.findall(row["question"]), _WORD.findall(row["answers"])
                if len(answers) != 1:
                    said = f"the answer {row['answers']!r} has {len(answers)} words"
                    raise UserError(f"data {path}: {said}; allowed: one")
                asked.append((image, tuple(question), answers[0]))
        images = tuple(path.parent / image for image in numbers)
        hashes = [file_hash(image) for image in images]
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"no field {error}" if isinstance(error, KeyError) else str(error)
        raise UserError(f"data {path}: cannot be read: {reason}") from None
    # by content, so that neither names of files nor the order of rows count
    order = sorted(range(len(images)), key=lambda place: (hashes[place], str(images[place])))
    number_of = {place: number for number, place in enumerate(order)}
    rows = tuple(sorted((number_of[place], question, answer) for place, question, answer in asked))
    named = content_hash({"images": [hashes[place] for place in order], "asked": [list(map(_plain, r)) for r in rows]})
    return Questions(named, tuple(images[place] for place in order), rows)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


@dataclass(frozen=True)
class EasyVqaWords(TokenizerSource):
    """A tokenizer with a token for every word and mark of the training questions and answers, one for the image, one for others."""

    kind: ClassVar[str] = "easy-vqa-words"

    content: str

    def not_byte_level(self) -> str:
        """Other words are all the same to it."""
        return "its tokens are the words of a small data set"

    def compute(self, ctx: StageContext, folder: Path) -> None:
        """Save in ``save_pretrained`` form."""
        tokenizer = word_tokenizer(questions(self.content).words)
        tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_WORD]})
        tokenizer.save_pretrained(folder)

    def load(self, ctx: StageContext, folder: Path) -> Any:
        """The tokenizer."""
        return read_tokenizer(folder)


@dataclass(frozen=True)
class EasyVqaFeatures(FeatureTable):
    """Features of the training images."""

    kind: ClassVar[str] = "easy-vqa-features"

    tower: TowerSource
    layer: LayerKey
    content: str

    @property
    def count(self) -> int:  # type: ignore[override]
        """Training images."""
        return len(questions(self.content).images)

    def images(self) -> Iterator[np.ndarray]:
        """256 at a time."""
        found = questions(self.content)
        for start in range(0, self.count, CHUNK):
            yield found.pixels(range(start, min(start + CHUNK, self.count)))


@dataclass(frozen=True)
class EasyVqaLessons(LessonSource):
    """Questions about the training images; all of a batch have the same number of words, so that none is padded.

    Attributes:
        content: of the data.
    """

    content: str

    def tables(self, tower: TowerSource, layer: LayerKey) -> tuple[EasyVqaFeatures, ...]:
        """One, with a row per image."""
        return (EasyVqaFeatures(tower, layer, self.content),)

    def steps(self, count: int, batch: int, seed: int) -> Iterator[Lesson]:
        """``count`` batches, of each length as often as there are such questions."""
        rng = np.random.default_rng(derive_seed("easy-vqa lessons", seed))
        lengths = questions(self.content).lessons()
        sizes = np.array([len(lesson.rows_B) for lesson in lengths])
        for kind in rng.choice(len(lengths), count, p=sizes / sizes.sum()):
            yield lengths[kind].chosen(torch.from_numpy(rng.integers(0, sizes[kind], batch)))
