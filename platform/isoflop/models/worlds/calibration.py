"""Where the calibration examples of a language model come from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from isoflop.core.stage import Stage, StageContext


@dataclass(frozen=True)
class CalibrationText(ABC):
    """Training sequences of a language model; a frozen dataclass of plain fields and stages."""

    def stages(self) -> tuple[Stage, ...]:
        """Stages that ``batches`` asks for."""
        return ()

    @abstractmethod
    def batches(self, ctx: StageContext, examples: int, seed: int) -> Iterator[Tensor]:
        """Token ids (B, T) of training sequences, ``examples`` rows in all; never from a test split."""
