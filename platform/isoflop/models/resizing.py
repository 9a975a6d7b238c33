"""How images of any size become those that a model takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Resizing:
    """What a checkpoint's processor does with an image before the middle of it, as large as the model's images, is cut out.

    Attributes:
        side: that an image gets; None for the model's own.
        keeps_shape: the shorter side gets it, and not both.
        resample: Pillow's number of the filter (2 bilinear, 3 bicubic).
    """

    side: int | None = None
    keeps_shape: bool = False
    resample: int = 3


SQUEEZED = Resizing()
"""The whole image into a square of the model's own side, bicubic."""


def pixels_of(picture: Any, side: int, resizing: Resizing = SQUEEZED, channels: int = 3) -> Tensor:
    """An image as values in [0, 1], (C, side, side), resized and cut as Hugging Face's processors do.

    Args:
        channels: 3, or 1 for grey.
    """
    picture = picture.convert("L") if channels == 1 else picture
    wanted = resizing.side or side
    if resizing.keeps_shape:
        short = min(picture.size)
        size = tuple(wanted if n == short else int(n * wanted / short) for n in picture.size)
    else:
        size = (wanted, wanted)
    picture = picture.resize(size, resizing.resample)
    width, height = picture.size
    left, top = (width - side) // 2, (height - side) // 2
    picture = picture.crop((left, top, left + side, top + side))  # black where it is smaller
    values = np.asarray(picture, dtype=np.float32) / 255.0
    return torch.from_numpy(values.reshape(side, side, channels)).permute(2, 0, 1).contiguous()
