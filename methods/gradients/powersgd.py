"""PowerSGD: two thin factors per gradient matrix (arXiv 1905.13727)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

from isoflop.core.knobs import Knob
from isoflop.methods.base import METHODS
from isoflop.methods.gradients.base import CompressingMethod, feedback_memory
from isoflop.methods.gradients.compressors import LowRank
from isoflop.methods.gradients.memory import Memory
from isoflop.models.base import ModelInfo
from isoflop.models.training.distributed import Setting


@METHODS.register("powersgd")
@dataclass(frozen=True)
class PowerSgd(CompressingMethod):
    """A low-rank approximation of the average gradient from one power iteration per step, with error feedback.

    Both factors are averaged on the way, so that the bytes per worker hardly grow with N. Matrices that factors of
    ``rank`` would not halve are averaged as they are.
    """

    paper: ClassVar[str] = "arXiv 1905.13727"

    rank: Annotated[int, Knob(low=1, high=4096, log=True, ratio=True, doc="columns of the factors")] = 2
    feedback: Annotated[bool, Knob(doc="keep what is not sent for later steps")] = True

    @classmethod
    def identity(cls, info: ModelInfo) -> PowerSgd:
        """A rank at which no matrix is worth factoring."""
        return replace(cls(), rank=4096, clip=False)

    def compressor(self, setting: Setting) -> LowRank:
        """Warm-started power iteration."""
        return LowRank(self.rank, setting.workers, setting.seed)

    def memory(self) -> Memory:
        """Error feedback, unless it is off."""
        return feedback_memory(self.feedback)
