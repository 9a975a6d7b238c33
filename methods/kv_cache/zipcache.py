"""ZipCache: more bits for tokens that normalised attention finds salient (arXiv 2405.14256).

Shape suffixes: B batch, G key-value heads, T tokens, P probe queries, N tokens of a block.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from isoflop.core.errors import Infeasible
from isoflop.core.knobs import Knob
from isoflop.methods.base import METHODS
from isoflop.methods.kv_cache.chance import uniform
from isoflop.methods.kv_cache.scores import QueryWeights, attention_scores, newest_attention, real
from isoflop.methods.kv_cache.select import lengths
from isoflop.methods.kv_cache.two_tier import TwoTier
from isoflop.models.base import ModelInfo
from isoflop.models.hooks.attention import AttentionCall
from isoflop.models.segments import LayerStore


@METHODS.register("zipcache")
@dataclass(frozen=True)
class ZipCache(TwoTier):
    """The most salient tokens of each head at ``bits_hi``, the others at ``bits_lo``.

    1. Probe queries: the newest ``probe_recent`` of the prompt, and ``probe_random`` of it drawn from the earlier ones
       (without replacement; the released code draws with it).
    2. Saliency of token j: attention from the probes, over a key-value head's query heads, divided by the number of
       probes that can see j (``probe_nnz``, the paper), by the number of all queries that can (``rows_total``, the
       released code, which favours recent tokens), or by nothing (``none``, accumulated attention).
    3. Keys: one grid per channel and tier. Values (``cst``): channels divided by the root of their largest magnitude
       over both tiers, then one grid per token and head; ``token`` leaves the channels as they are; ``group32`` has a
       grid per 32 channels.
    4. After ``streaming_gap`` new tokens, the newest query's attention to them decides which are salient, as in the
       released code: a softmax over the whole cache, added up over the group's heads, of which the new tokens' part is
       taken. A head that looks elsewhere thus has no say. They become a block of their own; the released code packs older tokens,
       which were packed before, once more.

    Tiers hold their tokens in any order, so no bitmap of the classes has to stay resident.
    """

    paper: ClassVar[str] = "arXiv 2405.14256"
    version: ClassVar[str] = "2"

    probe_recent: Annotated[
        float, Knob(low=0.0, high=1.0, doc="share of the queries, the newest ones, that are probes")
    ] = 0.05
    probe_random: Annotated[
        float, Knob(low=0.0, high=1.0, doc="share of the queries drawn as probes from the others")
    ] = 0.05
    normalizer: Annotated[
        str,
        Knob(choices=("probe_nnz", "rows_total", "none"), doc="what a token's attention from the probes is divided by"),
    ] = "probe_nnz"

    def check(self, info: ModelInfo) -> None:
        """Refuse saliency without probes."""
        super().check(info)
        if self.probe_recent + self.probe_random == 0:
            raise Infeasible(
                "method zipcache: probe_recent = 0 and probe_random = 0 leave no probe query; raise one of them"
            )

    def saliency(self, prompt: AttentionCall) -> Tensor:
        """Normalised attention from the probes, (B, G, T)."""
        queries = probes(prompt, self.probe_recent, self.probe_random)
        return attention_scores(prompt, queries) / self.seen_by(prompt, queries)[:, None]

    def new_saliency(self, query: AttentionCall, store: LayerStore) -> Tensor:
        """Attention of the newest query, which sees the whole cache, (B, G, N)."""
        return newest_attention(query, store)

    def seen_by(self, prompt: AttentionCall, queries: QueryWeights) -> Tensor:
        """What each token's score is divided by, (B, T); at least 1."""
        order_BT = prompt.order_BT.expand(prompt.q_BHTD.shape[0], -1)
        if self.normalizer == "none":
            return torch.ones_like(order_BT, dtype=torch.float32)
        if self.normalizer == "rows_total":
            counts_BT = order_BT.amax(-1, keepdim=True) + 1 - order_BT
        else:
            assert queries.index_BP is not None
            probes_BT = torch.zeros_like(order_BT, dtype=queries.weight_BP.dtype)
            probes_BT.scatter_add_(1, order_BT.gather(1, queries.index_BP), queries.weight_BP)
            later_BT = probes_BT.flip(-1).cumsum(-1).flip(-1)  # probes from each number in the row on
            counts_BT = later_BT.gather(1, order_BT)
        return counts_BT.float().clamp(min=1.0)


def probes(call: AttentionCall, recent: float, random: float) -> QueryWeights:
    """The newest queries, and random earlier ones: both shares of the row's length, rounded up and down; at least one.

    Drawn without replacement and the same for all heads of a layer.
    """
    seen = lengths(call)
    device = call.q_BHTD.device
    newest = [min(n, max(math.ceil(recent * n - 1e-9), 0 if random else 1)) for n in seen]
    drawn = [min(n - r, max(math.floor(random * n + 1e-9), 1 - r)) for n, r in zip(seen, newest, strict=True)]
    order_BT = call.order_BT.expand(len(seen), -1)
    after_B1 = torch.tensor([n - r for n, r in zip(seen, newest, strict=True)], device=device)[:, None]
    luck_BT = uniform(call, "zipcache probes")[:, 0]
    luck_BT = luck_BT.masked_fill(real(call) == 0, -1.0).masked_fill(order_BT >= after_B1, 2.0)
    counts_B1 = torch.tensor([r + d for r, d in zip(newest, drawn, strict=True)], device=device)[:, None]
    index_BP = luck_BT.sort(dim=-1, descending=True, stable=True).indices[:, : int(counts_B1.max())]
    weight_BP = (torch.arange(index_BP.shape[1], device=device) < counts_B1).float()
    return QueryWeights(weight_BP, index_BP)
