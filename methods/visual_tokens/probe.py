"""The conformance suite's model for visual-token methods: an untrained tiny LLaVA and a few scenes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from isoflop.core.folder_context import FolderContext
from isoflop.methods.base import Method, build
from isoflop.methods.probe import AbsoluteCost, Probe
from isoflop.methods.visual_tokens.base import VisualTokenMethod
from isoflop.models.counting import flops_of
from isoflop.models.features import vision_of
from isoflop.models.tiny.llava_config import SIZES, initialise, llava_config
from isoflop.models.tiny.llava_training import Recipe, tiny_info
from isoflop.models.vlm import VlmModel
from isoflop.models.vlm_info import VlmBatch
from isoflop.models.worlds import digit_world as world

PREFILL = "prefill_flops"
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


def decoder_flops(tokens: Sequence[int], width: int, mlp: int, vocabulary: int) -> float:
    """FLOPs of a decoder of the Llama type, as many query as key heads, over so many tokens in each layer; one token's head."""
    layers = [2 * t * (4 * width**2 + 3 * width * mlp) + 4 * t * t * width for t in tokens]
    return float(sum(layers) + 2 * width * vocabulary)


class VisualTokenProbe(Probe):
    """Logits of an untrained ``tiny-llava`` on reading questions; the cost is V, the tokens that enter the decoder."""

    def __init__(self, size: str = "d24", examples: int = 6, tower: str = "dense", joint: bool = True) -> None:
        self.model: VlmModel = untrained_model(size, tower=tower, joint=joint)
        self.ctx = FolderContext.temporary()
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

    def absolute(self) -> Sequence[AbsoluteCost]:
        """9 tokens enter, whatever the pooling; the decoder then runs over 9 and 2 of the question.

        Width 24, MLP 64, 2 layers; T tokens take 2·T·(4·24² + 3·24·64) FLOPs in matrices and 4·T²·24 in attention, and the
        last one 2·24·W in the head.
        """
        method, vocabulary = build("avgpool", {"tokens": 9}), self.model.info.geometry["vocab_size"]
        flops = decoder_flops([9 + 2] * 2, width=24, mlp=64, vocabulary=vocabulary)
        return AbsoluteCost(method, "cost", 9.0), AbsoluteCost(method, PREFILL, flops)

    def read(self, method: Method, what: str) -> float:
        """Also FLOPs of the decoder over the prompt of one example."""
        if what != PREFILL:
            return super().read(method, what)
        batch = self.batch([0])
        with torch.no_grad():
            found = self.model.compress(batch)
            visual_BVd = self.model.project(found.tokens_BVD)
            return float(flops_of(lambda: self.model.prefill(visual_BVd, batch, found.places_BV))[0])

    @torch.no_grad()
    def outputs(self, rows: Sequence[int]) -> Tensor:
        """Logits of the answer, (B, vocabulary)."""
        return self.model.answer_logits(self.batch(rows))

    @torch.no_grad()
    def cost(self) -> float:
        """V, measured on what enters the language model."""
        return float(self.model.project(self.model.compress(self.batch([0])).tokens_BVD).shape[1])
