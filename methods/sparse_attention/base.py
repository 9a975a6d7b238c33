"""Sparse decoding: the whole cache stays resident, and each query reads only some of its tokens.

The base class owns the choice by score, the reading and the count of what is fetched; a method gives approximate scores.
Prompts are read exactly. What a step fetches is counted on the sets that the last query chose: each token of a key-value
head once, whichever of its query heads want it, and every table that the choice needs.

Shape suffixes: B batch, H query heads, G key-value heads, R query heads of a key-value head, S heads that choose for
themselves (H or G), C = S / G, T queries, N cached tokens, M chosen tokens, D head width.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self

import torch
from torch import Tensor

from isoflop.core.errors import Infeasible
from isoflop.core.knobs import Knob
from isoflop.kernels.softmax import Softmax
from isoflop.methods.base import Axes
from isoflop.methods.kv_cache.base import KvCacheMethod, empty_recent, key_positions, slice_call, whole_prompt
from isoflop.methods.kv_cache.select import check_share
from isoflop.models.base import ModelInfo
from isoflop.models.hooks.attention import AttentionCall
from isoflop.models.segments import DenseSegment, LayerStore, decode_one, stored_bytes

if TYPE_CHECKING:
    from isoflop.methods.probe import Probe


@dataclass(frozen=True)
class SparseAttention(KvCacheMethod):
    """Base class of methods that read a share of a cache which is kept whole: their ratio is that of bytes read.

    Class attributes:
        shares_choices: choices are kept for later layers of the same pass, see ``chooses``.
    """

    family: ClassVar[str] = "sparse-attention"
    ratio_of: ClassVar[str] = "bytes of the KV cache that a step reads, which stays whole in memory"
    ratio_bytes: ClassVar[tuple[str, str] | None] = ("kv_bytes_dense", "kv_read_bytes")
    cuts: ClassVar[str] = "kv_read_ratio"
    shares_choices: ClassVar[bool] = False

    k_share: Annotated[
        float,
        Knob(
            low=0.01, high=1.0, log=True, ratio=True, doc="share of the tokens so far that a query reads; at least one"
        ),
    ] = 0.0625

    @classmethod
    def identity(cls, info: ModelInfo) -> Self:
        """Every token read."""
        return cls(k_share=1.0)

    def axes(self, info: ModelInfo) -> Axes:
        """1 / k_share, of what a step reads."""
        return Axes(ratio=1 / self.k_share)

    @classmethod
    def probe(cls) -> Probe:
        """A decoder of four layers, judged by the bytes that a step reads."""
        from isoflop.methods.kv_cache.probe import KvCacheProbe

        return KvCacheProbe(cost="read", layers=4)

    def check_prompt(self, tokens: int, task: str) -> None:
        """Right behind the prompt at least one token is read without rounding up."""
        check_share(self.name, "k_share", self.k_share, tokens, task)

    @abstractmethod
    def index(self, tokens: AttentionCall, store: LayerStore, prepared: Any) -> None:
        """Take new tokens into the tables of a layer (``store.state``); resident ones belong to ``store.extra``."""

    def approximate(self, query: AttentionCall, store: LayerStore, prepared: Any) -> Tensor:
        """Scores of every cached token for every query, (B, S, T, N) with S = H or G; higher is read first."""
        raise NotImplementedError(f"method {self.name} says neither how it scores tokens nor which it reads")

    def chosen(self, query: AttentionCall, store: LayerStore, prepared: Any) -> Tensor:
        """True at the tokens that each query reads, (B, S, T, N); by default those with the best scores."""
        scores_BSTN = self.approximate(query, store, prepared)
        seen_B1TN = visible(query, store.segments[0])
        return best(scores_BSTN.masked_fill(~seen_B1TN, float("-inf")), self._counts(query))

    def dense(self, layer: int) -> bool:
        """Whether a layer reads everything."""
        return False

    def chooses(self, layer: int) -> bool:
        """Whether a layer chooses tokens, for itself unless it is ``dense`` and for those behind it that do not choose.

        Where some layer does not, ``shares_choices`` must be set.
        """
        return not self.dense(layer)

    def compress(self, prompt: AttentionCall, prepared: Any) -> LayerStore:
        """The whole prompt, and its tables."""
        store = LayerStore([whole_prompt(prompt)], empty_recent(prompt))
        if self.chooses(prompt.layer):
            self.index(prompt, store, prepared)
        if self.chooses(prompt.layer) or not self.dense(prompt.layer):
            last = slice_call(prompt, prompt.q_BHTD.shape[2] - 1, None)
            chosen_BS1N = self._choose(last, store, prepared)
            if not self.dense(prompt.layer):
                self._note(chosen_BS1N, prompt.k_BGTD.shape[1], store)
        return store

    def step(self, query: AttentionCall, store: LayerStore, prepared: Any) -> Tensor:
        """Join the new tokens to the others, and read."""
        whole = store.segments[0]
        assert isinstance(whole, DenseSegment)
        whole.append(query.k_BGTD, query.v_BGTD, key_positions(query))
        store.recent = empty_recent(query)
        if self.chooses(query.layer):
            self.index(query, store, prepared)
        return self.read(query, store, prepared)

    def read(self, query: AttentionCall, store: LayerStore, prepared: Any) -> Tensor:
        """Exact attention over the chosen tokens: gathered for one query per row, masked for many."""
        whole = store.segments[0]
        assert isinstance(whole, DenseSegment)
        if self.dense(query.layer):
            if self.chooses(query.layer):
                self._choose(query, store, prepared)
            return super().read(query, store, prepared)
        chosen_BSTN = self._choose(query, store, prepared)
        self._note(chosen_BSTN[:, :, -1:], whole.k_BGND.shape[1], store)
        if query.q_BHTD.shape[2] == 1:
            return gathered_attention(query.q_BHTD, whole, chosen_BSTN[:, :, 0], query.softmax)
        return masked_attention(query.q_BHTD, whole, chosen_BSTN, query.softmax)

    def read_bytes(self, store: LayerStore, fetched: list[Tensor], dense_bits: int) -> float:
        """Tables, and the keys and values of the tokens that the last query chose."""
        if "chosen" not in store.state:
            return super().read_bytes(store, fetched, dense_bits)
        whole = store.segments[0]
        per_token = sum(stored_bytes([t[:1, :1, :1]], dense_bits) for t in (whole.keys(), whole.values()))
        return stored_bytes(store.extra, dense_bits) + store.state["chosen"] * per_token

    def _choose(self, query: AttentionCall, store: LayerStore, prepared: Any) -> Tensor:
        """True at the tokens that each query reads, (B, S, T, N): chosen here, or by a layer before."""
        if not self.chooses(query.layer):
            chosen: Tensor = query.carried["chosen"]
            return chosen.to(query.q_BHTD.device)  # the layer that chose may lie on another one
        chosen_BSTN = self.chosen(query, store, prepared)
        if self.shares_choices:
            query.carried["chosen"] = chosen_BSTN
        return chosen_BSTN

    def _counts(self, query: AttentionCall) -> Tensor:
        """Tokens that each query reads, (B or 1, T): the nearest number to the share, halves up, at least one."""
        seen_BT = query.order_BT + 1
        return (self.k_share * seen_BT.double() + 0.5 + 1e-9).floor().long().clamp(min=1).minimum(seen_BT)

    def _note(self, chosen_BS1N: Tensor, groups: int, store: LayerStore) -> None:
        """Remember how many tokens the last query of the batch's rows fetches, over all key-value heads."""
        chosen_BGCN = chosen_BS1N[:, :, 0].unflatten(1, (groups, -1))
        store.state["chosen"] = int(chosen_BGCN.any(2).sum())


@dataclass(frozen=True)
class DenseFirst(SparseAttention):
    """Base class of methods whose first layers read everything."""

    dense_layers: Annotated[int, Knob(low=0, high=256, unit="layers", doc="first layers that read everything")] = 2

    def check(self, info: ModelInfo) -> None:
        """Refuse models whose layers would all be dense."""
        super().check(info)
        layers = info.geometry["layers"]
        if self.dense_layers >= layers:
            raise Infeasible(
                f"method {self.name}: dense_layers = {self.dense_layers} leaves none of the {layers} layers sparse; allowed: 0 … {layers - 1}"
            )

    def dense(self, layer: int) -> bool:
        """The first ``dense_layers``."""
        return layer < self.dense_layers


def visible(query: AttentionCall, cached: Any) -> Tensor:
    """True where a query may read, (B, 1, T, N): its own position and before, no padding."""
    positions_BN = cached.positions_BGN[:, 0]
    seen_B1TN = (positions_BN[:, None] <= query.order_BT[:, :, None])[:, None]
    return seen_B1TN if cached.log_bias_BGN is None else seen_B1TN & (cached.log_bias_BGN[:, :1, None] == 0)


def best(scores_BSTN: Tensor, counts_BT: Tensor) -> Tensor:
    """True at the highest scores; among equal ones the lower index wins."""
    order_BSTN = scores_BSTN.sort(dim=-1, descending=True, stable=True).indices
    first_BSTN = torch.arange(scores_BSTN.shape[-1], device=scores_BSTN.device) < counts_BT[:, None, :, None]
    chosen_BSTN = torch.zeros_like(scores_BSTN, dtype=torch.bool)
    return chosen_BSTN.scatter(-1, order_BSTN, first_BSTN.expand_as(order_BSTN)) & (scores_BSTN > float("-inf"))


def masked_attention(q_BHTD: Tensor, cached: DenseSegment, chosen_BSTN: Tensor, softmax: Softmax) -> Tensor:
    """Attention over the chosen tokens by a mask over all of them, (B, T, H, D)."""
    heads = q_BHTD.shape[1]
    mask_BHTN = chosen_BSTN.repeat_interleave(heads // chosen_BSTN.shape[1], dim=1)
    return softmax.attend(q_BHTD, cached.k_BGND, cached.v_BGND, mask_BHTN).transpose(1, 2)


def gathered_attention(q_BH1D: Tensor, cached: DenseSegment, chosen_BSN: Tensor, softmax: Softmax) -> Tensor:
    """Attention of one query per row over the chosen tokens, which alone are read, (B, 1, H, D)."""
    batch, groups, tokens, width = cached.k_BGND.shape
    most = int(chosen_BSN.sum(-1).max())
    places = torch.arange(tokens, device=q_BH1D.device).masked_fill(~chosen_BSN, tokens)
    places_BSM = places.sort(dim=-1).values[..., :most]
    index_BGM = places_BSM.clamp(max=tokens - 1).reshape(batch, groups, -1)
    k_BSMD, v_BSMD = (
        x.gather(2, index_BGM[..., None].expand(-1, -1, -1, width)).reshape(batch, -1, most, width)
        for x in (cached.k_BGND, cached.v_BGND)
    )
    bias_BSM = torch.zeros(places_BSM.shape, dtype=k_BSMD.dtype, device=k_BSMD.device)
    bias_BSM = bias_BSM.masked_fill(places_BSM == tokens, float("-inf"))
    positions_BSM = torch.zeros_like(places_BSM)  # all of them lie before the query
    return decode_one(q_BH1D, [DenseSegment(positions_BSM, bias_BSM, k_BSMD, v_BSMD)], softmax)
