"""VTC-CLS: keep the patches that the class token attends to (arXiv 2412.05819).

Shape suffixes: B batch, P patches, V visual tokens, L vision layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

import torch
from torch import Tensor

from isoflop.core.errors import Infeasible
from isoflop.core.knobs import Knob
from isoflop.core.stage import StageContext
from isoflop.methods.base import METHODS
from isoflop.methods.selection import top_places
from isoflop.methods.vision_language import vlm_info, vlm_model
from isoflop.methods.visual_tokens.select import PatchSelection
from isoflop.models.base import Model, ModelInfo
from isoflop.models.features import LayerKey, attention_in
from isoflop.models.hooks.visual_tokens import VisualInput
from isoflop.models.vlm_info import VlmInfo

if TYPE_CHECKING:
    from isoflop.methods.probe import Probe


@METHODS.register("vtc-cls")
@dataclass(frozen=True)
class VtcCls(PatchSelection):
    """Score every patch by the attention it gets from [CLS] over several layers of the tower; keep the best.

    1. c^l_i: softmax row of [CLS] in layer l at patch i, averaged over the heads; not renormalised without the column
       of [CLS] itself.
    2. s_i = Σ c^l_i over the layers from ``start_layer`` to the last one that the projector's features went through
       (with features of the last layer but one, as in LLaVA, the last layer is left out).
    3. Keep the ``keep`` patches with the largest s, in raster order. The question plays no part.

    Training-free: on tiny models it is applied to one trained with all tokens. The rows come from a tap on the tower's
    own projections; the tower keeps its attention kernel, and the tap's products count as FLOPs of the tower. A tower
    without [CLS] scores patches by the mean attention they receive; ``footprint`` then says ``scored_by_cls`` = 0.

    Sequences are contiguous in the language model, as released; ``keep_positions: original`` is an extension.
    """

    paper: ClassVar[str] = "arXiv 2412.05819"
    trains_model: ClassVar[bool] = False
    wants_square: ClassVar[bool] = False
    wants_attention: ClassVar[bool] = True

    keep: Annotated[
        int, Knob(low=1, high=4096, log=True, ratio=True, unit="tokens", doc="V, at most the number of patches")
    ] = 4
    start_layer: Annotated[
        int,
        Knob(low=0, high=63, doc="first vision layer that counts, from 0; the last one alone: one row, no ensemble"),
    ] = 0
    reduce: Annotated[
        str, Knob(choices=("sum", "max", "min"), doc="how the layers' rows make one score; sum is the paper's")
    ] = "sum"

    @classmethod
    def identity(cls, info: ModelInfo) -> VtcCls:
        """Every patch."""
        return cls(keep=vlm_info(info).geometry["visual_tokens"])

    def check(self, info: ModelInfo) -> None:
        """Refuse layers that do not exist, or that come after the features."""
        super().check(info)
        self.scored(vlm_info(info))

    def tokens_left(self, grid: int) -> int:
        """``keep``, when there are as many patches."""
        return self.at_most_all("keep", self.keep, grid)

    def scored(self, info: VlmInfo) -> range:
        """Numbers of the layers whose rows count, from 0."""
        end = info.feature_layer  # hidden state n is the output of layer n - 1
        if self.start_layer >= end:
            raise Infeasible(
                f"method vtc-cls: start_layer = {self.start_layer} is none of the {end} vision layers of {info.ref} before "
                f"its features; allowed: 0 … {end - 1}"
            )
        return range(self.start_layer, end)

    def layers(self, info: VlmInfo) -> tuple[LayerKey, ...]:
        """The attention in the scored layers."""
        return tuple(attention_in(n) for n in self.scored(info))

    def kept(self, view: VisualInput, count: int) -> Tensor:
        """Places of the best scores."""
        rows = [rows_BP for key, rows_BP in view.hidden.items() if isinstance(key, str)]
        return top_places(combined(torch.stack(rows), self.reduce), count)

    @classmethod
    def probe(cls) -> Probe:
        """A tower of several layers."""
        from isoflop.methods.visual_tokens.probe import VisualTokenProbe

        return VisualTokenProbe(tower="cls")

    def footprint(self, model: Model, ctx: StageContext) -> dict[str, float]:
        """Also ``scored_by_cls``: 1 for [CLS], 0 for the fall-back of a tower without."""
        vlm = vlm_model(model)
        return {**super().footprint(model, ctx), "scored_by_cls": float(vlm.vision.prefix > 0)}


def combined(rows_LBP: Tensor, how: str) -> Tensor:
    """One score per patch from the rows of several layers, (B, P)."""
    if how == "sum":
        return rows_LBP.sum(0)
    return rows_LBP.amax(0) if how == "max" else rows_LBP.amin(0)
