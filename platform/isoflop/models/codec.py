"""Image codecs as models see them: 8-bit images become byte strings and images again before the model looks at them.

Shape suffixes: B batch, C channels, H height, W width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from isoflop.models.base import tensor_bytes

CODEC_HOOK = "codec"
"""Offered by models whose images can be encoded and decoded before they look at them."""


@dataclass(frozen=True)
class Coded:
    """One image as a byte string, which is all that its decoder gets.

    Attributes:
        data: the bytes.
        header: how many of them are the same for every image of this size and setting: file signatures, sizes, tables that do
            not depend on the image, counts.
    """

    data: bytes
    header: int


class ImageCodec(ABC):
    """Base class of codecs.

    What encoder and decoder hold beforehand is not part of an image's bytes: settings are not counted, weights are
    (``tensors``), with the model's.
    """

    @abstractmethod
    def encode(self, images_BCHW: Tensor) -> list[Coded]:
        """Each image, uint8, as bytes; an image does not depend on the others of its batch."""

    @abstractmethod
    def decode(self, data: Sequence[bytes]) -> Tensor:
        """The images (B, C, H, W) of byte strings, uint8, in the size that they had."""

    def tensors(self) -> Sequence[Tensor]:
        """All that must stay resident to encode and decode: weights, codebooks, bases; each once. None by default."""
        return ()

    def weight_bytes(self, dense_bits: int) -> float:
        """Bytes of ``tensors``, where an element of float32 counts ``dense_bits`` as in the model's own weights."""
        return float(sum(tensor_bytes(t, dense_bits) for t in self.tensors()))


@dataclass(frozen=True)
class CodecBytes:
    """Means over the images that went through a codec.

    Attributes:
        images: how many there were.
        coded: bytes per image; ``header`` of them are headers (see ``Coded``).
        raw: bytes per image as 8-bit samples.
        pixels: per image.
    """

    images: int
    coded: float
    header: float
    raw: float
    pixels: float


class CodecRun:
    """A codec at work in a model, and the bytes of every image that went through it.

    Args:
        codec: encodes and decodes.
    """

    def __init__(self, codec: ImageCodec) -> None:
        self.codec = codec
        self._sizes: dict[int, tuple[int, int, int, int]] = {}

    @torch.no_grad()
    def through(self, images_BCHW: Tensor, ids_B: Tensor | None = None) -> Tensor:
        """What is left of images in [0, 1], which are rounded to 8 bits first.

        Args:
            ids_B: example numbers, under which ``bytes`` counts each image once; images without are not counted.
        """
        coded = self.codec.encode(to_bytes(images_BCHW))
        if ids_B is not None:
            channels, *sides = images_BCHW.shape[1:]
            pixels = sides[0] * sides[1]
            for number, code in zip(ids_B.tolist(), coded, strict=True):
                self._sizes[number] = (len(code.data), code.header, channels * pixels, pixels)
        decoded_BCHW = self.codec.decode([code.data for code in coded])
        return (decoded_BCHW.float() / 255).to(images_BCHW.device)

    def bytes(self) -> CodecBytes:
        """Means over the images so far.

        Raises:
            ValueError: there were none.
        """
        if not self._sizes:
            raise ValueError(
                "no image has gone through the codec yet; its bytes are counted on those that the model sees"
            )
        coded, header, raw, pixels = (
            sum(column) / len(self._sizes) for column in zip(*self._sizes.values(), strict=True)
        )
        return CodecBytes(len(self._sizes), coded, header, raw, pixels)


def to_bytes(images_BCHW: Tensor) -> Tensor:
    """Images in [0, 1] as 8-bit samples, uint8."""
    return (images_BCHW.clamp(0, 1) * 255).round().to(torch.uint8)
