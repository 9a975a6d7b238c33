"""The hook ``voxels``: a raster of solid and empty cells goes through a codec before the model looks at it.

Shape suffixes: B batch, X, Y, Z cells along each axis.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from isoflop.models.hooks.signals import Codec, CodecRun, Coded, signal_hook

VOXELS = signal_hook("voxels", 4, "turns shapes into bytes and shapes again before the model sees them")
SOLID = 0.5


class VoxelCodec(Codec):
    """Base class of codecs of shapes: their samples are occupied cells."""

    @abstractmethod
    def encode(self, solid_BXYZ: Tensor) -> list[Coded]:
        """Each shape, boolean, as bytes; a shape does not depend on the others of its batch."""

    @abstractmethod
    def decode(self, data: Sequence[bytes]) -> Tensor:
        """The shapes (B, X, Y, Z) of byte strings, boolean, in the size that they had."""


class VoxelCodecRun(CodecRun):
    """The occupant: a codec of shapes at work. Signals are occupancies in [0, 1]; elements are cells."""

    what: ClassVar[str] = "shape"

    def raw(self, solid_BXYZ: Tensor) -> Tensor:
        """Cells that are more solid than empty."""
        return solid_BXYZ >= SOLID

    def signal(self, solid_BXYZ: Tensor) -> Tensor:
        """1 where solid."""
        return solid_BXYZ.float()

    def sizes(self, solid_BXYZ: Tensor) -> tuple[float, int]:
        """A bit per cell; cells."""
        cells = solid_BXYZ[0].numel()
        return cells / 8, cells
