"""Attention to the first tokens and the newest ones, as a mask: of a whole text, and of tokens behind a cache.

Shape suffixes: B batch, H query heads, G key-value heads, T tokens of a pass, N cached tokens, D head width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from isoflop.methods.kv_cache.rows import real_part, rows_alike
from isoflop.models.hooks.attention import AttentionCall

LEAST_BLOCK = 256
"""Queries that go through the window at once, at least."""


def streaming_attention(call: AttentionCall, sinks: int, recent: int) -> Tensor:
    """Each query sees the first ``sinks`` tokens and the newest ``recent``, itself included, (B, T, H, D); zeros at padding.

    Blocks of queries with the keys that they see: memory grows with tokens, not with their square.
    """
    batch, heads, length, _ = call.q_BHTD.shape
    out_BTHD = call.v_BGTD.new_zeros(batch, length, heads, call.v_BGTD.shape[-1])
    for rows, columns in rows_alike(call):
        part = real_part(call, rows, columns)
        out_BTHD[rows, columns] = _in_blocks(part, sinks, recent)
    return out_BTHD


def _in_blocks(call: AttentionCall, sinks: int, recent: int) -> Tensor:
    device, length = call.q_BHTD.device, call.q_BHTD.shape[2]
    step, outs = max(LEAST_BLOCK, recent), []
    for start in range(0, length, step):
        stop = min(start + step, length)
        first = max(0, start - recent + 1)
        keys_N = torch.cat((torch.arange(min(sinks, first), device=device), torch.arange(first, stop, device=device)))
        sees_TN = sees(torch.arange(start, stop, device=device)[:, None], keys_N, sinks, recent)
        k_BGND, v_BGND = call.k_BGTD[:, :, keys_N], call.v_BGTD[:, :, keys_N]
        outs.append(call.softmax.attend(call.q_BHTD[:, :, start:stop], k_BGND, v_BGND, sees_TN[None, None]))
    return torch.cat(outs, dim=2).transpose(1, 2)


def sees(queries: Tensor, keys: Tensor, sinks: int, recent: int) -> Tensor:
    """Whether tokens at some positions see those at others: the first ``sinks``, and the newest ``recent``, themselves included."""
    return (keys <= queries) & ((keys < sinks) | (keys > queries - recent))
