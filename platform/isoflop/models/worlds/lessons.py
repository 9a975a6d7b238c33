"""What a vision-language model is taught on the digit scenes: which scenes, and the questions about them.

Shape suffixes: S steps, N scenes, B batch, P patches, Q question tokens, D vision width.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from isoflop.core.hashing import derive_seed
from isoflop.core.stage import StageContext
from isoflop.models.features import FeaturesStage, FeatureTable, LayerKey, TowerSource
from isoflop.models.worlds import digit_world as world

Ask = Callable[[np.random.Generator, np.ndarray], tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Lesson:
    """One batch of training examples: rows of the joined feature tables, questions and answers."""

    rows_B: Tensor
    questions_BQ: Tensor
    answers_B: Tensor

    def chosen(self, places: Tensor) -> Lesson:
        """Some of its examples."""
        return Lesson(self.rows_B[places], self.questions_BQ[places], self.answers_B[places])


class LessonSource(ABC):
    """What a vision-language model is taught: images as tables of features, and questions about them with their answers."""

    @abstractmethod
    def tables(self, tower: TowerSource, layer: LayerKey) -> tuple[FeatureTable, ...]:
        """The feature tables of one tower layer; rows of lessons are counted through all of them."""

    @abstractmethod
    def steps(self, count: int, batch: int, seed: int) -> Iterator[Lesson]:
        """``count`` batches."""


@dataclass(frozen=True)
class Lessons(LessonSource):
    """Training scenes, from the handwritings of the split ``train``, and what is asked about them.

    Attributes:
        reading_scenes: scenes of every granularity, for reading.
        coarse_scenes: scenes of one class, for recall.
        sparse_scenes: scenes in which few tiles carry a digit, for finding them.
    """

    reading_scenes: int = 6144
    coarse_scenes: int = 2048
    sparse_scenes: int = 0

    def scenes(self) -> tuple[world.SceneSet, ...]:
        """The sets of scenes; rows of the feature tables are counted through all of them."""
        reading = world.SceneSet("train", self.reading_scenes, world.TRAIN_READING_MIX, derive_seed("reading scenes"))
        coarse = world.SceneSet("train", self.coarse_scenes, world.COARSE_MIX, derive_seed("coarse scenes"))
        if not self.sparse_scenes:
            return reading, coarse
        seed = derive_seed("sparse scenes")
        return (
            reading,
            coarse,
            world.SceneSet("train", self.sparse_scenes, world.FINE_MIX, seed, digits=world.SPARSE_DIGITS),
        )

    def tables(self, tower: TowerSource, layer: LayerKey) -> tuple[FeaturesStage, ...]:
        """The feature tables of one tower layer, one per set of scenes."""
        return tuple(FeaturesStage(tower, layer, s.split, s.count, s.mix, s.seed, s.digits) for s in self.scenes())

    def steps(self, count: int, batch: int, seed: int) -> Iterator[Lesson]:
        """``count`` batches: half reading and half recall, or a quarter each and half finding. The same at every size."""
        rng = np.random.default_rng(derive_seed("lessons", seed))
        classes = [scenes.classes() for scenes in self.scenes()]
        sizes, asks = self._parts(batch)
        rows = [rng.integers(0, len(c), count * size) for c, size in zip(classes, sizes, strict=True)]
        parts = [ask(rng, c[r]) for ask, c, r in zip(asks, classes, rows, strict=True)]
        first = np.cumsum([0, *(len(c) for c in classes[:-1])])
        rows_SB = np.concatenate([(start + r).reshape(count, -1) for start, r in zip(first, rows, strict=True)], axis=1)
        questions_SBQ = np.concatenate([q.reshape(count, -1, q.shape[-1]) for q, _ in parts], axis=1)
        answers_SB = np.concatenate([a.reshape(count, -1) for _, a in parts], axis=1)
        for triple in zip(*(torch.from_numpy(a) for a in (rows_SB, questions_SBQ, answers_SB)), strict=True):
            yield Lesson(*triple)

    def fields(self) -> tuple[tuple[str, Any], ...]:
        """As plain pairs, to name a stage."""
        return tuple(dataclasses.asdict(self).items())

    def _parts(self, batch: int) -> tuple[Sequence[int], Sequence[Ask]]:
        """Examples per batch and kind of question for each set of scenes."""
        if not self.sparse_scenes:
            return (batch // 2, batch // 2), (world.reading_questions, world.recall_questions)
        quarter = batch // 4
        sizes = (quarter, quarter, batch - 2 * quarter)
        return sizes, (world.reading_questions, world.recall_questions, world.find_questions)


def table_rows(
    ctx: StageContext, tables: Mapping[LayerKey, Sequence[FeatureTable]], rows_B: Tensor
) -> dict[LayerKey, Tensor]:
    """Rows of feature tables, counted through each layer's tables, by layer; read from disk as they are needed."""
    found: dict[LayerKey, Tensor] = {}
    for layer, stages in tables.items():
        first = np.cumsum([0, *(stage.count for stage in stages)])
        table_B = np.searchsorted(first, rows_B.numpy(), side="right") - 1
        places = zip(table_B, rows_B.numpy() - first[table_B], strict=True)
        found[layer] = torch.from_numpy(np.stack([ctx.get(stages[t])[row] for t, row in places]))
    return found
