"""What the pruners share: sparsity, patterns, and their stored forms.

Shape suffixes: O outputs (rows), I inputs (columns).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from isoflop.core.errors import Infeasible
from isoflop.core.knobs import Knob
from isoflop.methods.base import Axes
from isoflop.methods.weights.base import CalibratedMethod, MatrixCodecMethod
from isoflop.methods.weights.payloads import BitmapPayload, DensePayload, PatternPayload, Payload
from isoflop.methods.weights.rules import PATTERNS, UNSTRUCTURED, keep_highest, keep_pattern, pattern_of
from isoflop.models.base import ModelInfo

GROUPS = ("matrix", "row")


@dataclass(frozen=True)
class Pruner(MatrixCodecMethod):
    """Base class of methods that set weights to zero.

    Unstructured masks are stored as a bitmap, 16·(1 - sparsity) + 1 bits per weight, or dense where that is smaller; N:M
    patterns as kept weights with their places, 16·N/M + log2(M)·N/M bits.
    """

    sparsity: Annotated[float, Knob(low=0.0, high=0.95, ratio=True, doc="share of zeros; a pattern has its own")] = 0.5
    pattern: Annotated[str, Knob(choices=PATTERNS, doc="N:M keeps N of every M inputs of a row")] = UNSTRUCTURED

    def axes(self, info: ModelInfo) -> Axes:
        """Weights over those that are not zero."""
        return Axes(ratio=1 / (1 - self.sparsity))

    def check_shape(self, rows: int, cols: int) -> None:
        """A pattern fixes the sparsity and divides the inputs; without one every matrix will do."""
        pattern = pattern_of(self.pattern)
        if pattern is None:
            return
        n, m = pattern
        if abs(self.sparsity - (1 - n / m)) > 1e-9:
            raise Infeasible(
                f"method {self.name}: sparsity = {self.sparsity:g} does not fit pattern = {self.pattern}, "
                f"which prunes {1 - n / m:g}; allowed: sparsity {1 - n / m:g}, or pattern {UNSTRUCTURED}"
            )
        if cols % m:
            raise Infeasible(
                f"method {self.name}: pattern = {self.pattern} needs inputs in multiples of {m}, and a matrix of the "
                f"model has {cols}; allowed: {', '.join(_dividing(cols))}"
            )

    def stored(self, weight_OI: Tensor, keep_OI: Tensor) -> Payload:
        """The smallest form of what is kept."""
        pattern = pattern_of(self.pattern)
        if pattern is not None:
            return PatternPayload.of(weight_OI, keep_OI, pattern)
        return sparse_payload(weight_OI, keep_OI)


@dataclass(frozen=True)
class ScorePruner(Pruner):
    """Base class of pruners that keep the highest scores and leave the kept weights as they are."""

    compare: Annotated[str, Knob(choices=GROUPS, doc="scores are compared within the matrix or within a row")] = "matrix"  # fmt: skip

    def keep(self, score_OI: Tensor, ties_OI: Tensor | None = None) -> Tensor:
        """Mask of the kept weights; ``ties_OI`` decides among equal scores."""
        pattern = pattern_of(self.pattern)
        if pattern is not None:
            return keep_pattern(score_OI, pattern, ties_OI)
        return keep_highest(score_OI, self.sparsity, self.compare == "row", ties_OI)


@dataclass(frozen=True)
class CalibratedPruner(CalibratedMethod, Pruner):
    """Base class of pruners that know the inputs."""


def sparse_payload(weight_OI: Tensor, keep_OI: Tensor, group: int = 1) -> Payload:
    """What is kept with a bitmap, or the matrix with its zeros where that is smaller.

    Args:
        group: neighbours of a row that stay or go together, of which the bitmap has one bit.
    """
    bitmap = BitmapPayload.of(weight_OI, keep_OI, group)
    dense = DensePayload.of(weight_OI * keep_OI)
    return bitmap if bitmap.nbytes(16) < dense.nbytes(16) else dense


def _dividing(cols: int) -> list[str]:
    """Patterns that fit ``cols`` inputs."""
    return [name for name in PATTERNS if (p := pattern_of(name)) is None or cols % p[1] == 0]


def as_float(weight_OI: Tensor) -> Tensor:
    """At least float32, for scores."""
    return weight_OI if weight_OI.dtype == torch.float64 else weight_OI.float()
