"""The hook ``pixels``: 8-bit images go through a codec before the model looks at them.

Shape suffixes: B batch, C channels, H height, W width.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from isoflop.models.hooks.signals import Codec, CodecRun, Coded, signal_hook

PIXELS = signal_hook("pixels", 2, "turns images into bytes and images again before the model sees them")


class ImageCodec(Codec):
    """Base class of image codecs: their samples are 8-bit images."""

    @abstractmethod
    def encode(self, images_BCHW: Tensor) -> list[Coded]:
        """Each image, uint8, as bytes; an image does not depend on the others of its batch."""

    @abstractmethod
    def decode(self, data: Sequence[bytes]) -> Tensor:
        """The images (B, C, H, W) of byte strings, uint8, in the size that they had."""


class ImageCodecRun(CodecRun):
    """The occupant: an image codec at work. Signals are images in [0, 1]; elements are pixels."""

    what: ClassVar[str] = "image"

    def raw(self, images_BCHW: Tensor) -> Tensor:
        """Rounded to 8 bits."""
        return to_bytes(images_BCHW)

    def signal(self, images_BCHW: Tensor) -> Tensor:
        """In [0, 1]."""
        return images_BCHW.float() / 255

    def sizes(self, images_BCHW: Tensor) -> tuple[float, int]:
        """A byte per channel and pixel; pixels."""
        channels, height, width = images_BCHW.shape[1:]
        return channels * height * width, height * width


def to_bytes(images_BCHW: Tensor) -> Tensor:
    """Images in [0, 1] as 8-bit samples, uint8."""
    return (images_BCHW.clamp(0, 1) * 255).round().to(torch.uint8)
