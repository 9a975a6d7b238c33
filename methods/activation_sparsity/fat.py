"""FAT: one threshold on the magnitude of every activation (arXiv 2411.02335's baseline, after Kurtz et al. 2020)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import torch
from torch import Tensor

from isoflop.core.knobs import Knob
from isoflop.methods.activation_sparsity.base import Rule
from isoflop.methods.activation_sparsity.calibration import (
    Calibration,
    ThresholdMethod,
    Thresholds,
    prepared_thresholds,
)
from isoflop.methods.activation_sparsity.rules import at_least, just_above
from isoflop.methods.base import METHODS, Axes, Method
from isoflop.methods.bisection import largest_allowed
from isoflop.models.base import ModelInfo
from isoflop.models.hooks.feed_forward import Mlp

RESOLUTION = 2**14
"""Steps between no neuron and all of them."""


@METHODS.register("mlp-fat")
@dataclass(frozen=True)
class MlpFat(ThresholdMethod):
    """A neuron is inactive where a magnitude is below eps, one number for all layers, whatever the neuron's weights are.

    ``gate``, the output of the activation function, is what the released code of arXiv 2411.02335 looks at; ``value`` is
    the whole a_i. eps is found on training text. Exact zeros always go, which alone may leave fewer neurons than asked for.
    """

    active: Annotated[
        float, Knob(low=0.01, high=1.0, ratio=True, doc="share of the neurons that stay active on training text")
    ] = 0.3
    score: Annotated[str, Knob(choices=("gate", "value"), doc="whose magnitude counts")] = "gate"

    def axes(self, info: ModelInfo) -> Axes:
        """1 / active, as calibrated."""
        return Axes(ratio=1 / self.active)

    @classmethod
    def identity(cls, info: ModelInfo) -> Method | None:
        """All stay."""
        return cls(active=1.0)

    def rules(self, mlps: Sequence[Mlp], prepared: Any) -> list[Rule]:
        """Thresholds on magnitudes."""
        return [self._rule(float(eps)) for eps in prepared_thresholds(self.name, prepared)]

    def find(self, calibration: Calibration, cett: float | None) -> Thresholds:
        """Search among the magnitudes that occur."""
        ranked, blocks = calibration.scores(self.score), len(calibration.mlps)

        def eps_of(rank: float) -> float:
            return just_above(float(ranked[int(rank) - 1]) if rank else 0.0)

        def inactive(rank: float) -> float:
            return 1 - calibration.nll([self._rule(eps_of(rank))] * blocks)[1]

        step = max(1, ranked.numel() // RESOLUTION)
        eps = eps_of(largest_allowed(inactive, 1 - self.active, 0, ranked.numel(), step, slack=0.01).x)
        nll, active = calibration.nll([self._rule(eps)] * blocks)
        ratio = math.exp(nll - calibration.dense_nll)
        return Thresholds(torch.full((blocks,), eps), {"calibration_ppl_ratio": ratio, "calibration_active": active})

    def _rule(self, eps: float) -> Rule:
        return partial(_reaching, eps, self.score)


def _reaching(eps: float, score: str, a_BTF: Tensor, gate_BTF: Tensor) -> Tensor:
    return at_least((gate_BTF if score == "gate" else a_BTF).abs(), eps)
