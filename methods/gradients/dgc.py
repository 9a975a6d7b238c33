"""Deep Gradient Compression: top-k with momentum correction and masking (arXiv 1712.01887)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

from isoflop.core.knobs import Knob
from isoflop.methods.base import METHODS
from isoflop.methods.gradients.memory import Memory, MomentumCorrection
from isoflop.methods.gradients.sparse import TopKMethod
from isoflop.models.base import ModelInfo


@METHODS.register("dgc")
@dataclass(frozen=True)
class Dgc(TopKMethod):
    """Each worker accumulates momentum, not gradients, and sends the largest accumulated entries.

    Per worker and matrix: the local gradient is clipped to the model's ``clip`` / √N; u ← m·u + g; v ← v + u; the top
    ``density`` of |v| is sent, leaves v, and (``masking``) leaves u. Everybody adds up all pairs, divides by N and steps
    along that without further momentum. Vectors are averaged, with ordinary momentum. During ``warmup`` more is sent.

    On purpose not as released: the top entries are exact by default (released, above a threshold from a sample of 1 %: ``sampler:
    sampled``); the warm-up is a share of the training in five stages (released, of epochs); with ``values: fp16`` the remainder of
    rounding stays in v; indices take 4 bytes by default (released, 8).

    With ``density: 1`` this is momentum SGD without ``masking``, and SGD without momentum with it.
    """

    paper: ClassVar[str] = "arXiv 1712.01887"

    masking: Annotated[bool, Knob(doc="momentum factor masking: forget the momentum of what was sent")] = True

    @classmethod
    def identity(cls, info: ModelInfo) -> Dgc:
        """Everything is sent, as it is."""
        return replace(cls(), density=1.0, warmup=0.0, masking=False, clip=False)

    def memory(self) -> Memory:
        """u and v."""
        return MomentumCorrection(self.momentum, self.nesterov, self.masking)
