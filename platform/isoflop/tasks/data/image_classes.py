"""The task ``image-classes``: a user's own images, and what a classifier takes them for.

Shape suffixes: B examples, K classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
import torch
from torch.nn import functional as F

from isoflop.core.errors import nearest
from isoflop.core.knobs import Knob
from isoflop.core.rows import Rows
from isoflop.core.stage import StageContext
from isoflop.models.base import Model, ModelInfo
from isoflop.models.features import batches
from isoflop.models.resizing import pixels_of
from isoflop.models.vit import VitBatch, VitInfo
from isoflop.tasks.base import TASKS, Shard
from isoflop.tasks.data.base import DataTask, Example, bad_row, shards
from isoflop.tasks.data.images import image_rows, opened
from isoflop.tasks.image_costs import costs_of_image
from isoflop.tasks.labelled_images import vit_info, vit_model

BATCH = 32


@TASKS.register("image-classes")
@dataclass(frozen=True, kw_only=True)
class ImageClasses(DataTask):
    """Images with a class each; an example's error is 0 where its class is among the ``top`` most likely ones.

    ``data`` is a folder with a folder per class, or a table with paths (relative to the table) and classes. A class is what the
    model calls it (``id2label`` of its config; one of several names between commas is enough, whatever the case), or its
    number. Images are resized, cut and normalised as the checkpoint's processor says. Secondary metric: ``nll`` of the class.
    """

    version: ClassVar[str] = "1"
    metrics: ClassVar[tuple[str, ...] | None] = ("nll",)

    image: Annotated[str, Knob(doc="field of a table that holds paths of images")] = "image"
    label: Annotated[str, Knob(doc="field of a table that holds the class")] = "label"
    top: Annotated[int, Knob(low=1, high=1000, doc="how many guesses a model has")] = 1

    @property
    def rows(self) -> Rows:
        """Images with their classes."""
        return image_rows(self.data, self.split, self.image)

    def check_rows(self, rows: Rows) -> None:
        """The fields are there."""
        rows.require(self.label, "label", self.name)

    def check(self, info: ModelInfo) -> None:
        """An image classifier that knows the classes."""
        vit = vit_info(info, self.name)
        super().check(info)
        seen: set[str] = set()
        for example in self.examples():
            label = str(example.row[self.label])
            if label not in seen:
                seen.add(label)
                self.class_of(example, vit)

    def class_of(self, example: Example, info: VitInfo) -> int:
        """The number of an example's class.

        Raises:
            UserError: the model has no such class.
        """
        label = str(example.row[self.label]).strip()
        classes = info.geometry["classes"]
        names = _names(info.labels)
        if label.casefold() in names:
            return names[label.casefold()]
        if label.isdigit() and int(label) < classes:
            return int(label)
        guess = nearest(label.casefold(), names)
        hint = f" (did you mean {guess!r}?)" if guess else ""
        allowed = f"0 … {classes - 1}" + (
            f", {', '.join(list(names)[:6])}{', …' if len(names) > 6 else ''}" if names else ""
        )
        raise bad_row(
            self, example, f"data {self.data}: model {info.ref} has no class {label!r}{hint}; allowed: {allowed}"
        )

    @torch.no_grad()
    def evaluate(self, model: Model, ctx: StageContext, seed: int) -> Iterator[Shard]:
        """Classify shard by shard."""
        vit = vit_model(model, self.name)
        for examples in shards(self, self.examples(), self.shard, seed):
            wrong, nll = [], []
            for part in batches(len(examples), BATCH):
                batch = self._batch(vit.info, examples[part])
                logits_BK = vit.logits(batch.images_BCHW, batch.ids_B).float()
                labels_B = batch.labels_B.to(vit.device)
                best_BK = logits_BK.topk(min(self.top, logits_BK.shape[1]), dim=-1).indices
                wrong.append((best_BK != labels_B[:, None]).all(-1).double().cpu().numpy())
                nll.append(F.cross_entropy(logits_BK, labels_B, reduction="none").double().cpu().numpy())
            ids = np.array([example.id for example in examples])
            yield Shard(ids, np.concatenate(wrong), {"nll": np.concatenate(nll)})

    @torch.no_grad()
    def measure(self, model: Model, ctx: StageContext) -> dict[str, float]:
        """Footprint of classifying one image; see ``costs_of_image``."""
        vit = vit_model(model, self.name)
        return costs_of_image(vit, self._batch(vit.info, self.examples()[:1]))

    def _batch(self, info: VitInfo, examples: Sequence[Example]) -> VitBatch:
        side, channels = info.geometry["image_side"], info.geometry["channels"]
        images = [pixels_of(opened(example.row[self.image]), side, info.resizing, channels) for example in examples]
        labels = [self.class_of(example, info) for example in examples]
        return VitBatch(torch.stack(images), torch.tensor(labels), torch.tensor([example.id for example in examples]))


def _names(labels: Sequence[str]) -> dict[str, int]:
    """Every name of every class, the first class of a name first."""
    found: dict[str, int] = {}
    for number, label in enumerate(labels):
        for name in (label, *label.split(",")):
            found.setdefault(name.strip().casefold(), number)
    return found
