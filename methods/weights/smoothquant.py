"""SmoothQuant: weights and activations in 8 bits, large activations made smaller at the weights' expense (arXiv 2211.10438).

Shape suffixes: O outputs (rows), I inputs (columns), G scales: one per row or one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor

from isoflop.core.errors import Infeasible
from isoflop.core.knobs import Knob
from isoflop.core.stage import StageContext
from isoflop.kernels.quant import pack_bits, unpack_bits
from isoflop.methods.base import METHODS, Axes
from isoflop.methods.weights.artefact import Artefact, Serving
from isoflop.methods.weights.folding import FOLD_EXAMPLES, as_stored, fold_scales, norms_feeding
from isoflop.methods.weights.payloads import PAYLOADS, DensePayload, Payload
from isoflop.methods.weights.scaling import ScaledPayload, ScalingMethod, over
from isoflop.methods.weights.statistics import Statistics, ViewStats
from isoflop.methods.weights.views import LinearView, linear_views
from isoflop.models.base import Model, ModelInfo
from isoflop.models.hooks.experts import EXPERTS
from isoflop.models.hooks.matrices import MATRICES
from isoflop.models.hooks.occupant import Occupant
from isoflop.models.taps import ActivationTap

TENSOR, CHANNEL, TOKEN = "tensor", "channel", "token"
BITS = (4, 5, 6, 7, 8, 16)
LEAST = 1e-5
"""Below which magnitudes and scales count as this, as in the released code."""


def on_steps(x: Tensor, step: Tensor, bits: int) -> Tensor:
    """The whole numbers of steps, within ±(2^(bits-1) - 1), nearest to x; halves to even."""
    most = 2 ** (bits - 1) - 1
    return (x / step).round().clamp(-most, most)


@dataclass(frozen=True, eq=False)
class SymmetricPayload(Payload):
    """Codes on grids as wide below 0 as above: bits per weight, and 2 bytes for each scale.

    Attributes:
        codes: packed by row, counted from -2^(bits-1).
        scale_G: float16 steps, one per row or one for all.
    """

    kind: ClassVar[str] = "symmetric"
    codes: Tensor
    scale_G: Tensor
    bits: int

    @classmethod
    def round(cls, weight_OI: Tensor, bits: int, by_row: bool) -> SymmetricPayload:
        """The largest magnitude, of each row or of all, over 2^(bits-1) - 1 is a step."""
        size = weight_OI.float().abs()
        largest_G = size.amax(1) if by_row else size.amax()[None]
        step_G = (largest_G.clamp(min=LEAST) / (2 ** (bits - 1) - 1)).half()
        codes_OI = on_steps(weight_OI.float(), step_G.float()[:, None], bits) + 2 ** (bits - 1)
        packed = pack_bits(codes_OI.to(torch.uint8), bits)
        return cls((weight_OI.shape[0], weight_OI.shape[1]), packed, step_G, bits)

    def tensors(self) -> dict[str, Tensor]:
        """Codes and scales."""
        return {"codes": self.codes, "scale": self.scale_G}

    def settings(self) -> dict[str, Any]:
        """Shape and bits."""
        return {**super().settings(), "bits": self.bits}

    @classmethod
    def restore(cls, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> SymmetricPayload:
        """The inverse of ``settings`` and ``tensors``."""
        rows, cols = settings["shape"]
        return cls((rows, cols), tensors["codes"], tensors["scale"], settings["bits"])

    @property
    def whole_OI(self) -> Tensor:
        """Weights in steps: whole numbers, float32."""
        return unpack_bits(self.codes, self.bits, self.shape[1]).float() - 2 ** (self.bits - 1)

    def decode(self) -> Tensor:
        """Values on the grids."""
        return self.whole_OI * self.scale_G.float()[:, None]


@dataclass(frozen=True, eq=False)
class StaticInputPayload(Payload):
    """A payload, and the step of its inputs, which was fitted before: 2 bytes more.

    Attributes:
        step: float16, (1,).
    """

    kind: ClassVar[str] = "static-input"
    inner: Payload
    step: Tensor

    def tensors(self) -> dict[str, Tensor]:
        """Those of the inner payload, and the step."""
        return {**self.inner.tensors(), "step": self.step}

    def settings(self) -> dict[str, Any]:
        """Kind and settings of the inner payload."""
        return {**super().settings(), "inner": self.inner.kind, "settings": self.inner.settings()}

    @classmethod
    def restore(cls, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> StaticInputPayload:
        """The inverse of ``settings`` and ``tensors``."""
        inner = PAYLOADS[settings["inner"]].restore(settings["settings"], tensors)
        return cls(inner.shape, inner, tensors["step"])

    def decode(self) -> Tensor:
        """The matrix."""
        return self.inner.decode()


class SmoothServing(Serving):
    """Serves the matrices, and rounds what enters them.

    Args:
        bits: of the inputs; 16 leaves them as they are.
    """

    def __init__(self, views: list[LinearView], artefact: Artefact, bits: int) -> None:
        super().__init__(views, lambda view: artefact[view.name], artefact.vectors)
        self._artefact, self._bits = artefact, bits

    @contextmanager
    def at_work(self, model: Model) -> Iterator[None]:
        """The decoded matrices in the parameters' place, and their inputs on grids."""
        with ExitStack() as stack:
            stack.enter_context(super().at_work(model))
            if self._bits < 16:
                for view in self.views:
                    tap = ActivationTap(view.module)
                    stack.enter_context(tap.through(input_rounding(self._artefact[view.name], self._bits)))
            yield


def input_rounding(payload: Payload, bits: int) -> Callable[[Tensor], Tensor]:
    """What a matrix' input becomes: on the steps of each token, or on those that were fitted before; x/s where the matrix divides."""
    step = payload.step.float() if isinstance(payload, StaticInputPayload) else None
    inner = payload.inner if isinstance(payload, StaticInputPayload) else payload
    divisor_I = inner.divisor_I.float() if isinstance(inner, ScaledPayload) else None

    def rounded(x: Tensor) -> Tensor:
        values = x.float() if divisor_I is None else x.float() / divisor_I.to(x.device)
        steps = values.abs().amax(-1, keepdim=True).clamp(min=LEAST) / (2 ** (bits - 1) - 1) if step is None else step
        steps = steps.to(x.device)
        values = on_steps(values, steps, bits) * steps
        found = (values if divisor_I is None else values * divisor_I.to(x.device)).to(x.dtype)
        return _Straight.apply(x, found) if torch.is_grad_enabled() and x.requires_grad else found

    return rounded


class _Straight(torch.autograd.Function):
    """Gradients pass rounding as if it were not there (arXiv 1308.3432), for what learns in front of it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rounded: Tensor) -> Tensor:
        return rounded.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


@METHODS.register("smoothquant")
@dataclass(frozen=True)
class SmoothQuant(ScalingMethod):
    """Weights and the activations that enter them in 8 bits, where outlying channels of activations are first made smaller.

    Channels that a norm feeds are divided by s = max|x|^α / max|w|^(1-α), and the weights multiplied: activations become easy to
    round, weights harder, α says how much of each (equation 4). 1/s goes into the norm and costs nothing. Activations are rounded while
    the model runs, by token (O1 of the paper) or on one grid per matrix fitted on the calibration text (O3). Use it where integer
    arithmetic is wanted; for fewer bytes alone ``awq`` or ``gptq`` go lower.

    Stored bits per weight are ``bits``, and 16/cols for rows with grids of their own. Not rounded: queries, keys and values inside
    attention, which the paper rounds too. Grids per batch (O2) are not offered: an answer would depend on its neighbours.
    """

    paper: ClassVar[str] = "arXiv 2211.10438"

    bits: Annotated[int, Knob(choices=BITS, ratio=True, unit="bits", doc="per weight, 8 in the paper; 16 leaves weights as they are")] = 8  # fmt: skip
    act_bits: Annotated[int, Knob(choices=BITS, unit="bits", doc="per number that enters a matrix, while running; 16 leaves them as they are")] = 8  # fmt: skip
    alpha: Annotated[float, Knob(low=0.0, high=1.0, doc="how much of the difficulty goes to the weights; .5 in the paper, up to .9 for outliers that are large")] = 0.5  # fmt: skip
    weight_grid: Annotated[str, Knob(choices=(TENSOR, CHANNEL), doc="one per matrix, as in the paper, or one per row")] = TENSOR  # fmt: skip
    act_grid: Annotated[str, Knob(choices=(TOKEN, TENSOR), doc="of activations: per token while running, or one per matrix, fitted before")] = TOKEN  # fmt: skip

    @classmethod
    def identity(cls, info: ModelInfo) -> SmoothQuant:
        """Weights and activations in 16 bits."""
        return cls(bits=16, act_bits=16)

    @property
    def scales_nothing(self) -> bool:
        """Where nothing is rounded."""
        return self.bits == self.act_bits == 16

    def relevant(self) -> SmoothQuant:
        """Rounding by token keeps nothing: one stage serves all its bits."""
        if self.scales_nothing:
            return self.at_defaults("alpha", "weight_grid", "act_grid", "n_calib")
        return self.at_defaults("act_bits") if self.act_grid == TOKEN and self.bits < 16 else self

    def axes(self, info: ModelInfo) -> Axes:
        """Bits per weight, scales left out."""
        return Axes(bits=float(self.bits), ratio=info.dense_bits / self.bits)

    def check(self, info: ModelInfo) -> None:
        """Refuse mixtures of experts: what enters an expert's second matrix is computed inside a kernel."""
        super().check(info)
        if EXPERTS in info.hooks and not self.scales_nothing:
            raise self._no_experts(info.ref)

    def scales(self, weights: Sequence[Tensor], stats: ViewStats) -> Tensor:
        """Equation 4, on the float16 grid; channels that nobody saw stay as they are."""
        assert stats.maxima_I is not None
        largest_I = torch.stack([weight_OI.float().abs().amax(0) for weight_OI in weights]).amax(0).clamp(min=LEAST)
        s_I = (stats.maxima_I.pow(self.alpha) / largest_I.pow(1 - self.alpha)).clamp(min=LEAST)
        return as_stored(s_I.masked_fill(stats.maxima_I == 0, 1.0)).clamp(min=LEAST)

    def encode_scaled(self, weight_OI: Tensor, stats: ViewStats, role: str = "") -> Payload:
        """Rounded to the nearest."""
        if self.bits == 16:
            return DensePayload.of(weight_OI)
        return SymmetricPayload.round(weight_OI, self.bits, self.weight_grid == CHANNEL)

    def encode_folded(self, model: Model, ctx: StageContext, statistics: Statistics, seed: int) -> Artefact:
        """Every view; only inputs that a norm gives are smoothed, as in the paper."""
        if self.scales_nothing:
            return self.encode_model(model, statistics)
        views = linear_views(model)
        if any(view.expert is not None for view in views):
            raise self._no_experts(model.info.ref)
        batch = next(iter(model.calibration(ctx, FOLD_EXAMPLES, seed)))
        norms = norms_feeding(model, views, batch)
        scales = self.model_scales(views, statistics)
        for view in views:
            if statistics.owner[view.name] not in norms:
                scales[view.name] = torch.ones_like(scales[view.name])
        folding = fold_scales(model, views, scales, statistics.owner, batch)
        payloads: dict[str, Payload] = {}
        for view, stats in statistics.each(views):
            inputs = over(stats, folding.scales[view.name])
            weight_OI = folding.scaled(view)
            payload = self.encode_scaled(weight_OI.to(view.weight().dtype) if self.bits == 16 else weight_OI, inputs)
            divisor_I = folding.divisor(view)
            payload = payload if divisor_I is None else ScaledPayload.of(payload, divisor_I)
            if self.act_grid == TENSOR and self.act_bits < 16:
                assert inputs.maxima_I is not None
                step = inputs.maxima_I.max().clamp(min=LEAST) / (2 ** (self.act_bits - 1) - 1)
                payload = StaticInputPayload(payload.shape, payload, step.clamp(min=2.0**-24).half()[None])
            payloads[view.name] = payload
        return Artefact(payloads, folding.vectors)

    def occupants(self, model: Model, prepared: Any) -> dict[Any, Occupant]:
        """The matrices, served, and what enters them, rounded."""
        if not isinstance(prepared, Artefact):
            raise ValueError("method smoothquant is calibrated: apply() needs the value of its prepare() stage")
        return {MATRICES: SmoothServing(linear_views(model), prepared, self.act_bits)}

    def _no_experts(self, ref: str) -> Infeasible:
        return Infeasible(
            f"method smoothquant: model {ref} is a mixture of experts, whose inner activations cannot be rounded; allowed: "
            "bits = 16 with act_bits = 16, dense models, or a method on weights alone"
        )
