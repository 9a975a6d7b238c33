"""Training of a one-dimensional image tokenizer with tail drop, and the stage that keeps the result.

Shape suffixes: B batch, C channels, H height, W width, L latent tokens, D token width, K codes.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from isoflop.core.hashing import derive_seed
from isoflop.core.stage import Stage, StageContext
from isoflop.methods.budgets import BudgetSampler
from isoflop.models.hooks.pixels import to_bytes
from isoflop.models.networks.image_tokenizer import Tokenizer, TokenizerSize
from isoflop.models.networks.quantizers import VectorQuantizer, usage_of
from isoflop.models.training.loop import fit, record_training
from isoflop.models.worlds import sprite_world as world

log = logging.getLogger(__name__)
_WEIGHTS = "tokenizer.safetensors"


@dataclass(frozen=True)
class Recipe:
    """How a tokenizer is trained.

    Stage one trains everything on squared error of the pixels, in [-1, 1], and on the quantizer's loss. Stage two freezes
    encoder, latent tokens and codebook, and trains the decoder on. The tail is dropped in both. AdamW, linear warm-up and
    decay in each.

    Attributes:
        steps, batch: of both stages together; images per step.
        lr: peak learning rate.
        drop: what lengths are drawn, a kind of ``BudgetSampler``.
        each: every image draws a length of its own; otherwise one is drawn for the batch.
        second: share of the steps in stage two.
        quantizer_weight: of the quantizer's loss beside that of the pixels.
        revive: after so many steps codes that none of them used are put on latents of the batch; 0 never does. Only in the
            first half of stage one.
    """

    steps: int
    batch: int
    lr: float
    drop: str
    each: bool
    second: float
    quantizer_weight: float
    revive: int
    warmup: float = 0.1
    final: float = 0.1
    clip: float = 1.0

    @property
    def second_steps(self) -> int:
        """Steps of stage two."""
        return round(self.second * self.steps)


@dataclass(frozen=True)
class TokenizerLesson:
    """One batch: its number, images (B, C, H, W) in [0, 1], and how many tokens of each are kept, (B,)."""

    number: int
    images_BCHW: Tensor
    kept_B: Tensor


def lessons(recipe: Recipe, tokens: int, data: str, seed: int) -> Iterator[TokenizerLesson]:
    """All batches in order: 8-bit images of the training split with objects of all shares, and lengths."""
    sampler = BudgetSampler(recipe.drop, tokens, tokens)
    images = world.ImageSet(data, "train", recipe.steps * recipe.batch, 0.0, derive_seed("tokenizer lessons", seed))
    number = 0
    for images_NCHW in images.images():
        for batch_BCHW in torch.from_numpy(images_NCHW).split(recipe.batch):
            kept = sampler.draw_each(number, seed, len(batch_BCHW) if recipe.each else 1)
            kept_B = torch.tensor(kept).expand(len(batch_BCHW))
            yield TokenizerLesson(number, to_bytes(batch_BCHW).float() / 255, kept_B)
            number += 1


class Trainer:
    """Trains a tokenizer in place.

    Args:
        tokenizer: with its initial weights.
        recipe: how.
        seed: of what is drawn.
    """

    def __init__(self, tokenizer: Tokenizer, recipe: Recipe, seed: int) -> None:
        self.tokenizer = tokenizer
        self.recipe = recipe
        self._used_K = torch.zeros(tokenizer.quantizer.codes, dtype=torch.bool)
        self._latents_BLD = torch.empty(0)
        self._generator = torch.Generator().manual_seed(derive_seed("revived codes", seed))

    def run(self, data: str, seed: int) -> list[float]:
        """Both stages; returns the loss of every step."""
        steps = lessons(self.recipe, self.tokenizer.size.tokens, data, seed)
        second = self.recipe.second_steps
        losses = self._descend(steps, self.recipe.steps - second, betas=(0.9, 0.99))
        if second:
            self.tokenizer.freeze_encoder()
            losses += self._descend(steps, second, betas=(0.9, 0.999))
        self.tokenizer.eval().requires_grad_(False)
        return losses

    def loss(self, step: TokenizerLesson) -> Tensor:
        """Squared error of the pixels, in [-1, 1], behind the tail drop, and the quantizer's loss of all tokens."""
        self._revive(step.number)
        found = self.tokenizer.quantizer(self.tokenizer.latents(step.images_BCHW))
        self._used_K[found.indices_BL.flatten()] = True
        self._latents_BLD = found.inputs_BLD.detach()
        length = int(step.kept_B.max())
        kept_B = step.kept_B if self.recipe.each else None
        images_BCHW = self.tokenizer.render(found.values_BLD, length, kept_B)
        return 4 * F.mse_loss(images_BCHW, step.images_BCHW) + self.recipe.quantizer_weight * found.loss

    def _descend(self, steps: Iterator[TokenizerLesson], count: int, betas: tuple[float, float]) -> list[float]:
        parameters = [p for p in self.tokenizer.parameters() if p.requires_grad]
        schedule = dataclasses.replace(self.recipe, steps=count)
        self.tokenizer.train()
        batches = (next(steps) for _ in range(count))
        return fit(parameters, schedule, batches, self.loss, lr=self.recipe.lr, betas=betas, weight_decay=1e-4)

    def _revive(self, number: int) -> None:
        """Before a step for which it is time: put codes that the last steps did not use on latents of the last batch."""
        quantizer, every = self.tokenizer.quantizer, self.recipe.revive
        half = (self.recipe.steps - self.recipe.second_steps) // 2
        if not every or not isinstance(quantizer, VectorQuantizer) or not 0 < number <= half or number % every:
            return
        quantizer.revive(self._used_K, self._latents_BLD, self._generator)
        self._used_K.fill_(False)


@dataclass(frozen=True)
class TokenizerStage(Stage):
    """A trained tokenizer. It depends on the kind of images and on a seed, not on the model that will see them.

    Trained on the CPU wherever it runs, so that the weights do not depend on the worker's device.
    """

    version: ClassVar[str] = "1"
    kind: ClassVar[str] = "image-tokenizer"

    size: tuple[tuple[str, Any], ...]
    recipe: tuple[tuple[str, Any], ...]
    data: str
    seed: int
    images: str

    def compute(self, ctx: StageContext, folder: Path) -> None:
        """Train and save; ``training.json`` also tells how the codes of 256 training images are used."""
        from safetensors.torch import save_file

        started = time.process_time()
        tokenizer = self.untrained()
        recipe = Recipe(**dict(self.recipe))
        losses = Trainer(tokenizer, recipe, self.seed).run(self.data, self.seed)
        step = next(lessons(dataclasses.replace(recipe, batch=world.CHUNK), 1, self.data, self.seed))
        with torch.no_grad():
            usage = usage_of(tokenizer.encode(step.images_BCHW), tokenizer.quantizer.codes)
        save_file({name: t.contiguous() for name, t in tokenizer.state_dict().items()}, folder / _WEIGHTS)
        record = record_training(folder, losses, started, usage)
        log.info("trained an image tokenizer on %s, seed %d: %s", self.data, self.seed, record)

    def load(self, ctx: StageContext, folder: Path) -> Tokenizer:
        """The tokenizer on the worker's device, in evaluation mode."""
        from safetensors.torch import load_file

        tokenizer = self.untrained()
        tokenizer.load_state_dict(load_file(folder / _WEIGHTS))
        return tokenizer.eval().requires_grad_(False).to(ctx.device)

    def untrained(self) -> Tokenizer:
        """With its initial weights."""
        return Tokenizer(TokenizerSize(**dict(self.size)), derive_seed("tokenizer weights", self.seed))
