"""The tiny family's vision tower: its shape, and its training by dense patch labelling.

Shape suffixes: B batch, P patches, D width, C channels, H height, W width.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from isoflop.core.hashing import derive_seed
from isoflop.core.stage import StageContext
from isoflop.models.features import TowerSource, Vision, vision_of
from isoflop.models.quiet import no_progress_bars
from isoflop.models.training.loop import Unclipped, descend, one_cycle
from isoflop.models.worlds import digit_world as world

if TYPE_CHECKING:
    from transformers import CLIPVisionConfig, CLIPVisionModel

WIDTH = 64
CLS_WEIGHT = 4.0
"""Weight of the class token's loss, a mean over labels, beside the sum of the four patch losses."""


@dataclass(frozen=True)
class TowerKind:
    """A tower of the family.

    Attributes:
        layers: of the transformer.
        feature_layer: hidden state that feeds the projector (0 is the embedding).
    """

    layers: int
    feature_layer: int


KINDS = {"dense": TowerKind(1, 1), "cls": TowerKind(4, 3)}
"""``cls``: the class token of the last layer is trained on the whole image, and the projector reads the layer before,
as with CLIP in LLaVA."""


def tower_config(kind: str = "dense") -> CLIPVisionConfig:
    """CLIP-type tower: width 64, 4 heads, MLP 128, 48-pixel images in 8-pixel patches (36 patches + CLS)."""
    from transformers import CLIPVisionConfig

    return CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=128,
        num_hidden_layers=KINDS[kind].layers,
        num_attention_heads=4,
        image_size=world.IMAGE_SIDE,
        patch_size=world.TILE,
    )


def train_tower(steps: int, batch: int, lr: float, seed: int, kind: str = "dense") -> CLIPVisionModel:
    """A tower trained to label every patch with digit, colour, row and column.

    In a tower of kind ``cls`` every second batch holds sparse scenes; the patch labels are read from the layer that
    feeds the projector, and the class token of the last layer tells which digits and which colours a sparse scene holds.

    Args:
        steps: optimiser steps.
        batch: images per step, all with 36 regions; a divisor of 256.
        lr: peak of the one-cycle schedule.
        seed: of initial weights and images.
    """
    from transformers import CLIPVisionModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed("tower", seed))
        tower = CLIPVisionModel(tower_config(kind))
        heads = nn.ModuleList([nn.Linear(WIDTH, n) for n in _labels(kind)])
        present = nn.Linear(WIDTH, world.CLASSES + len(world.COLOURS)) if kind == "cls" else None
    parameters = [*tower.parameters(), *heads.parameters(), *(present.parameters() if present is not None else ())]

    def loss_of(labelled: _Labelled) -> Tensor:
        pixels_BCHW = torch.from_numpy((labelled.images - world.PIXEL_MEAN) / world.PIXEL_STD)
        if present is None:
            return _patch_loss(heads, tower(pixels_BCHW).last_hidden_state[:, 1:], labelled)
        outputs = tower(pixels_BCHW, output_hidden_states=True)
        loss = _patch_loss(heads, outputs.hidden_states[KINDS[kind].feature_layer][:, 1:], labelled)
        if labelled.sparse:
            told_BL = present(outputs.pooler_output)
            loss = loss + CLS_WEIGHT * F.binary_cross_entropy_with_logits(told_BL, labelled.contents())
        return loss

    optimizer = torch.optim.AdamW(parameters, lr=lr, fused=True)
    tower.train()
    descend(optimizer, Unclipped(steps), _batches(steps, batch, seed, kind), loss_of, one_cycle(optimizer, lr, steps))
    return tower.eval().requires_grad_(False)


@dataclass(frozen=True)
class _Labelled:
    """Images (B, C, H, W) with digit classes and colours of their tiles (B, P); colour -100 where there is no digit."""

    images: np.ndarray
    classes: np.ndarray
    colours: np.ndarray
    sparse: bool

    def contents(self) -> Tensor:
        """Which digits and which colours each image holds, float (B, classes + colours)."""
        digits = (self.classes[:, :, None] == np.arange(world.CLASSES)).any(1)
        colours = (self.colours[:, :, None] == np.arange(len(world.COLOURS))).any(1)
        return torch.from_numpy(np.concatenate([digits, colours], axis=1).astype(np.float32))


def _labels(kind: str) -> tuple[int, ...]:
    """Classes of the four patch labels: digit, colour, row, column."""
    return (world.CLASSES + (kind == "cls"), len(world.COLOURS), world.GRID, world.GRID)


def _batches(steps: int, batch: int, seed: int, kind: str) -> Iterator[_Labelled]:
    """Training batches; of kind ``cls`` every second one sparse."""
    full = world.SceneSet("train", steps * batch, world.FINE_MIX, derive_seed("tower scenes", seed))
    sets = [full] if kind == "dense" else [full, replace(full, digits=world.SPARSE_DIGITS)]
    streams = [_stream(scenes, batch) for scenes in sets]
    for step in range(steps):
        yield next(streams[step % len(streams)])


def _stream(scenes: world.SceneSet, batch: int) -> Iterator[_Labelled]:
    classes_NP = scenes.classes()
    for chunk in range(0, scenes.count, world.CHUNK):
        images, colours = scenes.draw(chunk)
        for start in range(0, min(world.CHUNK, scenes.count - chunk), batch):
            part = slice(start, start + batch)
            images_B = images[part]
            classes_BP = classes_NP[chunk + start : chunk + start + len(images_B)]
            colours_BP = np.where(classes_BP == world.BLANK, -100, colours[part])
            yield _Labelled(images_B, classes_BP, colours_BP, scenes.digits > 0)


def _patch_loss(heads: nn.ModuleList, x_BPD: Tensor, labelled: _Labelled) -> Tensor:
    """Sum of the four cross-entropies."""
    row_P, column_P = np.divmod(np.arange(world.TILES), world.GRID)
    size = len(x_BPD)
    labels = (labelled.classes, labelled.colours, np.tile(row_P, (size, 1)), np.tile(column_P, (size, 1)))
    return torch.stack(
        [
            F.cross_entropy(head(x_BPD).flatten(0, 1), torch.from_numpy(y.astype(np.int64)).flatten())
            for head, y in zip(heads, labels, strict=True)
        ]
    ).sum()


@dataclass(frozen=True)
class TinyTowerStage(TowerSource):
    """The tiny family's ``CLIPVisionModel``, trained once by dense patch labelling, then frozen.

    Every patch is labelled with its digit, colour, row and column by four linear heads on the last hidden state, which
    are thrown away. AdamW with a one-cycle schedule.
    """

    kind: ClassVar[str] = "tower"

    steps: int = 150
    batch: int = 64
    lr: float = 3e-3
    seed: int = 0
    tower: str = "dense"
    world: str = world.VOCABULARY

    def compute(self, ctx: StageContext, folder: Path) -> None:
        """Train and save in ``save_pretrained`` form with a ``preprocessor_config.json``."""
        save_tower(train_tower(self.steps, self.batch, self.lr, self.seed, self.tower), folder)

    def load(self, ctx: StageContext, folder: Path) -> Vision:
        """The tower in evaluation mode on the worker's device, without gradients."""
        return load_tower(ctx, folder)


def save_tower(tower: CLIPVisionModel, folder: Path) -> None:
    """Write weights, config and preprocessing into ``folder``."""
    with no_progress_bars():
        tower.save_pretrained(folder)
    save_preprocessing(folder, tower.config.image_size)


def load_tower(ctx: StageContext, folder: Path) -> Vision:
    """What ``save_tower`` wrote, in evaluation mode on the worker's device, without gradients."""
    from transformers import CLIPVisionModel

    with no_progress_bars():
        tower = CLIPVisionModel.from_pretrained(folder, local_files_only=True, use_safetensors=True)
    return vision_of(tower.to(ctx.device).eval().requires_grad_(False), folder)


def save_preprocessing(folder: Path, side: int = world.IMAGE_SIDE, processor: str = "CLIPImageProcessor") -> None:
    """Write ``preprocessor_config.json`` in the form Hugging Face's image processors read.

    Args:
        side: of the images the model wants, in pixels.
        processor: name of the processor's class.
    """
    content = {
        "image_processor_type": processor,
        "do_resize": True,
        "size": {"height": side, "width": side},
        **({"do_center_crop": False} if processor.startswith("CLIP") else {}),
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [world.PIXEL_MEAN] * 3,
        "image_std": [world.PIXEL_STD] * 3,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(content, indent=2) + "\n")
