"""H2O: heavy hitters by accumulated attention (arXiv 2306.14048)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from isoflop.core.knobs import Knob
from isoflop.methods.base import METHODS
from isoflop.methods.kv_cache.accumulated import Accumulated


@METHODS.register("h2o")
@dataclass(frozen=True)
class H2O(Accumulated):
    """Half of the budget for the tokens with the largest attention sums over all queries, half for the newest."""

    paper: ClassVar[str] = "arXiv 2306.14048"

    recent: Annotated[float, Knob(low=0.0, high=1.0, doc="share of the budget for the newest tokens")] = 0.5

    @property
    def protects(self) -> tuple[int, float]:
        """The knob ``recent``."""
        return 0, self.recent
