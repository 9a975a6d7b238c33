"""The task ``find-digit``: reading where most of the image holds nothing to read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np

from isoflop.core.knobs import Knob
from isoflop.models.worlds import digit_world as world
from isoflop.tasks.base import TASKS
from isoflop.tasks.digit_scenes import DigitSceneTask, Examples
from isoflop.tasks.reading import BLIND_READING_ERROR


@TASKS.register("find-digit")
@dataclass(frozen=True)
class FindDigit(DigitSceneTask):
    """Question ``[READ, place]`` about one of the few places that carry a digit; chance error 0.90.

    Of the 36 tiles ``digits`` carry one; the others are empty or clutter. Patches are therefore not equally worth
    keeping, which is what selections by importance need: V tokens chosen blindly hold the digit that is asked for with
    probability V/36. Models are trained with 6 digits.
    """

    version: ClassVar[str] = "1"
    needs: ClassVar[frozenset[str]] = DigitSceneTask.needs | {world.SPARSE_SCENES}
    chance: ClassVar[float] = BLIND_READING_ERROR

    digits: Annotated[int, Knob(low=1, high=world.TILES - 1, doc="tiles of a scene that carry a digit")] = (
        world.SPARSE_DIGITS
    )

    @property
    def mix(self) -> tuple[float, ...]:
        """Every tile for itself."""
        return world.FINE_MIX

    def scenes(self) -> world.SceneSet:
        """The sparse test scenes."""
        return world.SceneSet("test", self.examples, self.mix, self.scenes_seed, digits=self.digits)

    def ask(self, rng: np.random.Generator, regions_N: np.ndarray, classes_NP: np.ndarray) -> Examples:
        """One place with a digit per scene, uniformly."""
        return Examples(*world.find_questions(rng, classes_NP))
