"""HQQ: half-quadratic quantisation, zero points that a few outliers do not pull (Badri and Shaji, 2023).

Shape suffixes: O outputs (rows), I inputs (columns), G groups of a row, W weights of a group.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

import torch
from torch import Tensor

from isoflop.core.knobs import Knob
from isoflop.methods.base import METHODS, Axes
from isoflop.methods.weights.base import MatrixCodecMethod
from isoflop.methods.weights.payloads import DensePayload, GridPayload, Payload
from isoflop.methods.weights.rtn import BITS
from isoflop.methods.weights.statistics import ViewStats
from isoflop.models.base import ModelInfo

if TYPE_CHECKING:
    from isoflop.methods.weights.probe import WeightProbe

LEAST_RANGE, LARGEST_INVERSE = 1e-4, 2e4
"""Of the released code: narrower groups become constant, and steps are no finer than 1/20000."""


@dataclass(frozen=True)
class HalfQuadratic:
    """The solver: min over z of |W - s·(Q - z)|_p with Q = round(W/s + z), p below 1, the steps s fixed.

    An auxiliary error E takes turns with z: E is the error W - W' shrunk by |.|^(p-1)/β, in which only outliers survive, and z the
    mean over a group of Q - (W - E)/s; then β grows by κ.

    Attributes:
        p, beta, kappa: of the loss and the penalty.
        iters: turns, at most; they end where the mean absolute error of the matrix grows.
        official: z as the released code keeps it, which is one turn behind the best, and its limits on narrow groups.
    """

    bits: int
    p: float
    beta: float
    kappa: float
    iters: int
    official: bool

    @torch.no_grad()
    def fit(self, weight_OI: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor]:
        """(codes_OI, step_OG, zero_OG) with weights ``step · (code - zero)``; min-max grids where there are no turns.

        Args:
            weight_OI: float32.
            group: weights of a row that share a grid; the last group of a row may be shorter.
        """
        cols = weight_OI.shape[1]
        group = min(group, cols)
        value = torch.nn.functional.pad(weight_OI, (0, -cols % group), mode="replicate").unflatten(1, (-1, group))
        within = torch.arange(value.shape[1] * group, device=value.device).view(-1, group) < cols
        share_GW = within / within.sum(1, keepdim=True)
        inverse, zero = self._spanning(value)
        kept, best, beta = zero, torch.inf, self.beta
        for turn in range(self.iters + 1):
            codes = self._codes(value, inverse, zero)
            error = value - (codes - zero) / inverse
            mean = float((error.abs() * within).mean())
            worse = not mean < best
            if not worse:
                kept, best = zero, mean
            if turn == self.iters or (worse and not self.official):
                break
            zero = self._turned(value, error, codes, inverse, share_GW, beta)
            beta *= self.kappa
            if worse:
                break
        kept = zero if self.official else kept
        codes = self._codes(value, inverse, kept).to(torch.uint8).flatten(1)[:, :cols]
        return codes, 1 / inverse.squeeze(-1), kept.squeeze(-1)

    def _spanning(self, value_OGW: Tensor) -> tuple[Tensor, Tensor]:
        """1/s and z of grids from the least to the largest weight."""
        low, high = value_OGW.aminmax(dim=-1, keepdim=True)
        width = high - low
        inverse = (2**self.bits - 1) / width
        inverse = inverse.masked_fill(width <= (LEAST_RANGE if self.official else 0), 1.0)
        if self.official:
            inverse = inverse.clamp(max=LARGEST_INVERSE)
        return inverse, -low * inverse

    def _codes(self, value: Tensor, inverse: Tensor, zero: Tensor) -> Tensor:
        return torch.round(value * inverse + zero).clamp_(0, 2**self.bits - 1)

    def _turned(
        self, value: Tensor, error: Tensor, codes: Tensor, inverse: Tensor, share_GW: Tensor, beta: float
    ) -> Tensor:
        size = error.abs()
        outlier = (size - size ** (self.p - 1) / beta).clamp_(min=0) * error.sign()
        return ((codes - (value - outlier) * inverse) * share_GW).sum(-1, keepdim=True)


@METHODS.register("hqq")
@dataclass(frozen=True)
class Hqq(MatrixCodecMethod):
    """The grids of ``rtn`` with zero points that minimise a p-norm of the error below 1, in which outliers weigh little.

    No calibration: each matrix is solved by itself in a few turns that are closed forms, in about the time of a few roundings.
    Steps stay those of the min-max grid. Most of its gain over ``rtn`` shows at 2 and 3 bits. Stored bits per weight are those of
    ``rtn``: ``bits + 32/group``.

    At the released ``beta`` only errors above .17 are outliers, which weights of ordinary size never reach: z then is the plain mean
    of Q - W/s, and ``lp_norm`` changes nothing. From about 1000 on it does.

    The default keeps the zero points of least error, and steps as fine as weights ask for; ``official`` is the released code on the
    CPU. Groups lie along the inputs (``axis=1`` of the release; its groups across outputs are not offered), and end with a row.
    """

    paper: ClassVar[str] = "https://mobiusml.github.io/hqq_blog"

    bits: Annotated[int, Knob(choices=BITS, ratio=True, unit="bits", doc="per weight; 16 leaves weights as they are")] = 4  # fmt: skip
    group: Annotated[int, Knob(low=8, high=65536, log=True, unit="weights", doc="of a row that share a grid")] = 64
    lp_norm: Annotated[float, Knob(low=0.1, high=1.0, doc="p of the norm of the error; 1 tells outliers from others least")] = 0.7  # fmt: skip
    beta: Annotated[float, Knob(low=0.1, high=1e4, log=True, doc="weight of the penalty at first; errors below β^(-1/(2-p)) are no outliers")] = 10.0  # fmt: skip
    kappa: Annotated[float, Knob(low=1.0, high=2.0, doc="factor of the penalty's weight from turn to turn")] = 1.01
    iters: Annotated[int, Knob(low=0, high=200, unit="turns", doc="at most; 0 is a min-max grid")] = 20
    official: Annotated[bool, Knob(doc="stop one turn late, and limit narrow groups, as the released code does")] = False  # fmt: skip

    @classmethod
    def identity(cls, info: ModelInfo) -> Hqq:
        """16 bits."""
        return cls(bits=16)

    @classmethod
    def probe(cls) -> WeightProbe:
        """The norm matters where some errors are outliers."""
        from isoflop.methods.weights.probe import WeightProbe

        return WeightProbe(tried={"lp_norm": [{"lp_norm": p, "beta": 1e3} for p in (0.7, 1.0)]})

    def axes(self, info: ModelInfo) -> Axes:
        """Bits per weight, grids left out."""
        return Axes(bits=float(self.bits), ratio=info.dense_bits / self.bits)

    def encode(self, weight_OI: Tensor, stats: ViewStats | None = None) -> Payload:
        """Codes and grids."""
        if self.bits == 16:
            return DensePayload.of(weight_OI)
        solver = HalfQuadratic(self.bits, self.lp_norm, self.beta, self.kappa, self.iters, self.official)
        codes_OI, step_OG, zero_OG = solver.fit(weight_OI.float(), self.group)
        low_OG = -zero_OG * step_OG
        return GridPayload.of_codes(codes_OI, step_OG.half(), low_OG.half(), self.bits, self.group)
