"""Image classification: real digits on a noisy canvas, or procedural sprites on textures.

Shape suffixes: N examples, B batch, K classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch.nn import functional as F

from isoflop.core.stage import StageContext
from isoflop.models.base import Model
from isoflop.models.features import batches
from isoflop.models.hooks.pixels import PIXELS
from isoflop.models.worlds import sprite_world as world
from isoflop.tasks.base import TASKS, Shard
from isoflop.tasks.labelled_images import BATCH, LabelledImages, distortions, vit_model


@TASKS.register("digit-classification")
@dataclass(frozen=True)
class DigitClassification(LabelledImages):
    """The class of the one object in an image: a real handwritten digit that the model has not seen, or a sprite.

    The images are of the kind that the model was trained on; ``data`` only insists on one. The error of an example is 1
    when the most likely class is not its own. ``nll`` is kept beside it: the negative log-likelihood of that class, in
    nats; and where images go through a codec, what it lost of them: ``mse``, ``psnr`` in dB, ``ssim``. Examples and their
    numbers depend on the options and on the kind of images only; the job's seed shuffles the order. A shorter suite is a
    prefix of a longer one.
    """

    metrics: ClassVar[tuple[str, ...] | None] = ("nll", "mse", "psnr", "ssim")
    chance: ClassVar[float] = 1 - 1 / world.CLASSES

    @torch.no_grad()
    def evaluate(self, model: Model, ctx: StageContext, seed: int) -> Iterator[Shard]:
        """Score the suite shard by shard."""
        vit, order_N = vit_model(model, self.name), self.order(seed)
        for part in batches(self.examples, self.shard):
            ids_N = order_N[part]
            right_N = []
            metrics: dict[str, list[np.ndarray]] = {"nll": []}
            for piece in batches(len(ids_N), BATCH):
                batch = self.batch(vit.info, ids_N[piece], seed)
                seen_BCHW = vit.seen(batch.images_BCHW, batch.ids_B)
                logits_BK, labels_B = vit.classify(seen_BCHW, batch.ids_B), batch.labels_B.to(vit.device)
                metrics["nll"].append(F.cross_entropy(logits_BK.float(), labels_B, reduction="none").cpu().numpy())
                right_N.append((logits_BK.argmax(-1) == labels_B).cpu().numpy())
                if vit.occupant(PIXELS) is not None:
                    for name, lost_B in distortions(seen_BCHW, batch.images_BCHW).items():
                        metrics.setdefault(name, []).append(lost_B)
            errors_N = 1.0 - np.concatenate(right_N).astype(np.float64)
            yield Shard(ids_N, errors_N, {k: np.concatenate(v).astype(np.float64) for k, v in metrics.items()})
