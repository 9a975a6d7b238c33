"""Training of a tiny vision transformer on labelled images, and the stage that keeps the result.

Shape suffixes: B batch, N images, C width, P patches, H height, W width.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from isoflop.core.hashing import derive_seed
from isoflop.core.knobs import Knob
from isoflop.core.stage import Stage, StageContext
from isoflop.models.base import Model
from isoflop.models.quiet import no_progress_bars
from isoflop.models.tiny.vision import save_preprocessing
from isoflop.models.tiny.vit_config import GRID, PATCH, SIZES, untrained
from isoflop.models.training.loop import Keeper, fit, record_training
from isoflop.models.training.teaching import Course
from isoflop.models.vit import VitInfo, VitModel
from isoflop.models.worlds import sprite_world as world

log = logging.getLogger(__name__)
COVERED = 0.3
"""A patch shows the object when one of its pixels is at least so opaque."""
BACKGROUND = world.CLASSES
WEIGHT_DECAY = 0.02


@dataclass(frozen=True)
class Recipe:
    """How a tiny vision transformer is trained; the fields are options of the model in a sweep.

    AdamW with warm-up and linear decay. Besides CLS, every patch is labelled with the class of the object that it shows, or
    as background, by a linear head that is thrown away; the weight of that loss falls to 0 before the end. With the
    loss of CLS alone such small transformers need several times as many steps to find the object.
    """

    steps: Annotated[int, Knob(low=1, high=100_000, doc="optimiser steps")] = 1500
    batch: Annotated[int, Knob(choices=(8, 16, 32, 64, 128, 256), doc="images per step")] = 16
    lr: Annotated[
        float, Knob(low=1e-6, high=1.0, log=True, doc="peak learning rate at width 48; falls as the root of the width")
    ] = 2e-3
    warmup: Annotated[float, Knob(low=0.0, high=1.0, doc="share of the steps with a rising learning rate")] = 0.3
    final: Annotated[float, Knob(low=0.0, high=1.0, doc="share of the learning rate left at the end")] = 0.02
    clip: Annotated[float, Knob(low=1e-6, doc="gradient norm")] = 1.0
    patch_loss: Annotated[float, Knob(low=0.0, high=10.0, doc="weight of patch labelling at the start")] = 1.0
    patch_until: Annotated[float, Knob(low=0.01, high=1.0, doc="share of the steps after which that weight is 0")] = 0.7


@dataclass(frozen=True)
class ImageLesson:
    """One training batch: pixel values, classes, what every patch shows, and how much that counts."""

    pixels_BCHW: Tensor
    labels_B: Tensor
    patches_BP: Tensor
    patch_weight: float


def lessons(recipe: Recipe, data: str, seed: int) -> Iterator[ImageLesson]:
    """All batches in order; the same for every size of a seed."""
    images = world.ImageSet(data, "train", recipe.steps * recipe.batch, 0.0, derive_seed("vit lessons", seed))
    last = recipe.patch_until * recipe.steps
    for chunk in range(0, images.count, world.CHUNK):
        images_NCHW, labels_N, opacity_NHW = images.draw(chunk)
        pixels = torch.from_numpy((images_NCHW - world.PIXEL_MEAN) / world.PIXEL_STD)
        labels, patches = torch.from_numpy(labels_N), torch.from_numpy(patch_labels(labels_N, opacity_NHW))
        for start in range(0, min(world.CHUNK, images.count - chunk), recipe.batch):
            part = slice(start, start + recipe.batch)
            weight = recipe.patch_loss * max(0.0, 1 - (chunk + start) / recipe.batch / last)
            yield ImageLesson(pixels[part], labels[part], patches[part], weight)


def patch_labels(labels_N: np.ndarray, opacity_NHW: np.ndarray) -> np.ndarray:
    """The image's class for patches that show the object, ``BACKGROUND`` for the others, int64 (N, P)."""
    most_NGG = opacity_NHW.reshape(-1, GRID, PATCH, GRID, PATCH).max((2, 4))
    return np.where(most_NGG.reshape(len(labels_N), -1) >= COVERED, labels_N[:, None], BACKGROUND)


class PatchLoss:
    """Cross-entropy of labelling every patch, by a linear head that is thrown away, behind the pass that was run last.

    Where methods have taken patches away, those that are left have no labels of their own, and the loss is left out.
    """

    def __init__(self, module: Any, seed: int) -> None:
        self._module = module
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed("vit patch head", seed))
            self.head = nn.Linear(module.config.hidden_size, world.CLASSES + 1)
        self._x_BNC = torch.empty(0)

    def forward(self, lesson: ImageLesson) -> Tensor:
        """Class logits (B, K); the hidden states are kept for ``of``."""
        self._x_BNC = self._module.vit(lesson.pixels_BCHW).last_hidden_state
        return self._module.classifier(self._x_BNC[:, 0])

    def of(self, lesson: ImageLesson) -> Tensor | None:
        """The weighted loss; None where it counts nothing."""
        patches_BPC = self._x_BNC[:, 1:]
        if lesson.patch_weight == 0 or patches_BPC.shape[1] != lesson.patches_BP.shape[1]:
            return None
        logits = self.head(patches_BPC).flatten(0, 1)
        return lesson.patch_weight * F.cross_entropy(logits, lesson.patches_BP.flatten())


def train(module: Any, recipe: Recipe, data: str, seed: int, keeper: Keeper | None = None) -> list[float]:
    """Train a ``ViTForImageClassification`` in place; returns the loss of every step, patch labelling included."""
    patches = PatchLoss(module, seed)

    def loss_of(lesson: ImageLesson) -> Tensor:
        loss = F.cross_entropy(patches.forward(lesson), lesson.labels_B)
        extra = patches.of(lesson)
        return loss if extra is None else loss + extra

    parameters = [*module.parameters(), *patches.head.parameters()]
    module.train()
    losses = fit(
        parameters,
        recipe,
        lessons(recipe, data, seed),
        loss_of,
        lr=peak_rate(module, recipe),
        weight_decay=WEIGHT_DECAY,
        keeper=keeper,
    )
    module.eval()
    return losses


def peak_rate(module: Any, recipe: Recipe) -> float:
    """The learning rate of a width."""
    return recipe.lr * (48 / module.config.hidden_size) ** 0.5


def vit_course(info: VitInfo, size: str, data: str, seed: int) -> Course:
    """The same training with methods in place."""
    started = time.process_time()
    recipe = Recipe(**dict(info.options))
    module = untrained(SIZES[size], data, derive_seed("vit weights", seed))
    patches = PatchLoss(module, seed)

    def forward(model: Model, lesson: ImageLesson) -> tuple[Tensor, Tensor]:
        return patches.forward(lesson), lesson.labels_B

    def save(folder: Path, losses: list[float]) -> None:
        save_vit(folder, module, losses, started)

    parameters = [*module.parameters(), *patches.head.parameters()]
    groups = [{"params": parameters, "lr": peak_rate(module, recipe)}]
    model = VitModel(info, module)
    course = Course(model, recipe, groups, lessons(recipe, data, seed), save, forward, patches.of)
    course.weight_decay = WEIGHT_DECAY
    return course


def save_vit(folder: Path, module: Any, losses: list[float], started: float) -> dict[str, float]:
    """Write the checkpoint and its record."""
    with no_progress_bars():
        module.save_pretrained(folder)
    save_preprocessing(folder, world.SIDE, "ViTImageProcessor")
    return record_training(folder, losses, started)


@dataclass(frozen=True)
class VitStage(Stage):
    """A trained tiny vision transformer in ``save_pretrained`` form.

    Trained on the CPU wherever it runs, so that the weights do not depend on the worker's device.
    """

    version: ClassVar[str] = "1"
    kind: ClassVar[str] = "vit"

    size: str
    data: str
    seed: int
    recipe: tuple[tuple[str, Any], ...]
    images: str

    def compute(self, ctx: StageContext, folder: Path) -> None:
        """Train and save."""
        started = time.process_time()
        module = untrained(SIZES[self.size], self.data, derive_seed("vit weights", self.seed))
        losses = train(module, Recipe(**dict(self.recipe)), self.data, self.seed, Keeper(ctx.scratch(self)))
        record = save_vit(folder, module, losses, started)
        log.info("trained %s on %s, seed %d: %s", self.size, self.data, self.seed, record)

    def load(self, ctx: StageContext, folder: Path) -> Path:
        """Where the files are."""
        return folder
