"""What an image codec loses of the images, whoever looks at them.

Shape suffixes: N examples, B batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import numpy as np
import torch

from isoflop.core.errors import Infeasible
from isoflop.core.hook import Hook
from isoflop.core.knobs import Knob
from isoflop.core.stage import StageContext
from isoflop.models.base import Model, ModelInfo
from isoflop.models.features import batches
from isoflop.models.hooks.pixels import PIXELS
from isoflop.models.vit import LABELLED_IMAGES
from isoflop.tasks.base import TASKS, Shard
from isoflop.tasks.labelled_images import BATCH, LabelledImages, distortions, vit_model

if TYPE_CHECKING:
    from isoflop.methods.base import Method


@TASKS.register("reconstruction")
@dataclass(frozen=True)
class Reconstruction(LabelledImages):
    """How far decoded images are from what went into the codec in front of a model.

    The error of an image is its mean squared error, values in [0, 1], or 1 - SSIM. ``mse``, ``psnr`` in dB and ``ssim``
    are kept beside it. The model's only part is to name the kind of images.
    """

    quantity: ClassVar[str] = "distortion"
    metrics: ClassVar[tuple[str, ...] | None] = ("mse", "psnr", "ssim")
    needs: ClassVar[frozenset[str]] = frozenset({LABELLED_IMAGES})
    hooks: ClassVar[frozenset[Hook[Any]]] = frozenset({PIXELS})

    distortion: Annotated[
        str, Knob(choices=("mse", "ssim"), doc="the error: mean squared error, or 1 - structural similarity")
    ] = "mse"

    def check_method(self, method: Method, info: ModelInfo) -> None:
        """Refuse methods that leave images as they are."""
        if PIXELS not in method.hooks:
            raise Infeasible(f"task {self.name}: method {method.name} does nothing to images; allowed: codecs")

    @torch.no_grad()
    def evaluate(self, model: Model, ctx: StageContext, seed: int) -> Iterator[Shard]:
        """Score the suite shard by shard."""
        vit, order_N = vit_model(model, self.name), self.order(seed)
        for part in batches(self.examples, self.shard):
            ids_N = order_N[part]
            pieces = []
            for piece in batches(len(ids_N), BATCH):
                batch = self.batch(vit.info, ids_N[piece], seed)
                pieces.append(distortions(vit.seen(batch.images_BCHW, batch.ids_B), batch.images_BCHW))
            lost = {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}
            yield Shard(ids_N, 1 - lost["ssim"] if self.distortion == "ssim" else lost["mse"], lost)
