"""Image classifiers of the ViT type: what is known of one, and the loaded model.

Tiny models trained here and Hugging Face checkpoints run through this one class. A token reduction acts inside the
blocks (see :mod:`isoflop.models.hooks.vision_blocks`), an image codec in front of the model (see
:mod:`isoflop.models.hooks.pixels`).

Shape suffixes: B batch, C channels, H height, W width, K classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from isoflop.core.hashing import derive_seed
from isoflop.core.stage import StageContext
from isoflop.models.base import Model, ModelInfo
from isoflop.models.hooks.pixels import PIXELS
from isoflop.models.hooks.vision_blocks import VISION_BLOCKS, TokenReduction
from isoflop.models.hooks.vision_pooling import NO_POOLING, Pooling
from isoflop.models.resizing import SQUEEZED, Resizing
from isoflop.models.worlds.lm_text import TokenizerSource
from isoflop.models.worlds.sprite_world import CHUNK, ImageSet

LABELLED_IMAGES = "labelled-images"
"""Offered by models that classify one of the built-in kinds of images (``VitInfo.data``)."""


@dataclass(frozen=True, kw_only=True)
class VitInfo(ModelInfo):
    """What is known of a vision transformer for classification without loading its weights.

    ``n_params`` (N) counts the transformer blocks; patch and position embeddings, the final norm and the classifier are
    left out.

    Attributes:
        data: the built-in images it classifies (``digits``, ``sprites``), or None.
        pixel_mean, pixel_std: normalisation of pixel values in [0, 1], one number per channel.
        options: the sweep's options for this model, checked, as (name, value) pairs.
        labels: what the model calls its classes, in order; empty where it does not say.
        resizing: how images of other sizes become the model's.
        tokenizer: of a model without a head, which compares images with texts that name classes; None for the others.

    ``geometry`` holds ``layers``, ``width``, ``heads``, ``mlp``, ``patches``, ``prefix`` (class, distillation and register tokens),
    ``patch_inputs`` (numbers per patch), ``image_side``, ``channels``, ``classes``, ``heads_out`` (classifiers as wide as the
    model; a model that compares images with texts has none, and ``classes`` is the width of its projection); ``mlp_matrices`` where an MLP has other than two, and ``pool_macs`` where attention pools the tokens: multiply-adds for
    an image, and for each token.
    """

    data: str | None
    pixel_mean: tuple[float, ...]
    pixel_std: tuple[float, ...]
    options: tuple[tuple[str, Any], ...] = ()
    labels: tuple[str, ...] = ()
    resizing: Resizing = SQUEEZED
    tokenizer: TokenizerSource | None = None

    @property
    def uncalibrated(self) -> str:
        """Without built-in images there is nothing to see."""
        return (
            ""
            if self.data
            else "its config names no built-in images (isoflop: {images: …}); methods that need none work"
        )

    @property
    def names_classes(self) -> bool:
        """Whether it has no head, and compares images with texts that name classes."""
        return self.tokenizer is not None


@dataclass(frozen=True)
class VitBatch:
    """Labelled images.

    Attributes:
        images_BCHW: values in [0, 1].
        labels_B: classes.
        ids_B: example numbers.
    """

    images_BCHW: Tensor
    labels_B: Tensor
    ids_B: Tensor


class VitModel(Model):
    """A loaded classifier (``ViTForImageClassification``, ``Dinov2ForImageClassification`` …).

    Attributes:
        info: its description.
        module: the Hugging Face model, in evaluation mode.
        pooling: what of it pools tokens behind the blocks.
    """

    info: VitInfo

    def __init__(self, info: VitInfo, module: nn.Module, pooling: Pooling = NO_POOLING) -> None:
        self.info = info
        self.module: Any = module
        self.pooling = pooling

    @property
    def vision_encoder(self) -> nn.Module:
        """The classifier, whose blocks methods may act in."""
        return self.module

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return next(self.module.parameters()).device

    @contextmanager
    def unreduced(self) -> Iterator[None]:
        """All tokens within the ``with`` block, also while a reduction is at work."""
        run = self.occupant(VISION_BLOCKS)
        if run is None:
            yield
            return
        reduction, run.reduction = run.reduction, TokenReduction()
        try:
            yield
        finally:
            run.reduction = reduction

    def seen(self, images_BCHW: Tensor, ids_B: Tensor | None = None) -> Tensor:
        """What the model sees of images in [0, 1]: themselves, or what the codec leaves of them.

        Args:
            ids_B: numbers of examples that are evaluated: the codec counts their bytes, each once.
        """
        images_BCHW = images_BCHW.to(self.device)
        codec = self.occupant(PIXELS)
        return images_BCHW if codec is None else codec.through(images_BCHW, ids_B)

    def logits(self, images_BCHW: Tensor, ids_B: Tensor | None = None) -> Tensor:
        """Class logits (B, K) of images in [0, 1], which go through the codec first; gradients flow behind it when enabled.

        Args:
            ids_B: example numbers, for reductions that draw at random.
        """
        return self.classify(self.seen(images_BCHW), ids_B)

    def classify(self, images_BCHW: Tensor, ids_B: Tensor | None = None) -> Tensor:
        """Class logits (B, K) of images in [0, 1] as they are; images of another side are resized.

        Args:
            ids_B: example numbers, for reductions that draw at random.
        """
        images_BCHW = images_BCHW.to(self.device)
        side = self.info.geometry["image_side"]
        if images_BCHW.shape[-1] != side:
            images_BCHW = F.interpolate(images_BCHW, size=(side, side), mode="bicubic", antialias=True).clamp(0, 1)
        mean, std = (images_BCHW.new_tensor(v)[:, None, None] for v in (self.info.pixel_mean, self.info.pixel_std))
        pixels_BCHW = ((images_BCHW - mean) / std).to(next(self.module.parameters()).dtype)
        reduction = self.occupant(VISION_BLOCKS)
        if reduction is not None:
            reduction.ids_B = None if ids_B is None else ids_B.to(self.device)
        return self.module(pixels_BCHW).logits

    def supervised(self, batch: VitBatch) -> tuple[Tensor, Tensor]:
        """Logits (B, K) and labels (B,), as the model is now."""
        return self.logits(batch.images_BCHW, batch.ids_B), batch.labels_B.to(self.device)

    def calibration(self, ctx: StageContext, examples: int, seed: int) -> Iterator[VitBatch]:
        """Labelled training images of the model's own kind in batches of at most 256."""
        self.info.check_calibration()
        assert self.info.data is not None
        images = ImageSet(self.info.data, "train", examples, 0.0, derive_seed("vit calibration", seed))
        labels = torch.from_numpy(images.labels())
        for number, batch in enumerate(images.images()):
            ids_B = torch.arange(number * CHUNK, number * CHUNK + len(batch))
            yield VitBatch(torch.from_numpy(batch), labels[ids_B], ids_B)
