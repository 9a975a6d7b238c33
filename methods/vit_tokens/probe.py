"""The conformance suite's model for token methods of vision transformers: an untrained tiny ViT and a few images."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from isoflop.core.folder_context import FolderContext
from isoflop.methods.base import Method, build
from isoflop.methods.probe import AbsoluteCost, Probe
from isoflop.methods.vit_tokens.base import counted_macs
from isoflop.models.tiny.vit import tiny_info
from isoflop.models.tiny.vit_config import SIZES, untrained
from isoflop.models.tiny.vit_training import Recipe
from isoflop.models.vit import VitModel
from isoflop.models.worlds.sprite_world import ImageSet


def untrained_model(size: str = "c48", seed: int = 0) -> VitModel:
    """A member of the tiny family (on digits) as it is before training."""
    module = untrained(SIZES[size], "digits", seed).eval().requires_grad_(False)
    return VitModel(tiny_info(size, Recipe()), module)


class VitProbe(Probe):
    """Logits of an untrained ``tiny-vit`` on sprites; the cost is the counted multiply-adds of an image."""

    def __init__(self, size: str = "c48", examples: int = 6) -> None:
        self.model: VitModel = untrained_model(size)
        self.ctx = FolderContext.temporary()
        self.examples = examples
        self._images = torch.from_numpy(next(ImageSet("sprites", "train", examples, 0.0, seed=0).images()))

    def prepared(self, method: Method, seed: int) -> Any:
        """Nothing: none of these methods has weights."""
        return None

    def absolute(self) -> Sequence[AbsoluteCost]:
        """MACs of 4 blocks of width 48 with an MLP of 96: 4·N·48² + 2·N²·48 for N tokens at the input, 2·M·48·96 for M behind.

        64 patches of 48 numbers become tokens (64·48·48), and 10 classes are told apart (48·10). Whole, N = M = 65. Where
        every block keeps three quarters of its patches, 48, 36, 27 and 21 of them are left, beside the class token.
        """
        whole = AbsoluteCost(build("vit-random", {"macs": 1.0}), "cost", self._macs([65] * 5))
        return whole, AbsoluteCost(build("vit-random", {"ratio": 0.75}), "cost", self._macs([65, 49, 37, 28, 22]))

    @staticmethod
    def _macs(tokens: Sequence[int]) -> float:
        blocks = [4 * n * 48**2 + 2 * n * n * 48 + 2 * m * 48 * 96 for n, m in pairwise(tokens)]
        return float(64 * 48 * 48 + sum(blocks) + 48 * 10)

    @torch.no_grad()
    def outputs(self, rows: Sequence[int]) -> Tensor:
        """Class logits, (B, K)."""
        index = torch.tensor(list(rows))
        return self.model.logits(self._images[index], index)

    def cost(self) -> float:
        """Multiply-adds of one image, counted."""
        return counted_macs(self.model, self._images[:1])
