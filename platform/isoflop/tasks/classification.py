"""Image classification: real digits on a noisy canvas, or procedural sprites on textures.

Shape suffixes: N examples, B batch, K classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, ClassVar

import numpy as np
import torch
from torch.nn import functional as F

from isoflop.core.errors import Infeasible
from isoflop.core.hashing import derive_seed
from isoflop.core.knobs import Knob
from isoflop.core.stage import StageContext
from isoflop.models import sprite_world as world
from isoflop.models.base import Model, ModelInfo
from isoflop.models.counting import flops_of
from isoflop.models.features import batches
from isoflop.models.vit import IMAGES_HOOK, VitBatch, VitInfo, VitModel
from isoflop.tasks.base import TASKS, Shard, Task
from isoflop.tasks.footprint import module_bytes, peak_bytes_of, seconds_of

BATCH = 128


@TASKS.register("digit-classification")
@dataclass(frozen=True)
class DigitClassification(Task):
    """The class of the one object in an image: a real handwritten digit that the model has not seen, or a sprite.

    The images are of the kind that the model was trained on; ``data`` only insists on one. The error of an example is 1
    when the most likely class is not its own. ``nll`` is kept beside it: the negative log-likelihood of that class, in
    nats. Examples and their numbers depend on the options and on the kind of images only; the job's seed shuffles the
    order. A shorter suite is a prefix of a longer one.
    """

    needs: ClassVar[frozenset[str]] = frozenset({IMAGES_HOOK})
    chance: ClassVar[float] = 1 - 1 / world.CLASSES

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
        own = _info(info, self.name).data
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
        data = _info(info, self.name).data or ""
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
    def evaluate(self, model: Model, ctx: StageContext, seed: int) -> Iterator[Shard]:
        """Score the suite shard by shard."""
        vit, order_N = _vit(model, self.name), self.order(seed)
        for part in batches(self.examples, self.shard):
            ids_N = order_N[part]
            nll_N, right_N = [], []
            for piece in batches(len(ids_N), BATCH):
                logits_BK, labels_B = vit.supervised(self.batch(vit.info, ids_N[piece], seed))
                nll_N.append(F.cross_entropy(logits_BK.float(), labels_B, reduction="none").cpu().numpy())
                right_N.append((logits_BK.argmax(-1) == labels_B).cpu().numpy())
            errors_N = 1.0 - np.concatenate(right_N).astype(np.float64)
            yield Shard(ids_N, errors_N, {"nll": np.concatenate(nll_N).astype(np.float64)})

    @torch.no_grad()
    def measure(self, model: Model, ctx: StageContext) -> dict[str, float]:
        """Footprint of classifying example 0 from its pixels, batch of one.

        ``flops`` is counted on the live model, scoring of the method included; ``flops_dense`` is the same without
        token reduction. ``tokens_left`` are the patches behind the last block, ``tokens_mean`` those that the blocks'
        attention sees on average.
        """
        vit = _vit(model, self.name)
        batch = self.batch(vit.info, np.zeros(1, dtype=np.int64), 0)
        flops, _ = flops_of(lambda: vit.supervised(batch))
        patches = vit.info.geometry["patches"]
        left, seen = float(patches), [patches]
        if vit.reduction is not None and vit.reduction.state is not None:
            left = float(vit.reduction.state.patches)
            seen = [tokens - vit.info.geometry["prefix"] for tokens, _ in vit.reduction.counts]
        with vit.unreduced():
            dense, _ = flops_of(lambda: vit.supervised(batch))
        return {
            "tokens_left": left,
            "tokens_mean": float(np.mean(seen)),
            "flops": float(flops),
            "flops_dense": float(dense),
            "weight_bytes": vit.weight_bytes(),
            "weight_bytes_dense": vit.dense_weight_bytes(),
            "bytes": vit.weight_bytes(),
            "bytes_dense": vit.dense_weight_bytes(),
            "seconds": seconds_of(lambda: vit.supervised(batch), vit.device),
            "peak_bytes": float(module_bytes(vit.module) + peak_bytes_of(lambda: vit.supervised(batch), vit.device)),
        }


@lru_cache(maxsize=32)  # a shuffled suite of 8,000 examples draws each chunk once
def _draw(images: world.ImageSet, chunk: int) -> np.ndarray:
    return images.draw(chunk)[0]


@lru_cache(maxsize=8)
def _labels(images: world.ImageSet) -> np.ndarray:
    return images.labels()


def _vit(model: Model, task: str) -> VitModel:
    if not isinstance(model, VitModel):
        raise Infeasible(f"task {task} needs a vision transformer for classification, which {model.info.ref} is not")
    return model


def _info(info: ModelInfo, task: str) -> VitInfo:
    if not isinstance(info, VitInfo):
        raise Infeasible(f"task {task} needs a vision transformer for classification, which {info.ref} is not")
    return info
