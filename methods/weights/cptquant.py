"""CPTQuant: bits for each layer by how much the model depends on it (arXiv 2412.03599).

Shape suffixes: O outputs (rows), I inputs (columns).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import numpy as np
from torch import Tensor

from isoflop.core.errors import Infeasible
from isoflop.core.hashing import derive_seed
from isoflop.core.knobs import Knob, knob_specs
from isoflop.core.stage import Stage, StageContext
from isoflop.methods.allocation import allocate
from isoflop.methods.base import METHODS, Axes, Method
from isoflop.methods.calibration import OnModel
from isoflop.methods.weights.artefact import Artefact
from isoflop.methods.weights.base import Served, WeightMethod
from isoflop.methods.weights.payloads import DensePayload, GridPayload, Payload
from isoflop.methods.weights.sensitivity import (
    Sensitivity,
    alone_scores,
    blocks_of,
    correlation_scores,
    in_groups,
    perturbation_scores,
    pruning_scores,
)
from isoflop.methods.weights.statistics import calibration_seed
from isoflop.methods.weights.tensor_grid import TensorGridPayload
from isoflop.methods.weights.views import LinearView, linear_views
from isoflop.models.base import Model, ModelInfo

if TYPE_CHECKING:
    from isoflop.methods.weights.probe import WeightProbe

CMPQ, PMPQ, TDMPQ, ALONE, RANDOM, UNIFORM = "cmpq", "pmpq", "tdmpq", "alone", "random", "uniform"
SCORERS = (CMPQ, PMPQ, TDMPQ, ALONE, RANDOM, UNIFORM)
DP, CLUSTERS = "dp", "clusters"
MENUS = {"16/8/4": (16, 8, 4), "8/4/2": (8, 4, 2), "4/3/2": (4, 3, 2)}
_MEASURED = {
    CMPQ: {"n_calib"},
    PMPQ: {"n_calib", "probe_sparsity"},
    TDMPQ: {"n_calib", "sigma", "draws"},
    ALONE: {"n_calib", "menu", "group"},
}
"""Knobs that scores depend on."""
LEAST_SHARE = 1e-3
"""Of the widest difference between scores: what the least sensitive layer still counts."""


@METHODS.register("cptquant")
@dataclass(frozen=True)
class CptQuant(WeightMethod):
    """One bit-width for each layer, more for layers that score as sensitive; rounding to the nearest.

    Scorers: ``cmpq``, 1 - the mean canonical correlation of a layer's mean states with those of the others; ``pmpq``, the loss that
    pruning ``probe_sparsity`` of each of its parameters costs; ``tdmpq``, how much noise on its parameters moves the loss. Controls:
    ``random`` scores, ``uniform`` ones, and ``alone``, the loss that quantising nothing but the layer costs. ``clusters`` is the
    paper's allocation: three groups of scores get the three widths of the menu, whatever the mean. ``dp`` meets ``bits`` instead, by
    the least sum of score·weights·4^-width, exactly. 16 keeps a layer's weights as they are. Use it to ask whether a cheap score
    can replace a search (``evopress``) for mixed precision.

    Our choices, where paper and code leave it open: the finite form of TDMPQ (the code reports the perturbed loss itself, of noise on
    one tensor); scores counted from the least, at least a thousandth of their range, in ``dp``; clusters solved exactly and ordered by
    their scores, which the code does not; padding stays out of mean states, and principal components, one for ten samples, stand
    for them.
    """

    paper: ClassVar[str] = "arXiv 2412.03599"
    calibrates: ClassVar[bool] = True

    bits: Annotated[float, Knob(low=2.0, high=16.0, ratio=True, unit="bits", doc="mean width that dp may spend, grids left out; clusters spend what they spend")] = 4.0  # fmt: skip
    scorer: Annotated[str, Knob(choices=SCORERS, doc="what tells how sensitive a layer is")] = CMPQ
    allocation: Annotated[str, Knob(choices=(DP, CLUSTERS), doc="meet a mean width, or one width for each of three groups, as in the paper")] = DP  # fmt: skip
    menu: Annotated[str, Knob(choices=tuple(MENUS), doc="widths that layers may have")] = "8/4/2"
    group: Annotated[int, Knob(low=0, high=65536, unit="weights", doc="of a row that share a grid; 0: one grid per matrix, as in the paper")] = 0  # fmt: skip
    probe_sparsity: Annotated[float, Knob(low=0.0, high=0.95, doc="that pmpq tries")] = 0.3
    sigma: Annotated[float, Knob(low=1e-4, high=1.0, log=True, doc="of the noise of tdmpq, over the root mean square of each parameter")] = 0.1  # fmt: skip
    draws: Annotated[int, Knob(low=1, high=64, doc="of that noise")] = 4
    n_calib: Annotated[int, Knob(low=1, high=100_000, log=True, unit="examples", doc="training examples to score on; cmpq wants ten times as many as it has components")] = 128  # fmt: skip

    @classmethod
    def identity(cls, info: ModelInfo) -> CptQuant:
        """All layers at 16 bits."""
        return cls(bits=16.0, menu="16/8/4", scorer=UNIFORM)

    @classmethod
    def probe(cls) -> WeightProbe:
        """What belongs to one scorer, and the menu, which a layer alone shows at another mean."""
        from isoflop.methods.weights.probe import WeightProbe

        return WeightProbe(
            tried={
                "menu": [{"menu": menu, "bits": 8.0} for menu in ("8/4/2", "4/3/2")],
                "probe_sparsity": [{"scorer": PMPQ, "probe_sparsity": share} for share in (0.1, 0.6)],
                "sigma": [{"scorer": TDMPQ, "sigma": sigma} for sigma in (0.01, 1.0)],
                "draws": [{"scorer": TDMPQ, "draws": draws} for draws in (1, 2)],
            }
        )

    @property
    def widths(self) -> tuple[int, ...]:
        """The menu, the most bits first."""
        return MENUS[self.menu]

    def axes(self, info: ModelInfo) -> Axes:
        """The mean width, where it is planned."""
        if self.allocation == CLUSTERS:
            return Axes()
        bits = min(self.bits, float(self.widths[0]))
        return Axes(bits=bits, ratio=info.dense_bits / bits)

    def check(self, info: ModelInfo) -> None:
        """Refuse means below the menu, clusters of equal scores, and losses where there are none."""
        super().check(info)
        if self.allocation == DP and self.bits < self.widths[-1]:
            raise Infeasible(
                f"method cptquant: bits = {self.bits:g} is less than the narrowest of menu = {self.menu}; "
                f"allowed: bits from {self.widths[-1]}, or another menu"
            )
        if self.allocation == CLUSTERS and self.scorer == UNIFORM:
            raise Infeasible(
                f"method cptquant: scorer = {UNIFORM} tells no layers apart for allocation = {CLUSTERS}; allowed: {DP}"
            )
        if self.scorer in (PMPQ, TDMPQ, ALONE):
            info.check_loss(f"method cptquant with scorer = {self.scorer}")

    def relevant(self) -> CptQuant:
        """What the scores depend on, all other knobs at their defaults."""
        kept = {"scorer", *_MEASURED.get(self.scorer, ())}
        return self.at_defaults(*(name for name in knob_specs(type(self)) if name not in kept))

    def calibration_knobs(self) -> dict[str, Any]:
        """Those that the scores depend on."""
        return self.relevant().knobs()

    def prepare(
        self, info: ModelInfo, weights: Stage | None, seed: int, trained_with: tuple[Method, ...] = ()
    ) -> Stage | None:
        """The stage with the scores, the same for every menu and mean."""
        self.check(info)
        return SensitivityStage(**OnModel.source(info, weights, seed, trained_with), method=self.relevant())

    def calibrate(self, model: Model, ctx: StageContext, seed: int) -> Sensitivity:
        """What the stage computes, on a loaded model."""
        views = linear_views(model)
        if self.scorer == UNIFORM:
            return Sensitivity(dict.fromkeys(blocks_of(views), 1.0))
        if self.scorer == RANDOM:
            rng = np.random.default_rng(derive_seed("cptquant scores", seed))
            return Sensitivity({layer: float(rng.random()) for layer in blocks_of(views)})
        batches = list(model.calibration(ctx, self.n_calib, calibration_seed(seed)))
        if self.scorer == CMPQ:
            return Sensitivity(correlation_scores(model, views, batches))
        if self.scorer == PMPQ:
            return Sensitivity(pruning_scores(model, views, batches, self.probe_sparsity))
        if self.scorer == TDMPQ:
            return Sensitivity(perturbation_scores(model, views, batches, self.sigma, self.draws, seed))
        narrow = self.widths[-1]
        return Sensitivity(alone_scores(model, views, batches, lambda weight_OI: self.encode(weight_OI, narrow)))

    def allocated(self, scores: Mapping[int, float], sizes: Mapping[int, int]) -> dict[int, int]:
        """The width of each layer.

        Args:
            sizes: weights of each layer's matrices.
        """
        layers = list(scores)
        if self.allocation == CLUSTERS:
            groups = in_groups([scores[layer] for layer in layers], len(self.widths))
            return {layer: self.widths[group] for layer, group in zip(layers, groups, strict=True)}
        least = min(0.0, *scores.values())
        floor = LEAST_SHARE * (max(scores.values()) - least) or 1.0
        costs = [[float(sizes[layer] * width) for width in self.widths] for layer in layers]
        losses = [
            [(scores[layer] - least + floor) * sizes[layer] * 4.0**-width for width in self.widths] for layer in layers
        ]
        choice = allocate(costs, losses, self.bits * sum(sizes.values())).choice
        return {layer: self.widths[option] for layer, option in zip(layers, choice, strict=True)}

    def encode(self, weight_OI: Tensor, width: int) -> Payload:
        """A matrix in so many bits."""
        if width == 16:
            return DensePayload.of(weight_OI)
        if not self.group:
            return TensorGridPayload.round(weight_OI, width)
        return GridPayload.round(weight_OI, width, self.group)

    def served(self, model: Model, views: list[LinearView], prepared: Any) -> Served:
        """Each layer at its width."""
        if not isinstance(prepared, Sensitivity):
            raise ValueError("method cptquant is calibrated: apply() needs the value of its prepare() stage")
        sizes = dict.fromkeys(prepared.scores, 0)
        for view in views:
            sizes[view.layer] += view.numel
        widths = self.allocated(prepared.scores, sizes)
        artefact = Artefact({view.name: self.encode(view.weight(), widths[view.layer]) for view in views})
        return (lambda view: artefact[view.name]), {}

    def trace(self, prepared: Any) -> Mapping[str, Sequence[float]]:
        """``sensitivity`` by layer."""
        return {"sensitivity": list(prepared.scores.values())} if isinstance(prepared, Sensitivity) else {}


@dataclass(frozen=True)
class SensitivityStage(OnModel):
    """How sensitive a model's layers are."""

    kind: ClassVar[str] = "layer-sensitivity"

    method: CptQuant

    def compute(self, ctx: StageContext, folder: Path) -> None:
        """Score every layer."""
        with self.model(ctx) as model:
            self.method.calibrate(model, ctx, self.seed).save(folder)

    def load(self, ctx: StageContext, folder: Path) -> Sensitivity:
        """The scores."""
        return Sensitivity.load(folder)
