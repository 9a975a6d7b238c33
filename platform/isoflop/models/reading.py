"""Models that read text: what is known of their tokenizer and of the text that they are calibrated on."""

from __future__ import annotations

from dataclasses import dataclass

from isoflop.models.base import ModelInfo
from isoflop.models.worlds.calibration import CalibrationText
from isoflop.models.worlds.lm_text import TokenizerSource


@dataclass(frozen=True, kw_only=True)
class TextInfo(ModelInfo):
    """What is known of a model that reads text without loading its weights.

    Attributes:
        text: where calibration examples come from; None when nothing is known of its training.
        tokenizer: the stage whose value is its tokenizer, or None.
    """

    text: CalibrationText | None
    tokenizer: TokenizerSource | None = None

    @property
    def window_at_most(self) -> int | None:
        """Tokens of a window of calibration text that the model reads whole; None where nothing limits it."""
        return self.geometry.get("positions")
