"""The conformance suite's model for visual-token methods: an untrained tiny LLaVA and a few scenes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import torch
from torch import Tensor

from isoflop.core.folder_context import FolderContext
from isoflop.methods.base import Method
from isoflop.methods.probe import Probe
from isoflop.methods.visual_tokens.base import VisualTokenMethod
from isoflop.models.features import vision_of
from isoflop.models.tiny.llava_config import SIZES, initialise, llava_config
from isoflop.models.tiny.llava_training import Recipe, tiny_info
from isoflop.models.vlm import VlmBatch, VlmModel
from isoflop.models.worlds import digit_world as world

STEPS = 16
"""Steps of a training whose budgets are looked at."""


def untrained_model(size: str = "d24", seed: int = 0, tower: str = "dense", joint: bool = True) -> VlmModel:
    """A member of the tiny family as it is before training: random tower, projector and language model."""
    from transformers import LlavaForConditionalGeneration

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = LlavaForConditionalGeneration(llava_config(SIZES[size], tower))
    initialise(module, seed)
    with torch.no_grad():  # Hugging Face's default of .02 would leave the patch features almost constant
        module.model.vision_tower.embeddings.patch_embedding.weight.mul_(10)
    module = module.eval().requires_grad_(False)
    return VlmModel(
        tiny_info(size, Recipe(tower=tower, joint=joint)), module, vision_of(module.model.vision_tower, None)
    )


class VisualTokenProbe(Probe):
    """Logits of an untrained ``tiny-llava`` on reading questions; the cost is V, the tokens that enter the decoder."""

    def __init__(self, size: str = "d24", examples: int = 6, tower: str = "dense", joint: bool = True) -> None:
        self.model: VlmModel = untrained_model(size, tower=tower, joint=joint)
        self.ctx = FolderContext(Path(mkdtemp(prefix="isoflop-probe-")))
        self.examples = examples
        scenes = world.SceneSet("train", examples, world.TRAIN_READING_MIX, seed=0)
        self._images = torch.from_numpy(next(scenes.images()))
        questions_NQ, _ = world.reading_questions(np.random.default_rng(0), scenes.classes())
        self._questions = torch.from_numpy(questions_NQ)

    def prepared(self, method: Method, seed: int) -> Any:
        """The method's untrained module."""
        return method.untrained(self.model.info, seed) if isinstance(method, VisualTokenMethod) else None

    def trained(self, method: Method, prepared: Any) -> Any:
        """Of methods with weights, their learning rate and the budgets of the first steps."""
        if prepared is None or not isinstance(method, VisualTokenMethod):
            return None
        grid = self.model.info.geometry["grid"]
        return method.learning_rate, [method.at_step(step, 0).tokens_left(grid) for step in range(STEPS)]

    def batch(self, rows: Sequence[int]) -> VlmBatch:
        """The prompts of some examples."""
        index = torch.tensor(list(rows))
        questions_BQ = self._questions[index]
        prompts_BT = torch.cat((torch.full((len(index), 1), world.IMAGE), questions_BQ), dim=1)
        return VlmBatch(self.model.look(self._images[index]), prompts_BT, questions_BQ, index)

    @torch.no_grad()
    def outputs(self, rows: Sequence[int]) -> Tensor:
        """Logits of the answer, (B, vocabulary)."""
        return self.model.answer_logits(self.batch(rows))

    @torch.no_grad()
    def cost(self) -> float:
        """V, measured on what enters the language model."""
        return float(self.model.project(self.model.compress(self.batch([0])).tokens_BVD).shape[1])
