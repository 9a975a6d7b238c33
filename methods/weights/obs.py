"""The optimal-brain-surgeon sweep: fix one input column after the other and let the later ones take up the error.

One sweep serves GPTQ (arXiv 2210.17323) and SparseGPT (arXiv 2301.00774); they differ in what a column becomes, which is
the ``Rule``. With H the Hessian of the layer-wise squared error and U the upper Cholesky factor of H⁻¹, fixing column j
at q_j moves the columns behind it by -(w_j - q_j)/U_jj · U_j,>j (equations 3 and 4 of GPTQ).

Shape suffixes: O outputs (rows), I inputs (columns), W columns of a block.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

BLOCK = 128


class Rule(Protocol):
    """What a column becomes."""

    @property
    def span(self) -> int:
        """Columns that are decided on together; the sweep's blocks hold whole spans, or spans whole blocks."""

    def enter(self, weight_OW: Tensor, curvature_W: Tensor, start: int) -> None:
        """Called at every multiple of ``span`` with the columns of the span as they are now.

        Args:
            curvature_W: U_jj of these columns, so that w²/U_jj² is the error of removing a weight.
            start: first column of the span.
        """

    def fix(self, column_O: Tensor, index: int) -> Tensor:
        """The column that takes the place of column ``index``."""


def inverse_factor(hessian_II: Tensor, damp: float) -> Tensor:
    """Upper Cholesky factor U of (H + damp · mean(diag H) · 1)⁻¹ = UᵀU, in float64.

    Columns that no input ever reaches get H_jj = 1, as in the published code; without any input H is the identity.
    """
    hessian_II = hessian_II.double().clone()
    diagonal_I = hessian_II.diagonal()
    diagonal_I[diagonal_I == 0] = 1.0
    diagonal_I += damp * diagonal_I.mean()
    lower_II = torch.linalg.cholesky(hessian_II)
    return torch.linalg.cholesky(torch.cholesky_inverse(lower_II), upper=True)


@torch.no_grad()
def obs_sweep(weight_OI: Tensor, hessian_II: Tensor, rule: Rule, damp: float) -> Tensor:
    """The matrix (O, I) after the sweep, column for column what ``rule.fix`` returned.

    Weights whose input is always zero start at zero, as in the published codes, unless nothing was observed at all.

    Args:
        weight_OI: computed in float32, or in float64 when it comes so.
        hessian_II: of the inputs; any positive factor gives the same.
        damp: added to the diagonal, relative to its mean.
    """
    work = torch.float64 if weight_OI.dtype == torch.float64 else torch.float32
    weight_OI = weight_OI.to(work, copy=True)
    dead_I = hessian_II.diagonal() == 0
    if not bool(dead_I.all()):
        weight_OI[:, dead_I] = 0
    factor_II = inverse_factor(hessian_II, damp).to(work)
    result_OI = torch.empty_like(weight_OI)
    cols = weight_OI.shape[1]
    block = max(BLOCK - BLOCK % rule.span, rule.span)
    for start in range(0, cols, block):
        stop = min(start + block, cols)
        errors_OW = torch.empty_like(weight_OI[:, start:stop])
        for j in range(start, stop):
            if j % rule.span == 0:
                end = min(j + rule.span, cols)
                rule.enter(weight_OI[:, j:end], factor_II.diagonal()[j:end], j)
            result_OI[:, j] = rule.fix(weight_OI[:, j], j)
            error_O = (weight_OI[:, j] - result_OI[:, j]) / factor_II[j, j]
            weight_OI[:, j + 1 : stop] -= error_O[:, None] * factor_II[j, j + 1 : stop]
            errors_OW[:, j - start] = error_O
        weight_OI[:, stop:] -= errors_OW @ factor_II[start:stop, stop:]
    return result_OI
