"""NormalFloat as QLoRA stores the weights it trains on (arXiv 2305.14314)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from torch import Tensor

from isoflop.core.knobs import Knob
from isoflop.methods.base import METHODS, Axes
from isoflop.methods.weights.base import MatrixCodecMethod
from isoflop.methods.weights.normal_float import NormalFloatPayload
from isoflop.methods.weights.payloads import DensePayload, Payload
from isoflop.methods.weights.statistics import ViewStats
from isoflop.models.base import ModelInfo

BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)


@METHODS.register("nf4")
@dataclass(frozen=True)
class Nf4(MatrixCodecMethod):
    """Weights become the nearest of 16 quantiles of a normal distribution, times the largest magnitude of their block.

    What 4-bit loading in the Hugging Face libraries does: no calibration, no fitted grid, 0 is exact. Weights of a block are
    neighbours in row-major order, also across the ends of rows. Stored bits per weight: ``bits + 8/block + 32/(256·block)``, 4.127
    at the defaults of the paper, and ``bits + 32/block`` without double quantisation. Use it where nothing may be calibrated,
    and compare it with ``gptq`` at equal bytes where something may.

    Our choices: the 8-bit float of the second quantisation, which the paper leaves open, is the dynamic type of the released code;
    2 and 3 bits follow the table's formula with fewer quantiles; GPT-2's transposed matrices are taken as outputs by inputs.
    """

    paper: ClassVar[str] = "arXiv 2305.14314"

    bits: Annotated[int, Knob(choices=(2, 3, 4, 16), ratio=True, unit="bits", doc="per weight, 4 in the paper; 16 leaves weights as they are")] = 4  # fmt: skip
    block: Annotated[int, Knob(choices=BLOCKS, unit="weights", doc="that share a scale; smaller ones follow outliers closer and cost more")] = 64  # fmt: skip
    double_quant: Annotated[bool, Knob(doc="scales in 8 bits, in blocks of 256 with their own; false: in float32")] = True  # fmt: skip

    @classmethod
    def identity(cls, info: ModelInfo) -> Nf4:
        """16 bits."""
        return cls(bits=16)

    def axes(self, info: ModelInfo) -> Axes:
        """Bits per weight, scales left out."""
        return Axes(bits=float(self.bits), ratio=info.dense_bits / self.bits)

    def encode(self, weight_OI: Tensor, stats: ViewStats | None = None) -> Payload:
        """Codes and scales."""
        if self.bits == 16:
            return DensePayload.of(weight_OI)
        return NormalFloatPayload.of(weight_OI, self.bits, self.block, self.double_quant)
