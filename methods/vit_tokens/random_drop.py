"""Dropping random patches: the control that every reduction must beat.

Shape suffixes: B batch, T patches, M patches that stay.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from isoflop.core.knobs import Knob
from isoflop.methods.base import METHODS
from isoflop.methods.selection import random_subset
from isoflop.methods.vit_tokens.base import VitTokenMethod
from isoflop.methods.vit_tokens.tokens import keep
from isoflop.models.hooks.vision_blocks import Signals, TokenState


@METHODS.register("vit-random")
@dataclass(frozen=True)
class VitRandom(VitTokenMethod):
    """Every block drops patches at random and keeps the order of the rest.

    Which ones depends on the example's number, the block and ``draw``, not on the rest of the batch or on torch's
    random state.
    """

    draw: Annotated[int, Knob(low=0, high=1_000_000, doc="another number drops other patches")] = 0

    def most(self, patches: int) -> int:
        """All but one patch."""
        return patches - 1

    def scoring_macs(self, geometry: Any, patches: int, removed: int) -> int:
        """Nothing."""
        return 0

    def reduce(self, state: TokenState, signals: Signals, block: int, count: int, layers: int) -> TokenState:
        """Keep the patches with the smallest hashes."""
        kept_BM = random_subset(state.ids_B, state.patches, state.patches - count, self.draw * 1009 + block)
        return keep(state, kept_BM)
