"""What the tasks on digit scenes share: examples, scoring, measuring.

Shape suffixes: N examples, B batch, P patches, Q question tokens.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from isoflop.core.errors import Infeasible
from isoflop.core.hashing import derive_seed
from isoflop.core.hook import Hook
from isoflop.core.knobs import Knob
from isoflop.core.stage import Stage, StageContext
from isoflop.models.base import Model, ModelInfo
from isoflop.models.features import FeaturesStage, LayerKey, batches
from isoflop.models.hooks.visual_tokens import VISUAL_TOKENS
from isoflop.models.vlm import VlmModel
from isoflop.models.vlm_info import VlmBatch, VlmInfo
from isoflop.models.worlds import digit_world as world
from isoflop.tasks.base import Shard, Task
from isoflop.tasks.footprint import measure_answer

BATCH = 256


@dataclass(frozen=True)
class Examples:
    """Questions about the scenes of a set: token ids (N, Q), answers (N,)."""

    questions_NQ: np.ndarray
    answers_N: np.ndarray


@dataclass(frozen=True)
class DigitSceneTask(Task):
    """Base class of tasks on digit scenes: two question tokens, a one-token answer, one image per example.

    The error of an example is 1 when the most likely token of the whole vocabulary is not the answer. ``nll`` is kept
    beside it: the negative log-likelihood of the answer, in nats. Examples and their numbers depend on the options
    only; the job's seed shuffles the order in which they are asked. A shorter suite is a prefix of a longer one.
    """

    needs: ClassVar[frozenset[str]] = frozenset({f"vocabulary:{world.VOCABULARY}"})
    metrics: ClassVar[tuple[str, ...] | None] = ("nll",)
    hooks: ClassVar[frozenset[Hook[Any]]] = frozenset({VISUAL_TOKENS})

    examples: Annotated[int, Knob(low=1, high=1_000_000, doc="number of test questions, one image each")] = 2000
    shard: Annotated[
        int, Knob(low=1, high=1_000_000, doc="examples per shard; a pruner may stop a job between shards")
    ] = 250

    @property
    @abstractmethod
    def mix(self) -> tuple[float, ...]:
        """Shares of scenes with 1, 4, 9 and 36 regions."""

    @abstractmethod
    def ask(self, rng: np.random.Generator, regions_N: np.ndarray, classes_NP: np.ndarray) -> Examples:
        """Questions and answers about scenes."""

    @property
    def scenes_seed(self) -> int:
        """Seed of the test scenes; another version of the task has other scenes."""
        return derive_seed("test scenes", self.name, self.version)

    def features(self, info: VlmInfo, layer: LayerKey) -> FeaturesStage:
        """The stage with the test images' features from one layer of the model's tower."""
        s = self.scenes()
        return FeaturesStage(info.tower, layer, s.split, s.count, s.mix, s.seed, s.digits)

    def scenes(self) -> world.SceneSet:
        """The test scenes."""
        return world.SceneSet("test", self.examples, self.mix, self.scenes_seed)

    def stages(self, info: ModelInfo) -> tuple[Stage, ...]:
        """Features of the test images from the layer that feeds the projector."""
        vlm = _vlm_info(info, self.name)
        return (self.features(vlm, vlm.feature_layer),)

    def suite(self) -> Examples:
        """All questions, in order of their numbers."""
        return _suite(self)

    def order(self, seed: int) -> np.ndarray:
        """Example numbers in the order of ``evaluate``, shape (N,)."""
        return np.random.default_rng(derive_seed("order", self.name, seed)).permutation(self.examples)

    def evaluate(self, model: Model, ctx: StageContext, seed: int) -> Iterator[Shard]:
        """Score the suite shard by shard."""
        vlm = _vlm(model, self.name)
        suite, order_N = self.suite(), self.order(seed)
        tables = {} if vlm.live_vision else {n: ctx.get(self.features(vlm.info, n)) for n in vlm.layers_needed}
        for part in batches(self.examples, self.shard):
            ids_N = order_N[part]
            nll_N, right_N = [], []
            for piece in batches(len(ids_N), BATCH):
                ids_B = ids_N[piece]
                logits_BW = vlm.answer_logits(self.batch(vlm, ids_B, self._hidden(vlm, tables, ids_B), seed)).float()
                answers_B = torch.from_numpy(suite.answers_N[ids_B]).to(logits_BW.device)
                nll_N.append(F.cross_entropy(logits_BW, answers_B, reduction="none").cpu().numpy())
                right_N.append((logits_BW.argmax(-1) == answers_B).cpu().numpy())
            yield Shard(
                ids_N,
                1.0 - np.concatenate(right_N).astype(np.float64),
                {"nll": np.concatenate(nll_N).astype(np.float64)},
            )

    def measure(self, model: Model, ctx: StageContext) -> dict[str, float]:
        """Footprint of answering example 0 from its pixels, batch of one."""
        vlm = _vlm(model, self.name)
        image_BCHW = self._images(np.zeros(1, dtype=np.int64))
        return measure_answer(vlm, image_BCHW, lambda hidden: self.batch(vlm, np.zeros(1, dtype=np.int64), hidden, 0))

    def batch(self, model: VlmModel, ids_B: np.ndarray, hidden: dict[LayerKey, Tensor], seed: int) -> VlmBatch:
        """The prompts ``[image] question`` of some examples with the given features."""
        questions_BQ = torch.from_numpy(self.suite().questions_NQ[ids_B]).to(model.device)
        image_B1 = torch.full(
            (len(ids_B), 1), model.info.geometry["image_token"], dtype=torch.long, device=model.device
        )
        numbers_B = torch.from_numpy(ids_B + self.examples * seed).to(model.device)
        return VlmBatch(hidden, torch.cat((image_B1, questions_BQ), dim=1), questions_BQ, numbers_B)

    def _hidden(self, model: VlmModel, tables: dict[LayerKey, np.ndarray], ids_B: np.ndarray) -> dict[LayerKey, Tensor]:
        if model.live_vision:
            return model.look(self._images(ids_B))
        return {layer: torch.from_numpy(table[ids_B]).to(model.device) for layer, table in tables.items()}

    def _images(self, ids_B: np.ndarray) -> Tensor:
        scenes = self.scenes()
        return torch.from_numpy(np.stack([_draw(scenes, i - i % world.CHUNK)[i % world.CHUNK] for i in ids_B.tolist()]))


@lru_cache(maxsize=16)  # a shuffled suite of 4,000 examples draws each chunk once
def _draw(scenes: world.SceneSet, chunk: int) -> np.ndarray:
    return scenes.draw(chunk)[0]


@lru_cache(maxsize=8)
def _suite(task: DigitSceneTask) -> Examples:
    scenes = task.scenes()
    regions_N, classes_NP = scenes.regions(), scenes.classes()
    parts = []
    for start in range(0, task.examples, BATCH):  # a generator per block, so that a shorter suite is a prefix
        rng = np.random.default_rng([derive_seed("questions", task.name, task.version), start])
        stop = min(start + BATCH, task.examples)
        rows = _padded(regions_N[start:stop], BATCH), _padded(classes_NP[start:stop], BATCH)
        part = task.ask(rng, *rows)
        parts.append((part.questions_NQ[: stop - start], part.answers_N[: stop - start]))
    return Examples(np.concatenate([q for q, _ in parts]), np.concatenate([a for _, a in parts]))


def _padded(array: np.ndarray, length: int) -> np.ndarray:
    return np.concatenate([array, np.repeat(array[-1:], length - len(array), axis=0)])


def _vlm(model: Model, task: str) -> VlmModel:
    if not isinstance(model, VlmModel):
        raise Infeasible(f"task {task} needs a vision-language model, which {model.info.ref} is not")
    return model


def _vlm_info(info: ModelInfo, task: str) -> VlmInfo:
    if not isinstance(info, VlmInfo):
        raise Infeasible(f"task {task} needs a vision-language model, which {info.ref} is not")
    return info
