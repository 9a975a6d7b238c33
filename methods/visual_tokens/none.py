"""No compression: every patch enters the language model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from isoflop.methods.base import METHODS
from isoflop.methods.visual_tokens.base import VisualTokenMethod
from isoflop.models.base import ModelInfo
from isoflop.models.hooks.visual_tokens import CompressedTokens, VisualInput


@METHODS.register("none")
@dataclass(frozen=True)
class NoCompression(VisualTokenMethod):
    """All P patch features, V = P: the reference that every ratio is relative to."""

    wants_raster: ClassVar[bool] = False

    @classmethod
    def identity(cls, info: ModelInfo) -> NoCompression:
        """Always."""
        return cls()

    def tokens_left(self, grid: int) -> int:
        """All of them."""
        return grid * grid

    def compress(self, view: VisualInput, module: nn.Module | None) -> CompressedTokens:
        """The features as they are."""
        return CompressedTokens(view.x_BPD)
