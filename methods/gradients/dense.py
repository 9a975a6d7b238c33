"""No compression: the exact average of all gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from isoflop.methods.base import METHODS
from isoflop.methods.gradients.base import GradientMethod
from isoflop.methods.gradients.exchange import Exchanger
from isoflop.models.base import ModelInfo
from isoflop.models.training.distributed import Setting


@METHODS.register("dense-gradients")
@dataclass(frozen=True)
class DenseGradients(GradientMethod):
    """Everything is averaged in float32, in the bytes of a ring all-reduce; then clipped as in any training."""

    paper: ClassVar[str] = "arXiv 2006.15704"

    @classmethod
    def identity(cls, info: ModelInfo) -> DenseGradients:
        """Itself."""
        return cls()

    def exchange(self, setting: Setting) -> Exchanger:
        """The average."""
        return Exchanger(setting.workers, clip_mean=setting.clip)
