"""Conventional image files by Pillow: arrays to files and back, and what of a file is the same for every image.

Shape suffixes: B batch, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from isoflop.models.hooks.pixels import ImageCodec
from isoflop.models.hooks.signals import Coded

MODES = {1: "L", 3: "RGB"}
"""Pillow's names for images of so many channels."""

_PNG_HEADER = 8 + 25 + 12 + 12  # signature, IHDR, frame of one IDAT, IEND
_WEBP_HEADER = 12 + 8 + 10  # RIFF, frame of the chunk, frame tag with start code and size
_JPEG_TABLES = 0xC4
_JPEG_SCAN = 0xDA


@dataclass(frozen=True)
class FileCodec(ImageCodec):
    """Images as files of their own.

    Args:
        format: Pillow's name.
        channels: of the images, 1 or 3.
        options: of Pillow's encoder.
        header: how many bytes of a file are the same for every image of this size and these options.
    """

    format: str
    channels: int
    header: Callable[[bytes], int]
    options: dict[str, Any] = field(default_factory=dict)

    def encode(self, images_BCHW: Tensor) -> list[Coded]:
        """One file per image."""
        coded = []
        for image_HWC in images_BCHW.permute(0, 2, 3, 1).cpu().numpy():
            file = BytesIO()
            picture = Image.fromarray(image_HWC[..., 0] if self.channels == 1 else np.ascontiguousarray(image_HWC))
            picture.save(file, self.format, **self.options)
            coded.append(Coded(file.getvalue(), self.header(file.getvalue())))
        return coded

    def decode(self, data: Sequence[bytes]) -> Tensor:
        """Read the files."""
        images = []
        for file in data:
            with Image.open(BytesIO(file), formats=[self.format]) as picture:
                pixels = np.array(picture.convert(MODES[self.channels]))
            images.append(torch.from_numpy(pixels.reshape(*pixels.shape[:2], self.channels)))
        return torch.stack(images).permute(0, 3, 1, 2).contiguous()


def png_header(file: bytes) -> int:
    """Bytes of signature and chunk frames of a PNG file with one data chunk, as Pillow writes small images."""
    return _PNG_HEADER


def webp_header(file: bytes) -> int:
    """Bytes of RIFF container and frame header of a simple lossy WebP file.

    Raises:
        ValueError: the file has another layout.
    """
    if file[12:16] != b"VP8 ":
        raise ValueError(f"a WebP file with a first chunk {file[12:16]!r}, not a simple lossy one")
    return _WEBP_HEADER


def jpeg_header(file: bytes, own_tables: bool) -> int:
    """Bytes of a JPEG file that are the same for every image: all segments before the scan's data, and the end marker.

    Args:
        own_tables: the Huffman tables were made for this image, and count as its content.
    """
    place, header = 2, 4  # start and end of image
    while True:
        marker, length = file[place + 1], int.from_bytes(file[place + 2 : place + 4], "big")
        if not (own_tables and marker == _JPEG_TABLES):
            header += 2 + length
        if marker == _JPEG_SCAN:
            return header
        place += 2 + length
