"""Keeping the patches that CLS attends to: the plain baseline of token pruning.

Shape suffixes: B batch, H heads, T patches, M patches that stay.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from isoflop.core.errors import Infeasible
from isoflop.methods.base import METHODS
from isoflop.methods.selection import top_places
from isoflop.methods.vit_tokens.base import VitTokenMethod
from isoflop.methods.vit_tokens.tokens import keep
from isoflop.models.base import ModelInfo
from isoflop.models.hooks.vision_blocks import Signals, TokenState
from isoflop.models.vit import VitInfo


@METHODS.register("vit-cls-topk")
@dataclass(frozen=True)
class VitClsTopK(VitTokenMethod):
    """Every block keeps the patches with the largest attention weight from CLS, mean over heads, in their old order.

    Only the row of CLS is computed, from the block's own queries and keys, so that the model keeps its fast attention.
    """

    def check(self, info: ModelInfo) -> None:
        """Refuse models without a class token."""
        if isinstance(info, VitInfo) and not info.geometry["prefix"]:
            raise Infeasible(
                f"method {self.name} keeps what the class token attends to, and model {info.ref} has none; allowed: models with a "
                "class token, or another method (tome, pitome, vit-random)"
            )
        super().check(info)

    def most(self, patches: int) -> int:
        """All but one patch."""
        return patches - 1

    def scoring_macs(self, geometry: Any, patches: int, removed: int) -> int:
        """One row of attention logits in every head."""
        return (geometry["prefix"] + patches) * geometry["width"]

    def reduce(self, state: TokenState, signals: Signals, block: int, count: int, layers: int) -> TokenState:
        """Keep the patches with the highest scores; of equal ones the first."""
        score_BT = signals.attention(rows=1)[:, :, 0, state.prefix :].mean(1)
        return keep(state, top_places(score_BT, state.patches - count))
