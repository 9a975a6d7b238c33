"""The task ``reading``: which digit is written at a place? An OCR-like question on real handwriting."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from isoflop.models.worlds import digit_world as world
from isoflop.tasks.base import TASKS
from isoflop.tasks.digit_scenes import DigitSceneTask, Examples

BLIND_READING_ERROR = 1.0 - 1.0 / world.CLASSES
"""Every class is equally likely at every place."""


@TASKS.register("reading")
@dataclass(frozen=True)
class Reading(DigitSceneTask):
    """Question ``[READ, place]``, answer the digit at that place of the 6x6 grid; chance error 0.90.

    The regions play the part of font size: of the scenes 20 % have one region, 30 % four, 30 % nine, 20 % thirty-six,
    so that V pooled tokens leave the levels up to V readable and the finer ones partly.
    """

    version: ClassVar[str] = "1"
    chance: ClassVar[float] = BLIND_READING_ERROR

    @property
    def mix(self) -> tuple[float, ...]:
        """All levels."""
        return world.TEST_READING_MIX

    def ask(self, rng: np.random.Generator, regions_N: np.ndarray, classes_NP: np.ndarray) -> Examples:
        """One place per scene, uniformly."""
        return Examples(*world.reading_questions(rng, classes_NP))
