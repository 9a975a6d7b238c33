"""The empirical Fisher matrix of a weight matrix, in blocks along its diagonal; what removing weights costs by it, and moves.

Weights are numbered row by row, and every B of them make a block, the last one filled with zeros. Groups of G weights are removed
together, so that for G = 1 the formulas are those of single weights.

Shape suffixes: O outputs (rows), I inputs (columns), K blocks, B weights of a block, N groups, G weights of a group.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

PART = 2**22
"""Entries of blocks that are factorised at a time, in float64."""


class BlockFisher:
    """λI + (1/m) Σ g gᵀ within blocks, for m gradients g of the loss: Eq. 2 of arXiv 2203.07259.

    Held are the sums, B float32 numbers for each weight, in which the order of gradients means nothing. The paper brings the inverse up
    to date after every gradient instead (Woodbury/Sherman-Morrison), which gives the same matrices; here blocks are factorised in
    float64 when they are asked for, and no error adds up.

    Args:
        like_OI: a matrix of the shape, type and place of the gradients.
        block: B.
        damp: λ.
    """

    def __init__(self, like_OI: Tensor, block: int, damp: float) -> None:
        self.shape, self.block, self.damp = (like_OI.shape[0], like_OI.shape[1]), block, damp
        self.count = 0
        dtype = torch.promote_types(like_OI.dtype, torch.float32)
        self._sum_KBB = like_OI.new_zeros(-(-like_OI.numel() // block), block, block, dtype=dtype)

    def add(self, gradient_OI: Tensor) -> None:
        """One more gradient."""
        g_KB = self._in_blocks(gradient_OI.detach().to(self._sum_KBB))
        self._sum_KBB.baddbmm_(g_KB[:, :, None], g_KB[:, None, :])
        self.count += 1

    def inverse_within(self, group: int) -> Tensor:
        """[F⁻¹]_QQ of every group, (N, G, G) in float64; ``group`` divides the block."""
        parts = [_within(torch.cholesky_inverse(factor_KBB), group) for _, factor_KBB in self._factors()]
        return torch.cat(parts)[: -(-self.shape[0] * self.shape[1] // group)]

    def solve(self, right_OI: Tensor) -> Tensor:
        """F⁻¹ times the entries of a matrix, as a matrix in float64."""
        right_KB = self._in_blocks(right_OI.double())
        parts = [
            torch.cholesky_solve(right_KB[part, :, None], factor_KBB)[..., 0] for part, factor_KBB in self._factors()
        ]
        return torch.cat(parts).flatten()[: right_OI.numel()].view(self.shape)

    def _factors(self) -> Iterator[tuple[slice, Tensor]]:
        """Lower Cholesky factors of the blocks in float64, some at a time, with their places."""
        step = max(1, PART // self.block**2)
        damp_BB = self.damp * torch.eye(self.block, dtype=torch.float64, device=self._sum_KBB.device)
        for start in range(0, len(self._sum_KBB), step):
            part = slice(start, start + step)
            factor_KBB, failed_K = torch.linalg.cholesky_ex(self._sum_KBB[part].double() / max(1, self.count) + damp_BB)
            if bool(failed_K.any()):
                raise ValueError(
                    f"damp = {self.damp:g} is lost beside the gradients' squares, so that the Fisher matrix has no inverse; raise damp"
                )
            yield part, factor_KBB

    def _in_blocks(self, x_OI: Tensor) -> Tensor:
        flat = x_OI.flatten()
        return F.pad(flat, (0, -len(flat) % self.block)).view(-1, self.block)


def _within(inverse_KBB: Tensor, group: int) -> Tensor:
    """The squares of a group's size along the diagonals, (N, G, G)."""
    parts = inverse_KBB.unflatten(2, (-1, group)).unflatten(1, (-1, group))  # K, B/G, G, B/G, G
    return parts.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2).flatten(0, 1)


@dataclass(frozen=True, eq=False)
class Saliency:
    """What the removal of each group would cost, by itself.

    Attributes:
        score_N: ½ w_Qᵀ ([F⁻¹]_QQ)⁻¹ w_Q, the growth of the loss; for single weights w²/(2 [F⁻¹]_ii).
        dual_OI: ([F⁻¹]_QQ)⁻¹ w_Q, in the places of the groups; for single weights w/[F⁻¹]_ii.
    """

    score_N: Tensor
    dual_OI: Tensor

    @classmethod
    def of(cls, weight_OI: Tensor, fisher: BlockFisher, group: int) -> Saliency:
        """Eq. 4 of arXiv 2203.07259."""
        w_NG1 = weight_OI.double().reshape(-1, group, 1)
        dual_NG1 = torch.linalg.solve(fisher.inverse_within(group), w_NG1)
        return cls((w_NG1 * dual_NG1).sum((1, 2)) / 2, dual_NG1.view(weight_OI.shape))


def surgery(weight_OI: Tensor, gone_OI: Tensor, saliency: Saliency, fisher: BlockFisher) -> Tensor:
    """The matrix without what goes: all others take up what the loss loses by it, to second order (Eq. 5).

    δw = -F⁻¹_{:,Q} ([F⁻¹]_QQ)⁻¹ w_Q, summed over the groups as if each went alone, as the paper does for the sake of time. So
    what goes is not quite zero behind the sum where several go from a block; it is set to zero.
    """
    moved_OI = weight_OI - fisher.solve(saliency.dual_OI * gone_OI).to(weight_OI.dtype)
    return moved_OI.masked_fill(gone_OI, 0.0)
