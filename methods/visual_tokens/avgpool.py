"""Average pooling of square windows of patches.

Shape suffixes: B batch, P patches, V visual tokens, D vision width, g patches per side, s tokens per side, k window side.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

from torch import nn

from isoflop.core.errors import Infeasible
from isoflop.core.knobs import Knob
from isoflop.methods.base import METHODS
from isoflop.methods.vision_language import vlm_info
from isoflop.methods.visual_tokens.base import VisualTokenMethod
from isoflop.models.base import ModelInfo
from isoflop.models.hooks.visual_tokens import CompressedTokens, VisualInput


def square_counts(grid: int) -> list[int]:
    """Token counts that square windows leave of a ``grid`` x ``grid`` image: s² for every divisor s of ``grid``."""
    return [side * side for side in range(1, grid + 1) if grid % side == 0]


@METHODS.register("avgpool")
@dataclass(frozen=True)
class AvgPool(VisualTokenMethod):
    """The mean of each (grid/√V) x (grid/√V) window of patch features; a baseline every table needs. No weights."""

    tokens: Annotated[
        int,
        Knob(
            low=1, high=4096, log=True, ratio=True, unit="tokens", doc="V, a square whose root divides the patch grid"
        ),
    ] = 4

    @classmethod
    def identity(cls, info: ModelInfo) -> AvgPool:
        """One token per patch."""
        return cls(tokens=vlm_info(info).geometry["visual_tokens"])

    def tokens_left(self, grid: int) -> int:
        """``tokens``, when its root divides the grid."""
        allowed = square_counts(grid)
        if self.tokens not in allowed:
            raise Infeasible(
                f"method avgpool: tokens = {self.tokens} does not divide a {grid}x{grid} patch grid into square windows; allowed: {', '.join(map(str, allowed))}"
            )
        return self.tokens

    def compress(self, view: VisualInput, module: nn.Module | None) -> CompressedTokens:
        """Window means in raster order."""
        side = math.isqrt(self.tokens_left(view.grid))
        k = view.grid // side
        x_BskskD = view.x_BPD.unflatten(1, (side, k, side, k))
        return CompressedTokens(x_BskskD.mean(dim=(2, 4)).flatten(1, 2))
