"""Triton half of ``isoflop.kernels.decode_segments``.

One launch per segment, all writing partial results to one workspace, and one launch that joins them. Tokens of a segment
are split among programs, since a decoding step has too few heads to fill a GPU. A program reads each code once for all
query rows of its key-value head, and dequantises in registers. What can be applied to less than every element is: channel
scales to the queries and to the partial output, grids per token to logits and probabilities (codes are exact in 16 bits).
Of a ragged segment every head has the programs that its longest head needs; those behind a head's end do nothing.

Shape suffixes: see ``isoflop.kernels.decode_segments``.
"""

# mypy: disallow-untyped-defs=False
# (kernels are written in Triton's language, whose values have no Python types)

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from isoflop.kernels.decode_segments import Part, RaggedPart, operands
from isoflop.kernels.quant import Packed, unit
from isoflop.kernels.quant_triton import load_codes
from isoflop.kernels.softmax import Softmax
from isoflop.kernels.softmax_triton import capped, factors

_LOG2_E = tl.constexpr(1.4426950408889634)  # logits are in bits: exp2 is what the hardware has
_LN_2 = tl.constexpr(0.6931471805599453)
_BLOCK_DENSE, _BLOCK_PACKED = 64, 32  # tokens of a tile; dequantised ones take twice the registers
_WAVES = 4  # programs per multiprocessor
_WHOLE = 1 << 30

# how the grids of a packed tensor lie over a tile of tokens by channels
_DENSE, _BY_TOKEN, _BY_CHANNEL, _MIXED = 0, 1, 2, 3


@triton.jit
def _token_grids(scale_ptr, zero_ptr, head, n, tokens):
    """Scales and zeros of tokens with one grid each; 0 outside."""
    at = head * tokens + n
    scale = tl.load(scale_ptr + at, mask=n < tokens, other=0.0).to(tl.float32)
    return scale, tl.load(zero_ptr + at, mask=n < tokens, other=0.0).to(tl.float32)


@triton.jit
def _load_tile(
    ptr, scale_ptr, zero_ptr, head, first, stride_n, start, tokens, width, group, row_units,
    LAYOUT: tl.constexpr, PER_ROW: tl.constexpr, BITS: tl.constexpr, U: tl.constexpr, BYTES: tl.constexpr,
    FOLDED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Keys or values (BLOCK_N, BLOCK_D) of one key-value head from token ``start`` on; float32 if packed, 0 outside.

    first: where the head begins, if it is dense.
    FOLDED: codes as they are; the caller applies the grids, one per token, to what it computes from them.
    """
    n = start + tl.arange(0, BLOCK_N).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    n_inside, d_inside = n < tokens, d < width
    if LAYOUT == 0:
        at = ptr + first + n[:, None] * stride_n + d[None, :]
        return tl.load(at, mask=n_inside[:, None] & d_inside[None, :], other=0.0)
    else:
        row_ptr = ptr + (head * tokens + n) * row_units * BYTES
        codes = load_codes(row_ptr, n_inside, 0, row_units, BITS, BLOCK_D // U, U, BYTES).to(tl.float32)
        if FOLDED:
            return codes
        if LAYOUT == 1:  # one grid per token
            scale, zero = _token_grids(scale_ptr, zero_ptr, head, n, tokens)
            scale, zero = scale[:, None], zero[:, None]
        elif LAYOUT == 2:  # one grid per channel for the whole tile
            at = (head * tl.cdiv(tokens, group) + start // group) * width + d
            scale = tl.load(scale_ptr + at, mask=d_inside, other=0.0).to(tl.float32)[None, :]
            zero = tl.load(zero_ptr + at, mask=d_inside, other=0.0).to(tl.float32)[None, :]
        else:
            if PER_ROW:
                at = (head * tokens + n)[:, None] * tl.cdiv(width, group) + (d // group)[None, :]
            else:
                at = (head * tl.cdiv(tokens, group) + n // group)[:, None] * width + d[None, :]
            mask = n_inside[:, None] & d_inside[None, :]
            scale = tl.load(scale_ptr + at, mask=mask, other=0.0).to(tl.float32)
            zero = tl.load(zero_ptr + at, mask=mask, other=0.0).to(tl.float32)
        return codes * scale + zero  # padding channels hold a finite zero point; the queries there are 0


@triton.jit
def _segment_kernel(
    q_ptr, k_ptr, k_scale_ptr, k_zero_ptr, v_ptr, v_scale_ptr, v_zero_ptr, bias_ptr, k_channel_ptr, v_channel_ptr,
    ends_ptr, out_ptr, lse_ptr,
    k_stride_b, k_stride_g, k_stride_n, v_stride_b, v_stride_g, v_stride_n,
    scaling, cap, groups, rows, tokens, width, v_width, k_group, v_group, k_units, v_units, chunk, first_split, splits,
    K_LAYOUT: tl.constexpr, K_PER_ROW: tl.constexpr, K_BITS: tl.constexpr, K_U: tl.constexpr, K_BYTES: tl.constexpr,
    V_LAYOUT: tl.constexpr, V_PER_ROW: tl.constexpr, V_BITS: tl.constexpr, V_U: tl.constexpr, V_BYTES: tl.constexpr,
    K_FOLDED: tl.constexpr, V_FOLDED: tl.constexpr, RAGGED: tl.constexpr,
    HAS_CAP: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_K_CHANNEL: tl.constexpr, HAS_V_CHANNEL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Attention of one key-value head's query rows over ``chunk`` tokens: normalised output and log-sum-exp (base 2)."""
    head = tl.program_id(1).to(tl.int64)
    split = tl.program_id(0)
    m, d, dv = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    m_inside, d_inside, dv_inside = m < rows, d < width, dv < v_width
    q_at = q_ptr + (head * rows + m)[:, None] * width + d[None, :]
    q = tl.load(q_at, mask=m_inside[:, None] & d_inside[None, :], other=0.0)
    if HAS_K_CHANNEL:
        channel = tl.load(k_channel_ptr + head * width + d, mask=d_inside, other=0.0)
        q = (q.to(tl.float32) * channel[None, :]).to(q.dtype)
    q_sum = tl.sum(q.to(tl.float32), 1)
    if RAGGED:
        begin = tl.load(ends_ptr + head - 1, mask=head > 0, other=0).to(tl.int64)
        tokens = (tl.load(ends_ptr + head) - begin).to(tl.int32)
        k_first, v_first = begin * k_stride_n, begin * v_stride_n
    else:
        k_first = (head // groups) * k_stride_b + (head % groups) * k_stride_g
        v_first = (head // groups) * v_stride_b + (head % groups) * v_stride_g
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    out = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    for start in range(split * chunk, tl.minimum(split * chunk + chunk, tokens), BLOCK_N):
        k = _load_tile(
            k_ptr, k_scale_ptr, k_zero_ptr, head, k_first, k_stride_n, start, tokens, width,
            k_group, k_units, K_LAYOUT, K_PER_ROW, K_BITS, K_U, K_BYTES, K_FOLDED, BLOCK_N, BLOCK_D,
        )  # fmt: skip
        n = start + tl.arange(0, BLOCK_N)
        logits = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision="tf32x3")
        if K_FOLDED:
            scale, zero = _token_grids(k_scale_ptr, k_zero_ptr, head, n, tokens)
            logits = logits * scale[None, :] + q_sum[:, None] * zero[None, :]
        logits *= scaling
        if HAS_CAP:
            logits = capped(logits, cap)
        if HAS_BIAS:
            bias = tl.load(bias_ptr + head * tokens + n, mask=n < tokens, other=0.0)
            logits += bias[None, :] * _LOG2_E
        logits = tl.where((n < tokens)[None, :], logits, float("-inf"))
        higher = tl.maximum(top, tl.max(logits, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)  # only empty entries so far
        p = tl.exp2(logits - base[:, None])
        shrink = tl.exp2(top - base)
        total = total * shrink + tl.sum(p, 1)
        v = _load_tile(
            v_ptr, v_scale_ptr, v_zero_ptr, head, v_first, v_stride_n, start, tokens, v_width,
            v_group, v_units, V_LAYOUT, V_PER_ROW, V_BITS, V_U, V_BYTES, V_FOLDED, BLOCK_N, BLOCK_DV,
        )  # fmt: skip
        out *= shrink[:, None]
        if V_FOLDED:
            scale, zero = _token_grids(v_scale_ptr, v_zero_ptr, head, n, tokens)
            out += tl.sum(p * zero[None, :], 1)[:, None]
            p = p * scale[None, :]
        out += tl.dot(p.to(q.dtype), v.to(q.dtype), input_precision="tf32x3")
        top = higher
    out = out / tl.where(total > 0, total, 1.0)[:, None]
    if HAS_V_CHANNEL:
        out *= tl.load(v_channel_ptr + head * v_width + dv, mask=dv_inside, other=0.0)[None, :]
    lse = tl.where(total > 0, top + tl.log2(tl.where(total > 0, total, 1.0)), float("-inf"))
    place = (head * splits + first_split + split) * rows + m
    tl.store(lse_ptr + place, lse, mask=m_inside)
    tl.store(out_ptr + place[:, None] * v_width + dv[None, :], out, mask=m_inside[:, None] & dv_inside[None, :])


@triton.jit
def _join_kernel(
    part_ptr, part_lse_ptr, out_ptr, lse_ptr, rows, v_width, splits,
    BLOCK_SPLITS: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Join the partial results of one query row."""
    head, row = (tl.program_id(0) // rows).to(tl.int64), tl.program_id(0) % rows
    dv = tl.arange(0, BLOCK_DV)
    top = float("-inf")
    for start in range(0, splits, BLOCK_SPLITS):
        i = start + tl.arange(0, BLOCK_SPLITS)
        lse_at = part_lse_ptr + (head * splits + i) * rows + row
        top = tl.maximum(top, tl.max(tl.load(lse_at, mask=i < splits, other=float("-inf")), 0))
    base = tl.where(top == float("-inf"), 0.0, top)
    total = 0.0
    out = tl.zeros([BLOCK_DV], tl.float32)
    for start in range(0, splits, BLOCK_SPLITS):
        i = start + tl.arange(0, BLOCK_SPLITS)
        at = (head * splits + i) * rows + row
        weight = tl.exp2(tl.load(part_lse_ptr + at, mask=i < splits, other=float("-inf")) - base)
        inside = (i < splits)[:, None] & (dv < v_width)[None, :]
        part = tl.load(part_ptr + at[:, None] * v_width + dv[None, :], mask=inside, other=0.0)
        total += tl.sum(weight, 0)
        out += tl.sum(weight[:, None] * part, 0)
    safe = tl.where(total > 0, total, 1.0)
    lse = tl.where(total > 0, (base + tl.log2(safe)) * _LN_2, float("-inf"))
    tl.store(lse_ptr + head * rows + row, lse)
    out_at = out_ptr + (head * rows + row) * v_width + dv
    tl.store(out_at, (out / safe).to(out_ptr.dtype.element_ty), mask=dv < v_width)


def decode_segments(q_BHTD: Tensor, segments: Sequence[Part], softmax: Softmax) -> tuple[Tensor, Tensor]:
    """See ``isoflop.kernels.decode_segments.decode_segments``."""
    if not segments:
        raise ValueError("decode_segments needs at least one segment")
    batch, heads, queries = q_BHTD.shape[:3]
    groups, v_width = segments[0].groups, operands(segments[0])[1].shape[-1]
    rows, all_groups = heads // groups * queries, batch * groups
    q = q_BHTD.contiguous()
    filled = [part for part in segments if part.tokens]
    out = torch.zeros(batch, heads, queries, v_width, dtype=q.dtype, device=q.device)
    lse = torch.full((batch, heads, queries), float("-inf"), dtype=torch.float32, device=q.device)
    if not filled:
        return out, lse
    counts = _splits(filled, all_groups, q.device)
    splits = sum(counts)
    part_out = torch.empty(all_groups, splits, rows, v_width, dtype=torch.float32, device=q.device)
    part_lse = torch.empty(all_groups, splits, rows, dtype=torch.float32, device=q.device)
    first = 0
    for part, count in zip(filled, counts, strict=True):
        _launch(q, part, softmax, part_out, part_lse, first, count)
        first += count
    _join_kernel[(all_groups * rows,)](
        part_out, part_lse, out, lse, rows, v_width, splits,
        BLOCK_SPLITS=16, BLOCK_DV=triton.next_power_of_2(v_width), enable_fp_fusion=True,
    )  # fmt: skip
    return softmax.with_sinks(out, lse)


def _block(part: Part) -> int:
    return _BLOCK_PACKED if any(isinstance(x, Packed) for x in operands(part)) else _BLOCK_DENSE


def _splits(parts: Sequence[Part], all_groups: int, device: torch.device) -> list[int]:
    """Programs per key-value head for each segment: enough to fill the GPU, in proportion to tokens, none without work.

    Of a ragged one, as many as fill it with what the heads have on average; the longest head has them all.
    """
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132
    wanted = _WAVES * processors / all_groups
    means = [len(p.k_RD) / all_groups if isinstance(p, RaggedPart) else p.tokens for p in parts]
    found = []
    for part, mean in zip(parts, means, strict=True):
        block = _block(part)
        usual, most = math.ceil(mean / block), math.ceil(part.tokens / block)
        count = max(1, min(usual, round(wanted * mean / sum(means))))
        found.append(math.ceil(most / math.ceil(usual / count)))
    return found


def _launch(q: Tensor, part: Part, softmax: Softmax, out: Tensor, lse: Tensor, first: int, count: int) -> None:
    """Attend to one segment; writes ``count`` partial results from ``first`` on."""
    all_groups, splits, rows, v_width = out.shape
    block, (k, v) = _block(part), operands(part)
    k_tensors, k_strides, k_constants = _operand(k, "K", block)
    v_tensors, v_strides, v_constants = _operand(v, "V", block)
    width, groups = q.shape[-1], part.groups
    ends: Tensor | None = None
    extras: list[Tensor | None] = [None] * 3
    if isinstance(part, RaggedPart):
        ends = part.ends_O
    else:
        extras = [part.log_bias_BGN, part.k_channel_scale_BGD, part.v_channel_scale_BGD]
    given = [q if x is None else x.float().contiguous() for x in extras]  # a pointer that is not read stands for None
    chunk = math.ceil(math.ceil(part.tokens / block) / count) * block
    _segment_kernel[(count, all_groups)](
        q, *k_tensors, *v_tensors, *given, q if ends is None else ends, out, lse, *k_strides, *v_strides,
        *factors(softmax), groups, rows, part.tokens, width, v_width, *_sizes(k, v), chunk, first, splits,
        **k_constants, **v_constants, K_FOLDED=k_constants["K_LAYOUT"] == _BY_TOKEN,
        # small scales times small probabilities would leave float16's range
        V_FOLDED=v_constants["V_LAYOUT"] == _BY_TOKEN and q.dtype != torch.float16, RAGGED=ends is not None,
        HAS_CAP=softmax.cap is not None, HAS_BIAS=extras[0] is not None, HAS_K_CHANNEL=extras[1] is not None, HAS_V_CHANNEL=extras[2] is not None,
        BLOCK_M=max(16, triton.next_power_of_2(rows)), BLOCK_N=block,
        BLOCK_D=max(16, triton.next_power_of_2(width)), BLOCK_DV=max(16, triton.next_power_of_2(v_width)),
        num_warps=4, num_stages=3, enable_fp_fusion=True,
    )  # fmt: skip


def _sizes(*operands: Tensor | Packed) -> list[int]:
    """Groups of keys and values, then units of their rows.

    Triton aligns loads by what it knows to be a multiple of 16, and it knows that of arguments only. So units are passed
    rather than computed from widths, and one group over the whole axis, of whatever length, as a longer round number.
    """
    packed = [x if isinstance(x, Packed) else None for x in operands]
    groups = [1 if x is None else x.group if x.group < x.shape[x.axis] else _WHOLE for x in packed]
    return [*groups, *(1 if x is None else math.ceil(x.shape[-1] / unit(x.bits)[0]) for x in packed)]


def _operand(
    x: Tensor | Packed, side: str, block: int
) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[int, ...], dict[str, Any]]:
    """(data, scales, zeros), strides over batch, heads and tokens (0 for those that there are none of), and the kernel's constants for keys or values."""
    if isinstance(x, Packed):
        tensors = (x.codes.contiguous(), x.scale.contiguous(), x.zero.contiguous())
        layout, bits, per_row = _layout(x, block), x.bits, x.axis == -1
        strides: tuple[int, ...] = (0, 0, 0)
    else:
        dense = x if x.stride(-1) == 1 else x.contiguous()
        tensors, layout, bits, per_row, strides = (dense, dense, dense), _DENSE, 8, True, dense.stride()[:-1]
        strides = (*[0] * (3 - len(strides)), *strides)
    count, size = unit(bits)
    constants = {"LAYOUT": layout, "PER_ROW": per_row, "BITS": bits, "U": count, "BYTES": size}
    return tensors, strides, {f"{side}_{name}": value for name, value in constants.items()}


def _layout(x: Packed, block: int) -> int:
    if x.axis == -1:
        return _BY_TOKEN if x.group == x.shape[-1] else _MIXED
    return _BY_CHANNEL if x.group % block == 0 or x.group >= x.shape[-2] else _MIXED
