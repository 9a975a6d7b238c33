"""Sizes of the tiny vision transformers, their configs and their initial weights.

Shape suffixes: P patches, C width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from isoflop.models.worlds import sprite_world as world

if TYPE_CHECKING:
    from transformers import ViTConfig

PATCH = 4
GRID = world.SIDE // PATCH
POSITION_SCALE = 0.5


@dataclass(frozen=True)
class TinyVitSize:
    """One member: width, layers, heads; the MLP is twice as wide as the tokens."""

    width: int
    layers: int
    heads: int


SIZES = {"c48": TinyVitSize(48, 4, 3), "c64": TinyVitSize(64, 6, 4), "c96": TinyVitSize(96, 6, 3)}


def vit_config(size: TinyVitSize, data: str) -> ViTConfig:
    """The Hugging Face config: 32-pixel images in 4-pixel patches (64 patches + CLS); declares its images."""
    from transformers import ViTConfig

    return ViTConfig(
        architectures=["ViTForImageClassification"],
        hidden_size=size.width,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        intermediate_size=2 * size.width,
        image_size=world.SIDE,
        patch_size=PATCH,
        num_labels=world.CLASSES,
        isoflop={"images": data},
    )


def untrained(size: TinyVitSize, data: str, seed: int) -> Any:
    """A ``ViTForImageClassification`` with fresh weights, in training mode. Leaves torch's global random state alone.

    Matrices N(0, 1/fan_in), residual outputs also divided by √(2·layers); classifier N(0, 0.01/C); positions are sines
    and cosines of row and column. Hugging Face's default (0.02 everywhere) learns from few steps more slowly.
    """
    from transformers import ViTForImageClassification

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = ViTForImageClassification(vit_config(size, data))
        _initialise(module, size)
    return module


@torch.no_grad()
def _initialise(module: Any, size: TinyVitSize) -> None:
    for name, parameter in module.vit.layers.named_parameters():
        if parameter.ndim == 2:
            residual = "o_proj" in name or "fc2" in name
            parameter.normal_(std=parameter.shape[1] ** -0.5 / ((2 * size.layers) ** 0.5 if residual else 1.0))
    embeddings = module.vit.embeddings
    embeddings.patch_embeddings.projection.weight.normal_(std=(world.CHANNELS * PATCH**2) ** -0.5)
    embeddings.cls_token.normal_(std=0.2)
    embeddings.position_embeddings.zero_()
    embeddings.position_embeddings[0, 1:] = POSITION_SCALE * grid_positions(size.width)
    module.classifier.weight.normal_(std=0.1 * size.width**-0.5)


def grid_positions(width: int) -> Tensor:
    """Sines and cosines of column and row at width/4 wave lengths, (P, C)."""
    row_P, column_P = np.divmod(np.arange(GRID * GRID), GRID)
    frequency = 1.5 * 20.0 ** -(np.arange(width // 4) / (width // 4))
    parts = [f(place_P[:, None] * frequency) for place_P in (column_P, row_P) for f in (np.sin, np.cos)]
    return torch.from_numpy(np.concatenate(parts, axis=1).astype(np.float32))
