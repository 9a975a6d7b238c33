"""Methods that keep some patches as they are and drop the others.

Shape suffixes: B batch, P patches, V visual tokens, D vision width.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated

import torch
from torch import Tensor, nn

from isoflop.core.errors import Infeasible
from isoflop.core.knobs import Knob
from isoflop.methods.vision_language import vlm_info
from isoflop.methods.visual_tokens.base import VisualTokenMethod
from isoflop.models.base import ModelInfo
from isoflop.models.hooks.visual_tokens import CompressedTokens, VisualInput

if TYPE_CHECKING:
    from isoflop.methods.probe import Probe


@dataclass(frozen=True)
class PatchSelection(VisualTokenMethod):
    """Base class of selections: says which patches stay; they enter the language model in raster order.

    ``keep_positions`` acts at inference only: every training sees V places in a row. On a model that is trained with the
    selection in place the other choice would be a position code that it has never seen, and is refused.
    """

    keep_positions: Annotated[
        str,
        Knob(
            choices=("contiguous", "original"),
            doc="positions in the language model: V places in a row, or those of the kept patches among all P",
        ),
    ] = "contiguous"

    @abstractmethod
    def kept(self, view: VisualInput, count: int) -> Tensor:
        """Numbers of the ``count`` patches that stay, ascending, (B, V)."""

    def as_trained(self) -> PatchSelection:
        """With places in a row."""
        return replace(self, keep_positions="contiguous")

    def check(self, info: ModelInfo) -> None:
        """Refuse positions that the model's own training has not seen."""
        super().check(info)
        vlm = vlm_info(info)
        trained_here = vlm.lessons is not None and vlm.joint and self.trains_model
        if trained_here and self.keep_positions != "contiguous":
            raise Infeasible(
                f"method {self.name}: keep_positions = {self.keep_positions} does not fit {info.ref} trained with the "
                "method in place, on places in a row; allowed: contiguous, or the model with joint: false"
            )

    @classmethod
    def probe(cls) -> Probe:
        """A model that is trained without the method, on which every position works."""
        from isoflop.methods.visual_tokens.probe import VisualTokenProbe

        return VisualTokenProbe(joint=False)

    def compress(self, view: VisualInput, module: nn.Module | None) -> CompressedTokens:
        """Gather the kept patches."""
        kept_BV = self.kept(view, self.left_of(view.grid, view.x_BPD.shape[1], view.square))
        tokens_BVD = view.x_BPD.gather(1, kept_BV[:, :, None].expand(-1, -1, view.x_BPD.shape[2]))
        return CompressedTokens(tokens_BVD, kept_BV, kept_BV if self.keep_positions == "original" else None)


def lattice(grid: int, side: int) -> Tensor:
    """Numbers of ``side`` x ``side`` patches spread evenly over a ``grid`` x ``grid`` image, ascending, (side²,)."""
    line = ((torch.arange(side) + 0.5) * grid / side).long()
    return (line[:, None] * grid + line).flatten()
