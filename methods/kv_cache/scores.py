"""Scores of cached tokens by the attention they receive: weighted column sums over chosen queries.

A method's score is a choice of queries and of their weights; ``isoflop.kernels.column_scores`` does the sums and never
holds the attention matrix. The query heads of a key-value head are added up.

Shape suffixes: B batch, H query heads, G key-value heads, T tokens, P chosen queries, N tokens of a segment, D head width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from isoflop.kernels.column_scores import column_scores
from isoflop.kernels.decode_segments import decode_segments
from isoflop.models.hooks.attention import AttentionCall
from isoflop.models.segments import LayerStore, segment_logits

_SMALLEST = 2.0**-150  # rounds to 0 in float32


@dataclass(frozen=True, eq=False)
class QueryWeights:
    """Queries whose attention counts.

    Attributes:
        weight_BP: how much each counts; 0 for padding.
        index_BP: their columns in the call; None for all of its last P columns.
    """

    weight_BP: Tensor
    index_BP: Tensor | None = None


def attention_scores(call: AttentionCall, queries: QueryWeights) -> Tensor:
    """S_BGT = sum over the chosen queries and a head's group of weight times attention, float32."""
    batch, heads, length, width = call.q_BHTD.shape
    order_BT = call.order_BT.expand(batch, -1)
    if queries.index_BP is None:
        chosen = queries.weight_BP.shape[1]
        q_BHPD, positions_BP = call.q_BHTD[:, :, length - chosen :], order_BT[:, length - chosen :]
    else:
        index_BHPD = queries.index_BP[:, None, :, None].expand(batch, heads, -1, width)
        q_BHPD, positions_BP = call.q_BHTD.gather(2, index_BHPD), order_BT.gather(1, queries.index_BP)
    scores_BG1T = column_scores(
        q_BHPD, call.k_BGTD, call.softmax, queries.weight_BP[:, None], positions_BP, order_BT, call.valid_BT
    )
    return scores_BG1T[:, :, 0]


def forgetting(call: AttentionCall, alpha: float) -> QueryWeights:
    """Every query, weighted by ``alpha`` to the power of its age (0 for the last); alpha 1 is H2O, alpha 0 the last query.

    Ages are of queries, not of keys, and powers are taken in float32 (A2SF, arXiv 2407.20485). Queries so old that nothing
    is left of their weight are left out.
    """
    order_BT = call.order_BT.expand(call.q_BHTD.shape[0], -1)
    counting = slice(
        order_BT.shape[1] - int(min(order_BT.shape[1], _remembered(alpha))), None
    )  # padding is on the left
    age_BP = (order_BT.amax(-1, keepdim=True) - order_BT)[:, counting]
    power_BP = torch.tensor(alpha, dtype=torch.float32, device=age_BP.device) ** age_BP
    return QueryWeights(real(call)[:, counting] * power_BP)


def _remembered(alpha: float) -> float:
    """Queries whose weight is more than nothing in float32, the last one included."""
    if alpha >= 1:
        return math.inf
    return 1 if alpha <= 0 else math.ceil(math.log(_SMALLEST) / math.log(alpha)) + 2


def window(call: AttentionCall, size: int) -> QueryWeights:
    """The last ``size`` queries, each with weight 1 (all of them in shorter prompts)."""
    return QueryWeights(real(call)[:, -size:])


def real(call: AttentionCall) -> Tensor:
    """1 at real tokens and 0 at padding, (B, T), float32."""
    if call.valid_BT is None:
        return torch.ones(call.q_BHTD.shape[0], call.q_BHTD.shape[2], device=call.q_BHTD.device)
    return call.valid_BT.float()


def newest_attention(query: AttentionCall, store: LayerStore) -> Tensor:
    """What the recent tokens receive from the newest query (T = 1), a softmax over the whole cache, (B, G, N).

    Added up over the query heads of each key-value head, in float32. The packed part of the cache is read as codes.
    """
    parts = [segment.read_part() for segment in store.all() if segment.tokens]
    lse_BH1 = decode_segments(query.q_BHTD, parts, query.softmax)[1]
    logits_BH1N = segment_logits(query.q_BHTD, store.recent, query.softmax, query.order_BT)
    return over_group((logits_BH1N - lse_BH1[..., None]).exp()[:, :, 0], query.k_BGTD.shape[1])


def over_group(p_BHN: Tensor, groups: int) -> Tensor:
    """Attention of one query per row added up over the query heads of each key-value head, (B, G, N)."""
    batch, heads, length = p_BHN.shape
    return p_BHN.reshape(batch, groups, heads // groups, length).sum(2)
