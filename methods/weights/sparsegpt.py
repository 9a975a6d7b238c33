"""SparseGPT: pruning in one sweep, the error of each removal taken up by the columns behind it (arXiv 2301.00774).

Shape suffixes: O outputs (rows), I inputs (columns), W columns of a span.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from isoflop.core.knobs import Knob
from isoflop.methods.base import METHODS
from isoflop.methods.weights.obs import obs_sweep
from isoflop.methods.weights.payloads import DensePayload, Payload
from isoflop.methods.weights.rules import keep_highest, keep_pattern, pattern_of
from isoflop.methods.weights.sparse import CalibratedPruner
from isoflop.methods.weights.statistics import ViewStats
from isoflop.models.base import ModelInfo


@METHODS.register("sparsegpt")
@dataclass(frozen=True)
class SparseGpt(CalibratedPruner):
    """Masks by w²/[U]_jj², chosen for ``mask_block`` columns at a time (N:M: for M), then removal with error feedback.

    Algorithm 1 of the paper. Inputs are those of the uncompressed model, so that one calibration serves every setting.
    The paper's 128 columns are a small part of matrices of its size. Where they are the whole matrix, all of its mask is
    chosen before anything is removed, and the result can be worse than Wanda's.

    On purpose not as released: exactly ⌊sparsity · n⌋ weights of a mask block go (released, one more, and all that equal it); blocks
    see inputs of the uncompressed model (released, of the pruned blocks before them). Quantising in the same sweep is not offered.
    """

    paper: ClassVar[str] = "arXiv 2301.00774"

    damp: Annotated[float, Knob(low=1e-6, high=1.0, log=True, doc="added to the Hessian's diagonal, relative to its mean")] = 0.01  # fmt: skip

    mask_block: Annotated[int, Knob(low=4, high=65536, log=True, unit="columns", doc="whose mask is chosen together; a pattern has its own")] = 128  # fmt: skip

    @classmethod
    def identity(cls, info: ModelInfo) -> SparseGpt:
        """Nothing removed."""
        return cls(sparsity=0.0)

    def relevant(self) -> SparseGpt:
        """A pattern has its own mask block; without removal there is no sweep."""
        if self.sparsity == 0:
            return self.at_defaults("damp", "mask_block", "n_calib")
        return self if pattern_of(self.pattern) is None else self.at_defaults("mask_block")

    def encode(self, weight_OI: Tensor, stats: ViewStats | None = None) -> Payload:
        """The kept weights, moved by the sweep."""
        if self.sparsity == 0:
            return DensePayload.of(weight_OI)
        assert stats is not None
        rule = MaskRule(weight_OI, self.sparsity, pattern_of(self.pattern), self.mask_block)
        swept_OI = obs_sweep(weight_OI, stats.curvature(self.damp, weight_OI.dtype), rule)
        return self.stored(swept_OI.to(weight_OI.dtype), rule.keep_OI)


class MaskRule:
    """Columns lose the weights that cost least to remove.

    Attributes:
        keep_OI: what the sweep has kept.
    """

    def __init__(self, weight_OI: Tensor, sparsity: float, pattern: tuple[int, int] | None, block: int) -> None:
        self._sparsity = sparsity
        self._pattern = pattern
        self.span = min(block, weight_OI.shape[1]) if pattern is None else pattern[1]
        self.keep_OI = torch.ones_like(weight_OI, dtype=torch.bool)

    def enter(self, weight_OW: Tensor, curvature_W: Tensor, start: int) -> None:
        """Choose the masks of a span from its weights as they are now."""
        score_OW = (weight_OW / curvature_W) ** 2
        stop = start + weight_OW.shape[1]
        if self._pattern is None:
            self.keep_OI[:, start:stop] = keep_highest(score_OW, self._sparsity, by_row=False)
        else:
            self.keep_OI[:, start:stop] = keep_pattern(score_OW, self._pattern)

    def fix(self, column_O: Tensor, index: int) -> Tensor:
        """The column with its removed weights at zero."""
        return column_O * self.keep_OI[:, index]
