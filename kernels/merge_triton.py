"""Triton half of ``isoflop.kernels.merge``. Neither kernel uses atomics, so results repeat bit by bit.

The similarity matrix is never written: a program keeps the best destination of its sources while it walks over all
destinations. Merging reads each token once: sources are sorted by destination beforehand (integers only), and a program adds
up one output row.

Shape suffixes: see ``isoflop.kernels.merge``.
"""

# mypy: disallow-untyped-defs=False
# (kernels are written in Triton's language, whose values have no Python types)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from isoflop.kernels.merge import check_mode, rows_of

_EPS = tl.constexpr(1e-12)


@triton.jit
def _match_kernel(
    a_ptr, b_ptr, valid_ptr, similarity_ptr, index_ptr,
    a_stride_b, a_stride_n, b_stride_b, b_stride_m, valid_stride_b, sources, destinations, width,
    HAS_VALID: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The best destination of a block of sources. Widths are walked in blocks, so that any metric fits."""
    batch = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
    n_inside = n < sources
    best = tl.full([BLOCK_N], float("-inf"), tl.float32)
    index = tl.zeros([BLOCK_N], tl.int32)
    for start in range(0, destinations, BLOCK_M):
        m = start + tl.arange(0, BLOCK_M).to(tl.int64)
        m_inside = m < destinations
        dots = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        a_norm = tl.zeros([BLOCK_N], tl.float32)
        b_norm = tl.zeros([BLOCK_M], tl.float32)
        for first in range(0, width, BLOCK_D):
            d = first + tl.arange(0, BLOCK_D)
            d_inside = (d < width)[None, :]
            a_at = a_ptr + batch * a_stride_b + n[:, None] * a_stride_n + d[None, :]
            a = tl.load(a_at, mask=n_inside[:, None] & d_inside, other=0.0)
            b_at = b_ptr + batch * b_stride_b + m[:, None] * b_stride_m + d[None, :]
            b = tl.load(b_at, mask=m_inside[:, None] & d_inside, other=0.0)
            dots += tl.dot(a, tl.trans(b), input_precision="tf32x3")
            a_norm += tl.sum(a.to(tl.float32) * a.to(tl.float32), 1)
            b_norm += tl.sum(b.to(tl.float32) * b.to(tl.float32), 1)
        cosine = dots * tl.rsqrt(tl.maximum(a_norm, _EPS))[:, None] * tl.rsqrt(tl.maximum(b_norm, _EPS))[None, :]
        if HAS_VALID:
            m_inside &= tl.load(valid_ptr + batch * valid_stride_b + m, mask=m_inside, other=0) != 0
        cosine = tl.where(m_inside[None, :], cosine, float("-inf"))
        here, where = tl.max(cosine, 1, return_indices=True, return_indices_tie_break_left=True)
        better = here > best  # strictly: of equals the first stays
        index = tl.where(better, start + where, index)
        best = tl.maximum(best, here)
    at = batch * sources + n
    tl.store(similarity_ptr + at, best, mask=n_inside)
    tl.store(index_ptr + at, index.to(tl.int64), mask=n_inside)


@triton.jit
def _merge_kernel(
    x_ptr, size_ptr, keep_ptr, source_ptr, begin_ptr, out_ptr, out_size_ptr,
    x_stride_b, x_stride_n, tokens, kept, sources, channels,
    MEAN: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One output row by one block of channels: a kept token and the sources that are sorted to it."""
    batch = tl.program_id(2).to(tl.int64)
    k = tl.program_id(0)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    c_inside = c < channels
    x_base = x_ptr + batch * x_stride_b
    size_base = size_ptr + batch * tokens
    token = tl.load(keep_ptr + batch * kept + k)
    size = tl.load(size_base + token).to(tl.float32)
    total = size
    weight = size if MEAN else 1.0
    out = tl.load(x_base + token * x_stride_n + c, mask=c_inside, other=0.0).to(tl.float32) * weight
    begin = tl.load(begin_ptr + batch * (kept + 1) + k)
    end = tl.load(begin_ptr + batch * (kept + 1) + k + 1)
    for r in range(begin, end):
        token = tl.load(source_ptr + batch * sources + r)
        size = tl.load(size_base + token).to(tl.float32)
        total += size
        weight = size if MEAN else 1.0
        out += tl.load(x_base + token * x_stride_n + c, mask=c_inside, other=0.0).to(tl.float32) * weight
    if MEAN:
        out = out / total
    at = out_ptr + (batch * kept + k) * channels + c
    tl.store(at, out.to(out_ptr.dtype.element_ty), mask=c_inside)
    if tl.program_id(1) == 0:
        tl.store(out_size_ptr + batch * kept + k, total.to(out_size_ptr.dtype.element_ty))


def bipartite_match(a_BND: Tensor, b_BMD: Tensor, valid_BM: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """See ``isoflop.kernels.merge.bipartite_match``."""
    if b_BMD.shape[1] == 0:
        raise ValueError("bipartite_match needs at least one destination")
    a, b = (x if x.stride(-1) == 1 else x.contiguous() for x in (a_BND, b_BMD))
    b = b.to(a.dtype)
    batch, sources, width = a.shape
    destinations = b.shape[1]
    valid = a if valid_BM is None else valid_BM.to(torch.int8).contiguous()
    similarity = torch.empty(batch, sources, dtype=torch.float32, device=a.device)
    index = torch.empty(batch, sources, dtype=torch.int64, device=a.device)
    largest = 64 if a.element_size() <= 2 else 32
    block = 16 if sources <= 16 else largest  # few sources: small tiles, more programs
    _match_kernel[(triton.cdiv(sources, block), batch)](
        a, b, valid, similarity, index, *a.stride()[:2], *b.stride()[:2], destinations, sources, destinations, width,
        HAS_VALID=valid_BM is not None, BLOCK_N=block, BLOCK_M=largest,
        BLOCK_D=min(64, max(16, triton.next_power_of_2(width))), num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return similarity, index


def merge_tokens(
    x_BNC: Tensor, size_BN1: Tensor, keep_BK: Tensor, src_BR: Tensor, dst_BR: Tensor, mode: str = "mean"
) -> tuple[Tensor, Tensor]:
    """See ``isoflop.kernels.merge.merge_tokens``."""
    check_mode(mode)
    x = x_BNC if x_BNC.stride(-1) == 1 else x_BNC.contiguous()
    batch, tokens, channels = x.shape
    kept, sources = keep_BK.shape[1], src_BR.shape[1]
    row, order = rows_of(keep_BK, dst_BR, tokens).sort(dim=1, stable=True)
    bounds = torch.arange(kept + 1, device=x.device).expand(batch, -1).contiguous()
    begin = torch.searchsorted(row, bounds)
    out = torch.empty(batch, kept, channels, dtype=x.dtype, device=x.device)
    size = torch.empty(batch, kept, 1, dtype=size_BN1.dtype, device=x.device)
    block = min(1024, triton.next_power_of_2(channels))
    _merge_kernel[(kept, triton.cdiv(channels, block), batch)](
        x, size_BN1.contiguous(), keep_BK.contiguous(), src_BR.gather(1, order), begin, out, size,
        *x.stride()[:2], tokens, kept, sources, channels,
        MEAN=mode == "mean", BLOCK_C=block, num_warps=4 if block > 256 else 1, enable_fp_fusion=True,
    )  # fmt: skip
    return out, size
