"""Truncation: the beginning or the end of the context."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np

from isoflop.core.knobs import Knob
from isoflop.methods.base import METHODS
from isoflop.methods.prompts.base import KeptUnits, RatedPromptMethod, over_all_pages, selection_of
from isoflop.methods.prompts.select import within_budget
from isoflop.methods.prompts.units import Page
from isoflop.models.lm import LmModel


@METHODS.register("prompt-truncate")
@dataclass(frozen=True)
class PromptTruncate(RatedPromptMethod):
    """Keep the first or the last words of the context, documents in their order, up to the share of reader tokens."""

    side: Annotated[str, Knob(choices=("head", "tail"), doc="what stays: the beginning or the end")] = "head"

    def select(self, pages: Sequence[Page], query: str | None, reader: LmModel, prepared: Any) -> KeptUnits:
        """Scores fall with the distance from the side that stays."""
        tokens_N = over_all_pages(pages)
        places_N = np.arange(len(tokens_N), dtype=np.float64)
        score_N = -places_N if self.side == "head" else places_N
        return selection_of(within_budget(score_N, tokens_N, self.rate * tokens_N.sum()), pages)
