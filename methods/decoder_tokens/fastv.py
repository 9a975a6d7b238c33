"""FastV: visual tokens that the last prompt token ignores go after K layers (arXiv 2403.06764).

Shape suffixes: B batch, V visual tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from isoflop.methods.base import METHODS
from isoflop.methods.decoder_tokens.base import Candidates, DecoderTokenMethod
from isoflop.methods.selection import random_subset, top_places


@METHODS.register("fastv")
@dataclass(frozen=True)
class FastV(DecoderTokenMethod):
    """Before layer K the share ``drop`` of the visual tokens goes: those with the least attention from the last token.

    The score of a visual token is the attention that the last prompt token pays it in layer K - 1, mean over the heads;
    it comes from a tap on that layer's own queries and keys. Training-free, depends on the question. ``ratio`` is the
    number of visual tokens over its mean over the layers; FLOPs are measured.
    """

    paper: ClassVar[str] = "arXiv 2403.06764"

    def kept(self, candidates: Candidates, count: int) -> Tensor:
        """The visual tokens with the most attention."""
        return top_places(candidates.attention(), count)


@METHODS.register("drop-random")
@dataclass(frozen=True)
class DropRandom(DecoderTokenMethod):
    """Before layer K a random share of the visual tokens goes, drawn per example: the control for FastV."""

    def kept(self, candidates: Candidates, count: int) -> Tensor:
        """A subset that depends on the example's number only."""
        return random_subset(candidates.ids_B, candidates.count, count, draw=0)
