"""Double Sparsity: few key channels choose the few tokens to read (arXiv 2408.07092).

Shape suffixes: B batch, H query heads, G key-value heads, S heads with labels of their own (H or G), T queries, N cached
tokens, D head width, r label channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from torch import Tensor

from isoflop.core.errors import Infeasible
from isoflop.core.knobs import Knob
from isoflop.core.stage import Stage, StageContext
from isoflop.kernels.quant import Packed, quant_pack, unpack
from isoflop.methods.base import METHODS, Method
from isoflop.methods.calibration import OnModel
from isoflop.methods.kv_cache.quantised import EXACT
from isoflop.methods.kv_cache.token_tiers import appended
from isoflop.methods.sparse_attention.base import DenseFirst, visible
from isoflop.methods.sparse_attention.labels import Contributions, LabelStage, contributions, pick, ranked
from isoflop.models.base import Model, ModelInfo
from isoflop.models.growing import Rooms
from isoflop.models.hooks.attention import AttentionCall
from isoflop.models.segments import LayerStore


@METHODS.register("double-sparsity")
@dataclass(frozen=True)
class DoubleSparsity(DenseFirst):
    """A label cache holds a few channels of every key; query labels times key labels choose the tokens that are read.

    1. Calibration: channels of each head in order of the mean of |q k| over text, each token's query with its own key
       after RoPE (``qk``), or of |q| or |k| alone (also after RoPE here, as the labels are; the released code takes
       these two before it).
    2. Every cached token keeps its first head_width / group_factor channels as labels, at ``label_bits``.
    3. A query's labels, quantised alike, give approximate logits; the best ``k_share`` of the tokens are read and attended to
       exactly.
    4. The first ``dense_layers`` layers read everything and have no labels. Prompts are read exactly.

    The whole cache stays, and the labels come on top: ``ratio`` is that of bytes read, ``kv_store_ratio`` is below 1.
    Here all calibration tokens count alike. In the released calibration every block of text replaces the ``qk`` of the one before,
    so that the last block alone decides, while |q| and |k| add up over all of them. Released label caches are per query
    head (``label_per: query-head``). With ``group_factor: 1`` and 16 bits the choice is exact.
    """

    paper: ClassVar[str] = "arXiv 2408.07092"
    calibrates: ClassVar[bool] = True

    group_factor: Annotated[int, Knob(low=1, high=256, log=True, doc="key channels per label channel")] = 8
    label_bits: Annotated[
        int, Knob(choices=(2, 4, 8, 16), unit="bits", doc="of each label; 16 keeps them as they are")
    ] = 16
    channel: Annotated[
        str,
        Knob(
            choices=("qk", "q", "k", "random", "worst"),
            doc="which channels are labels: the largest mean |qk|, |q| or |k|; controls",
        ),
    ] = "qk"
    label_per: Annotated[
        str, Knob(choices=("kv-head", "query-head"), doc="whose channel lists and labels are kept")
    ] = "kv-head"
    select_per: Annotated[
        str, Knob(choices=("query-head", "kv-head"), doc="who chooses tokens; a group by its summed attention")
    ] = "query-head"
    force_recent: Annotated[
        int,
        Knob(low=0, high=4096, unit="tokens", doc="newest tokens always among those read, as far as the budget goes"),
    ] = 0
    texts: Annotated[int, Knob(low=1, high=65536, log=True, doc="calibration sequences")] = 64

    def check(self, info: ModelInfo) -> None:
        """Refuse label channels fewer than one."""
        super().check(info)
        width = info.geometry.get("head_width", info.geometry["width"] // info.geometry["heads"])
        if self.group_factor > width:
            raise Infeasible(
                f"method double-sparsity: group_factor = {self.group_factor} leaves no label channel of {width}; allowed: 1 … {width}"
            )

    def prepare(
        self, info: ModelInfo, weights: Stage | None, seed: int, trained_with: tuple[Method, ...] = ()
    ) -> Stage | None:
        """The calibration; none for random channels."""
        self.check(info)
        if self.channel == "random":
            return None
        return LabelStage(**OnModel.source(info, weights, seed, trained_with), texts=self.texts)

    def calibrate(self, model: Model, ctx: StageContext, seed: int) -> Contributions:
        """What the stage computes, on a model that is at hand."""
        return contributions(model, ctx, self.texts, seed)

    def index(self, tokens: AttentionCall, store: LayerStore, prepared: Any) -> None:
        """Append the tokens' labels."""
        k_BSTD = tokens.k_BGTD
        if self.label_per == "query-head":
            k_BSTD = k_BSTD.repeat_interleave(tokens.q_BHTD.shape[1] // k_BSTD.shape[1], dim=1)
        channels_Sr = self._channels(tokens, store, prepared)
        new = self._packed(pick(k_BSTD, channels_Sr))
        labels, rooms = store.state.get("labels"), store.state.setdefault("rooms", Rooms())
        store.state["labels"] = new if labels is None else joined(labels, new, rooms)
        store.extra = list(parts(store.state["labels"]))

    def approximate(self, query: AttentionCall, store: LayerStore, prepared: Any) -> Tensor:
        """Label logits per query head, (B, H, T, N), or attention by them added up over a group, (B, G, T, N)."""
        channels_Sr = self._channels(query, store, prepared)
        heads, groups = query.q_BHTD.shape[1], query.k_BGTD.shape[1]
        channels_Hr = channels_Sr.repeat_interleave(heads // channels_Sr.shape[0], dim=0)
        q_BHTr = dense(self._packed(pick(query.q_BHTD, channels_Hr)))
        labels_BSNr = dense(store.state["labels"])
        q_BSXTr = q_BHTr.unflatten(1, (labels_BSNr.shape[1], -1))
        logits_BHTN = query.softmax.logits((q_BSXTr @ labels_BSNr[:, :, None].transpose(-1, -2)).flatten(1, 2))
        if self.select_per == "kv-head":
            seen_B1TN = visible(query, store.segments[0])
            p_BHTN = query.softmax.weights(logits_BHTN.masked_fill(~seen_B1TN, float("-inf")))
            scores_BSTN = p_BHTN.unflatten(1, (groups, -1)).sum(2)
        else:
            scores_BSTN = logits_BHTN
        if self.force_recent:
            # within the budget, so that the newest of them are read and not the first of the window
            after_BT = query.order_BT - self._counts(query).clamp(max=self.force_recent)
            newest_B1TN = store.segments[0].positions_BGN[:, :1, None] > after_BT[:, None, :, None]
            scores_BSTN = scores_BSTN.masked_fill(newest_B1TN, float("inf"))
        return scores_BSTN

    def _channels(self, call: AttentionCall, store: LayerStore, prepared: Any) -> Tensor:
        """The layer's label channels, (S, r)."""
        if "channels" not in store.state:
            heads, groups, width = call.q_BHTD.shape[1], call.k_BGTD.shape[1], call.k_BGTD.shape[-1]
            order_SD = ranked(prepared, self.channel, call.layer, heads, groups, self.label_per == "query-head", width)
            store.state["channels"] = order_SD[:, : width // self.group_factor].to(call.k_BGTD.device)
        channels_Sr: Tensor = store.state["channels"]
        return channels_Sr

    def _packed(self, labels_BSTr: Tensor) -> Tensor | Packed:
        return labels_BSTr if self.label_bits >= EXACT else quant_pack(labels_BSTr, self.label_bits, -1)


def joined(a: Tensor | Packed, b: Tensor | Packed, rooms: Rooms) -> Tensor | Packed:
    """Labels of more tokens; each token has a grid of its own, so nothing is quantised anew.

    Args:
        rooms: where ``a`` grows.
    """
    if isinstance(a, Packed) and isinstance(b, Packed):
        return appended(a, b, rooms, "labels")
    assert isinstance(a, Tensor)
    assert isinstance(b, Tensor)
    return rooms.append("labels", a, b)


def dense(labels: Tensor | Packed) -> Tensor:
    """Labels as they are compared, in float32."""
    return unpack(labels) if isinstance(labels, Packed) else labels.float()


def parts(labels: Tensor | Packed) -> tuple[Tensor, ...]:
    """Everything that must stay resident."""
    return labels.tensors() if isinstance(labels, Packed) else (labels,)
