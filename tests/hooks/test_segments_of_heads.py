"""Segments over some of the heads: each key-value head reads what covers it, by brute force head by head."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from isoflop.kernels.quant import quant_pack
from isoflop.kernels.softmax import Softmax
from isoflop.models.segments import (
    DenseSegment,
    PackedSegment,
    Segment,
    attend_segments,
    decode_one,
    stored_bytes,
)

B, H, G, D, N, RECENT = 2, 6, 3, 8, 11, 4
FULL = torch.tensor([False, True, False])
SCALING = 0.4
SOFTMAXES = [Softmax(SCALING), Softmax(SCALING, cap=0.7, sinks_H=torch.linspace(-1.0, 2.0, H))]


def dense(tokens: int, seed: int, start: int, bias: bool = False) -> DenseSegment:
    rng = torch.Generator().manual_seed(seed)
    k, v = torch.randn(2, B, G, tokens, D, generator=rng)
    log_bias = None
    if bias:  # padding in the first row, and an entry that stands for three tokens
        log_bias = torch.zeros(B, G, tokens)
        log_bias[0, :, 0], log_bias[1, :, 1] = float("-inf"), 3.0**0.5
    return DenseSegment(torch.arange(start, start + tokens).expand(B, G, tokens), log_bias, k, v)


def banks(packed: bool) -> list[Segment]:
    """One head keeps all of the prompt, two keep its last three tokens, all of them the recent ones."""
    whole = dense(N, 0, 0, bias=True)
    full = whole.of_heads(FULL)
    last = DenseSegment(
        whole.positions_BGN[:, :, -3:], whole.log_bias_BGN[:, :, -3:], whole.k_BGND[:, :, -3:], whole.v_BGND[:, :, -3:]
    )  # type: ignore[index]
    short: Any = last.of_heads(~FULL)
    if packed:
        k, v = (quant_pack(x, 8, -1, D) for x in (short.k_BGND, short.v_BGND))
        short = PackedSegment(short.positions_BGN, short.log_bias_BGN, k, v, heads_G=~FULL)
    return [full, short, dense(RECENT, 1, N)]


def by_hand(q_BHTD: Tensor, segments: list[Segment], order_T: Tensor, softmax: Softmax) -> Tensor:
    """Head by head, query by query, entry by entry, in double precision."""
    out = torch.zeros(*q_BHTD.shape, dtype=torch.float64)
    for b, h, t in torch.cartesian_prod(*(torch.arange(n) for n in q_BHTD.shape[:3])).tolist():
        head, logits, values = h // (H // G), [], []
        for segment in segments:
            covered = list(range(G)) if segment.heads_G is None else segment.heads_G.nonzero()[:, 0].tolist()
            if head not in covered:
                continue
            g = covered.index(head)
            for n in range(segment.tokens):
                if segment.positions_BGN[b, g, n] <= order_T[t]:
                    bias = 0.0 if segment.log_bias_BGN is None else float(segment.log_bias_BGN[b, g, n])
                    key = segment.keys()[b, g, n].double()
                    logit = float(q_BHTD[b, h, t].double() @ key) * SCALING
                    logits.append((softmax.cap * math.tanh(logit / softmax.cap) if softmax.cap else logit) + bias)
                    values.append(segment.values()[b, g, n].double())
        if softmax.sinks_H is not None:
            logits.append(float(softmax.sinks_H[h]))
            values.append(torch.zeros(D, dtype=torch.float64))
        p = torch.tensor(logits, dtype=torch.float64).softmax(0)
        out[b, h, t] = p @ torch.stack(values)
    return out


@pytest.mark.parametrize("softmax", SOFTMAXES)
@pytest.mark.parametrize("packed", [False, True])
def test_every_head_reads_what_covers_it(packed: bool, softmax: Softmax) -> None:
    segments = banks(packed)
    q = torch.randn(B, H, RECENT, D, generator=torch.Generator().manual_seed(2))
    order = torch.arange(N, N + RECENT)
    expected = by_hand(q, segments, order, softmax)
    found, p_BHTN = attend_segments(q, segments, softmax, order[None])
    torch.testing.assert_close(found.transpose(1, 2).double(), expected, atol=1e-5, rtol=1e-5)
    if softmax.plain:
        torch.testing.assert_close(p_BHTN.sum(-1), torch.ones(B, H, RECENT))
    else:
        assert (p_BHTN.sum(-1) < 1).all()
    others = ~FULL.repeat_interleave(H // G)
    assert not p_BHTN[:, others, :, :N].any()
    one = decode_one(q[:, :, -1:], segments, softmax)
    torch.testing.assert_close(one.transpose(1, 2).double(), expected[:, :, -1:], atol=1e-5, rtol=1e-5)


def test_segments_over_heads_alone_join_to_the_whole() -> None:
    """Cut by heads, nothing else: the result, also where no segment covers all heads, is that of the uncut one."""
    whole = dense(N, 0, 0, bias=True)
    parts: list[Segment] = [whole.of_heads(FULL), whole.of_heads(~FULL)]
    q = torch.randn(B, H, 1, D, generator=torch.Generator().manual_seed(2))
    for cut in (parts, parts[::-1]):
        torch.testing.assert_close(decode_one(q, cut, SOFTMAXES[1]), decode_one(q, [whole], SOFTMAXES[1]))
        found, _ = attend_segments(q, cut, SOFTMAXES[1], torch.tensor([[N]]))
        torch.testing.assert_close(found, attend_segments(q, [whole], SOFTMAXES[1], torch.tensor([[N]]))[0])


def test_only_the_heads_that_a_segment_covers_cost_bytes() -> None:
    whole = dense(N, 0, 0)
    full, short = whole.of_heads(FULL), whole.of_heads(~FULL)
    token = 2 * 16 / 8 * D  # keys and values of one token of one head at 16 bits
    assert stored_bytes(full.tensors(), 16) == B * N * token
    assert stored_bytes(short.tensors(), 16) == B * 2 * N * token
    short.append(*(x[:, :, :1] for x in (whole.k_BGND, whole.v_BGND)), whole.positions_BGN[:, :, :1] + N)
    assert stored_bytes(short.tensors(), 16) == B * 2 * (N + 1) * token
    assert torch.equal(short.k_BGND[:, :, -1], whole.k_BGND[:, ~FULL, 0])
    assert (full.tokens, short.tokens) == (N, N + 1)
