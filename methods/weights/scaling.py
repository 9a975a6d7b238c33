"""Methods that scale input channels before they round: what they share (AWQ, SmoothQuant).

Scales are folded into what computes the inputs where that works, see :mod:`isoflop.methods.weights.folding`; elsewhere they are
stored, 2 bytes per input channel, and divided by.

Shape suffixes: O outputs (rows), I inputs (columns).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from isoflop.core.stage import Stage, StageContext
from isoflop.methods.base import Method
from isoflop.methods.calibration import OnModel
from isoflop.methods.weights.artefact import Artefact
from isoflop.methods.weights.base import ArtefactStage, CalibratedMethod
from isoflop.methods.weights.folding import FOLD_EXAMPLES, fold_scales
from isoflop.methods.weights.payloads import PAYLOADS, Payload
from isoflop.methods.weights.statistics import CalibrationStage, Statistics, ViewStats, calibration_seed, collect
from isoflop.methods.weights.views import LinearView, linear_views
from isoflop.models.base import Model, ModelInfo


@dataclass(frozen=True, eq=False)
class ScaledPayload(Payload):
    """A payload of the matrix times s, and s: 2 bytes per input channel more.

    Attributes:
        inner: of the scaled matrix.
        divisor_I: float16; input channels are divided by it after decoding.
    """

    kind: ClassVar[str] = "scaled"
    inner: Payload
    divisor_I: Tensor

    @classmethod
    def of(cls, inner: Payload, divisor_I: Tensor) -> Payload:
        """``inner`` alone where s is 1 everywhere."""
        return inner if bool((divisor_I == 1).all()) else cls(inner.shape, inner, divisor_I)

    def tensors(self) -> dict[str, Tensor]:
        """Those of the inner payload, and the divisor."""
        return {**self.inner.tensors(), "divisor": self.divisor_I}

    def settings(self) -> dict[str, Any]:
        """Kind and settings of the inner payload."""
        return {**super().settings(), "inner": self.inner.kind, "settings": self.inner.settings()}

    @classmethod
    def restore(cls, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ScaledPayload:
        """The inverse of ``settings`` and ``tensors``."""
        inner = {name: t for name, t in tensors.items() if name != "divisor"}
        found = PAYLOADS[settings["inner"]].restore(settings["settings"], inner)
        return cls(found.shape, found, tensors["divisor"])

    def decode(self) -> Tensor:
        """The matrix itself."""
        return self.inner.decode() / self.divisor_I.float()


@dataclass(frozen=True)
class FoldingMethod(CalibratedMethod):
    """Base class of methods that change a model to another one that computes the same before they encode its matrices."""

    @abstractmethod
    def encode_folded(self, model: Model, ctx: StageContext, statistics: Statistics, seed: int) -> Artefact:
        """Every view as stored, and the vectors outside the views that change with them.

        Args:
            statistics: of the model as it is.
            seed: of the calibration examples.
        """

    def prepare(
        self, info: ModelInfo, weights: Stage | None, seed: int, trained_with: tuple[Method, ...] = ()
    ) -> Stage | None:
        """The stage with the encoded matrices."""
        self.check(info)
        source = OnModel.source(info, weights, seed, trained_with)
        relevant = self.relevant()
        calibration = CalibrationStage(**source, n_calib=relevant.n_calib, sizes=True)
        return FoldedStage(**source, method=relevant, calibration=calibration)

    @torch.no_grad()
    def calibrate(self, model: Model, ctx: StageContext, seed: int) -> Artefact:
        """What the stage computes, on a loaded model."""
        examples = calibration_seed(seed)
        return self.encode_folded(model, ctx, collect(model, ctx, self.n_calib, examples), examples)


@dataclass(frozen=True)
class ScalingMethod(FoldingMethod):
    """Base class of methods that scale input channels, all matrices with a common input alike, and then encode."""

    @abstractmethod
    def scales(self, weights: Sequence[Tensor], stats: ViewStats) -> Tensor:
        """s_I of matrices that read the same input, on the float16 grid (``as_stored``), in float32.

        Args:
            weights: (O, I) each.
        """

    @abstractmethod
    def encode_scaled(self, weight_OI: Tensor, stats: ViewStats, role: str = "") -> Payload:
        """The stored form of a matrix that is scaled already.

        Args:
            stats: of the inputs over s.
            role: of the view.
        """

    @property
    def scales_nothing(self) -> bool:
        """Whether matrices stay as they are."""
        return False

    def encode(self, weight_OI: Tensor, stats: ViewStats | None = None) -> Payload:
        """A matrix by itself, with its scales."""
        assert stats is not None
        if self.scales_nothing:
            return self.encode_scaled(weight_OI, stats)
        s_I = self.scales([weight_OI], stats)
        inner = self.encode_scaled(weight_OI.float() * s_I, over(stats, s_I))
        return ScaledPayload.of(inner, s_I.half())

    def encode_folded(self, model: Model, ctx: StageContext, statistics: Statistics, seed: int) -> Artefact:
        """Every view, its scales folded away where the model computes the same with them."""
        if self.scales_nothing:
            return self.encode_model(model, statistics)
        views = linear_views(model)
        batch = next(iter(model.calibration(ctx, FOLD_EXAMPLES, seed)))
        folding = fold_scales(model, views, self.model_scales(views, statistics), statistics.owner, batch)
        payloads = {}
        for view, stats in statistics.each(views):
            scaled = over(stats, folding.scales[view.name])
            payload = self.encode_scaled(folding.scaled(view), scaled, view.role)
            divisor_I = folding.divisor(view)
            payloads[view.name] = payload if divisor_I is None else ScaledPayload.of(payload, divisor_I)
        return Artefact(payloads, folding.vectors)

    @torch.no_grad()
    def model_scales(self, views: Sequence[LinearView], statistics: Statistics) -> dict[str, Tensor]:
        """s_I of every view by its name."""
        groups: dict[str, list[LinearView]] = {}
        for view in views:
            groups.setdefault(statistics.owner[view.name], []).append(view)
        found: dict[str, Tensor] = {}
        for members in groups.values():
            s_I = self.scales([view.weight() for view in members], statistics.of(members[0]))
            found |= {view.name: s_I.to(view.holder.device) for view in members}
        return found


@dataclass(frozen=True)
class FoldedStage(ArtefactStage):
    """A model's matrices as a ``FoldingMethod`` encodes them, and the vectors that change with them."""

    kind: ClassVar[str] = "folded-weight-artefact"

    @torch.no_grad()
    def compute(self, ctx: StageContext, folder: Path) -> None:
        """Fold and encode."""
        assert isinstance(self.method, FoldingMethod)
        with self.model(ctx) as model:
            found = self.method.encode_folded(model, ctx, ctx.get(self.calibration), calibration_seed(self.seed))
            found.save(folder)


def over(stats: ViewStats, s_I: Tensor) -> ViewStats:
    """Statistics of the inputs divided by s."""
    parts = (stats.norms_I, stats.scales_I, stats.means_I, stats.maxima_I)
    norms_I, scales_I, means_I, maxima_I = (None if part is None else part / s_I for part in parts)
    assert norms_I is not None
    assert scales_I is not None
    hessian_II = stats.hessian_II / (s_I[:, None] * s_I)
    return ViewStats(stats.tokens, hessian_II, norms_I, scales_I, means_I, maxima_I)
