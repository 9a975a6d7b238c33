"""A whole matrix on one grid.

Shape suffixes: O outputs (rows), I inputs (columns).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from isoflop.methods.weights.payloads import GridPayload, Payload


@dataclass(frozen=True, eq=False)
class TensorGridPayload(Payload):
    """Codes of all weights in row-major order on one min-max grid: bits per weight, and 4 bytes.

    Attributes:
        row: the matrix as one row.
    """

    kind: ClassVar[str] = "tensor-grid"
    row: GridPayload

    @classmethod
    def round(cls, weight_OI: Tensor, bits: int) -> TensorGridPayload:
        """Round to nearest."""
        rows, cols = weight_OI.shape
        return cls((rows, cols), GridPayload.round(weight_OI.reshape(1, -1), bits, rows * cols))

    def tensors(self) -> dict[str, Tensor]:
        """Codes, scale and zero."""
        return self.row.tensors()

    def settings(self) -> dict[str, Any]:
        """Shape and bits."""
        return {**super().settings(), "bits": self.row.packed.bits}

    @classmethod
    def restore(cls, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> TensorGridPayload:
        """The inverse of ``settings`` and ``tensors``."""
        rows, cols = settings["shape"]
        row = {"shape": [1, rows * cols], "bits": settings["bits"], "group": rows * cols}
        return cls((rows, cols), GridPayload.restore(row, tensors))

    def decode(self) -> Tensor:
        """Values on the grid."""
        return self.row.decode().view(self.shape)
