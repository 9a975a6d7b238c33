"""Magnitude pruning: the smallest weights go."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from isoflop.methods.base import METHODS
from isoflop.methods.weights.payloads import Payload
from isoflop.methods.weights.sparse import ScorePruner, as_float
from isoflop.methods.weights.statistics import ViewStats
from isoflop.models.base import ModelInfo


@METHODS.register("magnitude")
@dataclass(frozen=True)
class Magnitude(ScorePruner):
    """Remove the weights of smallest |W_ij|, by default with one threshold per matrix; no data."""

    @classmethod
    def identity(cls, info: ModelInfo) -> Magnitude:
        """Nothing removed."""
        return cls(sparsity=0.0)

    def encode(self, weight_OI: Tensor, stats: ViewStats | None = None) -> Payload:
        """The kept weights."""
        return self.stored(weight_OI, self.keep(as_float(weight_OI).abs()))
