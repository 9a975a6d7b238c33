"""The conformance suite's model for methods that drop tokens inside the decoder."""

from __future__ import annotations

import torch

from isoflop.methods.decoder_tokens.base import Dropping
from isoflop.methods.visual_tokens.probe import VisualTokenProbe
from isoflop.models.hooks.decoder_layers import DECODER_LAYERS


class DecoderTokenProbe(VisualTokenProbe):
    """Logits of an untrained ``tiny-llava`` with three decoder layers; the cost is the visual tokens per layer."""

    def __init__(self, examples: int = 6) -> None:
        super().__init__("d128", examples)

    @torch.no_grad()
    def cost(self) -> float:
        """Visual tokens that a layer processes, mean over the layers, from a pass."""
        self.outputs([0])
        dropping = self.model.occupant(DECODER_LAYERS)
        return (
            dropping.mean_tokens if isinstance(dropping, Dropping) else float(self.model.info.geometry["visual_tokens"])
        )
