"""NormalFloat: values at quantiles of a normal distribution, scaled block by block, as QLoRA stores weights (arXiv 2305.14314).

Weights are taken in row-major order, whatever the rows: a block of them shares its largest magnitude (absmax). With double
quantisation the absmax values are stored in 8 bits, less their mean, in blocks of 256 that again share theirs.

Float32 constants are kept as their bits in int32: they take 4 bytes, whatever ``dense_bits`` says of weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist
from typing import Any, ClassVar

import torch
from torch import Tensor

from isoflop.kernels.quant import pack_bits, unpack_bits
from isoflop.methods.weights.payloads import Payload

NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""Appendix E of the paper."""
COARSE_BLOCK = 256
"""Absmax values that share theirs."""
_TINY = 1e-38


@lru_cache
def normal_float(bits: int) -> tuple[float, ...]:
    """The ``2^bits`` values of NormalFloat, ascending from -1 to 1, 0 among them and one positive more than negative.

    Quantiles of N(0, 1) at equal steps from ½ to δ, 2^(bits-1) of them above 0 and one fewer below, over the largest. δ is halfway
    between the last midpoints of 2^bits and of 2^bits - 1 equal shares, which at 4 bits gives the published table.
    """
    if bits == 4:
        return NF4  # digits as published; the formula gives them within 2e-7
    return _quantiles(bits)


def _quantiles(bits: int) -> tuple[float, ...]:
    count, half = 2**bits, 2 ** (bits - 1)
    last = 1 - (1 / (2 * count) + 1 / (2 * (count - 1))) / 2
    above = [NormalDist().inv_cdf(0.5 + (last - 0.5) * (i / half)) for i in range(1, half + 1)]
    below = [-NormalDist().inv_cdf(0.5 + (last - 0.5) * (i / (half - 1))) for i in range(half - 1, 0, -1)]
    return tuple(x / above[-1] for x in (*below, 0.0, *above))


@lru_cache
def dynamic_8bit() -> tuple[float, ...]:
    """The signed 8-bit dynamic type of arXiv 1511.04561, in which the released code stores absmax values, ascending.

    A decimal exponent of 0 to -6, in unary, leaves 6 to 0 bits for the fraction, which counts linearly from .1 to 1; and 0 and 1.
    """
    found = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1)
        middles = ((edges[:-1] + edges[1:]) / 2 * 10.0 ** (i - 6)).tolist()
        found += [*middles, *(-x for x in middles)]
    return tuple(sorted(found))


@dataclass(frozen=True, eq=False)
class NormalFloatPayload(Payload):
    """Codes of NormalFloat, and the scales of their blocks: bits + 8/block + 32/(256·block) per weight, or bits + 32/block.

    Attributes:
        codes: packed, in row-major order; a matrix of n weights takes ⌈n·bits/8⌉ bytes.
        absmax: 8-bit codes of the blocks' absmax; without double quantisation the values themselves.
        coarse: of every 256 of these, and behind them their mean; None without double quantisation.
    """

    kind: ClassVar[str] = "normal-float"
    codes: Tensor
    absmax: Tensor
    coarse: Tensor | None
    bits: int
    block: int

    @classmethod
    def of(cls, weight_OI: Tensor, bits: int, block: int, double_quant: bool) -> NormalFloatPayload:
        """Round to the nearest values, between two equally near ones to the lower."""
        count = weight_OI.numel()
        blocks = _blocks(weight_OI.float().reshape(-1), block)
        largest = blocks.abs().amax(1)
        codes = _nearest(blocks / largest.clamp(min=_TINY)[:, None], normal_float(bits)).flatten()[:count]
        absmax, coarse = _double(largest) if double_quant else (largest.view(torch.int32), None)
        return cls((weight_OI.shape[0], weight_OI.shape[1]), pack_bits(codes, bits), absmax, coarse, bits, block)

    def tensors(self) -> dict[str, Tensor]:
        """Codes and scales."""
        coarse = {} if self.coarse is None else {"coarse": self.coarse}
        return {"codes": self.codes, "absmax": self.absmax, **coarse}

    def settings(self) -> dict[str, Any]:
        """Shape, bits and block."""
        return {**super().settings(), "bits": self.bits, "block": self.block}

    @classmethod
    def restore(cls, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> NormalFloatPayload:
        """The inverse of ``settings`` and ``tensors``."""
        rows, cols = settings["shape"]
        stored = (tensors["codes"], tensors["absmax"], tensors.get("coarse"))
        return cls((rows, cols), *stored, settings["bits"], settings["block"])

    def scales(self) -> Tensor:
        """The blocks' absmax as decoding sees them, float32."""
        if self.coarse is None:
            return self.absmax.view(torch.float32)
        coarse = self.coarse.view(torch.float32)
        fine = _table(dynamic_8bit(), coarse)[self.absmax.long()]
        return (_blocks(fine, COARSE_BLOCK) * coarse[:-1, None]).flatten()[: len(fine)] + coarse[-1]

    def decode(self) -> Tensor:
        """Values of the table times their block's absmax."""
        rows, cols = self.shape
        scales = self.scales()
        values = _table(normal_float(self.bits), scales)[unpack_bits(self.codes, self.bits, rows * cols).long()]
        return (_blocks(values, self.block) * scales[:, None]).flatten()[: rows * cols].view(rows, cols)


def _double(largest: Tensor) -> tuple[Tensor, Tensor]:
    """(codes, bits of the coarse scales and the mean) of absmax values."""
    mean = largest.mean()
    blocks = _blocks(largest - mean, COARSE_BLOCK)
    coarse = blocks.abs().amax(1)
    codes = _nearest(blocks / coarse.clamp(min=_TINY)[:, None], dynamic_8bit()).flatten()[: len(largest)]
    return codes, torch.cat((coarse, mean[None])).view(torch.int32)


def _blocks(x: Tensor, block: int) -> Tensor:
    """(blocks, block), the last one filled with zeros; a block is no longer than what there is."""
    block = min(block, len(x))
    return torch.nn.functional.pad(x, (0, -len(x) % block)).view(math.ceil(len(x) / block), block)


def _nearest(x: Tensor, table: tuple[float, ...]) -> Tensor:
    values = _table(table, x)
    return torch.bucketize(x, (values[1:] + values[:-1]) / 2).to(torch.uint8)


def _table(values: tuple[float, ...], like: Tensor) -> Tensor:
    return torch.tensor(values, device=like.device)
