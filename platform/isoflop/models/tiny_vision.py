"""The tiny family's vision tower: its shape, and its training by dense patch labelling.

Shape suffixes: B batch, P patches, D width, C channels, H height, W width.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from isoflop.core.hashing import derive_seed
from isoflop.models import digit_world as world
from isoflop.models.quiet import no_progress_bars

if TYPE_CHECKING:
    from transformers import CLIPVisionConfig, CLIPVisionModel

WIDTH = 64
LAYERS = 1


def tower_config() -> CLIPVisionConfig:
    """CLIP-type tower: width 64, 1 layer, 4 heads, MLP 128, 48-pixel images in 8-pixel patches (36 patches + CLS)."""
    from transformers import CLIPVisionConfig

    return CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=128,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        image_size=world.IMAGE_SIDE,
        patch_size=world.TILE,
    )


def train_tower(steps: int, batch: int, lr: float, seed: int) -> CLIPVisionModel:
    """A tower trained to label every patch with digit, colour, row and column.

    Args:
        steps: optimiser steps.
        batch: images per step, all with 36 regions; a divisor of 256.
        lr: peak of the one-cycle schedule.
        seed: of initial weights and images.
    """
    from transformers import CLIPVisionModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed("tower", seed))
        tower = CLIPVisionModel(tower_config())
        heads = nn.ModuleList(
            [nn.Linear(WIDTH, n) for n in (world.CLASSES, len(world.COLOURS), world.GRID, world.GRID)]
        )
    parameters = [*tower.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=lr, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=lr, total_steps=steps)
    scenes = world.SceneSet("train", steps * batch, (0.0, 0.0, 0.0, 1.0), derive_seed("tower scenes", seed))
    classes = scenes.classes()
    row_P, column_P = np.divmod(np.arange(world.TILES), world.GRID)
    tower.train()
    step = 0
    for chunk in range(0, scenes.count, world.CHUNK):
        images, colours = scenes.draw(chunk)
        for start in range(0, min(world.CHUNK, scenes.count - chunk), batch):
            part = slice(start, start + batch)
            pixels_BCHW = torch.from_numpy((images[part] - world.PIXEL_MEAN) / world.PIXEL_STD)
            x_BPD = tower(pixels_BCHW).last_hidden_state[:, 1:]
            size = len(pixels_BCHW)
            labels = (
                classes[chunk + start : chunk + start + size],
                colours[part],
                np.tile(row_P, (size, 1)),
                np.tile(column_P, (size, 1)),
            )
            loss = torch.stack(
                [
                    F.cross_entropy(head(x_BPD).flatten(0, 1), torch.from_numpy(y.astype(np.int64)).flatten())
                    for head, y in zip(heads, labels, strict=True)
                ]
            ).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            step += 1
    return tower.eval().requires_grad_(False)


def save_tower(tower: CLIPVisionModel, folder: Path) -> None:
    """Write weights, config and preprocessing into ``folder``."""
    with no_progress_bars():
        tower.save_pretrained(folder)
    save_preprocessing(folder)


def save_preprocessing(folder: Path) -> None:
    """Write ``preprocessor_config.json`` in the form Hugging Face's CLIP image processor reads."""
    side = {"height": world.IMAGE_SIDE, "width": world.IMAGE_SIDE}
    content = {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": side,
        "do_center_crop": False,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [world.PIXEL_MEAN] * 3,
        "image_std": [world.PIXEL_STD] * 3,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(content, indent=2) + "\n")
