"""Top-k with error feedback, and without: the reference for sparse gradients."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

from isoflop.core.knobs import Knob
from isoflop.methods.base import METHODS
from isoflop.methods.gradients.base import feedback_memory
from isoflop.methods.gradients.memory import Memory
from isoflop.methods.gradients.sparse import TopKMethod
from isoflop.models.base import ModelInfo


@METHODS.register("topk-ef")
@dataclass(frozen=True)
class TopKFeedback(TopKMethod):
    """The largest entries of gradient plus what was not sent before; momentum after averaging.

    Unlike ``dgc``, what waits in the memory collects no momentum.
    """

    paper: ClassVar[str] = "arXiv 1809.07599"

    feedback: Annotated[bool, Knob(doc="keep what is not sent for later steps")] = True

    @classmethod
    def identity(cls, info: ModelInfo) -> TopKFeedback:
        """Everything is sent, as it is."""
        return replace(cls(), density=1.0, warmup=0.0, clip=False)

    def memory(self) -> Memory:
        """Error feedback, unless it is off."""
        return feedback_memory(self.feedback)
