"""Random documents: the control of every selection."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from isoflop.methods.base import METHODS
from isoflop.methods.data_selection.base import DataSelectionMethod
from isoflop.methods.data_selection.scorers import RandomScorer


@METHODS.register("data-random")
@dataclass(frozen=True)
class DataRandom(DataSelectionMethod):
    """Keeps documents drawn without replacement, in an order that the job's seed gives."""

    wants_target: ClassVar[bool] = False
    by_chance: ClassVar[bool] = True

    def scorer(self, seed: int) -> RandomScorer:
        """Uniform numbers."""
        return RandomScorer(seed)
