"""Wanda: weights and activations decide what goes (arXiv 2306.11695).

Shape suffixes: O outputs (rows), I inputs (columns).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from torch import Tensor

from isoflop.core.knobs import Knob
from isoflop.methods.base import METHODS
from isoflop.methods.weights.payloads import Payload
from isoflop.methods.weights.rules import pattern_of
from isoflop.methods.weights.sparse import GROUPS, CalibratedPruner, ScorePruner, as_float
from isoflop.methods.weights.statistics import ViewStats
from isoflop.models.base import ModelInfo


@METHODS.register("wanda")
@dataclass(frozen=True)
class Wanda(CalibratedPruner, ScorePruner):
    """Remove the weights of smallest |W_ij|·‖X_j‖₂, compared within each output row (section 3 of the paper).

    The kept weights stay as they are. Input norms are those of the uncompressed model. Among equal scores the weights of
    smallest |W_ij| go first, so that a matrix without observed inputs (an expert that no token was routed to) is pruned by
    magnitude.
    """

    paper: ClassVar[str] = "arXiv 2306.11695"

    compare: Annotated[str, Knob(choices=GROUPS, doc="scores are compared within the matrix or within a row")] = "row"

    @classmethod
    def identity(cls, info: ModelInfo) -> Wanda:
        """Nothing removed."""
        return cls(sparsity=0.0)

    def relevant(self) -> Wanda:
        """A pattern compares its own groups; where nothing goes nothing is compared."""
        if self.sparsity == 0:
            return self.at_defaults("compare", "n_calib")
        return self if pattern_of(self.pattern) is None else self.at_defaults("compare")

    def encode(self, weight_OI: Tensor, stats: ViewStats | None = None) -> Payload:
        """The kept weights."""
        assert stats is not None
        size_OI = as_float(weight_OI).abs()
        return self.stored(weight_OI, self.keep(size_OI * stats.norms_I, ties_OI=size_OI))
