"""The vision tower of the members that are trained on easy-VQA: its shape, and its training on the training questions.

Shape suffixes: B images, N questions about them, P patches, D width, W words.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from isoflop.core.hashing import derive_seed
from isoflop.core.stage import StageContext
from isoflop.models.features import TowerSource, Vision
from isoflop.models.tiny.vision import WIDTH, load_tower, save_tower
from isoflop.models.training.loop import Unclipped, descend, one_cycle
from isoflop.models.worlds import digit_world
from isoflop.models.worlds import easy_vqa as world

if TYPE_CHECKING:
    from transformers import CLIPVisionConfig, CLIPVisionModel

PATCH = 8
GRID = world.IMAGE_SIDE // PATCH
LAYERS = 3
FEATURE_LAYER = 2
"""The projector reads the layer before the last, as with CLIP in LLaVA."""


def easy_vqa_tower_config() -> CLIPVisionConfig:
    """CLIP-type tower: width 64, 3 layers, 4 heads, MLP 128, 64-pixel images in 8-pixel patches (64 patches + CLS)."""
    from transformers import CLIPVisionConfig

    return CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=128,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        image_size=world.IMAGE_SIDE,
        patch_size=PATCH,
    )


class Reader(nn.Module):
    """Answers questions, each a bag of words, from one vector per image; thrown away after the training."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.question = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(world.VOCAB_SIZE, 2 * WIDTH, bias=False)
        self.answer = nn.Linear(2 * WIDTH, world.VOCAB_SIZE)

    def forward(self, image_BD: Tensor, owner_N: Tensor, bags_NW: Tensor) -> Tensor:
        """Logits of the answers, (N, W); ``owner_N`` is each question's row of ``image_BD``."""
        return self.answer(F.gelu(self.image(image_BD)[owner_N] + self.question(bags_NW)))


@dataclass(frozen=True)
class _Asked:
    pixels: Tensor
    owner_N: Tensor
    bags_NW: Tensor
    answers_N: Tensor


class _Batches:
    """All questions about some images at a time."""

    def __init__(self, content: str, steps: int, batch: int, seed: int) -> None:
        found = world.questions(content)
        ids = {word: number for number, word in enumerate(found.words)}
        self._pixels = torch.from_numpy(found.pixels(range(len(found.images))))
        self._pixels = (self._pixels - digit_world.PIXEL_MEAN) / digit_world.PIXEL_STD
        self._bags = torch.zeros(len(found.asked), world.VOCAB_SIZE)
        for place, (_, question, _) in enumerate(found.asked):
            self._bags[place, [ids[word] for word in question]] = 1.0
        self._answers = torch.tensor([ids[answer] for _, _, answer in found.asked])
        count = np.bincount([image for image, _, _ in found.asked], minlength=len(found.images))
        self._first = np.concatenate([[0], count.cumsum()])  # questions lie in the order of their images
        self._steps, self._batch = steps, batch
        self._rng = np.random.default_rng(derive_seed("easy-vqa tower", seed))

    def __iter__(self) -> Iterator[_Asked]:
        for _ in range(self._steps):
            images = self._rng.integers(0, len(self._pixels), self._batch)
            spans = [np.arange(self._first[image], self._first[image + 1]) for image in images]
            places = torch.from_numpy(np.concatenate(spans))
            owner = torch.from_numpy(np.repeat(np.arange(len(spans)), [len(span) for span in spans]))
            yield _Asked(self._pixels[torch.from_numpy(images)], owner, self._bags[places], self._answers[places])


def train_easy_vqa_tower(content: str, steps: int, batch: int, lr: float, seed: int) -> CLIPVisionModel:
    """A tower whose class token, and the mean of whose patches where the projector reads them, answer the training questions.

    Args:
        content: of the data.
        steps: optimiser steps.
        batch: images per step, with all questions about them.
        lr: peak of the one-cycle schedule.
        seed: of initial weights and order.
    """
    tower, readers = untrained_easy_vqa_tower(seed), nn.ModuleList()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed("easy-vqa readers", seed))
        readers.extend([Reader(), Reader()])

    def loss_of(asked: _Asked) -> Tensor:
        outputs = tower(asked.pixels, output_hidden_states=True)
        seen = (outputs.pooler_output, outputs.hidden_states[FEATURE_LAYER][:, 1:].mean(1))
        told = [reader(x_BD, asked.owner_N, asked.bags_NW) for reader, x_BD in zip(readers, seen, strict=True)]
        return torch.stack([F.cross_entropy(logits_NW, asked.answers_N) for logits_NW in told]).sum()

    optimizer = torch.optim.AdamW([*tower.parameters(), *readers.parameters()], lr=lr, fused=True)
    tower.train()
    batches = _Batches(content, steps, batch, seed)
    descend(optimizer, Unclipped(steps), batches, loss_of, one_cycle(optimizer, lr, steps))
    return tower.eval().requires_grad_(False)


def untrained_easy_vqa_tower(seed: int = 0) -> CLIPVisionModel:
    """The tower before its training."""
    from transformers import CLIPVisionModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed("tower", seed))
        return CLIPVisionModel(easy_vqa_tower_config())


@dataclass(frozen=True)
class EasyVqaTowerStage(TowerSource):
    """A ``CLIPVisionModel``, trained once on the training questions, then frozen. AdamW with a one-cycle schedule."""

    kind: ClassVar[str] = "easy-vqa-tower"

    content: str
    steps: int
    batch: int = 64
    lr: float = 2e-3
    seed: int = 0

    def compute(self, ctx: StageContext, folder: Path) -> None:
        """Train and save in ``save_pretrained`` form with a ``preprocessor_config.json``."""
        save_tower(train_easy_vqa_tower(self.content, self.steps, self.batch, self.lr, self.seed), folder)

    def load(self, ctx: StageContext, folder: Path) -> Vision:
        """The tower in evaluation mode on the worker's device, without gradients."""
        return load_tower(ctx, folder)
