"""GPTQ: rounding column by column, the error of each taken up by the columns behind it (arXiv 2210.17323).

Shape suffixes: O outputs (rows), I inputs (columns), G groups, W columns of a group.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from isoflop.core.knobs import Knob
from isoflop.kernels.quant import grid_of
from isoflop.methods.base import METHODS, Axes
from isoflop.methods.weights.base import CalibratedMethod
from isoflop.methods.weights.obs import obs_sweep
from isoflop.methods.weights.payloads import DensePayload, GridPayload, Payload
from isoflop.methods.weights.rtn import BITS
from isoflop.methods.weights.statistics import ViewStats
from isoflop.models.base import ModelInfo


@METHODS.register("gptq")
@dataclass(frozen=True)
class Gptq(CalibratedMethod):
    """The grids of ``rtn``, with the error feedback of the layer-wise Hessian (algorithm 1 of the paper).

    A group's grid is fitted when the sweep reaches it, to the weights as they are then. Inputs are those of the
    uncompressed model, so that one calibration serves every setting; columns keep their order. Stored bits per weight are
    those of ``rtn``: ``bits + 32/group``.

    On purpose not as released: a group's grid sees the errors of all columns before it (released, those of the same 128 columns are
    left out where the group is smaller); a grid spans the group's least and largest weight, with a float16 zero point (released, it
    holds 0, whose code is a whole number); blocks see inputs of the uncompressed model (released, of the compressed blocks before
    them). The order of columns by activation, static groups and the search for narrower grids, all off in the release, are not offered.
    """

    paper: ClassVar[str] = "arXiv 2210.17323"

    bits: Annotated[int, Knob(choices=BITS, ratio=True, unit="bits", doc="per weight; 16 leaves weights as they are")] = 4  # fmt: skip
    group: Annotated[int, Knob(low=8, high=65536, log=True, unit="weights", doc="of a row that share a grid")] = 32
    damp: Annotated[float, Knob(low=1e-6, high=1.0, log=True, doc="added to the Hessian's diagonal, relative to its mean")] = 0.01  # fmt: skip

    @classmethod
    def identity(cls, info: ModelInfo) -> Gptq:
        """16 bits."""
        return cls(bits=16)

    def relevant(self) -> Gptq:
        """At 16 bits nothing is swept."""
        return self.at_defaults("group", "damp", "n_calib") if self.bits == 16 else self

    def axes(self, info: ModelInfo) -> Axes:
        """Bits, per weight, grids left out."""
        return Axes(bits=float(self.bits), ratio=info.dense_bits / self.bits)

    def encode(self, weight_OI: Tensor, stats: ViewStats | None = None) -> Payload:
        """Codes and grids after the sweep."""
        if self.bits == 16:
            return DensePayload.of(weight_OI)
        assert stats is not None
        rule = GridRule(weight_OI, self.bits, self.group)
        obs_sweep(weight_OI, stats.curvature(self.damp, weight_OI.dtype), rule)
        return GridPayload.of_codes(rule.codes_OI, rule.scale_OG, rule.zero_OG, self.bits, self.group)


class GridRule:
    """Columns become values on grids that are fitted group by group.

    Attributes:
        codes_OI, scale_OG, zero_OG: what the sweep has chosen.
    """

    def __init__(self, weight_OI: Tensor, bits: int, group: int) -> None:
        rows, cols = weight_OI.shape
        self.bits = bits
        self.span = min(group, cols)
        groups = math.ceil(cols / self.span)
        self._codes_IO = weight_OI.new_zeros(cols, rows, dtype=torch.uint8)
        self.scale_OG = weight_OI.new_zeros(rows, groups, dtype=torch.float16)
        self.zero_OG = torch.zeros_like(self.scale_OG)

    @property
    def codes_OI(self) -> Tensor:
        """Codes on the grids."""
        return self._codes_IO.T.contiguous()

    def enter(self, weight_OW: Tensor, curvature_W: Tensor, start: int) -> None:
        """Fit the grid of a group."""
        low_O, high_O = weight_OW.float().aminmax(dim=1)
        number = start // self.span
        self.scale_OG[:, number], self.zero_OG[:, number] = grid_of(low_O, high_O, self.bits)
        self._step_O = self.scale_OG[:, number].to(weight_OW.dtype)
        self._zero_O = self.zero_OG[:, number].to(weight_OW.dtype)
        self._divisor_O = self._step_O.masked_fill(self._step_O == 0, math.inf)  # a constant group has code 0 alone

    def fix(self, column_O: Tensor, index: int) -> Tensor:
        """The nearest values on the group's grids."""
        steps_O = (column_O - self._zero_O).div_(self._divisor_O)
        codes_O = steps_O.add_(0.5).floor_().clamp_(0, 2**self.bits - 1)
        self._codes_IO[index] = codes_O
        return codes_O.mul_(self._step_O).add_(self._zero_O)
