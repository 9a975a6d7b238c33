"""Images with one object on a large background, for the tiny vision transformers: real digits and procedural sprites.

An image is 32x32 RGB. ``digits``: a real handwriting (scikit-learn's ``load_digits``; 1,400 writings for training, the
other 397 for test), enlarged, in a random colour, on a noisy canvas. ``sprites``: one of ten shapes in a random colour
and a random small rotation, on a texture of plane waves. The object lies at a random place; ``foreground`` is the share
of the image that its bounding box covers, so that a small one leaves many redundant background patches.

Shape suffixes: N images, C colour channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

from isoflop.core.hashing import derive_seed
from isoflop.models.worlds import digit_world

DATA = ("digits", "sprites")
SPRITES = ("disc", "square", "triangle", "ring", "plus", "diamond", "frame", "bars", "half-moon", "checker")
CLASSES = 10
SIDE = 32
CHANNELS = 3
MIN_SHARE, MAX_SHARE = 0.2, 0.9
"""Shares of the image that objects of the training images cover: from 14 to 30 pixels a side."""
SMALLEST_SIDE = 6
SMALLEST_SHARE = (SMALLEST_SIDE / SIDE) ** 2
STEP = 4
"""Boxes start at multiples of so many pixels. With free places, models of this size need far longer to learn."""
PIXEL_MEAN = 0.5
PIXEL_STD = 0.5
NOISE = 0.1
CHUNK = 256
"""Images are drawn in chunks of this many, each with a generator of its own."""
VERSION = "1"
"""Raised whenever the same fields of an ``ImageSet`` would give other images."""


@dataclass(frozen=True)
class ImageSet:
    """A reproducible set of labelled images, drawn when asked for.

    Image ``i`` does not depend on ``count``: a shorter set is a prefix of a longer one.

    Args:
        data: ``digits`` or ``sprites``.
        split: ``train`` or ``test``; decides which handwritings may appear, and seeds everything else.
        count: number of images.
        foreground: share of the image that the object's box covers; 0 draws it between 0.2 and 0.9, as in training.
        seed: of classes, places, colours, textures and noise.
    """

    data: str
    split: str
    count: int
    foreground: float
    seed: int

    def labels(self) -> np.ndarray:
        """Class of every image, int64 (N,)."""
        parts = [self._labels(self._generator(start)) for start in range(0, self.count, CHUNK)]
        return np.concatenate(parts)[: self.count]

    def images(self, start: int = 0, stop: int | None = None) -> Iterator[np.ndarray]:
        """Images ``start`` to ``stop`` in batches of at most 256: float32 (n, C, H, W) with values in [0, 1]."""
        stop = self.count if stop is None else min(stop, self.count)
        for chunk in range(start - start % CHUNK, stop, CHUNK):
            images_NCHW, _, _ = self.draw(chunk)
            yield images_NCHW[max(0, start - chunk) : stop - chunk]

    def draw(self, chunk: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The 256 images from ``chunk`` (a multiple of 256) on: pixels (n, C, H, W), labels (n,), and the opacity of
        the object at every pixel (n, H, W)."""
        rng = self._generator(chunk)
        labels_N = self._labels(rng)
        uv_NHW2 = self._places(rng)
        if self.data == "digits":
            mask_NHW = self._handwritings(rng, labels_N, uv_NHW2)
            background_NCHW = np.zeros((CHUNK, CHANNELS, SIDE, SIDE), dtype=np.float32)
        else:
            mask_NHW = _sprites(rng, labels_N, uv_NHW2)
            background_NCHW = _texture(rng)
        colour_NC = rng.uniform(0.5, 1.0, (CHUNK, CHANNELS)).astype(np.float32)
        mask_N1HW = mask_NHW[:, None]
        images_NCHW = background_NCHW * (1 - mask_N1HW) + colour_NC[:, :, None, None] * mask_N1HW
        images_NCHW += NOISE * rng.standard_normal(images_NCHW.shape, dtype=np.float32)
        return np.clip(images_NCHW, 0.0, 1.0), labels_N, mask_NHW

    def _generator(self, chunk: int) -> np.random.Generator:
        return np.random.default_rng([derive_seed("images", self.data, self.split, self.seed), chunk])

    def _labels(self, rng: np.random.Generator) -> np.ndarray:
        return rng.integers(0, CLASSES, CHUNK)

    def _places(self, rng: np.random.Generator) -> np.ndarray:
        """Coordinates of every pixel in the object's box, which is [-1, 1]², float32 (N, H, W, 2) as (x, y)."""
        share_N = rng.uniform(MIN_SHARE, MAX_SHARE, CHUNK)
        place_N2 = rng.random((CHUNK, 2))
        side_N1 = SIDE * np.sqrt(share_N if self.foreground == 0 else np.full(CHUNK, self.foreground))[:, None]
        corner_N2 = STEP * np.floor(place_N2 * (np.floor((SIDE - side_N1) / STEP) + 1))
        centre_N2 = corner_N2 + side_N1 / 2
        y_HW, x_HW = np.mgrid[:SIDE, :SIDE] + 0.5
        xy_HW2 = np.stack([x_HW, y_HW], axis=-1)
        return ((xy_HW2 - centre_N2[:, None, None, :]) / (side_N1[:, None, None] / 2)).astype(np.float32)

    def _handwritings(self, rng: np.random.Generator, labels_N: np.ndarray, uv_NHW2: np.ndarray) -> np.ndarray:
        writings, by_class = digit_world.writings(self.split)
        counts = np.array([len(rows) for rows in by_class])
        first = np.concatenate([[0], np.cumsum(counts)[:-1]])
        pick_N = (rng.random(CHUNK) * counts[labels_N]).astype(np.int64) + first[labels_N]
        digits_N1hw = torch.from_numpy(writings[np.concatenate(by_class)[pick_N]])[:, None]
        return F.grid_sample(digits_N1hw, torch.from_numpy(uv_NHW2), align_corners=False)[:, 0].numpy()


def _sprites(rng: np.random.Generator, labels_N: np.ndarray, uv_NHW2: np.ndarray) -> np.ndarray:
    """Masks of the shapes, values 0 or 1, (N, H, W)."""
    angle_N = rng.uniform(-0.35, 0.35, CHUNK).astype(np.float32)[:, None, None]
    x, y = uv_NHW2[..., 0], uv_NHW2[..., 1]
    u, v = x * np.cos(angle_N) - y * np.sin(angle_N), x * np.sin(angle_N) + y * np.cos(angle_N)
    mask_NHW = np.zeros(x.shape, dtype=np.float32)
    for label, shape in enumerate(_SHAPES):
        rows = labels_N == label
        mask_NHW[rows] = shape(u[rows], v[rows])
    return mask_NHW


Shape = Callable[[np.ndarray, np.ndarray], np.ndarray]
_SHAPES: tuple[Shape, ...] = (
    lambda u, v: u**2 + v**2 < 0.8,
    lambda u, v: np.maximum(abs(u), abs(v)) < 0.75,
    lambda u, v: (v < 0.7) & (abs(u) < (v + 0.9) * 0.55),
    lambda u, v: (u**2 + v**2 < 0.9) & (u**2 + v**2 > 0.3),
    lambda u, v: (np.minimum(abs(u), abs(v)) < 0.25) & (np.maximum(abs(u), abs(v)) < 0.9),
    lambda u, v: abs(u) + abs(v) < 0.95,
    lambda u, v: (np.maximum(abs(u), abs(v)) < 0.8) & (np.maximum(abs(u), abs(v)) > 0.45),
    lambda u, v: (np.maximum(abs(u), abs(v)) < 0.8) & (abs(v) > 0.3),
    lambda u, v: (u**2 + v**2 < 0.9) & ((u - 0.45) ** 2 + v**2 > 0.5),
    lambda u, v: (np.maximum(abs(u), abs(v)) < 0.8) & (u * v > 0),
)


def _texture(rng: np.random.Generator) -> np.ndarray:
    """A sum of three plane waves per image with random directions, wave lengths, phases and colours, (N, C, H, W)."""
    y_HW, x_HW = np.mgrid[:SIDE, :SIDE].astype(np.float32)
    total = np.full((CHUNK, CHANNELS, SIDE, SIDE), 0.3, dtype=np.float32)
    for _ in range(3):
        angle, frequency, phase = (
            rng.uniform(low, high, (CHUNK, 1, 1)).astype(np.float32)
            for low, high in ((0, np.pi), (0.2, 1.2), (0, 2 * np.pi))
        )
        wave_NHW = np.sin(frequency * (x_HW * np.cos(angle) + y_HW * np.sin(angle)) + phase)
        total += 0.1 * wave_NHW[:, None] * rng.uniform(-1, 1, (CHUNK, CHANNELS, 1, 1)).astype(np.float32)
    return total
