"""KV-cache methods: what becomes of the prompt's keys and values, and how later queries read them.

The base class owns what sits in the hook ``attention``. A method turns the prompt of one layer into a store
of segments (``compress``), may change how queries read it (``read``) and what happens while tokens are generated
(``step`` and ``stride``). Everything runs per layer, and per row of a batch: no row sees another.

A layer's cache after a token depends on that layer's tokens up to it and on nothing else. So a whole text can be scored
in one pass also where a method changes the cache while decoding: each layer takes the tokens behind the prompt in
turn, as many at once as the method allows, and the result is that of generating token by token through all layers.

Two things go from layer to layer. What a layer found out about some tokens it may leave for the layers behind it
(``AttentionCall.carried``): the memory belongs to one pass and to the tokens that a layer takes at once, so that in one pass
every query finds what it would have found in a step of its own. And a cache may span layers (``spans_layers``): then the
prompt runs through all layers first, ``merge`` sees all stores, and the tokens behind the prompt follow in a second pass. Such a
method may also have the model read on behind the stored prompt before that (``rereads``): what it reads there leaves nothing but what
the method noticed.

Shape suffixes: B batch, H query heads, G key-value heads, T tokens of a pass, N tokens of a segment, D head width.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from isoflop.core.errors import Infeasible
from isoflop.core.hook import Hook
from isoflop.core.stage import StageContext
from isoflop.methods.base import Method
from isoflop.methods.kv_cache.calls import append_recent, attend_joined, empty_recent, slice_call
from isoflop.methods.kv_cache.compressed_cache import CompressedCache
from isoflop.methods.kv_cache.rereading import Passage
from isoflop.models.base import Model, ModelInfo
from isoflop.models.hooks.attention import (
    ATTENTION,
    AttentionCall,
    causal_attention,
)
from isoflop.models.hooks.decoder_layers import DECODER_LAYERS
from isoflop.models.hooks.occupant import Occupant
from isoflop.models.metering import metered
from isoflop.models.rotary import OTHER, unknown_rotation
from isoflop.models.segments import (
    LayerStore,
    attend_segments,
    decode_one,
    key_positions,
    padding_bias,
    stored_bytes,
    whole_prompt,
)

if TYPE_CHECKING:
    from isoflop.methods.probe import Probe

__all__ = [
    "CompressedCache",
    "KvCacheMethod",
    "append_recent",
    "empty_recent",
    "key_positions",
    "padding_bias",
    "slice_call",
    "whole_prompt",
]


@dataclass(frozen=True)
class KvCacheMethod(Method):
    """Base class of methods on the key-value cache.

    Class attributes:
        cuts: which of the two measured ratios is the method's ``ratio``: ``kv_store_ratio`` or ``kv_read_ratio``.
        spans_layers: layers share what they store, or what it is allowed to take, see ``merge``.
        rereads: and before that the model reads ``passages`` behind the prompt, see ``notice``.
        follows_rotation: the method looks at queries or keys as they were before positions turned them.
    """

    family: ClassVar[str] = "kv-cache"
    ratio_of: ClassVar[str] = "bytes of the KV cache"
    ratio_bytes: ClassVar[tuple[str, str] | None] = ("kv_bytes_dense", "kv_bytes")
    hooks: ClassVar[tuple[Hook[Any], ...]] = (ATTENTION,)
    sharing: ClassVar[str] = "one that keeps tokens (snapkv, h2o …) with one that packs what is kept (kv-rtn, gear …)"
    cuts: ClassVar[str] = "kv_store_ratio"
    spans_layers: ClassVar[bool] = False
    rereads: ClassVar[bool] = False
    follows_rotation: ClassVar[bool] = False

    @property
    def merges_later(self) -> bool:
        """Whether ``merge`` runs again after every token behind the prompt; each of them then takes a pass of its own."""
        return False

    @property
    def exact_prompt(self) -> bool:
        """Whether attention inside the prompt is what it would be without the method, which then needs its calls alone."""
        return type(self).prefill is KvCacheMethod.prefill

    @abstractmethod
    def compress(self, prompt: AttentionCall, prepared: Any) -> LayerStore:
        """The store of one layer after the prompt. Padding must get a log bias of -inf or be left out."""

    def prefill(self, prompt: AttentionCall, prepared: Any) -> tuple[Tensor, LayerStore]:
        """Attention inside the prompt, (B, T, H, D), and the store behind it; by default exact, then ``compress``."""
        return causal_attention(prompt), self.compress(prompt, prepared)

    def read(self, query: AttentionCall, store: LayerStore, prepared: Any) -> Tensor:
        """Attention of the tokens in ``query`` (already in ``store.recent``) over the store, (B, T, H, D).

        Each query must be treated as if it came alone: in a one-pass evaluation there are many of them, though never more than
        a block has room for.
        """
        if query.q_BHTD.shape[2] == 1:
            return decode_one(query.q_BHTD, store.all(), query.softmax)
        if (out_BTHD := attend_joined(query, store)) is not None:
            return out_BTHD
        return attend_segments(query.q_BHTD, store.all(), query.softmax, query.order_BT)[0]

    def stride(self, store: LayerStore) -> int | None:
        """How many tokens may come before ``step`` has to run; None when it never changes what later tokens read."""
        return None

    def step(self, query: AttentionCall, store: LayerStore, prepared: Any) -> Tensor:
        """Read for at most ``stride`` tokens, then change the store if the method does so; by default only read."""
        return self.read(query, store, prepared)

    def merge(self, stores: dict[int, LayerStore], prepared: Any) -> None:
        """Where ``spans_layers``: change the stores of all layers, by their numbers, in place.

        Called when the prompt has been through all layers; with ``merges_later`` also behind every later token, which
        all layers have then attended to exactly, among ``recent``. A tensor that several stores hold counts its
        bytes once, and is read once per layer.
        """
        raise NotImplementedError(f"method {self.name} spans layers and does not say how they merge")

    def passages(self, ids_BT: Tensor, valid_BT: Tensor | None, prepared: Any) -> Iterable[Passage]:
        """Where ``rereads``: what the model reads behind the prompt of these tokens, each passage as if it were the first."""
        raise NotImplementedError(f"method {self.name} reads again and does not say what")

    def notice(self, call: AttentionCall, store: LayerStore, passage: Passage, noticed: dict[int, Tensor]) -> None:
        """Where ``rereads``: a layer reads a passage; what is to be known of it in ``merge`` goes to ``noticed[call.layer]``.

        ``merge`` finds it as ``noticed`` in the state of the layer's store.
        """
        raise NotImplementedError(f"method {self.name} reads again and notices nothing")

    def read_bytes(self, store: LayerStore, fetched: list[Tensor], dense_bits: int) -> float:
        """Bytes that one step fetches for the whole batch; ``fetched`` are the segments' ``read_tensors``."""
        return stored_bytes([*fetched, *store.extra], dense_bits)

    def check(self, info: ModelInfo) -> None:
        """Refuse models whose rotation cannot be taken back, where the method has to."""
        super().check(info)
        if self.follows_rotation and info.geometry.get("rotation") == OTHER:
            raise Infeasible(f"method {self.name}: {unknown_rotation(f'model {info.ref}')}")

    def check_beside(self, others: Sequence[Method], info: ModelInfo) -> None:
        """Refuse, beside a cache that spans layers, methods that look at image and question between the layers."""
        between = [other.name for other in others if DECODER_LAYERS in other.hooks]
        if self.spans_layers and between:
            raise Infeasible(
                f"method {self.name} runs the prompt through all layers before the question, and method {between[0]} needs both "
                f"at once ({DECODER_LAYERS}); a trial has one of them"
            )

    def occupants(self, model: Model, prepared: Any) -> dict[Hook[Any], Occupant]:
        """A compressed cache in the decoder's attention."""
        return {ATTENTION: CompressedCache(self, prepared, model.info.dense_bits)}

    def footprint(self, model: Model, ctx: StageContext) -> dict[str, float]:
        """Dense bytes over those that the last closed meter read, or of the last pass where there was no meter.

        Everything is included: scales, indices, labels, exact tokens.

        ``kv_store_ratio``: of what must stay resident after the prompt (``kv_prompt_bytes``); ``kv_read_ratio``: of what a
        step at the end of the pass fetches; ``ratio`` is the one that the family cuts.
        """
        report = self.cache(model).report() if (read := metered(model, ATTENTION)) is None else read
        ratios = {
            "kv_store_ratio": report.prompt_dense / report.prompt_stored,
            "kv_read_ratio": report.dense / report.read,
        }
        return {"ratio": ratios[self.cuts], **ratios, "kv_prompt_bytes": report.prompt_stored}

    def cache(self, model: Model) -> CompressedCache:
        """The method at work in ``model``. Raises ValueError when it is not applied."""
        policy = model.occupant(ATTENTION)
        if not isinstance(policy, CompressedCache):
            raise ValueError(f"method {self.name} is not applied")
        return policy

    @classmethod
    def probe(cls) -> Probe:
        """An untrained decoder with grouped queries."""
        from isoflop.methods.kv_cache.probe import KvCacheProbe

        return KvCacheProbe()


def full_layers(info: ModelInfo) -> list[int]:
    """Numbers of the layers whose caches methods act on: those that attend to all tokens before."""
    windows = info.geometry.get("windows") or (None,) * info.geometry["layers"]
    return [layer for layer, window in enumerate(windows) if window is None]
