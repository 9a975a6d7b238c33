"""QuaRot: rounding in a rotated basis, where no weight stands out (arXiv 2404.00456; the rotations of SpinQuant, arXiv 2405.16406).

Shape suffixes: O outputs (rows), I inputs (columns).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar

from torch import Tensor

from isoflop.core.knobs import Knob
from isoflop.core.stage import StageContext
from isoflop.methods.base import METHODS, Axes
from isoflop.methods.weights.artefact import Artefact, Serving
from isoflop.methods.weights.base import MatrixCodecMethod
from isoflop.methods.weights.folding import FOLD_EXAMPLES
from isoflop.methods.weights.gptq import Gptq
from isoflop.methods.weights.payloads import DensePayload, Payload
from isoflop.methods.weights.rotation import (
    HADAMARD,
    RANDOM_HADAMARD,
    ROTATIONS,
    WRITERS,
    RotatedPayload,
    plan_turning,
    rotation_of,
)
from isoflop.methods.weights.rtn import BITS, RoundToNearest
from isoflop.methods.weights.scaling import FoldingMethod
from isoflop.methods.weights.statistics import Statistics, ViewStats
from isoflop.methods.weights.views import LinearView, linear_views
from isoflop.models.base import Model, ModelInfo
from isoflop.models.hooks.matrices import MATRICES
from isoflop.models.hooks.occupant import Occupant

RTN, GPTQ = "rtn", "gptq"


class RotatedServing(Serving):
    """Serves rotated payloads, and knows what is turned while the model runs."""

    def __init__(self, views: list[LinearView], artefact: Artefact) -> None:
        super().__init__(views, lambda view: artefact[view.name], artefact.vectors)
        found = [(view, artefact[view.name]) for view in views]
        self.rotated = [(view, payload) for view, payload in found if isinstance(payload, RotatedPayload)]

    def online_flops(self, model: Model) -> float:
        """Per token. Where the head is tied to the embedding, the turned stream is turned back before the last norm."""
        total = sum(payload.online for _, payload in self.rotated)
        streams = (
            payload.out.flops(view.rows) for view, payload in self.rotated if view.role in WRITERS and payload.out
        )
        sides = [getattr(model.module, f"get_{side}_embeddings", lambda: None)() for side in ("output", "input")]
        tied = getattr(sides[0], "weight", 0) is getattr(sides[1], "weight", 1)
        return total + (next(streams, 0.0) if tied else 0.0)


@METHODS.register("quarot")
@dataclass(frozen=True)
class QuaRot(FoldingMethod):
    """Matrices are turned by orthogonal rotations before they are rounded, which spreads outliers over all weights of a row.

    The stream between layers is turned by one rotation, values per head by another, both within the weights and for nothing; scales of
    norms go into the matrices first. Inputs of down_proj, behind the activation, are turned while the model runs, by a fast Hadamard
    transform; ``online_flops`` counts it. Where the stream cannot be turned (GPT-2's norms take off means, norms behind a block's
    output, mixtures of experts) every input is turned while running. Rounding is GPTQ's or to the nearest. Stored bits are those
    of ``rtn``. Use it where single channels are large; on smooth weights it changes little.

    Weights only: activations and cache keep their precision (``quarot-kv`` rotates the cache). Not as released: grids are those of
    ``rtn``; heads are turned each by itself, where the release also mixes heads while running; widths without a known Hadamard matrix
    are turned in blocks; SpinQuant's rotations are learned, here they are drawn.
    """

    paper: ClassVar[str] = "arXiv 2404.00456"

    bits: Annotated[int, Knob(choices=BITS, ratio=True, unit="bits", doc="per weight; 16 leaves weights as they are")] = 4  # fmt: skip
    group: Annotated[int, Knob(low=8, high=65536, log=True, unit="weights", doc="of a row that share a grid")] = 128
    rounding: Annotated[str, Knob(choices=(GPTQ, RTN), doc="with error feedback, or to the nearest")] = GPTQ
    rotation: Annotated[str, Knob(choices=ROTATIONS, doc="of stream and heads: Hadamard's with random signs, without, or any orthogonal one")] = RANDOM_HADAMARD  # fmt: skip
    damp: Annotated[float, Knob(low=1e-6, high=1.0, log=True, doc="added to the Hessian's diagonal, relative to its mean")] = 0.01  # fmt: skip

    @classmethod
    def identity(cls, info: ModelInfo) -> QuaRot:
        """16 bits."""
        return cls(bits=16)

    def relevant(self) -> QuaRot:
        """At 16 bits nothing is turned; rounding to the nearest needs no Hessian."""
        if self.bits == 16:
            return self.at_defaults("group", "rounding", "rotation", "damp", "n_calib")
        return self if self.rounding == GPTQ else self.at_defaults("damp", "n_calib")

    def axes(self, info: ModelInfo) -> Axes:
        """Bits per weight, grids left out."""
        return Axes(bits=float(self.bits), ratio=info.dense_bits / self.bits)

    @property
    def rounder(self) -> MatrixCodecMethod:
        """What encodes turned matrices."""
        if self.rounding == RTN:
            return RoundToNearest(bits=self.bits, group=self.group)
        return Gptq(bits=self.bits, group=self.group, damp=self.damp, n_calib=self.n_calib)

    def encode(self, weight_OI: Tensor, stats: ViewStats | None = None) -> Payload:
        """A matrix by itself, its inputs turned."""
        if self.bits == 16:
            return DensePayload.of(weight_OI)
        assert stats is not None
        into = rotation_of(HADAMARD, weight_OI.shape[1], 0)
        turned = replace(stats, hessian_II=into.turn(into.turn(stats.hessian_II).T), _curvatures={})
        inner = self.rounder.encode(into.turn(weight_OI.float()), turned)
        return RotatedPayload(inner.shape, inner, into, None, into.flops(weight_OI.shape[1]))

    def encode_folded(self, model: Model, ctx: StageContext, statistics: Statistics, seed: int) -> Artefact:
        """Every view, turned as ``plan_turning`` says."""
        if self.bits == 16:
            return self.encode_model(model, statistics)
        views = linear_views(model)
        batch = next(iter(model.calibration(ctx, FOLD_EXAMPLES, seed)))
        turning = plan_turning(model, views, statistics.owner, batch, self.rotation, seed)
        payloads: dict[str, Payload] = {}
        owner, turned = "", None
        for view, stats in statistics.each(views):
            if turned is None or statistics.owner[view.name] != owner:  # views with a common input are turned alike
                owner = statistics.owner[view.name]
                turned = replace(stats, hessian_II=turning.hessian(view, stats.hessian_II), _curvatures={})
            inner = self.rounder.encode(turning.turned(view), turned)
            into, out = turning.into.get(view.name), turning.out.get(view.name)
            payloads[view.name] = RotatedPayload(inner.shape, inner, into, out, turning.online.get(view.name, 0.0))
        return Artefact(payloads, turning.folding.vectors)

    def occupants(self, model: Model, prepared: Any) -> dict[Any, Occupant]:
        """The rotated matrices, served."""
        if not isinstance(prepared, Artefact):
            raise ValueError("method quarot is calibrated: apply() needs the value of its prepare() stage")
        return {MATRICES: RotatedServing(linear_views(model), prepared)}

    def footprint(self, model: Model, ctx: StageContext) -> dict[str, float]:
        """Also ``online_flops``: per token, of turning activations while the model runs."""
        serving = model.occupant(MATRICES)
        found = super().footprint(model, ctx)
        return {**found, "online_flops": serving.online_flops(model)} if isinstance(serving, RotatedServing) else found
