"""Patches on an even lattice: the other control that every selection must beat."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

from torch import Tensor

from isoflop.core.errors import Infeasible
from isoflop.core.knobs import Knob
from isoflop.methods.base import METHODS
from isoflop.methods.vision_language import vlm_info
from isoflop.methods.visual_tokens.select import PatchSelection, lattice
from isoflop.models.base import ModelInfo
from isoflop.models.hooks.visual_tokens import VisualInput


@METHODS.register("uniform-grid")
@dataclass(frozen=True)
class UniformGrid(PatchSelection):
    """√V x √V patches, the middles of equal cells, the same for every image. No weights."""

    tokens: Annotated[
        int, Knob(low=1, high=4096, log=True, ratio=True, unit="tokens", doc="V, a square, at most the patches")
    ] = 4

    @classmethod
    def identity(cls, info: ModelInfo) -> UniformGrid:
        """Every patch."""
        return cls(tokens=vlm_info(info).geometry["visual_tokens"])

    def tokens_left(self, grid: int) -> int:
        """``tokens``, when it is a square."""
        if math.isqrt(self.tokens) ** 2 != self.tokens or self.tokens > grid * grid:
            squares = ", ".join(str(n * n) for n in range(1, grid + 1))
            raise Infeasible(
                f"method uniform-grid: tokens = {self.tokens} is no square lattice on a {grid}x{grid} patch grid; "
                f"allowed: {squares}"
            )
        return self.tokens

    def kept(self, view: VisualInput, count: int) -> Tensor:
        """The lattice."""
        return lattice(view.grid, math.isqrt(count)).to(view.x_BPD.device).expand(len(view.x_BPD), -1)
