"""No compression: the baseline of every model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from isoflop.core.hook import Hook
from isoflop.core.stage import Stage, StageContext
from isoflop.methods.base import METHODS, Axes, Method
from isoflop.methods.visual_tokens.base import VisualTokenMethod
from isoflop.models.base import Model, ModelInfo
from isoflop.models.hooks.occupant import Occupant
from isoflop.models.hooks.visual_tokens import VISUAL_TOKENS, CompressedTokens, VisualInput


@METHODS.register("none")
@dataclass(frozen=True)
class NoCompression(VisualTokenMethod):
    """The model as it is, ratio 1: what every other method is compared with, on models of every kind.

    On a vision-language model all P patch features enter the language model, V = P.
    """

    wants_raster: ClassVar[bool] = False
    wants_square: ClassVar[bool] = False

    @classmethod
    def identity(cls, info: ModelInfo) -> NoCompression:
        """Always."""
        return cls()

    def idle(self, info: ModelInfo) -> bool:
        """On every model without visual tokens."""
        return VISUAL_TOKENS not in info.hooks

    def tokens_left(self, grid: int) -> int:
        """All of them."""
        return grid * grid

    def compress(self, view: VisualInput, module: nn.Module | None) -> CompressedTokens:
        """The features as they are."""
        return CompressedTokens(view.x_BPD)

    def axes(self, info: ModelInfo) -> Axes:
        """V = P where there are visual tokens; ratio 1."""
        return Axes(ratio=1.0) if self.idle(info) else super().axes(info)

    def check(self, info: ModelInfo) -> None:
        """Nothing is impossible."""
        if not self.idle(info):
            super().check(info)

    def prepare(
        self, info: ModelInfo, weights: Stage | None, seed: int, trained_with: tuple[Method, ...] = ()
    ) -> Stage | None:
        """The training of the model where it took part in it."""
        return None if self.idle(info) else super().prepare(info, weights, seed, trained_with)

    def occupants(self, model: Model, prepared: Any) -> dict[Hook[Any], Occupant]:
        """Nothing, or what hands visual tokens on."""
        return {} if self.idle(model.info) else super().occupants(model, prepared)

    def footprint(self, model: Model, ctx: StageContext) -> dict[str, float]:
        """``ratio`` = 1."""
        return {"ratio": 1.0} if self.idle(model.info) else super().footprint(model, ctx)
