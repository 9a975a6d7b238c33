"""Tasks on the labelled images that vision transformers are trained on: which examples, in which order, at what cost.

Shape suffixes: N examples, B batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, ClassVar

import numpy as np
import torch
from torch import Tensor

from isoflop.core.errors import Infeasible
from isoflop.core.hashing import derive_seed
from isoflop.core.knobs import Knob
from isoflop.core.stage import StageContext
from isoflop.models.base import Model, ModelInfo
from isoflop.models.vit import LABELLED_IMAGES, VitBatch, VitInfo, VitModel
from isoflop.models.worlds import sprite_world as world
from isoflop.tasks.base import Task
from isoflop.tasks.distortion import mse, psnr, ssim
from isoflop.tasks.image_costs import costs_of_image

BATCH = 128


@dataclass(frozen=True)
class LabelledImages(Task):
    """Base class of tasks on images of the kind that a model was trained on; ``data`` only insists on one.

    Examples and their numbers depend on the options and on the kind of images only; the job's seed shuffles the order. A
    shorter suite is a prefix of a longer one.
    """

    needs: ClassVar[frozenset[str]] = frozenset({LABELLED_IMAGES})

    data: Annotated[str, Knob(choices=("own", *world.DATA), doc="kind of images; own is the model's")] = "own"
    examples: Annotated[int, Knob(low=1, high=1_000_000, doc="number of test images")] = 2000
    shard: Annotated[
        int, Knob(low=1, high=1_000_000, doc="examples per shard; a pruner may stop a job between shards")
    ] = 500
    foreground: Annotated[
        float,
        Knob(low=0.0, high=1.0, doc="share of the image that the object's box covers; 0 mixes them as in training"),
    ] = 0.4

    def check(self, info: ModelInfo) -> None:
        """Refuse models of other images, and objects too small to be drawn."""
        super().check(info)
        own = vit_info(info, self.name).data
        if self.data not in ("own", own):
            raise Infeasible(
                f"task {self.name}: data = {self.data!r}, but model {info.ref} was trained on {own}; allowed: own, {own}"
            )
        if 0 < self.foreground < world.SMALLEST_SHARE:
            raise Infeasible(
                f"task {self.name}: foreground = {self.foreground:g} leaves less than {world.SMALLEST_SIDE} pixels a side; "
                f"allowed: {world.SMALLEST_SHARE:.4g} … 1, or 0 for a mixture"
            )

    def images(self, info: ModelInfo) -> world.ImageSet:
        """The test images for a model."""
        data = vit_info(info, self.name).data or ""
        return world.ImageSet(
            data, "test", self.examples, self.foreground, derive_seed("test images", self.name, self.version)
        )

    def order(self, seed: int) -> np.ndarray:
        """Example numbers in the order of ``evaluate``, shape (N,)."""
        return np.random.default_rng(derive_seed("order", self.name, seed)).permutation(self.examples)

    def batch(self, info: ModelInfo, ids_B: np.ndarray, seed: int) -> VitBatch:
        """Some examples; their numbers carry the job's seed, so that what is random in a method differs between repeats."""
        images = self.images(info)
        pixels = np.stack([_draw(images, i - i % world.CHUNK)[i % world.CHUNK] for i in ids_B.tolist()])
        numbers_B = torch.from_numpy(ids_B + self.examples * seed)
        return VitBatch(torch.from_numpy(pixels), torch.from_numpy(_labels(images)[ids_B]), numbers_B)

    @torch.no_grad()
    def measure(self, model: Model, ctx: StageContext) -> dict[str, float]:
        """Footprint of classifying example 0 from its pixels, batch of one.

        See ``costs_of_image``.
        """
        vit = vit_model(model, self.name)
        return costs_of_image(vit, self.batch(vit.info, np.zeros(1, dtype=np.int64), 0))


def distortions(seen_BCHW: Tensor, images_BCHW: Tensor) -> dict[str, np.ndarray]:
    """What a codec lost of images in [0, 1], each (B,): ``mse``, ``psnr`` in dB, ``ssim``.

    Against the images before they were rounded to 8 bits, so that the ratio of no image is infinite (59 dB is lossless).
    """
    images_BCHW = images_BCHW.to(seen_BCHW.device)
    found = {"mse": mse, "psnr": psnr, "ssim": ssim}
    return {name: of(seen_BCHW, images_BCHW).cpu().numpy().astype(np.float64) for name, of in found.items()}


@lru_cache(maxsize=32)  # a shuffled suite of 8,000 examples draws each chunk once
def _draw(images: world.ImageSet, chunk: int) -> np.ndarray:
    return images.draw(chunk)[0]


@lru_cache(maxsize=8)
def _labels(images: world.ImageSet) -> np.ndarray:
    return images.labels()


def vit_model(model: Model, task: str) -> VitModel:
    """``model`` as an image classifier; Infeasible otherwise."""
    if not isinstance(model, VitModel):
        raise Infeasible(f"task {task} needs a vision transformer for classification, which {model.info.ref} is not")
    return model


def vit_info(info: ModelInfo, task: str) -> VitInfo:
    """``info`` as that of an image classifier; Infeasible otherwise."""
    if not isinstance(info, VitInfo):
        raise Infeasible(f"task {task} needs a vision transformer for classification, which {info.ref} is not")
    return info
