"""Fewer pixels: the codec that anybody can build.

Shape suffixes: B batch, C channels, H height, W width, h height and w width of the small image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from isoflop.core.knobs import Knob
from isoflop.methods.base import METHODS
from isoflop.methods.codecs.base import ImageCodecMethod
from isoflop.models.base import ModelInfo
from isoflop.models.hooks.pixels import ImageCodec
from isoflop.models.hooks.signals import Coded
from isoflop.models.vit import LABELLED_IMAGES, VitInfo
from isoflop.models.worlds import sprite_world as world


@METHODS.register("downsample")
@dataclass(frozen=True)
class Downsample(ImageCodecMethod):
    """Means of squares of pixels as raw 8-bit samples, enlarged again by bicubic interpolation. There is no header."""

    needs: ClassVar[frozenset[str]] = frozenset({LABELLED_IMAGES})

    factor: Annotated[
        int, Knob(choices=(1, 2, 4, 8, 16, 32), ratio=True, unit="pixels", doc="side of a square that is averaged")
    ] = 4

    @classmethod
    def identity(cls, info: ModelInfo) -> Downsample:
        """Squares of one pixel: raw samples."""
        return cls(factor=1)

    def codec(self, info: VitInfo, prepared: Any) -> SmallImages:
        """For the built-in images, whose side all factors divide."""
        return SmallImages(world.CHANNELS, world.SIDE, self.factor)


@dataclass(frozen=True)
class SmallImages(ImageCodec):
    """Raw samples of smaller images.

    Args:
        channels, side: of the images.
        factor: divides the side.
    """

    channels: int
    side: int
    factor: int

    def encode(self, images_BCHW: Tensor) -> list[Coded]:
        """Means, rounded to 8 bits."""
        small_BChw = F.avg_pool2d(images_BCHW.float(), self.factor).round().to(torch.uint8).cpu().numpy()
        return [Coded(image_Chw.tobytes(), 0) for image_Chw in small_BChw]

    def decode(self, data: Sequence[bytes]) -> Tensor:
        """Enlarged images."""
        side = self.side // self.factor
        samples = np.frombuffer(b"".join(data), np.uint8).reshape(len(data), self.channels, side, side)
        images_BChw = torch.from_numpy(samples.astype(np.float32))
        if self.factor > 1:
            images_BChw = F.interpolate(images_BChw, size=(self.side, self.side), mode="bicubic", align_corners=False)
        return images_BChw.round().clamp(0, 255).to(torch.uint8)
