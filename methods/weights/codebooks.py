"""Codebooks: groups of neighbouring inputs of a row stand as codes, which tables turn into numbers.

Shape suffixes: O outputs (rows), I inputs (columns), N groups, G weights of a group, M tables, K entries of a table, D width of an
entry.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from isoflop.kernels.quant import pack_bits, unpack_bits
from isoflop.methods.weights.payloads import Payload

MOST = 2**24
"""Distances that are held at a time."""
LLOYD, SETTLED = 50, 1e-4
"""Rounds of k-means at most, and the relative gain of one below which it ends."""


def groups_of(weight_OI: Tensor, size: int) -> Tensor:
    """Groups (N, G) along the inputs of each row, row after row; the last of a row is filled with zeros."""
    padded = torch.nn.functional.pad(weight_OI, (0, -weight_OI.shape[1] % size))
    return padded.reshape(-1, size)


def matrix_of(groups_NG: Tensor, rows: int, cols: int) -> Tensor:
    """The matrix (O, I): the inverse of :func:`groups_of`."""
    return groups_NG.reshape(rows, -1)[:, :cols]


def code_bits(entries: int) -> int:
    """⌈log2 K⌉, and at least 1."""
    return max(1, (entries - 1).bit_length())


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Codes of up to 16 bits in one row of bytes: the lower 8 bits of all, then what is above."""
    flat = codes.flatten()
    parts = [pack_bits((flat & 255).to(torch.uint8), min(bits, 8))]
    if bits > 8:
        parts.append(pack_bits((flat >> 8).to(torch.uint8), bits - 8))
    return torch.cat(parts)


def unpack_codes(packed: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of :func:`pack_codes`, int64 (count,)."""
    if bits <= 8:
        return unpack_bits(packed, bits, count).long()
    low = unpack_bits(packed[:count], 8, count).long()
    return low + (unpack_bits(packed[count:], bits - 8, count).long() << 8)


@dataclass(frozen=True, eq=False)
class CodebookPayload(Payload):
    """Groups as sums of table entries: M·⌈log2 K⌉ bits a group, and the tables in float16.

    Attributes:
        codes: packed, N·M of them, those of a group side by side.
        tables_MKD: float16. With a basis D is its rank, else the width of a group.
        basis_DG: float16; entries are multiplied by it, or None.
        scales_O: float16; rows are multiplied by them, or None.
        group: G.
    """

    kind: ClassVar[str] = "codebook"
    codes: Tensor
    tables_MKD: Tensor
    basis_DG: Tensor | None
    scales_O: Tensor | None
    group: int

    @classmethod
    def of(
        cls,
        shape: tuple[int, int],
        codes_NM: Tensor,
        tables_MKD: Tensor,
        basis_DG: Tensor | None,
        scales_O: Tensor | None,
        group: int,
    ) -> CodebookPayload:
        """Round and pack; a basis is multiplied into the tables where these are smaller than both."""
        if basis_DG is not None and tables_MKD.shape[:2].numel() * group <= tables_MKD.numel() + basis_DG.numel():
            tables_MKD, basis_DG = tables_MKD @ basis_DG, None
        packed = pack_codes(codes_NM, code_bits(tables_MKD.shape[1]))
        halves = [None if t is None else t.half().contiguous() for t in (tables_MKD, basis_DG, scales_O)]
        assert halves[0] is not None
        return cls(shape, packed, halves[0], halves[1], halves[2], group)

    def tensors(self) -> dict[str, Tensor]:
        """Codes, tables, and what multiplies them."""
        found = {"codes": self.codes, "tables": self.tables_MKD, "basis": self.basis_DG, "scales": self.scales_O}
        return {name: t for name, t in found.items() if t is not None}

    def settings(self) -> dict[str, Any]:
        """Shape and group."""
        return {**super().settings(), "group": self.group}

    @classmethod
    def restore(cls, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> CodebookPayload:
        """The inverse of ``settings`` and ``tensors``."""
        rows, cols = settings["shape"]
        stored = tensors["codes"], tensors["tables"], tensors.get("basis"), tensors.get("scales")
        return cls((rows, cols), *stored, settings["group"])

    def codes_NM(self) -> Tensor:
        """The codes, unpacked."""
        (rows, cols), (tables, entries) = self.shape, self.tables_MKD.shape[:2]
        count = rows * -(-cols // self.group)
        return unpack_codes(self.codes, code_bits(entries), count * tables).view(count, tables)

    def decode(self) -> Tensor:
        """Sums of entries, in float32."""
        tables_MKG = self.tables_MKD.float()
        if self.basis_DG is not None:
            tables_MKG = tables_MKG @ self.basis_DG.float()
        weight_OI = matrix_of(looked_up(tables_MKG, self.codes_NM()), *self.shape)
        return weight_OI if self.scales_O is None else weight_OI * self.scales_O.float()[:, None]


def looked_up(tables_MKG: Tensor, codes_NM: Tensor) -> Tensor:
    """The sum of each group's entries (N, G)."""
    total_NG = tables_MKG[0, codes_NM[:, 0]]
    for table_KG, codes_N in zip(tables_MKG[1:], codes_NM.T[1:], strict=True):
        total_NG = total_NG + table_KG[codes_N]
    return total_NG


def distances(points_ND: Tensor, table_KD: Tensor) -> Tensor:
    """Squared distances (N, K), less the points' own squares."""
    return torch.addmm(table_KD.square().sum(1), points_ND, table_KD.T, alpha=-2)


@torch.no_grad()
def nearest(points_ND: Tensor, table_KD: Tensor) -> Tensor:
    """The nearest entry of each point, (N,); between equally near ones the first."""
    parts = points_ND.split(max(1, MOST // len(table_KD)))
    return torch.cat([distances(part, table_KD).argmin(1) for part in parts])


@torch.no_grad()
def k_means(points_ND: Tensor, entries: int, generator: torch.Generator) -> Tensor:
    """Entries (K, D) that points lie close to, no more than there are points: k-means++, then Lloyd's rounds.

    An entry that no point is nearest to takes the place of the point that lies farthest from the entry with most points.
    """
    table_KD = _spread(points_ND, min(entries, len(points_ND)), generator)
    before = float("inf")
    for _ in range(LLOYD):
        codes_N = nearest(points_ND, table_KD)
        apart_N = (points_ND - table_KD[codes_N]).square().sum(1)
        error = float(apart_N.sum())
        if error >= before * (1 - SETTLED):
            break
        before = error
        counts_K = torch.bincount(codes_N, minlength=len(table_KD))
        sums_KD = torch.zeros_like(table_KD).index_add_(0, codes_N, points_ND)
        table_KD = torch.where(counts_K[:, None] > 0, sums_KD / counts_K.clamp(min=1)[:, None], table_KD)
        _reseed(table_KD, counts_K, codes_N, apart_N, points_ND)
    return table_KD


def _reseed(table_KD: Tensor, counts_K: Tensor, codes_N: Tensor, apart_N: Tensor, points_ND: Tensor) -> None:
    """Give empty entries the farthest points of the fullest one; nothing changes where these lie on it."""
    empty = (counts_K == 0).nonzero().flatten()
    if not len(empty):
        return
    crowd = (codes_N == counts_K.argmax()).nonzero().flatten()
    farthest = crowd[apart_N[crowd].argsort(descending=True, stable=True)[: len(empty)]]
    farthest = farthest[apart_N[farthest] > 0]
    table_KD[empty[: len(farthest)]] = points_ND[farthest]


def _spread(points_ND: Tensor, entries: int, generator: torch.Generator) -> Tensor:
    """k-means++: each next entry is a point drawn by its squared distance from those before."""
    draws = torch.rand(entries, generator=generator, dtype=torch.float64).tolist()
    first = min(int(draws[0] * len(points_ND)), len(points_ND) - 1)
    table, apart_N = [points_ND[first]], (points_ND - points_ND[first]).square().sum(1).double()
    for draw in draws[1:]:
        total_N = apart_N.cumsum(0)
        place = int(torch.searchsorted(total_N, draw * total_N[-1], right=True).clamp(max=len(points_ND) - 1))
        table.append(points_ND[place])
        apart_N = torch.minimum(apart_N, (points_ND - points_ND[place]).square().sum(1).double())
    return torch.stack(table)
