"""Weighted column sums of the attention matrix, without ever holding the matrix.

Every score of this kind is one choice of weights: H2O weighs all queries 1, A2SF by age, SnapKV a last window, ZipCache its
probe queries (pass only those), and several choices at once share the two passes over queries and keys.

Shape suffixes: B batch, H query heads, G key-value heads, R query heads of a key-value head (H = G * R), T queries, S keys,
D head width, W sets of weights.
"""

from __future__ import annotations

import torch
from torch import Tensor

from isoflop.kernels.blocks import LEAST_ROWS, block_values
from isoflop.kernels.dispatch import operation
from isoflop.kernels.softmax import Softmax


def _supported(
    q_BHTD: Tensor,
    k_BGSD: Tensor,
    softmax: Softmax,
    weight_BWT: Tensor,
    q_positions_BT: Tensor,
    k_positions_BS: Tensor,
    valid_BS: Tensor | None = None,
) -> bool:
    return q_BHTD.shape[-1] <= 256 and weight_BWT.shape[1] <= 16 and q_BHTD.numel() > 0 and k_BGSD.numel() > 0


@operation("isoflop.kernels.column_scores_triton:column_scores", supports=_supported)
def column_scores(
    q_BHTD: Tensor,
    k_BGSD: Tensor,
    softmax: Softmax,
    weight_BWT: Tensor,
    q_positions_BT: Tensor,
    k_positions_BS: Tensor,
    valid_BS: Tensor | None = None,
) -> Tensor:
    """Sum the attention that each key receives over queries, by weight, and over the query heads of its head.

    ``S[b,g,w,s] = sum_t weight[b,w,t] * sum_{h in g} softmax_s(logit(q_h[t] . k_g[s]) + mask)[s]``. A query sees the
    valid keys at its own position and before; a query that sees none contributes nothing.

    Args:
        q_BHTD: queries after RoPE; a key-value head's query heads stand one after the other.
        k_BGSD: keys after RoPE.
        softmax: from products to weights; a sink takes its share of them.
        weight_BWT: 0 for queries that do not count (padding).
        q_positions_BT: position of each query; batch dimension 1 when all rows agree. Any subset, in any order.
        k_positions_BS: position of each key; batch dimension 1 when all rows agree.
        valid_BS: False for padding; None when nothing is padded.

    Returns:
        S_BGWS, float32. Softmax and sums are computed in float32.
    """
    given = weight_BWT, q_positions_BT, k_positions_BS, valid_BS
    batch, heads, queries, _ = q_BHTD.shape
    groups, keys = k_BGSD.shape[1], k_BGSD.shape[2]
    most = block_values(q_BHTD.device)
    if most // max(1, batch * heads * keys) >= min(LEAST_ROWS, queries):  # otherwise heads take turns
        return _summed(q_BHTD, k_BGSD, softmax, *given, most)
    of_group = [slice(first, first + heads // groups) for first in range(0, heads, heads // groups)]
    each = zip(of_group, k_BGSD.split(1, dim=1), strict=True)
    return torch.cat([_summed(q_BHTD[:, h], k_B1SD, softmax.of_heads(h), *given, most) for h, k_B1SD in each], dim=1)


def _summed(
    q_BHTD: Tensor,
    k_BGSD: Tensor,
    softmax: Softmax,
    weight_BWT: Tensor,
    q_positions_BT: Tensor,
    k_positions_BS: Tensor,
    valid_BS: Tensor | None,
    most: int,
) -> Tensor:
    """``column_scores`` in blocks of queries with at most so many probabilities."""
    batch, heads, queries, width = q_BHTD.shape
    groups, keys = k_BGSD.shape[1], k_BGSD.shape[2]
    q_BGRTD = q_BHTD.float().reshape(batch, groups, heads // groups, queries, width) * softmax.scaling
    k_BG1DS = k_BGSD.float().transpose(-1, -2).unsqueeze(2)
    scores_BGWS = k_BG1DS.new_zeros(batch, groups, weight_BWT.shape[1], keys)
    if not q_BHTD.numel() or keys == 0:
        return scores_BGWS
    rows = max(1, most // max(1, batch * heads * keys))
    for start, end in zip(range(0, queries, rows), _last_keys(q_positions_BT, k_positions_BS, rows), strict=True):
        block = slice(start, start + rows)
        seen_BTS = k_positions_BS[:, None, :end] <= q_positions_BT[:, block, None]
        if valid_BS is not None:
            seen_BTS = seen_BTS & valid_BS[:, None, :end]
        sees_BT1 = seen_BTS.any(-1, keepdim=True)  # other rows get an even softmax and the weight 0: no NaN arises
        logits_BGRTS = softmax.capped(q_BGRTD[:, :, :, block] @ k_BG1DS[..., :end])
        logits_BGRTS.masked_fill_((sees_BT1 & ~seen_BTS)[:, None, None], float("-inf"))
        p_BGRTS = softmax.weights(logits_BGRTS.flatten(1, 2)).unflatten(1, (groups, -1))
        weight_B1WT = (weight_BWT[:, :, block].float() * sees_BT1.transpose(-1, -2))[:, None]
        scores_BGWS[..., :end] += weight_B1WT @ p_BGRTS.sum(2)
    return scores_BGWS


def _last_keys(q_positions_BT: Tensor, k_positions_BS: Tensor, rows: int) -> list[int]:
    """For each block of query rows one past the last key that any of its queries may see, at least 1."""
    latest = [part.max() for part in q_positions_BT.split(rows, dim=1)]
    past = torch.arange(1, k_positions_BS.shape[1] + 1, device=k_positions_BS.device)
    return [int(end) for end in torch.stack([torch.where(k_positions_BS <= p, past, 1).max() for p in latest]).tolist()]
