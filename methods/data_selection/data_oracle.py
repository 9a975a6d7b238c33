"""Documents of the target's own domain: what a selection by domain can reach at best."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from isoflop.methods.base import METHODS
from isoflop.methods.data_selection.base import DataSelectionMethod
from isoflop.methods.data_selection.scorers import OracleScorer


@METHODS.register("data-oracle")
@dataclass(frozen=True)
class DataOracle(DataSelectionMethod):
    """Keeps random documents of the target's domain, and random others when these are used up.

    It reads the label that no other method sees. It is no bound: documents of another domain may be of more use, and the
    best ones of the domain better than random ones.
    """

    by_chance: ClassVar[bool] = True

    def scorer(self, seed: int) -> OracleScorer:
        """The domain before chance."""
        return OracleScorer(seed)
