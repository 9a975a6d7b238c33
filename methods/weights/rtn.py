"""Round-to-nearest: the floor that every weight quantiser is compared with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from torch import Tensor

from isoflop.core.knobs import Knob
from isoflop.methods.base import METHODS, Axes
from isoflop.methods.weights.base import MatrixCodecMethod
from isoflop.methods.weights.grids import FLOAT, GRID_DOC, GRIDS, SYMMETRIC, IntegerGridPayload, check_grid
from isoflop.methods.weights.payloads import DensePayload, GridPayload, Payload
from isoflop.methods.weights.statistics import ViewStats
from isoflop.models.base import ModelInfo

BITS = (1, 2, 3, 4, 5, 6, 7, 8, 16)


@METHODS.register("rtn")
@dataclass(frozen=True)
class RoundToNearest(MatrixCodecMethod):
    """Asymmetric min-max grids of ``2^bits`` values, one per ``group`` weights of a row, with float16 scale and zero.

    Stored bits per weight: ``bits + 32/group``. Grids with a whole zero point, or symmetric ones, store ``(16 + bits)/group`` or
    ``16/group`` beside the bits.
    """

    bits: Annotated[int, Knob(choices=BITS, ratio=True, unit="bits", doc="per weight; 16 leaves weights as they are")] = 4  # fmt: skip
    group: Annotated[int, Knob(low=8, high=65536, log=True, unit="weights", doc="of a row that share a grid")] = 32
    grid: Annotated[str, Knob(choices=GRIDS, newer=True, doc=GRID_DOC)] = FLOAT

    @classmethod
    def identity(cls, info: ModelInfo) -> RoundToNearest:
        """16 bits."""
        return cls(bits=16)

    def check(self, info: ModelInfo) -> None:
        """Also refuse grids of too few values."""
        super().check(info)
        check_grid(self.name, self.grid, self.bits)

    def axes(self, info: ModelInfo) -> Axes:
        """Bits per weight, grids left out."""
        return Axes(bits=float(self.bits), ratio=info.dense_bits / self.bits)

    def encode(self, weight_OI: Tensor, stats: ViewStats | None = None) -> Payload:
        """Codes and grids."""
        if self.bits == 16:
            return DensePayload.of(weight_OI)
        if self.grid == FLOAT:
            return GridPayload.round(weight_OI, self.bits, self.group)
        return IntegerGridPayload.round(weight_OI, self.bits, self.group, self.grid == SYMMETRIC)
