"""The optimal-brain-surgeon sweep: fix one input column after the other and let the later ones take up the error.

One sweep serves GPTQ (arXiv 2210.17323) and SparseGPT (arXiv 2301.00774); they differ in what a column becomes, which is
the ``Rule``. With H the Hessian of the layer-wise squared error and U the upper Cholesky factor of H⁻¹, fixing column j
at q_j moves the columns behind it by -(w_j - q_j)/U_jj · U_j,>j (equations 3 and 4 of GPTQ).

Columns take up errors as late as they can: a range of columns is swept in halves, and the errors of the first half reach the second
in one product of matrices. Only inside ranges of a few columns they move one by one. The matrix is swept transposed, so that a
column lies in one piece.

Shape suffixes: O outputs (rows), I inputs (columns), W columns of a range.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

RANGE = 32
"""Columns among which errors are taken up one by one."""


class Rule(Protocol):
    """What a column becomes."""

    @property
    def span(self) -> int:
        """Columns that are decided on together."""

    def enter(self, weight_OW: Tensor, curvature_W: Tensor, start: int) -> None:
        """Called at every multiple of ``span`` with the columns of the span as they are now.

        Args:
            curvature_W: U_jj of these columns, so that w²/U_jj² is the error of removing a weight.
            start: first column of the span.
        """

    def fix(self, column_O: Tensor, index: int) -> Tensor:
        """The column that takes the place of column ``index``."""


@dataclass(frozen=True, eq=False)
class Curvature:
    """What a sweep knows of the inputs; matrices that read the same inputs share it.

    Attributes:
        factor_II: U, see above.
        dead_I: inputs that are always zero, unless nothing was observed at all.
        order_I: the column of the matrix that each of these is; None where columns are swept as they lie.
    """

    factor_II: Tensor
    dead_I: Tensor
    order_I: Tensor | None = None

    @classmethod
    def of(
        cls, hessian_II: Tensor, damp: float, dtype: torch.dtype = torch.float32, by_activation: bool = False
    ) -> Curvature:
        """Work it out in float64.

        Args:
            hessian_II: of the inputs; any positive factor gives the same.
            damp: added to the diagonal, relative to its mean.
            dtype: to keep it in.
            by_activation: columns of the largest H_jj first, those that no input reaches counting 1, as published.
        """
        order_I = None
        if by_activation:
            size_I = hessian_II.diagonal()
            order_I = size_I.masked_fill(size_I == 0, 1.0).argsort(descending=True, stable=True)
            hessian_II = hessian_II[order_I][:, order_I]
        dead_I = hessian_II.diagonal() == 0
        return cls(inverse_factor(hessian_II, damp).to(dtype), dead_I & ~dead_I.all(), order_I)

    def in_place(self, values_I: Tensor) -> Tensor:
        """What belongs to the columns as they are swept, in the order in which they lie."""
        if self.order_I is None:
            return values_I
        return torch.empty_like(values_I).scatter_(0, self.order_I, values_I)


def inverse_factor(hessian_II: Tensor, damp: float) -> Tensor:
    """Upper Cholesky factor U of (H + damp · mean(diag H) · 1)⁻¹ = UᵀU, in float64.

    Columns that no input ever reaches get H_jj = 1, as in the published code; without any input H is the identity.
    """
    found_II = hessian_II.to(torch.float64, copy=True)
    diagonal_I = found_II.diagonal()
    diagonal_I[diagonal_I == 0] = 1.0
    diagonal_I += damp * diagonal_I.mean()
    found_II = torch.linalg.cholesky(
        found_II
    )  # one name, so that no more than two of these matrices are alive at a time
    found_II = torch.cholesky_inverse(found_II)
    return torch.linalg.cholesky(found_II, upper=True)


@torch.no_grad()
def obs_sweep(weight_OI: Tensor, curvature: Curvature, rule: Rule) -> Tensor:
    """The matrix (O, I) after the sweep, column for column what ``rule.fix`` returned.

    Weights whose input is always zero start at zero, as in the published codes, unless nothing was observed at all.

    Args:
        weight_OI: computed in float32, or in float64 when it comes so.
        curvature: of the inputs.
    """
    work = torch.float64 if weight_OI.dtype == torch.float64 else torch.float32
    sweep = _Sweep(weight_OI, curvature, rule, work)
    sweep.run(0, weight_OI.shape[1])
    return sweep.result_IO.T


class _Sweep:
    """A matrix on its way. Behind the sweep ``left_IO`` holds errors in the place of columns, which are needed no more."""

    def __init__(self, weight_OI: Tensor, curvature: Curvature, rule: Rule, dtype: torch.dtype) -> None:
        self.left_IO = weight_OI.T.to(dtype, copy=True, memory_format=torch.contiguous_format)
        self.left_IO[curvature.dead_I] = 0
        self.result_IO = torch.empty_like(self.left_IO)
        self.factor_II = curvature.factor_II.to(dtype)
        self.diagonal_I = self.factor_II.diagonal().tolist()
        self.rule = rule

    def run(self, start: int, stop: int) -> None:
        """Sweep columns that have taken up the errors of all before ``start``: whole spans, or a part of one."""
        size, span = stop - start, self.rule.span
        if size <= RANGE:
            self._one_by_one(start, stop)
            return
        half = (size + 1) // 2
        middle = start + (-(-half // span) * span if size > span else half)
        self.run(start, middle)
        self.left_IO[middle:stop].addmm_(
            self.factor_II[start:middle, middle:stop].T, self.left_IO[start:middle], alpha=-1
        )
        self.run(middle, stop)

    def _one_by_one(self, start: int, stop: int) -> None:
        for j in range(start, stop):
            if j % self.rule.span == 0:
                end = j + self.rule.span
                self.rule.enter(self.left_IO[j:end].T, self.factor_II.diagonal()[j:end], j)
            fixed_O = self.rule.fix(self.left_IO[j], j)
            self.result_IO[j] = fixed_O
            error_O = self.left_IO[j].sub_(fixed_O).div_(self.diagonal_I[j])
            self.left_IO[j + 1 : stop].addr_(self.factor_II[j, j + 1 : stop], error_O, alpha=-1)
