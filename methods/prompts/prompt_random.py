"""Random deletion of words: the control of every score."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from isoflop.core.hashing import derive_seed
from isoflop.methods.base import METHODS
from isoflop.methods.prompts.base import KeptUnits, RatedPromptMethod, over_all_pages, selection_of
from isoflop.methods.prompts.select import within_budget
from isoflop.methods.prompts.units import Page
from isoflop.models.lm import LmModel


@METHODS.register("prompt-random")
@dataclass(frozen=True)
class PromptRandom(RatedPromptMethod):
    """Keep words at random up to the share of reader tokens; the same words for the same documents, and nested in ``rate``."""

    def select(self, pages: Sequence[Page], query: str | None, reader: LmModel, prepared: Any) -> KeptUnits:
        """Random scores that depend on nothing but the documents' text."""
        tokens_N = over_all_pages(pages)
        rng = np.random.default_rng(derive_seed(self.name, *(page.document.text for page in pages)))
        kept_N = within_budget(rng.random(len(tokens_N)), tokens_N, self.rate * tokens_N.sum())
        return selection_of(kept_N, pages)
