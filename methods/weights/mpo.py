"""Matrix product operators: a matrix as a chain of small tensors, the bonds between which are cut to a dimension.

W of (o_1 … o_N) x (i_1 … i_N) is read as a tensor (o_1 i_1, …, o_N i_N); singular value decompositions from the left split off one
site after the other. All cores but the last have orthonormal columns, the singular values stay in the last.

Shape suffixes: O outputs (rows), I inputs (columns), L and R the bonds to the left and to the right of a core.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from isoflop.kernels.quant import Packed, quant_pack, unpack
from isoflop.methods.weights.healing import Form
from isoflop.methods.weights.payloads import Payload

GROUP = 64
"""Entries of a core that share a grid, where cores are rounded."""

Sites = tuple[int, ...]


def site_sizes(size: int, sites: int) -> Sites:
    """Factors of ``size``, as equal as its prime factors allow: the largest prime goes to the smallest factor, ascending."""
    found = [1] * sites
    for prime in sorted(_primes(size), reverse=True):
        found[found.index(min(found))] *= prime
    return tuple(sorted(found))


def _primes(size: int) -> list[int]:
    found, divisor = [], 2
    while divisor * divisor <= size:
        while size % divisor == 0:
            found.append(divisor)
            size //= divisor
        divisor += 1
    return [*found, size] if size > 1 else found


def bonds(outs: Sites, ins: Sites, chi: int) -> Sites:
    """Dimensions of the N + 1 bonds, the outer ones 1: at most ``chi``, and no more than either side can fill."""
    sizes = [o * i for o, i in zip(outs, ins, strict=True)]
    found = [1]
    for site in range(1, len(sizes)):
        found.append(min(chi, found[-1] * sizes[site - 1], math.prod(sizes[site:])))
    return (*found, 1)


def core_numel(rows: int, cols: int, sites: int, chi: int) -> int:
    """Entries of all cores: the sum of L · o_n · i_n · R."""
    outs, ins = site_sizes(rows, sites), site_sizes(cols, sites)
    ranks = bonds(outs, ins, chi)
    return sum(left * o * i * right for left, o, i, right in zip(ranks, outs, ins, ranks[1:], strict=False))


@torch.no_grad()
def decompose(weight_OI: Tensor, outs: Sites, ins: Sites, chi: int) -> list[Tensor]:
    """Cores (L, o_n, i_n, R) with at most ``chi`` singular values kept at each bond; computed in at least float32."""
    count = len(outs)
    left = weight_OI if weight_OI.dtype == torch.float64 else weight_OI.float()
    left = left.reshape(*outs, *ins).permute([axis for n in range(count) for axis in (n, count + n)])
    cores, rank = [], 1
    for o, i in zip(outs[:-1], ins[:-1], strict=True):
        u, values, vh = torch.linalg.svd(left.reshape(rank * o * i, -1), full_matrices=False)
        kept = min(chi, len(values))
        cores.append(u[:, :kept].reshape(rank, o, i, kept))
        left, rank = values[:kept, None] * vh[:kept], kept
    return [*cores, left.reshape(rank, outs[-1], ins[-1], 1)]


def contract(cores: Sequence[Tensor]) -> Tensor:
    """The matrix (O, I) of a chain."""
    product = cores[0].flatten(0, 2)
    for core in cores[1:]:
        product = (product @ core.flatten(1)).reshape(-1, core.shape[3])
    outs, ins = [core.shape[1] for core in cores], [core.shape[2] for core in cores]
    pairs = [size for pair in zip(outs, ins, strict=True) for size in pair]
    order = [*range(0, len(pairs), 2), *range(1, len(pairs), 2)]
    return product.reshape(pairs).permute(order).reshape(math.prod(outs), math.prod(ins))


class Chain(Form):
    """A matrix as its cores.

    Args:
        bits: of an entry of a core as stored; 16 for float16.
    """

    def __init__(self, cores: Sequence[Tensor], bits: int) -> None:
        super().__init__()
        self.cores = nn.ParameterList([nn.Parameter(core.contiguous()) for core in cores])
        self._bits = bits

    def weight(self) -> Tensor:
        """The contracted chain."""
        return contract(list(self.cores))

    def payload(self) -> MpoPayload:
        """The cores as stored."""
        return MpoPayload.of([core.detach() for core in self.cores], self._bits)


@dataclass(frozen=True, eq=False)
class MpoPayload(Payload):
    """Cores in float16, or in codes on grids of ``GROUP`` entries of a core, read in the order L, o, i, R.

    An entry takes 2 bytes, or ``bits`` bits and its share of a grid's 4 bytes.
    """

    kind: ClassVar[str] = "mpo"
    cores: tuple[Tensor | Packed, ...]
    shapes: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, cores: Sequence[Tensor], bits: int) -> MpoPayload:
        """Round the cores."""
        shapes = tuple(tuple(core.shape) for core in cores)
        stored = tuple(core.half() if bits == 16 else _rounded(core, bits) for core in cores)
        shape = math.prod(s[1] for s in shapes), math.prod(s[2] for s in shapes)
        return cls(shape, stored, shapes)

    def tensors(self) -> dict[str, Tensor]:
        """Cores, or their codes, scales and zeros."""
        found: dict[str, Tensor] = {}
        for number, core in enumerate(self.cores):
            parts = {"core": core} if isinstance(core, Tensor) else dict(zip(_PARTS, core.tensors(), strict=True))
            found |= {f"{name}{number}": t for name, t in parts.items()}
        return found

    def settings(self) -> dict[str, Any]:
        """Shapes and bits."""
        bits = 16 if isinstance(self.cores[0], Tensor) else self.cores[0].bits
        return {**super().settings(), "bits": bits, "cores": [list(shape) for shape in self.shapes]}

    @classmethod
    def restore(cls, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> MpoPayload:
        """The inverse of ``settings`` and ``tensors``."""
        shapes, bits = tuple(tuple(shape) for shape in settings["cores"]), settings["bits"]
        cores: list[Tensor | Packed] = []
        for number, shape in enumerate(shapes):
            if bits == 16:
                cores.append(tensors[f"core{number}"])
                continue
            codes, scale, zero = (tensors[f"{part}{number}"] for part in _PARTS)
            cores.append(_grid(codes, scale, zero, bits, math.prod(shape)))
        rows, cols = settings["shape"]
        return cls((rows, cols), tuple(cores), shapes)

    def decode(self) -> Tensor:
        """The chain of the stored cores, contracted in float32."""
        cores = [core.float() if isinstance(core, Tensor) else unpack(core) for core in self.cores]
        return contract([core.reshape(shape) for core, shape in zip(cores, self.shapes, strict=True)])


_PARTS = ("codes", "scale", "zero")


def _rounded(core: Tensor, bits: int) -> Packed:
    return quant_pack(core.float().reshape(1, -1), bits, -1, min(GROUP, core.numel()))


def _grid(codes: Tensor, scale: Tensor, zero: Tensor, bits: int, count: int) -> Packed:
    return Packed(codes, scale, zero, bits, (1, count), -1, min(GROUP, count))
