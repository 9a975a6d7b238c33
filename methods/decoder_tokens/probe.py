"""The conformance suite's model for methods that drop tokens inside the decoder."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from isoflop.methods.base import build
from isoflop.methods.probe import AbsoluteCost
from isoflop.methods.visual_tokens.probe import PREFILL, VisualTokenProbe, decoder_flops
from isoflop.models.metering import meter


class DecoderTokenProbe(VisualTokenProbe):
    """Logits of an untrained ``tiny-llava`` with three decoder layers; the cost is the visual tokens per layer."""

    def __init__(self, examples: int = 6) -> None:
        super().__init__("d128", examples)

    def absolute(self) -> Sequence[AbsoluteCost]:
        """Of 36 visual tokens half go before the second of 3 layers: (36 + 18 + 18) / 3, and 2 of the question in each.

        Width 128, MLP 344; see ``decoder_flops``.
        """
        method, vocabulary = build("drop-random", {"drop": 0.5, "layer": 1}), self.model.info.geometry["vocab_size"]
        flops = decoder_flops([36 + 2, 18 + 2, 18 + 2], width=128, mlp=344, vocabulary=vocabulary)
        return (
            AbsoluteCost(method, "cost", 24.0),
            AbsoluteCost(method, "layer_visual_tokens", 24.0),
            AbsoluteCost(method, PREFILL, flops),
        )

    @torch.no_grad()
    def cost(self) -> float:
        """Visual tokens that a layer processes, mean over the layers, from a pass."""
        with meter(self.model) as reading:
            self.outputs([0])
        layers = reading.tokens_per_layer
        return float(self.model.info.geometry["visual_tokens"]) if layers is None else sum(layers) / len(layers)
