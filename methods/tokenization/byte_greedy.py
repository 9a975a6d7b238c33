"""Greedy segmentation, byte by byte."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from isoflop.methods.base import METHODS
from isoflop.methods.tokenization.base import TokenizationMethod
from isoflop.models.byte_trees.segmentations import Segmentations
from isoflop.models.hooks.byte_view import ByteText, ByteView, TokenView
from isoflop.models.lm import LmModel


@dataclass
class GreedyView(TokenView):
    """Every byte is predicted behind the tokens of all bytes before it, tokenised anew."""

    def next_bytes(self, model: LmModel, segmentations: Segmentations, texts: Sequence[ByteText]) -> list[np.ndarray]:
        """One prompt per scored byte."""
        prompts = [ByteText(text.data[: at + 1], at) for text in texts for at in range(text.first, len(text.data))]
        rows_NS = np.concatenate(super().next_bytes(model, segmentations, prompts))
        ends = np.cumsum([len(text.data) - text.first for text in texts])
        return np.split(rows_NS, ends[:-1])


@METHODS.register("byte-greedy")
@dataclass(frozen=True)
class ByteGreedy(TokenizationMethod):
    """One segmentation per prefix: tokenise all bytes so far, add up the next tokens by their first byte.

    What byte-by-byte generation with an ordinary interface amounts to. It is wrong inside every token, not only behind
    the prompt, and runs the whole prefix again for each byte.
    """

    version: ClassVar[str] = "1"
    paper: ClassVar[str] = "arXiv 2410.09303, the biased predictor at every byte"

    def view(self, prepared: Any) -> ByteView:
        """Tokenised anew."""
        return GreedyView()
