"""A random subset of the patches: the control that many published selections beat only slightly.

Shape suffixes: B batch, P patches, V visual tokens, D vision width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from torch import Tensor

from isoflop.core.knobs import Knob
from isoflop.methods.base import METHODS
from isoflop.methods.selection import random_subset
from isoflop.methods.vision_language import vlm_info
from isoflop.methods.visual_tokens.select import PatchSelection
from isoflop.models.base import ModelInfo
from isoflop.models.hooks.visual_tokens import VisualInput


@METHODS.register("random")
@dataclass(frozen=True)
class RandomTokens(PatchSelection):
    """``tokens`` patches of each image in raster order, drawn anew per image. No weights.

    The subset depends on ``draw`` and on the example's number (which carries the job's seed), not on the rest of the
    batch or on torch's random state. While a tiny model is trained, a scene keeps its subset whenever it comes up.
    """

    wants_square: ClassVar[bool] = False

    tokens: Annotated[
        int, Knob(low=1, high=4096, log=True, ratio=True, unit="tokens", doc="V, at most the number of patches")
    ] = 4
    draw: Annotated[int, Knob(low=0, high=1_000_000, doc="another number draws other subsets")] = 0

    @classmethod
    def identity(cls, info: ModelInfo) -> RandomTokens:
        """Every patch."""
        return cls(tokens=vlm_info(info).geometry["visual_tokens"])

    def tokens_left(self, grid: int) -> int:
        """``tokens``, when there are as many patches."""
        return self.at_most_all("tokens", self.tokens, grid)

    def kept(self, view: VisualInput, count: int) -> Tensor:
        """The patches with the smallest hashes."""
        return random_subset(view.ids_B, view.x_BPD.shape[1], count, self.draw)
