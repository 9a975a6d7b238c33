"""The task ``visual-reasoning``: recall of facts about what is seen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np

from isoflop.core.knobs import Knob
from isoflop.models.worlds import digit_world as world
from isoflop.tasks.base import TASKS
from isoflop.tasks.digit_scenes import DigitSceneTask, Examples
from isoflop.tasks.reading import BLIND_READING_ERROR

FINE_SHARE = 0.05


def blind_error(fine_share: float) -> float:
    """Expected error of the best answerer that does not see the image, at a share of reading questions."""
    return (1.0 - fine_share) * world.blind_recall_error() + fine_share * BLIND_READING_ERROR


@TASKS.register("visual-reasoning")
@dataclass(frozen=True)
class VisualReasoning(DigitSceneTask):
    """Recall of visual facts: question ``[pad, entity]``, answer FACT[entity, class of the scene].

    The scene is coarse (one class everywhere), the 128 entities follow Zipf's law, and the facts are a fixed random
    table: a matter of what the language model can hold. ``blind_error`` says how much of the suite a model that sees
    nothing gets wrong at best: 0.72 of the recall and 0.9 of the reading, so 0.73 at the default share.

    ``fine_share`` of the suite are reading questions on the finest scenes instead. That share is a dial that sets the
    token exponent: fitted as error ~ N^-alpha V^-beta on 32 cells of this recipe (14 to 222 thousand parameters, 1 to 36
    tokens, 3 seeds; standard error .015), beta is -.04 at 0 %, .02 at 5 %, .07 at 10 % and .11 at 15 %, and alpha falls
    from .33 to .22. State the share wherever results are shown: a toy whose exponents depend on a dial shows how the law
    is measured, it does not prove the paper's law.
    """

    version: ClassVar[str] = "1"
    chance: ClassVar[float] = round(blind_error(FINE_SHARE), 4)

    fine_share: Annotated[
        float,
        Knob(
            low=0.0,
            high=1.0,
            doc="share of reading questions on the finest scenes; a dial that sets the token exponent",
        ),
    ] = FINE_SHARE

    @property
    def mix(self) -> tuple[float, ...]:
        """Coarse scenes and the share of the finest."""
        return (1.0 - self.fine_share, 0.0, 0.0, self.fine_share)

    def ask(self, rng: np.random.Generator, regions_N: np.ndarray, classes_NP: np.ndarray) -> Examples:
        """Recall on coarse scenes, reading on fine ones."""
        recall_NQ, facts_N = world.recall_questions(rng, classes_NP)
        reading_NQ, digits_N = world.reading_questions(rng, classes_NP)
        fine_N = regions_N != world.LEVELS[0]
        return Examples(np.where(fine_N[:, None], reading_NQ, recall_NQ), np.where(fine_N, digits_N, facts_N))
