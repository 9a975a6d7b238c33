"""What the methods that send a share of the entries have in common: density, warm-up, sampler, coding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from isoflop.core.knobs import Knob
from isoflop.methods.base import Axes
from isoflop.methods.gradients.base import CompressingMethod
from isoflop.methods.gradients.coding import CODINGS, VALUE_TYPES, EntryCoding
from isoflop.methods.gradients.compressors import TopK
from isoflop.methods.gradients.selection import SAMPLERS, warmed_density
from isoflop.models.base import ModelInfo
from isoflop.models.training.distributed import Setting


@dataclass(frozen=True)
class SparseMethod(CompressingMethod):
    """Base class: k = ⌈density · numel⌉ entries of each matrix, more of them during a warm-up.

    In the warm-up the density falls from nearly 1 in five equal stages, exponentially.
    """

    density: Annotated[float, Knob(low=5e-4, high=1.0, log=True, ratio=True, doc="share of the entries sent")] = 1e-3
    warmup: Annotated[float, Knob(low=0.0, high=0.5, doc="share of the training with a higher density")] = 0.05

    def axes(self, info: ModelInfo) -> Axes:
        """1 / density, of entries; their places are measured."""
        return Axes(ratio=1 / self.density)

    def warmup_steps(self, setting: Setting) -> int:
        """``warmup`` of all steps."""
        return round(self.warmup * setting.steps)

    def density_at(self, step: int, setting: Setting) -> float:
        """The density of a step."""
        return warmed_density(self.density, step, self.warmup_steps(setting))


@dataclass(frozen=True)
class TopKMethod(SparseMethod):
    """Base class: the largest entries by magnitude, gathered as pairs of index and value."""

    sampler: Annotated[
        str, Knob(choices=SAMPLERS, doc="top-k of all entries, or above a threshold estimated on 1 % of them")
    ] = "exact"
    values: Annotated[str, Knob(choices=tuple(VALUE_TYPES), doc="type in which values travel")] = "fp32"
    indices: Annotated[str, Knob(choices=CODINGS, doc="how places travel")] = "int32"

    def compressor(self, setting: Setting) -> TopK:
        """Top-k; a sampled threshold lets through at most k entries, so that their count travels, too."""
        return TopK(
            lambda step: self.density_at(step, setting),
            EntryCoding(self.values, self.indices, counted=self.sampler == "exact"),
            setting.workers,
            setting.rank,
            setting.seed,
            self.sampler,
        )
