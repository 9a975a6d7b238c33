"""Triton half of ``isoflop.kernels.column_scores``: two passes, and no atomics, so that results repeat bit by bit.

The first pass finds each query's log-sum-exp, as attention does but without values. In the second a program owns a block
of keys, walks over the queries of its head, rebuilds the probabilities from the log-sum-exp and adds them up. Each program
first finds from positions (and weights) where its walk begins and ends: half of a causal matrix, and queries without
weight, cost nothing. Bounds of the loop rather than branches in it, so that its loads can be pipelined.

Shape suffixes: see ``isoflop.kernels.column_scores``.
"""

# mypy: disallow-untyped-defs=False
# (kernels are written in Triton's language, whose values have no Python types)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from isoflop.kernels.softmax import Softmax
from isoflop.kernels.softmax_triton import LOG2_E, capped, factors


@triton.jit
def _logits(q, k, q_position, k_position, k_valid, scaling, cap, HAS_CAP: tl.constexpr):
    """Masked logits (T, S) in float32 of query rows (T, D) against key rows (S, D)."""
    logits = tl.dot(q, tl.trans(k), input_precision="tf32x3") * scaling
    if HAS_CAP:
        logits = capped(logits, cap)
    seen = (k_position[None, :] <= q_position[:, None]) & k_valid[None, :]
    return tl.where(seen, logits, float("-inf"))


@triton.jit
def _load_keys(positions_ptr, valid_ptr, at, inside, position_stride_b, valid_stride_b, b, HAS_VALID: tl.constexpr):
    """(positions, valid) of keys."""
    position = tl.load(positions_ptr + b * position_stride_b + at, mask=inside, other=0)
    if HAS_VALID:
        return position, inside & (tl.load(valid_ptr + b * valid_stride_b + at, mask=inside, other=0) != 0)
    else:
        return position, inside


@triton.jit
def _lse_kernel(
    q_ptr, k_ptr, q_positions_ptr, k_positions_ptr, valid_ptr, lse_ptr,
    q_stride_b, q_stride_h, q_stride_t, k_stride_b, k_stride_g, k_stride_s,
    q_position_stride_b, k_position_stride_b, valid_stride_b,
    scaling, cap, heads, repeats, queries, keys, width,
    HAS_VALID: tl.constexpr, HAS_CAP: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, SCAN: tl.constexpr,
):  # fmt: skip
    """Log-sum-exp (base 2) of one block of queries of one head; -inf for a query that sees nothing."""
    b, h = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    d = tl.arange(0, BLOCK_D)
    t_inside, d_inside = t < queries, d < width
    q_base = q_ptr + b * q_stride_b + h * q_stride_h
    k_base = k_ptr + b * k_stride_b + (h // repeats) * k_stride_g
    q = tl.load(q_base + t[:, None] * q_stride_t + d[None, :], mask=t_inside[:, None] & d_inside[None, :], other=0.0)
    q_position = tl.load(q_positions_ptr + b * q_position_stride_b + t, mask=t_inside, other=-1)
    last = tl.max(q_position, 0)
    top = tl.full([BLOCK_T], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_T], tl.float32)
    end = 0
    for start in range(0, keys, SCAN):
        s = start + tl.arange(0, SCAN)
        position, k_valid = _load_keys(
            k_positions_ptr, valid_ptr, s, s < keys, k_position_stride_b, valid_stride_b, b, HAS_VALID
        )
        end = tl.maximum(end, tl.max(tl.where((position <= last) & k_valid, s + 1, 0), 0))
    for start in range(0, end, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S).to(tl.int64)
        s_inside = s < keys
        position, k_valid = _load_keys(
            k_positions_ptr, valid_ptr, s, s_inside, k_position_stride_b, valid_stride_b, b, HAS_VALID
        )
        k_at = k_base + s[:, None] * k_stride_s + d[None, :]
        k = tl.load(k_at, mask=s_inside[:, None] & d_inside[None, :], other=0.0)
        logits = _logits(q, k, q_position, position, k_valid, scaling, cap, HAS_CAP)
        higher = tl.maximum(top, tl.max(logits, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)  # a row that has seen nothing yet
        total = total * tl.exp2(top - base) + tl.sum(tl.exp2(logits - base[:, None]), 1)
        top = higher
    lse = tl.where(total > 0, top + tl.log2(tl.where(total > 0, total, 1.0)), float("-inf"))
    tl.store(lse_ptr + (b * heads + h) * queries + t, lse, mask=t_inside)


@triton.jit
def _sum_kernel(
    q_ptr, k_ptr, q_positions_ptr, k_positions_ptr, valid_ptr, lse_ptr, weight_ptr, out_ptr,
    q_stride_b, q_stride_h, q_stride_t, k_stride_b, k_stride_g, k_stride_s,
    q_position_stride_b, k_position_stride_b, valid_stride_b, weight_stride_b,
    scaling, cap, groups, repeats, queries, keys, width, sets,
    HAS_VALID: tl.constexpr, HAS_CAP: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, SCAN: tl.constexpr,
    BLOCK_W: tl.constexpr,
):  # fmt: skip
    """Column sums of one block of keys of one key-value head, over all its queries."""
    b, g = (tl.program_id(1) // groups).to(tl.int64), (tl.program_id(1) % groups).to(tl.int64)
    s = tl.program_id(0).to(tl.int64) * BLOCK_S + tl.arange(0, BLOCK_S)
    d, w = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_W)
    s_inside, d_inside = s < keys, d < width
    k_base = k_ptr + b * k_stride_b + g * k_stride_g
    k = tl.load(k_base + s[:, None] * k_stride_s + d[None, :], mask=s_inside[:, None] & d_inside[None, :], other=0.0)
    position, k_valid = _load_keys(
        k_positions_ptr, valid_ptr, s, s_inside, k_position_stride_b, valid_stride_b, b, HAS_VALID
    )
    first = tl.min(tl.where(k_valid, position, 2**31 - 1), 0)
    begin, end = queries, 0
    for start in range(0, queries, SCAN):
        t = start + tl.arange(0, SCAN)
        q_position = tl.load(q_positions_ptr + b * q_position_stride_b + t, mask=t < queries, other=-1)
        weighs = t < 0
        for i in range(sets):
            weighs |= tl.load(weight_ptr + b * weight_stride_b + i * queries + t, mask=t < queries, other=0.0) != 0
        counts = weighs & (q_position >= first)
        begin = tl.minimum(begin, tl.min(tl.where(counts, t, queries), 0))
        end = tl.maximum(end, tl.max(tl.where(counts, t + 1, 0), 0))
    sums = tl.zeros([BLOCK_W, BLOCK_S], tl.float32)
    for start in range(begin // BLOCK_T * BLOCK_T, end, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T).to(tl.int64)
        t_inside = t < queries
        q_position = tl.load(q_positions_ptr + b * q_position_stride_b + t, mask=t_inside, other=-1)
        p = tl.zeros([BLOCK_T, BLOCK_S], tl.float32)
        for r in range(repeats):
            h = g * repeats + r
            q_at = q_ptr + b * q_stride_b + h * q_stride_h + t[:, None] * q_stride_t + d[None, :]
            q = tl.load(q_at, mask=t_inside[:, None] & d_inside[None, :], other=0.0)
            lse_at = lse_ptr + (b * groups * repeats + h) * queries + t
            lse = tl.load(lse_at, mask=t_inside, other=float("inf"))
            lse = tl.where(lse == float("-inf"), float("inf"), lse)  # sees nothing: probabilities 0, not NaN
            p += tl.exp2(_logits(q, k, q_position, position, k_valid, scaling, cap, HAS_CAP) - lse[:, None])
        weight_at = weight_ptr + b * weight_stride_b + w[:, None] * queries + t[None, :]
        weight = tl.load(weight_at, mask=(w < sets)[:, None] & t_inside[None, :], other=0.0)
        sums += tl.dot(weight, p, input_precision="tf32x3")
    out_at = ((b * groups + g) * sets + w[:, None]) * keys + s[None, :]
    tl.store(out_ptr + out_at, sums, mask=(w < sets)[:, None] & s_inside[None, :])


def _rows(values: Tensor, batch: int, dtype: torch.dtype) -> tuple[Tensor, int]:
    """A (B or 1, n) tensor with contiguous rows, and its stride over the batch."""
    made = values.to(dtype).contiguous()
    return made, 0 if made.shape[0] == 1 and batch > 1 else made.stride(0)


def column_scores(
    q_BHTD: Tensor,
    k_BGSD: Tensor,
    softmax: Softmax,
    weight_BWT: Tensor,
    q_positions_BT: Tensor,
    k_positions_BS: Tensor,
    valid_BS: Tensor | None = None,
) -> Tensor:
    """See ``isoflop.kernels.column_scores.column_scores``."""
    q_BHTD, k_BGSD = (x if x.stride(-1) == 1 else x.contiguous() for x in (q_BHTD, k_BGSD))
    if q_BHTD.dtype != k_BGSD.dtype:
        k_BGSD = k_BGSD.to(q_BHTD.dtype)
    batch, heads, queries, width = q_BHTD.shape
    groups, keys = k_BGSD.shape[1], k_BGSD.shape[2]
    sets = weight_BWT.shape[1]
    q_positions, q_position_stride = _rows(q_positions_BT, batch, torch.int32)
    k_positions, k_position_stride = _rows(k_positions_BS, batch, torch.int32)
    weight, weight_stride = _rows(weight_BWT.flatten(1), batch, torch.float32)
    valid, valid_stride = (k_positions, 0) if valid_BS is None else _rows(valid_BS, batch, torch.int8)
    lse = torch.empty(batch, heads, queries, dtype=torch.float32, device=q_BHTD.device)
    out = torch.empty(batch, groups, sets, keys, dtype=torch.float32, device=q_BHTD.device)
    block_d = max(16, triton.next_power_of_2(width))
    block = 32 if q_BHTD.dtype == torch.float32 or block_d > 128 else 64
    strides = (*q_BHTD.stride()[:3], *k_BGSD.stride()[:3], q_position_stride, k_position_stride, valid_stride)
    common = {
        "HAS_VALID": valid_BS is not None,
        "HAS_CAP": softmax.cap is not None,
        "BLOCK_D": block_d,
        "SCAN": 512,
        "num_warps": 4,
        "enable_fp_fusion": True,
    }
    _lse_kernel[(triton.cdiv(queries, 2 * block), batch * heads)](
        q_BHTD, k_BGSD, q_positions, k_positions, valid, lse, *strides,
        *factors(softmax), heads, heads // groups, queries, keys, width, BLOCK_T=2 * block, BLOCK_S=block, **common,
    )  # fmt: skip
    if softmax.sinks_H is not None:
        lse = torch.logaddexp2(lse, softmax.sinks_H.float()[:, None] * LOG2_E)
    _sum_kernel[(triton.cdiv(keys, block), batch * groups)](
        q_BHTD, k_BGSD, q_positions, k_positions, valid, lse, weight, out, *strides, weight_stride,
        *factors(softmax), groups, heads // groups, queries, keys, width, sets,
        BLOCK_T=block, BLOCK_S=block, BLOCK_W=16, **common,
    )  # fmt: skip
    return out
