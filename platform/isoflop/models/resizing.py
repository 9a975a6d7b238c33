"""How images of any size become those that a model takes."""

from __future__ import annotations

from dataclasses import dataclass


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
