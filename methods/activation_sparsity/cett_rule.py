"""The CETT rule with its threshold given in three ways: as a CETT, as a rise of perplexity, as a share of active neurons."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, ClassVar

from torch import Tensor

from isoflop.core.knobs import Knob
from isoflop.core.stage import Stage
from isoflop.methods.activation_sparsity.base import Rule
from isoflop.methods.activation_sparsity.calibration import (
    Calibration,
    CettStage,
    Crossed,
    ThresholdMethod,
    Thresholds,
    ThresholdStage,
    prepared_thresholds,
)
from isoflop.methods.activation_sparsity.rules import at_least
from isoflop.methods.base import METHODS, Method
from isoflop.methods.bisection import largest_allowed
from isoflop.methods.calibration import OnModel
from isoflop.models.base import ModelInfo
from isoflop.models.family import family_of
from isoflop.models.hooks.feed_forward import Mlp

MOST_CETT = 0.95
"""At 1 nothing need stay."""
LAST_CHECKPOINTS = 5
CETT_TOLERANCE = 1e-4
"""A perplexity ratio moves by about 0.1 times that."""


@dataclass(frozen=True)
class CettRule(ThresholdMethod):
    """Base class: a neuron is inactive where the norm of its contribution, |a_i| ||W_out[:, i]||, is below eps_L.

    eps_L is, for each layer, the largest threshold with at most a given CETT on dense states of training text (see
    ``cett``); that CETT is one number for all layers. The weights' norms are taken as they are when the rule is applied.
    """

    paper: ClassVar[str] = "arXiv 2411.02335"

    def rules(self, mlps: Sequence[Mlp], prepared: Any) -> list[Rule]:
        """Thresholds on the norms of the contributions."""
        return cett_rules(mlps, prepared_thresholds(self.name, prepared))

    def found(self, calibration: Calibration, cett: float) -> Thresholds:
        """The thresholds of a CETT, with what they do to the calibration text."""
        eps_L = calibration.thresholds(cett)
        nll, active = calibration.nll(cett_rules(calibration.mlps, eps_L))
        ratio = math.exp(nll - calibration.dense_nll)
        return Thresholds(eps_L, {"cett": cett, "calibration_ppl_ratio": ratio, "calibration_active": active})


def cett_rules(mlps: Sequence[Mlp], eps_L: Tensor) -> list[Rule]:
    """Contributions stay whose norm is at least eps of their layer."""
    return [partial(_reaching, mlp.norms_F(), float(eps)) for mlp, eps in zip(mlps, eps_L, strict=True)]


def _reaching(norms_F: Tensor, eps: float, a_BTF: Tensor, gate_BTF: Tensor) -> Tensor:
    return at_least(a_BTF.abs().float() * norms_F, eps)


@METHODS.register("mlp-cett")
@dataclass(frozen=True)
class MlpCett(CettRule):
    """The CETT rule at a given CETT. At 0 exactly the neurons that are zero are inactive, and no output changes."""

    cett: Annotated[
        float,
        Knob(low=0.0, high=MOST_CETT, ratio=True, doc="cumulative error of tail truncation allowed in every layer"),
    ] = 0.2

    @classmethod
    def identity(cls, info: ModelInfo) -> Method | None:
        """Nothing but zeros goes."""
        return cls(cett=0.0)

    def find(self, calibration: Calibration, cett: float | None) -> Thresholds:
        """Those of the knob."""
        return self.found(calibration, self.cett)


@METHODS.register("mlp-cett-active")
@dataclass(frozen=True)
class MlpCettActive(CettRule):
    """The CETT rule at the largest CETT that leaves a given share of the neurons active on training text.

    For comparisons with other rules at an equal number of active neurons.
    """

    active: Annotated[
        float, Knob(low=0.01, high=1.0, ratio=True, doc="share of the neurons that stay active on training text")
    ] = 0.3

    @classmethod
    def identity(cls, info: ModelInfo) -> Method | None:
        """All stay."""
        return cls(active=1.0)

    def find(self, calibration: Calibration, cett: float | None) -> Thresholds:
        """Search for the CETT."""

        def inactive(value: float) -> float:
            return 1 - calibration.nll(cett_rules(calibration.mlps, calibration.thresholds(value)))[1]

        reached = largest_allowed(inactive, 1 - self.active, 0.0, MOST_CETT, CETT_TOLERANCE, slack=0.01)
        return self.found(calibration, float(reached.x))


@METHODS.register("sparsing-law")
@dataclass(frozen=True)
class SparsingLaw(CettRule):
    """PPL-p % sparsity: the CETT rule at the largest CETT that raises the perplexity of training text by at most p %.

    The mean ratio of perplexities decides over the last five checkpoints of the model's training (``ModelFamily.series``),
    and all its checkpoints share the CETT that it gives; a model without a series decides for itself. ``ratio`` is 1 over
    the share of active neurons, which the laws of the paper describe (``sparsing_relu``, ``sparsing_silu``).

    In the released search a CETT that even the least threshold exceeds gives the largest one, targets beyond the 0.99
    quantile of the norms cannot be met, and thresholds come from the text that is scored; here they do not.
    """

    ppl_tolerance: Annotated[
        float, Knob(low=0.0, high=100.0, ratio=True, unit="%", doc="rise of perplexity allowed; 0: only zeros go")
    ] = 1.0

    @classmethod
    def identity(cls, info: ModelInfo) -> Method | None:
        """Nothing but zeros goes."""
        return cls(ppl_tolerance=0.0)

    def prepare(
        self, info: ModelInfo, weights: Stage | None, seed: int, trained_with: tuple[Method, ...] = ()
    ) -> Stage | None:
        """The thresholds of this checkpoint, at the CETT of its series."""
        self.check(info)
        last = family_of(info.ref).series(info, weights)[-LAST_CHECKPOINTS:]
        models = tuple(OnModel(**OnModel.source(i, w, seed, trained_with)) for i, w in last)
        common = CettStage(models, self)
        return ThresholdStage(**OnModel.source(info, weights, seed, trained_with), method=self, common=common)

    def shared(self, models: Sequence[Calibration]) -> Crossed | None:
        """Search for the CETT; dips of the ratio that are smaller than the tolerance itself are taken for noise."""

        def ratio(cett: float) -> float:
            ratios = [math.exp(m.nll(cett_rules(m.mlps, m.thresholds(cett)))[0] - m.dense_nll) for m in models]
            return sum(ratios) / len(ratios)

        rise = self.ppl_tolerance / 100
        if not rise:
            return Crossed(0.0, ratio(0.0), 1, 0.0)
        found = largest_allowed(ratio, 1 + rise, 0.0, MOST_CETT, CETT_TOLERANCE, slack=rise)
        return Crossed(float(found.x), found.y, found.evaluations, found.dip)

    def find(self, calibration: Calibration, cett: float | None) -> Thresholds:
        """Those of the shared CETT."""
        if cett is None:
            raise ValueError(f"method {self.name} needs the CETT of its series")
        return self.found(calibration, cett)
