"""The model as it is served, the reference of the family."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from isoflop.methods.base import METHODS, Method
from isoflop.methods.tokenization.base import TokenizationMethod
from isoflop.models.base import ModelInfo
from isoflop.models.hooks.byte_view import ByteView, TokenView


@METHODS.register("byte-tokens")
@dataclass(frozen=True)
class ByteTokens(TokenizationMethod):
    """The prompt's own tokens, as they are: what a model does with a prompt that ends inside a word.

    The prompt is tokenised by itself; the bytes behind it get their probabilities from all segmentations of the
    continuation, given those tokens. The same as no method; it gives the rows to compare with.
    """

    version: ClassVar[str] = "1"
    paper: ClassVar[str] = "arXiv 2410.09303, the biased predictor"

    @classmethod
    def identity(cls, info: ModelInfo) -> Method:
        """Itself."""
        return cls()

    def view(self, prepared: Any) -> ByteView:
        """The view of a model without a method."""
        return TokenView()
