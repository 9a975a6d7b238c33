"""Grids of MC-MoE: two values at one bit; at more bits a range that is searched (arXiv 2410.06270, and its released code).

Shape suffixes: O outputs (rows), I inputs (columns), G groups, W columns of a group, F ranges.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from isoflop.kernels.quant import FP16_MAX
from isoflop.methods.weights.gptq import GridRule
from isoflop.methods.weights.grids import LEAST, FloatGrid
from isoflop.methods.weights.obs import Curvature, obs_sweep
from isoflop.methods.weights.payloads import DensePayload, Payload

NORM = 2.4
"""Power of the errors that a range is judged by."""
REACH, STEPS = 0.1, 50
"""Ranges from 1 - REACH to 1 + REACH times the group's own are tried, so many on either side."""
AT_ONCE = 2**22
"""Weights, times ranges, that are tried at once."""
LAZY = 128
"""Columns between which the released code lets no errors through, at 3 bits and less."""
EVERYWHERE, BETWEEN = "everywhere", "between-blocks"
FEEDBACK = (EVERYWHERE, BETWEEN)


def _factors(device: torch.device) -> Tensor:
    """1, those above it and those below it."""
    steps = torch.arange(1, STEPS + 1, device=device) * (REACH / STEPS)
    return torch.cat([torch.ones(1, device=device), 1 + steps, 1 - steps])


@dataclass(frozen=True)
class ExpertGrid(FloatGrid):
    """±mean |w| of a group at 1 bit; else from below 0 to above it, the factor on that range being the best of 101."""

    def fit(self, weight_OW: Tensor) -> tuple[Tensor, Tensor]:
        """Step and the value of code 0, float16."""
        weight_OW = weight_OW.float()
        if self.bits == 1:
            mean_O = weight_OW.abs().mean(1).clamp(LEAST, FP16_MAX / 2).half()
            return 2 * mean_O, -mean_O
        low_O, high_O = weight_OW.amin(1).clamp(max=0), weight_OW.amax(1).clamp(min=0)
        empty_O = low_O == high_O
        low_O, high_O = low_O.masked_fill(empty_O, -1.0), high_O.masked_fill(empty_O, 1.0)
        least_O = torch.full_like(low_O, torch.inf)
        found: tuple[Tensor, Tensor] = (torch.empty_like(low_O).half(), torch.empty_like(low_O).half())
        for factor_F in _factors(weight_OW.device).split(max(1, AT_ONCE // weight_OW.numel())):
            step_FO = (factor_F[:, None] * (high_O - low_O) / (2**self.bits - 1)).clamp(LEAST, FP16_MAX).half()
            zero_FO = (factor_F[:, None] * low_O).clamp(-FP16_MAX, FP16_MAX).half()
            step_F1O, zero_F1O, divisor_F1O = (part[:, None] for part in self.ready(step_FO, zero_FO, torch.float32))
            ready = step_F1O, zero_F1O, divisor_F1O
            error_FWO = self.values(self.codes(weight_OW.T, ready), ready) - weight_OW.T
            error_O, place_O = error_FWO.abs_().pow_(NORM).sum(1).min(0)
            better_O = error_O < least_O
            least_O = torch.where(better_O, error_O, least_O)
            step_O, zero_O = (part_FO.gather(0, place_O[None])[0] for part_FO in (step_FO, zero_FO))
            found = (torch.where(better_O, step_O, found[0]), torch.where(better_O, zero_O, found[1]))
        return found


def rounded(weight_OI: Tensor, bits: int, group: int) -> Payload:
    """Each weight to the nearest value of its group's grid."""
    if bits == 16:
        return DensePayload.of(weight_OI)
    grid, group = ExpertGrid(bits), min(group, weight_OI.shape[1])
    codes, scales, zeros = [], [], []
    for columns_OW in weight_OI.float().split(group, dim=1):
        scale_O, zero_O = grid.fit(columns_OW)
        codes.append(grid.codes(columns_OW.T, grid.ready(scale_O, zero_O, torch.float32)).T.to(torch.uint8))
        scales.append(scale_O)
        zeros.append(zero_O)
    return grid.payload(torch.cat(codes, 1).contiguous(), torch.stack(scales, 1), torch.stack(zeros, 1), group)


def swept(weight_OI: Tensor, curvature: Curvature, bits: int, group: int, feedback: str = EVERYWHERE) -> Payload:
    """After a sweep of GPTQ on these grids.

    Args:
        feedback: ``between-blocks`` lets no errors through inside blocks of ``LAZY`` columns, at 3 bits and less.
    """
    if bits == 16:
        return DensePayload.of(weight_OI)
    rule = GridRule(weight_OI, bits, group, ExpertGrid(bits))
    if feedback == EVERYWHERE or bits > 3:
        obs_sweep(weight_OI, curvature, rule)
    else:
        lazy_sweep(weight_OI, curvature, rule)
    return rule.payload


def lazy_sweep(weight_OI: Tensor, curvature: Curvature, rule: GridRule) -> None:
    """The errors of a block of ``LAZY`` columns reach what is behind it, and nothing inside; groups must not cross blocks."""
    left_OI = weight_OI.to(curvature.factor_II.dtype, copy=True)
    left_OI[:, curvature.dead_I] = 0
    for start in range(0, left_OI.shape[1], LAZY):
        block_OW = left_OI[:, start : start + LAZY]
        stop = start + block_OW.shape[1]
        diagonal_W = curvature.factor_II.diagonal()[start:stop]
        errors_OW = torch.empty_like(block_OW)
        for place in range(block_OW.shape[1]):
            if (start + place) % rule.span == 0:
                behind = left_OI[:, start + place : start + place + rule.span]
                rule.enter(behind, diagonal_W[place : place + rule.span], start + place)
            column_O = block_OW[:, place].contiguous()
            errors_OW[:, place] = (column_O - rule.fix(column_O, start + place)) / diagonal_W[place]
        left_OI[:, stop:] -= errors_OW @ curvature.factor_II[start:stop, stop:]
