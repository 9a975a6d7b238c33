"""TidalDecode: full attention in few layers selects tokens, and the layers behind them read those (arXiv 2410.05076).

Shape suffixes: B batch, H query heads, G key-value heads, S heads that choose for themselves, T queries, N cached tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from torch import Tensor

from isoflop.core.errors import Infeasible
from isoflop.core.knobs import Knob
from isoflop.methods.base import METHODS
from isoflop.methods.kv_cache.base import full_layers
from isoflop.methods.sparse_attention.base import SparseAttention
from isoflop.models.base import ModelInfo
from isoflop.models.hooks.attention import AttentionCall
from isoflop.models.segments import LayerStore, segment_logits

if TYPE_CHECKING:
    from isoflop.methods.kv_cache.probe import KvCacheProbe

INDEX_BYTES = 4
"""Of a chosen token's place, which every layer that reads by it fetches."""


@METHODS.register("tidaldecode")
@dataclass(frozen=True)
class TidalDecode(SparseAttention):
    """The tokens that matter to one layer matter to those behind it: they are chosen once or twice per token, and reused.

    The first ``sparse_start`` layers read everything. So does the next one, and leaves to the layers behind it the places of its
    largest products of query and key; ``correction`` does the same once more further up. Every token chooses anew. The released
    recipes correct at layer 13 of 32; its simulation does not force the newest token into the set, its kernels do, and so
    does the default here.
    """

    paper: ClassVar[str] = "arXiv 2410.05076"
    shares_choices: ClassVar[bool] = True

    sparse_start: Annotated[int, Knob(low=0, high=256, unit="layers", doc="first layers that read all tokens and select none; the next one selects")] = 2  # fmt: skip
    correction: Annotated[int, Knob(low=0, high=256, doc="number of a later layer, from 0, that selects anew; 0: none")] = 0  # fmt: skip
    select_per: Annotated[str, Knob(choices=("query-head", "kv-head", "layer"), doc="who chooses tokens; a group, or all heads, by their summed attention")] = "query-head"  # fmt: skip
    force_recent: Annotated[int, Knob(low=0, high=4096, unit="tokens", doc="newest tokens always among those read, as far as the budget goes")] = 1  # fmt: skip
    force_sinks: Annotated[int, Knob(low=0, high=4096, unit="tokens", doc="first tokens always among those read, as far as the budget goes behind the newest")] = 0  # fmt: skip

    @classmethod
    def probe(cls) -> KvCacheProbe:
        """The family's, whose four layers have room for a correction behind a selection further down."""
        from isoflop.methods.kv_cache.probe import KvCacheProbe

        return KvCacheProbe(
            cost="read", layers=4, tried={"correction": [{"sparse_start": 0, "correction": layer} for layer in (0, 2)]}
        )

    def check(self, info: ModelInfo) -> None:
        """Refuse layers that do not exist, and a selection that no layer uses."""
        super().check(info)
        layers, full = info.geometry["layers"], full_layers(info)
        first = full[:-1]
        second = [layer for layer in first if layer > self.sparse_start]
        for knob, layer, allowed in (
            ("sparse_start", self.sparse_start, first),
            ("correction", self.correction, second),
        ):
            if layer not in allowed and (knob == "sparse_start" or layer):
                behind = f" behind sparse_start = {self.sparse_start}" if knob == "correction" else ""
                raise Infeasible(
                    f"method tidaldecode: {knob} = {layer} is no layer of {layers}{behind} that attends to all tokens and has another "
                    f"such behind it; allowed: {', '.join(map(str, allowed)) or 'none of this model'}"
                    f"{', or 0 for none' if behind else ''}"
                )

    def dense(self, layer: int) -> bool:
        """The first layers, and those that select."""
        return layer < self.sparse_start or self.chooses(layer)

    def chooses(self, layer: int) -> bool:
        """The layer behind the dense ones, and the correction."""
        return layer in self._selecting()

    def _selecting(self) -> Sequence[int]:
        return (self.sparse_start, self.correction) if self.correction else (self.sparse_start,)

    def index(self, tokens: AttentionCall, store: LayerStore, prepared: Any) -> None:
        """Nothing: whole keys are read where tokens are chosen."""

    def approximate(self, query: AttentionCall, store: LayerStore, prepared: Any) -> Tensor:
        """Exact logits per query head, (B, H, T, N), or attention added up over a group, or over the layer, (B, G, T, N)."""
        cached = store.segments[0]
        scores_BSTN = segment_logits(query.q_BHTD, cached, query.softmax, query.order_BT)
        if self.select_per != "query-head":
            groups = query.k_BGTD.shape[1]
            p_BHTN = query.softmax.weights(scores_BSTN).nan_to_num()
            scores_BSTN = p_BHTN.unflatten(1, (groups, -1)).sum(2)
            if self.select_per == "layer":
                scores_BSTN = scores_BSTN.sum(1, keepdim=True).expand_as(scores_BSTN)
        counts_BT = self._counts(query)
        recent_BT = counts_BT.clamp(max=self.force_recent)
        sinks_BT = (counts_BT - recent_BT).clamp(max=self.force_sinks)
        positions_BN = cached.positions_BGN[:, 0]
        newest_BTN = positions_BN[:, None] > (query.order_BT - recent_BT)[..., None]
        first_BTN = positions_BN[:, None] < sinks_BT[..., None]
        return scores_BSTN.masked_fill((newest_BTN | first_BTN)[:, None], float("inf"))

    def read_bytes(self, store: LayerStore, fetched: list[Tensor], dense_bits: int) -> float:
        """Also the places of the chosen tokens."""
        return super().read_bytes(store, fetched, dense_bits) + INDEX_BYTES * store.state.get("chosen", 0)
