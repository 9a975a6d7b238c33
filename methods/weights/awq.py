"""AWQ: channels with large inputs are scaled up before rounding, so that they lose less (arXiv 2306.00978).

Shape suffixes: O outputs (rows), I inputs (columns), G groups of a row, W weights of a group.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from isoflop.core.knobs import Knob
from isoflop.methods.base import METHODS, Axes
from isoflop.methods.weights.folding import as_stored
from isoflop.methods.weights.grids import (
    FLOAT,
    GRID_DOC,
    INTEGER,
    SYMMETRIC,
    IntegerGridPayload,
    check_grid,
    grid_named,
)
from isoflop.methods.weights.payloads import DensePayload, GridPayload, Payload
from isoflop.methods.weights.rtn import BITS
from isoflop.methods.weights.scaling import ScalingMethod
from isoflop.methods.weights.statistics import ViewStats
from isoflop.models.base import ModelInfo

Rounding = Callable[[Tensor], Tensor]
"""Groups of weights (O, G, W), each to its own grid."""
LEAST_SCALE = 1e-4
MOST_CLIPPED = 0.5
"""Of a group's largest magnitude, at most that much is cut off."""
QUERIES_AND_KEYS = ("q_", "k_", "query", "key", "qkv", "Wqkv", "c_attn")
"""In the names of matrices that are never clipped: what they make is multiplied with each other."""


def best_scale(weights: Sequence[Tensor], stats: ViewStats, rounding: Rounding, group: int, n_grid: int) -> Tensor:
    """s* = argmin |Q(W·diag(s))·diag(s)⁻¹·X - W·X|² over s = s_X^α, α = 0, 1/n … (n-1)/n (equations 4 and 5).

    s_X are mean magnitudes of the input channels. Scales are balanced, so that the least and the largest multiply to 1, and on the
    float16 grid on which they are stored. The error is that of all outputs on all calibration tokens, by the Hessian.
    """
    assert stats.means_I is not None
    best, least = torch.ones_like(stats.means_I), torch.inf
    for step in range(n_grid):
        s_I = stats.means_I.pow(step / n_grid).clamp(min=LEAST_SCALE)
        s_I = as_stored(s_I / (s_I.max() * s_I.min()).sqrt())
        error = 0.0
        for weight_OI in weights:
            change_OI = ungrouped(rounding(grouped(weight_OI * s_I, group)), weight_OI.shape[1]) / s_I - weight_OI
            error += float(((change_OI @ stats.hessian_II) * change_OI).sum())
        if error < least:
            best, least = s_I, error
    return best


def best_clip(weight_OI: Tensor, hessian_II: Tensor, rounding: Rounding, group: int, n_grid: int) -> Tensor:
    """(O, G, 1): the magnitude at which each group is cut before rounding, of least error in what the group adds to its output.

    Tried are the group's largest magnitude times 1, 1 - 1/n … down to ½.
    """
    weight_OGW = grouped(weight_OI, group)
    groups, width = weight_OGW.shape[1:]
    padded_II = torch.nn.functional.pad(hessian_II, (0, groups * width - len(hessian_II)) * 2)
    blocks_GWW = torch.stack([padded_II[at : at + width, at : at + width] for at in range(0, groups * width, width)])
    largest = weight_OGW.abs().amax(-1, keepdim=True)
    best, least = largest.clone(), torch.full_like(largest, torch.inf)
    for step in range(int(MOST_CLIPPED * n_grid)):
        limit = largest * (1 - step / n_grid)
        change = rounding(weight_OGW.clamp(-limit, limit)) - weight_OGW
        error = ((change.transpose(0, 1) @ blocks_GWW).transpose(0, 1) * change).sum(-1, keepdim=True)
        better = error < least
        best, least = torch.where(better, limit, best), torch.where(better, error, least)
    return best


@METHODS.register("awq")
@dataclass(frozen=True)
class Awq(ScalingMethod):
    """Few weights matter most, and the size of their inputs tells which: these channels are scaled up before rounding.

    Matrices with a common input share scales s = s_X^α, the α that changes their outputs least. 1/s goes into the norm or the matrix
    that computes the input where the model then computes the same, at no cost; elsewhere s is stored in float16 and divided by.
    Then each group's range is narrowed where that helps, but for queries and keys. The weights themselves are rounded to the nearest:
    nothing is fitted to the calibration text but one exponent per input and one limit per group, so that little text is enough.
    Stored bits per weight are those of ``rtn`` on the same grids, and 16/rows where scales cannot be folded.

    Not as released: the error is measured at the outputs of the matrices (equation 4), where the released code measures it behind
    attention or the MLP; it is of all calibration tokens, there of samples; activations that feed a matrix without a gate
    (GPT-2's MLP) are not scaled in place, there the matrix divides; a group's range always holds 0.
    """

    paper: ClassVar[str] = "arXiv 2306.00978"

    bits: Annotated[int, Knob(choices=BITS, ratio=True, unit="bits", doc="per weight; 16 leaves weights as they are")] = 4  # fmt: skip
    group: Annotated[int, Knob(low=8, high=65536, log=True, unit="weights", doc="of a row that share a grid")] = 128
    n_grid: Annotated[int, Knob(low=1, high=100, unit="steps", doc="exponents tried from 0 to 1; 1 scales nothing")] = 20  # fmt: skip
    grid: Annotated[str, Knob(choices=(INTEGER, FLOAT, SYMMETRIC), doc=GRID_DOC)] = INTEGER
    clip: Annotated[bool, Knob(doc="narrow the range of groups, down to half, where outputs change less")] = True

    @classmethod
    def identity(cls, info: ModelInfo) -> Awq:
        """16 bits."""
        return cls(bits=16)

    def check(self, info: ModelInfo) -> None:
        """Also refuse grids of too few values."""
        super().check(info)
        check_grid(self.name, self.grid, self.bits)

    @property
    def scales_nothing(self) -> bool:
        """At 16 bits."""
        return self.bits == 16

    def relevant(self) -> Awq:
        """At 16 bits nothing is searched."""
        return self.at_defaults("group", "n_grid", "grid", "clip", "n_calib") if self.bits == 16 else self

    def axes(self, info: ModelInfo) -> Axes:
        """Bits per weight, grids left out."""
        return Axes(bits=float(self.bits), ratio=info.dense_bits / self.bits)

    def scales(self, weights: Sequence[Tensor], stats: ViewStats) -> Tensor:
        """By the grid search."""
        return best_scale([w.float() for w in weights], stats, self.rounded, self.group, self.n_grid)

    def encode_scaled(self, weight_OI: Tensor, stats: ViewStats, role: str = "") -> Payload:
        """Clipped where that helps, and rounded to the nearest."""
        if self.bits == 16:
            return DensePayload.of(weight_OI)
        if self.clip and not any(part in role for part in QUERIES_AND_KEYS):
            limit = best_clip(weight_OI, stats.hessian_II, self.rounded, self.group, CLIP_GRID)
            weight_OI = ungrouped(grouped(weight_OI, self.group).clamp(-limit, limit), weight_OI.shape[1])
        if self.grid == FLOAT:
            return GridPayload.round(weight_OI, self.bits, self.group)
        return IntegerGridPayload.round(weight_OI, self.bits, self.group, self.grid == SYMMETRIC)

    def rounded(self, weight_OGW: Tensor) -> Tensor:
        """Groups on their own grids."""
        grid, columns = grid_named(self.grid, self.bits), weight_OGW.flatten(0, 1).T
        ready = grid.ready(*grid.fit(columns.T), columns.dtype)
        return grid.values(grid.codes(columns, ready), ready).T.view_as(weight_OGW)


CLIP_GRID = 20
"""Steps of the search for limits, of which the first half are tried."""


def grouped(weight_OI: Tensor, group: int) -> Tensor:
    """(O, G, W); the last group of a row is filled with its last weight, which moves no end of its range."""
    cols = weight_OI.shape[1]
    group = min(group, cols)
    return torch.nn.functional.pad(weight_OI, (0, -cols % group), mode="replicate").unflatten(1, (-1, group))


def ungrouped(weight_OGW: Tensor, cols: int) -> Tensor:
    """The inverse of :func:`grouped`."""
    return weight_OGW.flatten(1)[:, :cols]
