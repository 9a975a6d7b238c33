"""The task ``image-classes``: a user's own images, and what a classifier takes them for.

Shape suffixes: B examples, K classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
import torch
from torch.nn import functional as F

from isoflop.core.errors import UserError, nearest
from isoflop.core.knobs import Knob
from isoflop.core.rows import Rows
from isoflop.core.stage import StageContext
from isoflop.models.base import Model, ModelInfo
from isoflop.models.features import batches
from isoflop.models.hooks.pixels import PIXELS
from isoflop.models.resizing import pixels_of
from isoflop.models.vit import VitBatch, VitInfo, VitModel
from isoflop.models.zero_shot import ZeroShotModel
from isoflop.tasks.base import TASKS, Shard
from isoflop.tasks.data.base import DataTask, Example, bad_row, shards
from isoflop.tasks.data.images import image_rows, opened
from isoflop.tasks.image_costs import costs_of_image
from isoflop.tasks.labelled_images import distortions, vit_info, vit_model

BATCH = 32
PLACE = "{label}"
PROMPT = f"a photo of a {PLACE}"


@TASKS.register("image-classes")
@dataclass(frozen=True, kw_only=True)
class ImageClasses(DataTask):
    """Images with a class each; an example's error is 0 where its class is among the ``top`` most likely ones.

    ``data`` is a folder with a folder per class, or a table with paths (relative to the table) and classes. A class is what the
    model calls it (``id2label`` of its config; one of several names between commas is enough, whatever the case), or its
    number. Images are resized, cut and normalised as the checkpoint's processor says. Secondary metrics: ``nll`` of the class; and where images
    go through a codec, what it lost of them: ``mse``, ``psnr`` in dB, ``ssim``.

    A model without a head that compares images with texts (CLIP, SigLIP) chooses among ``labels``, by default all classes of the
    data, each put in the place of ``{label}`` in ``prompt``. The texts are embedded once for all images: ``flops_names`` beside
    the costs of an image. ``nll`` is over the softmax of all classes, for SigLIP too, which was trained to judge each by itself.
    """

    version: ClassVar[str] = "1"
    metrics: ClassVar[tuple[str, ...] | None] = ("nll", "mse", "psnr", "ssim")

    image: Annotated[str, Knob(doc="field of a table that holds paths of images")] = "image"
    label: Annotated[str, Knob(doc="field of a table that holds the class")] = "label"
    top: Annotated[int, Knob(low=1, high=1000, doc="how many guesses a model has")] = 1
    labels: Annotated[
        tuple[str, ...], Knob(newer=True, doc="classes for models that read their names; empty for those of the data")
    ] = ()
    prompt: Annotated[str, Knob(newer=True, doc="text with {label} in it, for models that read names of classes")] = (
        PROMPT
    )

    @property
    def rows(self) -> Rows:
        """Images with their classes."""
        return image_rows(self.data, self.split, self.image)

    def check_rows(self, rows: Rows) -> None:
        """The fields are there."""
        rows.require(self.label, "label", self.name)

    def check(self, info: ModelInfo) -> None:
        """An image classifier that knows the classes, or can be told them."""
        vit = vit_info(info, self.name)
        super().check(info)
        if vit.names_classes:
            self._check_names()
        firsts: dict[str, Example] = {}
        for example in self.examples():
            firsts.setdefault(str(example.row[self.label]), example)
        self.classes_of(list(firsts.values()), vit)

    def classes_of(self, examples: Sequence[Example], info: VitInfo) -> list[int]:
        """The numbers of examples' classes.

        Raises:
            UserError: the model has no such class.
        """
        given = self.names_of(info)
        count = len(given) if info.names_classes else info.geometry["classes"]
        names = _names(given, split=not info.names_classes)
        found = []
        for example in examples:
            label = str(example.row[self.label]).strip()
            number = names.get(label.casefold(), int(label) if label.isdigit() else count)
            if number >= count:
                raise self._no_class(example, label, count, names, info)
            found.append(number)
        return found

    def _no_class(self, example: Example, label: str, count: int, names: Mapping[str, int], info: VitInfo) -> UserError:
        guess = nearest(label.casefold(), names)
        hint = f" (did you mean {guess!r}?)" if guess else ""
        few = f", {', '.join(list(names)[:6])}{', …' if len(names) > 6 else ''}" if names else ""
        who = "labels name" if info.names_classes else f"model {info.ref} has"
        return bad_row(
            self, example, f"data {self.data}: {who} no class {label!r}{hint}; allowed: 0 … {count - 1}{few}"
        )

    def names_of(self, info: VitInfo) -> tuple[str, ...]:
        """What a model's classes are called, in order: its own names, or those that it is told."""
        if not info.names_classes:
            return info.labels
        return self.labels or _listed(self.rows, self.label)

    def _check_names(self) -> None:
        names = self.labels or _listed(self.rows, self.label)
        folded = [name.casefold() for name in names]
        double = next((name for name in names if folded.count(name.casefold()) > 1), None)
        for wrong, what in (
            (PLACE not in self.prompt, f"prompt = {self.prompt!r} has no {PLACE}; allowed: a text like {PROMPT!r}"),
            (len(names) < 2, f"labels = {list(names)}; allowed: two classes or more"),
            (not all(name.strip() for name in names), f"labels = {list(names)}; allowed: names that are not empty"),
            (double is not None, f"labels name {double!r} twice, whatever the case; allowed: each class once"),
        ):
            if wrong:
                raise UserError(f"task {self.name}: {what}")

    @contextmanager
    def _told(self, vit: VitModel) -> Iterator[dict[str, float]]:
        """Within the block a model without a head knows the classes; gives what that takes once."""
        if not isinstance(vit, ZeroShotModel):
            yield {}
            return
        texts = [self.prompt.replace(PLACE, name) for name in self.names_of(vit.info)]
        with vit.naming(texts):
            yield {"flops_names": float(vit.naming_flops(texts))}

    @torch.no_grad()
    def evaluate(self, model: Model, ctx: StageContext, seed: int) -> Iterator[Shard]:
        """Classify shard by shard."""
        vit = vit_model(model, self.name)
        for examples in shards(self, self.examples(), self.shard, seed):
            wrong = []
            metrics: dict[str, list[np.ndarray]] = {"nll": []}
            for part in batches(len(examples), BATCH):
                batch = self._batch(vit.info, examples[part])
                with self._told(vit):
                    seen_BCHW = vit.seen(batch.images_BCHW, batch.ids_B)
                    logits_BK = vit.classify(seen_BCHW, batch.ids_B).float()
                labels_B = batch.labels_B.to(vit.device)
                best_BK = logits_BK.topk(min(self.top, logits_BK.shape[1]), dim=-1).indices
                wrong.append((best_BK != labels_B[:, None]).all(-1).double().cpu().numpy())
                metrics["nll"].append(F.cross_entropy(logits_BK, labels_B, reduction="none").double().cpu().numpy())
                if vit.occupant(PIXELS) is not None:
                    for name, lost_B in distortions(seen_BCHW, batch.images_BCHW).items():
                        metrics.setdefault(name, []).append(lost_B)
            ids = np.array([example.id for example in examples])
            yield Shard(ids, np.concatenate(wrong), {name: np.concatenate(parts) for name, parts in metrics.items()})

    @torch.no_grad()
    def measure(self, model: Model, ctx: StageContext) -> dict[str, float]:
        """Footprint of classifying one image; see ``costs_of_image``."""
        vit = vit_model(model, self.name)
        with self._told(vit) as once:
            return {**costs_of_image(vit, self._batch(vit.info, self.examples()[:1])), **once}

    def _batch(self, info: VitInfo, examples: Sequence[Example]) -> VitBatch:
        side, channels = info.geometry["image_side"], info.geometry["channels"]
        images = [pixels_of(opened(example.row[self.image]), side, info.resizing, channels) for example in examples]
        labels = self.classes_of(examples, info)
        return VitBatch(torch.stack(images), torch.tensor(labels), torch.tensor([example.id for example in examples]))


def _listed(rows: Rows, field: str) -> tuple[str, ...]:
    """All classes of the data, whether their rows are taken or not."""
    return tuple(sorted({str(row[field]).strip() for row in rows.rows}))


def _names(labels: Sequence[str], split: bool = True) -> dict[str, int]:
    """Every name of every class, the first class of a name first.

    Args:
        split: a class may have several names between commas.
    """
    found: dict[str, int] = {}
    for number, label in enumerate(labels):
        for name in (label, *(label.split(",") if split else ())):
            found.setdefault(name.strip().casefold(), number)
    return found
