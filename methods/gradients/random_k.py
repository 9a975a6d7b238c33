"""Random entries, the same on all workers: the lower bound for choosing entries."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

from isoflop.core.knobs import Knob
from isoflop.methods.base import METHODS
from isoflop.methods.gradients.base import feedback_memory
from isoflop.methods.gradients.compressors import RandomK
from isoflop.methods.gradients.memory import Memory
from isoflop.methods.gradients.sparse import SparseMethod
from isoflop.models.base import ModelInfo
from isoflop.models.training.distributed import Setting


@METHODS.register("random-k")
@dataclass(frozen=True)
class RandomEntries(SparseMethod):
    """Entries drawn anew in each step from a seed that all workers share: no index travels, and values are added up on
    the way, so that a density sends less than half of what top-k sends at it."""

    paper: ClassVar[str] = "arXiv 1809.07599"

    feedback: Annotated[bool, Knob(doc="keep what is not sent for later steps")] = True

    @classmethod
    def identity(cls, info: ModelInfo) -> RandomEntries:
        """Everything is sent."""
        return replace(cls(), density=1.0, warmup=0.0, clip=False)

    def compressor(self, setting: Setting) -> RandomK:
        """Common random entries."""
        return RandomK(lambda step: self.density_at(step, setting), setting.workers, setting.seed)

    def memory(self) -> Memory:
        """Error feedback, unless it is off."""
        return feedback_memory(self.feedback)
