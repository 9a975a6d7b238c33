"""Weighted column sums of the attention matrix, without ever holding the matrix.

Every score of this kind is one choice of weights: H2O weighs all queries 1, A2SF by age, SnapKV a last window, ZipCache its
probe queries (pass only those), and several choices at once share the two passes over queries and keys.

Shape suffixes: B batch, H query heads, G key-value heads, R query heads of a key-value head (H = G * R), T queries, S keys,
D head width, W sets of weights.
"""

from __future__ import annotations

import torch
from torch import Tensor

from isoflop.kernels.dispatch import operation

_BLOCK_VALUES = 1 << 24
"""Probabilities that the twin holds at a time."""


def _supported(
    q_BHTD: Tensor,
    k_BGSD: Tensor,
    scaling: float,
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
    scaling: float,
    weight_BWT: Tensor,
    q_positions_BT: Tensor,
    k_positions_BS: Tensor,
    valid_BS: Tensor | None = None,
) -> Tensor:
    """Sum the attention that each key receives over queries, by weight, and over the query heads of its head.

    ``S[b,g,w,s] = sum_t weight[b,w,t] * sum_{h in g} softmax_s(q_h[t] . k_g[s] * scaling + mask)[s]``. A query sees the
    valid keys at its own position and before; a query that sees none contributes nothing.

    Args:
        q_BHTD: queries after RoPE; a key-value head's query heads stand one after the other.
        k_BGSD: keys after RoPE.
        scaling: factor on the logits.
        weight_BWT: 0 for queries that do not count (padding).
        q_positions_BT: position of each query; batch dimension 1 when all rows agree. Any subset, in any order.
        k_positions_BS: position of each key; batch dimension 1 when all rows agree.
        valid_BS: False for padding; None when nothing is padded.

    Returns:
        S_BGWS, float32. Softmax and sums are computed in float32.
    """
    batch, heads, queries, width = q_BHTD.shape
    groups, keys = k_BGSD.shape[1], k_BGSD.shape[2]
    q_BGRTD = q_BHTD.reshape(batch, groups, heads // groups, queries, width)
    keys_BG1DS = k_BGSD.float().transpose(-1, -2).unsqueeze(2)
    scores_BGWS = q_BHTD.new_zeros(batch, groups, weight_BWT.shape[1], keys, dtype=torch.float32)
    for rows in torch.arange(queries, device=q_BHTD.device).split(
        max(1, _BLOCK_VALUES // max(1, batch * heads * keys))
    ):
        seen_BTS = k_positions_BS[:, None, :] <= q_positions_BT[:, rows, None]
        if valid_BS is not None:
            seen_BTS = seen_BTS & valid_BS[:, None, :]
        seen_B11TS = seen_BTS[:, None, None]
        logits_BGRTS = (q_BGRTD[:, :, :, rows].float() @ keys_BG1DS) * scaling
        p_BGRTS = logits_BGRTS.masked_fill(~seen_B11TS, float("-inf")).softmax(-1)
        p_BGTS = p_BGRTS.masked_fill(~seen_B11TS, 0.0).sum(2)  # rows that see nothing are NaN before this
        scores_BGWS += weight_BWT[:, None, :, rows].float() @ p_BGTS
    return scores_BGWS
