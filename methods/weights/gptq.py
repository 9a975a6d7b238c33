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
from isoflop.methods.base import METHODS, Axes
from isoflop.methods.weights.base import CalibratedMethod
from isoflop.methods.weights.grids import (
    FLOAT,
    GRID_DOC,
    GRIDS,
    FloatGrid,
    Grid,
    PermutedPayload,
    Ready,
    check_grid,
    grid_named,
)
from isoflop.methods.weights.obs import obs_sweep
from isoflop.methods.weights.payloads import DensePayload, Payload
from isoflop.methods.weights.rtn import BITS
from isoflop.methods.weights.statistics import ViewStats
from isoflop.models.base import ModelInfo

NATURAL, ACTIVATION = "natural", "activation"
ORDERS = (NATURAL, ACTIVATION)
NEWER = ("column_order", "static_groups", "grid")


@METHODS.register("gptq")
@dataclass(frozen=True)
class Gptq(CalibratedMethod):
    """The grids of ``rtn``, with the error feedback of the layer-wise Hessian (algorithm 1 of the paper).

    A group's grid is fitted when the sweep reaches it, to the weights as they are then. Inputs are those of the
    uncompressed model, so that one calibration serves every setting. Stored bits per weight are those of ``rtn``: ``bits + 32/group``.

    ``column_order: activation`` sweeps the columns of the largest inputs first, so that the others take up their errors, which helps where
    few inputs are large. Its groups are of columns that follow each other in the sweep: the order is stored, 2 bytes per column, and
    decoding gathers. ``static_groups`` fits all grids before the sweep, to neighbours as they lie: nothing more is stored then.

    On purpose not as released: a group's grid sees the errors of all columns before it (released, those of the same 128 columns are
    left out where the group is smaller); a grid spans the group's least and largest weight, with a float16 zero point (``grid: integer``
    is as released: it holds 0, whose code is a whole number; scales are float16 in both); blocks see inputs of the uncompressed model
    (released, of the compressed blocks before them). The search for narrower grids, off in the release, is not offered.
    """

    paper: ClassVar[str] = "arXiv 2210.17323"

    bits: Annotated[int, Knob(choices=BITS, ratio=True, unit="bits", doc="per weight; 16 leaves weights as they are")] = 4  # fmt: skip
    group: Annotated[int, Knob(low=8, high=65536, log=True, unit="weights", doc="of a row that share a grid")] = 32
    damp: Annotated[float, Knob(low=1e-6, high=1.0, log=True, doc="added to the Hessian's diagonal, relative to its mean")] = 0.01  # fmt: skip
    column_order: Annotated[str, Knob(choices=ORDERS, newer=True, doc="columns as they lie, or those of the largest inputs first")] = NATURAL  # fmt: skip
    static_groups: Annotated[bool, Knob(newer=True, doc="grids of neighbouring columns, fitted before the sweep")] = False  # fmt: skip
    grid: Annotated[str, Knob(choices=GRIDS, newer=True, doc=GRID_DOC)] = FLOAT

    @classmethod
    def identity(cls, info: ModelInfo) -> Gptq:
        """16 bits."""
        return cls(bits=16)

    def relevant(self) -> Gptq:
        """At 16 bits nothing is swept."""
        return self.at_defaults("group", "damp", "n_calib", *NEWER) if self.bits == 16 else self

    def check(self, info: ModelInfo) -> None:
        """Also refuse grids of too few values."""
        super().check(info)
        check_grid(self.name, self.grid, self.bits)

    def axes(self, info: ModelInfo) -> Axes:
        """Bits, per weight, grids left out."""
        return Axes(bits=float(self.bits), ratio=info.dense_bits / self.bits)

    def encode(self, weight_OI: Tensor, stats: ViewStats | None = None) -> Payload:
        """Codes and grids after the sweep."""
        if self.bits == 16:
            return DensePayload.of(weight_OI)
        assert stats is not None
        grid = grid_named(self.grid, self.bits)
        curvature = stats.curvature(self.damp, weight_OI.dtype, self.column_order == ACTIVATION)
        order_I = curvature.order_I
        if self.static_groups:
            seen_OI = weight_OI.masked_fill(curvature.in_place(curvature.dead_I), 0)
            rule: GridRule = StaticRule(seen_OI, self.bits, self.group, grid, order_I)
        else:
            rule = GridRule(weight_OI, self.bits, self.group, grid)
        obs_sweep(weight_OI if order_I is None else weight_OI[:, order_I], curvature, rule)
        if order_I is None or self.static_groups:
            return rule.payload
        return PermutedPayload.of(rule.payload, order_I)


class GridRule:
    """Columns become values on grids that are fitted group by group.

    Attributes:
        codes_OI, scale_OG, zero_OG: what the sweep has chosen, in its order of columns.
    """

    def __init__(self, weight_OI: Tensor, bits: int, group: int, grid: Grid | None = None) -> None:
        rows, cols = weight_OI.shape
        self.grid = FloatGrid(bits) if grid is None else grid
        self.group = self.span = min(group, cols)
        groups = math.ceil(cols / self.group)
        self._dtype = torch.float64 if weight_OI.dtype == torch.float64 else torch.float32
        self._codes_IO = weight_OI.new_zeros(cols, rows, dtype=torch.uint8)
        found = self.grid.fit(weight_OI[:1, : self.group])  # of what types they are
        self.scale_OG, self.zero_OG = (part.new_zeros(rows, groups) for part in found)

    @property
    def codes_OI(self) -> Tensor:
        """Codes on the grids."""
        return self._codes_IO.T.contiguous()

    @property
    def payload(self) -> Payload:
        """What is stored, in the sweep's order of columns."""
        return self.grid.payload(self.codes_OI, self.scale_OG, self.zero_OG, self.group)

    def enter(self, weight_OW: Tensor, curvature_W: Tensor, start: int) -> None:
        """Fit the grid of a group."""
        self._ready = self._fit(weight_OW, start // self.group)

    def fix(self, column_O: Tensor, index: int) -> Tensor:
        """The nearest values on the group's grids."""
        codes_O = self.grid.codes(column_O, self._ready)
        self._codes_IO[index] = codes_O
        return self.grid.values(codes_O, self._ready)

    def _fit(self, weight_OW: Tensor, number: int) -> Ready:
        self.scale_OG[:, number], self.zero_OG[:, number] = self.grid.fit(weight_OW)
        return self.grid.ready(self.scale_OG[:, number], self.zero_OG[:, number], self._dtype)


class StaticRule(GridRule):
    """Grids are those of neighbouring columns as they were before the sweep, in whichever order it runs.

    Args:
        order_I: the column of the matrix that the sweep takes up at each step; None for all in turn.
    """

    def __init__(self, weight_OI: Tensor, bits: int, group: int, grid: Grid, order_I: Tensor | None = None) -> None:
        super().__init__(weight_OI, bits, group, grid)
        self.span = 1
        cols = weight_OI.shape[1]
        self._column = list(range(cols)) if order_I is None else order_I.tolist()
        self._grids = [
            self._fit(weight_OI[:, start : start + self.group], start // self.group)
            for start in range(0, cols, self.group)
        ]

    def enter(self, weight_OW: Tensor, curvature_W: Tensor, start: int) -> None:
        """The grids are there."""

    def fix(self, column_O: Tensor, index: int) -> Tensor:
        """On the grid of the column's own group, its code in the column's own place."""
        column = self._column[index]
        self._ready = self._grids[column // self.group]
        return super().fix(column_O, column)
