"""The world that the tiny models live in: scenes of handwritten digits, a raw vocabulary, and a table of facts.

An image is 48x48 RGB: 6x6 tiles of 8x8 pixels, each tile a real handwritten digit (scikit-learn's ``load_digits``) in
one of six colours, with Gaussian noise. Granularity plays the part of font size: the image is divided into 1, 4, 9 or
36 equal regions, and all tiles of a region show the same class in different handwritings. Training and test images
draw from disjoint sets of handwritings.

In sparse scenes only some tiles carry a digit. Every other tile is empty or clutter (a handwriting whose pixels are
shuffled, in a colour), so that neither brightness nor contrast tells where there is something to read.

Shape suffixes: N scenes, P tiles of a scene (= patches), C colour channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from isoflop.core.hashing import derive_seed

GRID = 6
TILE = 8
IMAGE_SIDE = GRID * TILE
TILES = GRID * GRID
LEVELS = (1, 4, 9, 36)
CLASSES = 10
BLANK = CLASSES
"""Class of a tile without a digit."""
SPARSE_DIGITS = 6
"""Tiles with a digit in the sparse scenes of the training."""
CLUTTER = 0.5
"""Share of the tiles without a digit that are clutter."""
NOISE = 0.08
PIXEL_MEAN = 0.5
PIXEL_STD = 0.5
TRAIN_WRITINGS = 1400
COLOURS = np.array(
    [[1.0, 0.2, 0.2], [0.2, 1.0, 0.2], [0.3, 0.3, 1.0], [1.0, 1.0, 0.2], [1.0, 0.2, 1.0], [0.2, 1.0, 1.0]],
    dtype=np.float32,
)

VOCABULARY = "digit-scenes-1"
"""Name and version of this world: raise it whenever scenes, vocabulary or facts change. A checkpoint that was trained
in it says so in ``config.json`` under ``isoflop``; stages that draw from it carry it as a field."""
SPARSE_SCENES = "scenes:sparse-1"
"""What a model offers that was trained on sparse scenes; raise it when they change."""
PAD, IMAGE, READ = 0, 1, 2
FIRST_DIGIT = 3
FIRST_ANSWER = FIRST_DIGIT + CLASSES
FIRST_PLACE = FIRST_ANSWER + CLASSES
ENTITIES = 128
ZIPF = 0.8
FIRST_ENTITY = FIRST_PLACE + TILES
VOCAB_SIZE = FIRST_ENTITY + ENTITIES
QUESTION_TOKENS = 2

TRAIN_READING_MIX = (0.2, 0.25, 0.25, 0.3)
TEST_READING_MIX = (0.2, 0.3, 0.3, 0.2)
FINE_MIX = (0.0, 0.0, 0.0, 1.0)
COARSE_MIX = (1.0, 0.0, 0.0, 0.0)

CHUNK = 256
"""Scenes are drawn in chunks of this many, each with a generator of its own."""
_GOLDEN = 0.6180339887498949


@lru_cache(maxsize=1)
def fact_table() -> np.ndarray:
    """The answer to entity e in a scene of class c, shape (ENTITIES, CLASSES), values 0-9; fixed for ever."""
    return np.random.default_rng(derive_seed(VOCABULARY, "facts")).integers(0, CLASSES, (ENTITIES, CLASSES))


@lru_cache(maxsize=1)
def entity_probabilities() -> np.ndarray:
    """Zipf's law over the entities: probability proportional to rank^-0.8."""
    weights = np.arange(1, ENTITIES + 1) ** -ZIPF
    return weights / weights.sum()


def reading_questions(rng: np.random.Generator, classes_NP: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Questions ``[READ, place]`` and the digits at these places: token ids (N, 2) and answers (N,)."""
    count = len(classes_NP)
    places_N = rng.integers(0, TILES, count)
    questions_NQ = np.stack([np.full(count, READ), FIRST_PLACE + places_N], axis=1)
    return questions_NQ, FIRST_DIGIT + classes_NP[np.arange(count), places_N].astype(np.int64)


def find_questions(rng: np.random.Generator, classes_NP: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Questions ``[READ, place]`` about places that carry a digit: token ids (N, 2) and answers (N,)."""
    places_N = np.where(classes_NP == BLANK, -1.0, rng.random(classes_NP.shape)).argmax(1)
    questions_NQ = np.stack([np.full(len(classes_NP), READ), FIRST_PLACE + places_N], axis=1)
    return questions_NQ, FIRST_DIGIT + classes_NP[np.arange(len(classes_NP)), places_N].astype(np.int64)


def recall_questions(rng: np.random.Generator, classes_NP: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Questions ``[pad, entity]`` about coarse scenes and FACT[entity, scene class]: token ids (N, 2), answers (N,)."""
    count = len(classes_NP)
    entities_N = rng.choice(ENTITIES, count, p=entity_probabilities())
    questions_NQ = np.stack([np.full(count, PAD), FIRST_ENTITY + entities_N], axis=1)
    return questions_NQ, FIRST_ANSWER + fact_table()[entities_N, classes_NP[:, 0]]


def blind_recall_error() -> float:
    """Expected error on recall of the best answerer that knows the facts and the question but sees nothing.

    It names the answer that most of the equally likely classes give for the entity.
    """
    best_E = [np.bincount(facts).max() / CLASSES for facts in fact_table()]
    return 1.0 - float(entity_probabilities() @ best_E)


@dataclass(frozen=True)
class SceneSet:
    """A reproducible set of scenes, drawn when asked for.

    Scene ``i`` does not depend on ``count``: a shorter set is a prefix of a longer one.

    Args:
        split: ``train`` or ``test``: which handwritings may appear.
        count: number of scenes.
        mix: share of scenes with 1, 4, 9 and 36 regions. Shares are met evenly along the set, not by chance.
        seed: of classes, handwritings, colours and noise.
        digits: tiles of a scene that carry a digit; 0 for all of them.
    """

    split: str
    count: int
    mix: tuple[float, ...]
    seed: int
    digits: int = 0

    def regions(self) -> np.ndarray:
        """Number of regions of each scene, shape (N,), values from LEVELS."""
        return self._levels(0, self.count)

    def classes(self) -> np.ndarray:
        """Digit class of every tile in raster order, BLANK where there is none, uint8 (N, P)."""
        parts = [self._classes(start) for start in range(0, self.count, CHUNK)]
        return np.concatenate(parts)[: self.count]

    def images(self, start: int = 0, stop: int | None = None) -> Iterator[np.ndarray]:
        """Images ``start`` to ``stop`` in batches of at most 256: float32 (n, C, H, W) with values in [0, 1]."""
        stop = self.count if stop is None else min(stop, self.count)
        for chunk in range(start - start % CHUNK, stop, CHUNK):
            images_NCHW, _ = self.draw(chunk)
            yield images_NCHW[max(0, start - chunk) : stop - chunk]

    def draw(self, chunk: int) -> tuple[np.ndarray, np.ndarray]:
        """The 256 scenes from ``chunk`` (a multiple of 256) on: images (n, C, H, W) and colour numbers (n, P)."""
        rng = np.random.default_rng([derive_seed("pixels", self.split, self.seed), chunk])
        classes_NP = self._classes(chunk)
        pixels, by_class = writings(self.split)
        counts = np.array([len(rows) for rows in by_class])
        first = np.concatenate([[0], np.cumsum(counts)[:-1]])
        drawn_NP = np.where(classes_NP == BLANK, 0, classes_NP)
        pick_NP = (rng.random(classes_NP.shape) * counts[drawn_NP]).astype(np.int64) + first[drawn_NP]
        tiles = pixels[np.concatenate(by_class)[pick_NP]]
        if self.digits:
            tiles = self._emptied(tiles, classes_NP == BLANK, chunk)
        colours_NP = rng.integers(0, len(COLOURS), classes_NP.shape)
        coloured = tiles[:, :, None] * COLOURS[colours_NP][:, :, :, None, None]
        images = coloured.reshape(-1, GRID, GRID, 3, TILE, TILE).transpose(0, 3, 1, 4, 2, 5)
        images_NCHW = images.reshape(-1, 3, IMAGE_SIDE, IMAGE_SIDE)
        images_NCHW = images_NCHW + NOISE * rng.standard_normal(images_NCHW.shape, dtype=np.float32)
        return np.clip(images_NCHW, 0.0, 1.0), colours_NP

    def _emptied(self, tiles: np.ndarray, blank_NP: np.ndarray, chunk: int) -> np.ndarray:
        """Tiles (n, P, 8, 8) with those without a digit empty, or clutter: some handwriting with its pixels shuffled."""
        rng = np.random.default_rng([derive_seed("clutter", self.split, self.seed), chunk])
        pixels, by_class = writings(self.split)
        pool = pixels[np.concatenate(by_class)]
        other = rng.permuted(pool[rng.integers(0, len(pool), blank_NP.shape)].reshape(*blank_NP.shape, -1), axis=-1)
        clutter_NP = blank_NP & (rng.random(blank_NP.shape) < CLUTTER)
        tiles = np.where(blank_NP[:, :, None, None], np.float32(0.0), tiles)
        return np.where(clutter_NP[:, :, None, None], other.reshape(tiles.shape), tiles)

    def _levels(self, start: int, stop: int) -> np.ndarray:
        # A golden-ratio sequence meets the shares along the whole set, so that prefixes are as balanced as the whole.
        offset = derive_seed("levels", self.split, self.seed) / 2**31
        u_N = np.modf((np.arange(start, stop) + 1) * _GOLDEN + offset)[0]
        return np.array(LEVELS)[np.searchsorted(np.cumsum(self.mix)[:-1], u_N, side="right")]

    def _classes(self, chunk: int) -> np.ndarray:
        rng = np.random.default_rng([derive_seed("classes", self.split, self.seed), chunk])
        regions_NP = rng.integers(0, CLASSES, (CHUNK, TILES), dtype=np.uint8)
        levels_N = self._levels(chunk, chunk + CHUNK)
        classes_NP = np.take_along_axis(regions_NP, np.stack([_region_of_tile(int(g)) for g in levels_N]), axis=1)
        if self.digits:
            order = np.random.default_rng([derive_seed("places", self.split, self.seed), chunk]).random(
                classes_NP.shape
            )
            np.put_along_axis(classes_NP, order.argsort(1)[:, self.digits :], BLANK, axis=1)
        return classes_NP


@lru_cache(maxsize=len(LEVELS))
def _region_of_tile(regions: int) -> np.ndarray:
    """Region number of each tile in raster order, shape (P,)."""
    side = int(regions**0.5)
    row, column = np.divmod(np.arange(TILES), GRID)
    size = GRID // side
    return (row // size) * side + column // size


@lru_cache(maxsize=2)
def writings(split: str) -> tuple[np.ndarray, list[np.ndarray]]:
    """All 1,797 handwritings, float32 (n, 8, 8) in [0, 1], and the rows of each class that belong to ``split``."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = np.random.default_rng(derive_seed(VOCABULARY, "writings")).permutation(len(digits.target))
    rows = order[:TRAIN_WRITINGS] if split == "train" else order[TRAIN_WRITINGS:]
    pixels = (digits.images / 16.0).astype(np.float32)
    return pixels, [rows[digits.target[rows] == c] for c in range(CLASSES)]
