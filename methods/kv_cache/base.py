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
prompt runs through all layers first, ``merge`` sees all stores, and the tokens behind the prompt follow in a second pass.

Shape suffixes: B batch, H query heads, G key-value heads, T tokens of a pass, N tokens of a segment, D head width.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from isoflop.core.errors import Infeasible
from isoflop.core.hook import Hook
from isoflop.core.stage import StageContext
from isoflop.kernels.blocks import queries_at_once
from isoflop.methods.base import Method
from isoflop.methods.kv_cache.calls import append_recent, attend_joined, empty_recent, slice_call
from isoflop.methods.kv_cache.carrying import Carrying
from isoflop.models.base import Model, ModelInfo
from isoflop.models.hooks.attention import (
    ATTENTION,
    AttentionCall,
    AttentionPolicy,
    CacheReport,
    causal_attention,
    order_of,
)
from isoflop.models.hooks.decoder_layers import DECODER_LAYERS
from isoflop.models.hooks.occupant import Occupant, tensor_bytes
from isoflop.models.metering import metered
from isoflop.models.moving import moved
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
from isoflop.models.windows import WindowCache

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
        spans_layers: layers share what they store, see ``merge``.
        follows_rotation: the method looks at queries or keys as they were before positions turned them.
    """

    family: ClassVar[str] = "kv-cache"
    ratio_of: ClassVar[str] = "bytes of the KV cache"
    ratio_bytes: ClassVar[tuple[str, str] | None] = ("kv_bytes_dense", "kv_bytes")
    hooks: ClassVar[tuple[Hook[Any], ...]] = (ATTENTION,)
    sharing: ClassVar[str] = "one that keeps tokens (snapkv, h2o …) with one that packs what is kept (kv-rtn, gear …)"
    cuts: ClassVar[str] = "kv_store_ratio"
    spans_layers: ClassVar[bool] = False
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


@dataclass(frozen=True)
class Counted:
    """What is known of a layer's tokens when its bytes are counted; no tensors, which would stay alive with it.

    Attributes:
        rows: of the batch.
        dense: bytes of all tokens that one row has brought the layer so far, kept whole; of its window's where it has one.
    """

    layer: int
    rows: int
    dense: float


class CompressedCache(AttentionPolicy):
    """A KV-cache method at work in a decoder.

    Args:
        method: what compresses.
        prepared: value of its ``prepare`` stage.
        dense_bits: see ``ModelInfo``.
    """

    held_in_session = ("_stores", "_windows", "_passed", "_last", "_widths", "_carrying", "_prompt_passed")

    def __init__(self, method: KvCacheMethod, prepared: Any, dense_bits: int) -> None:
        self.method = method
        self.spans_layers = method.spans_layers
        self.token_by_token = method.spans_layers and method.merges_later
        self.exact_prompt = method.exact_prompt
        self.follows_rotation = method.follows_rotation
        self.prefix: int | None = None
        self.examples_B: Tensor | None = None
        self.prepared = prepared
        self._dense_bits = dense_bits
        self._stores: dict[int, LayerStore] | None = None
        self._windows: dict[int, WindowCache] = {}
        self._passed: dict[int, int | Tensor] = {}
        self._prompts: dict[int, tuple[float, float]] = {}
        self._reports: dict[int, CacheReport] = {}
        self._last: dict[int, Counted] = {}
        self._ids_BT: Tensor | None = None
        self._widths: dict[int, int] = {}
        self._carrying = Carrying()
        self._prompt_passed = False
        self._noted: list[AttentionCall] | None = None
        self._following = False

    @contextmanager
    def at_work(self, model: Any) -> Iterator[None]:
        """Inside the block the token ids that enter the decoder become known to the method, and where its passes end."""

        def note(module: torch.nn.Module, args: tuple[Any, ...]) -> None:
            self._ids_BT = args[0] if args else None

        def passed(module: torch.nn.Module, args: Any, output: Any) -> None:
            if self._stores is not None and self.method.spans_layers:
                self._span(self._stores)

        handles = [
            model.decoder.get_input_embeddings().register_forward_pre_hook(note),
            model.decoder.register_forward_hook(passed),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def attend(self, call: AttentionCall) -> Tensor:
        """Plain causal attention, the one-pass form, or a step of a session."""
        if self._noted is not None:
            self._noted.append(call)
        if self._stores is None and self.prefix is None:
            return causal_attention(call)
        if call.window is not None:
            return self._within_window(call)
        self._carrying.enter(call.layer)
        ids_BT = self._ids_BT
        if ids_BT is not None and ids_BT.shape == (call.q_BHTD.shape[0], call.q_BHTD.shape[2]):
            call = replace(call, ids_BT=ids_BT.to(call.q_BHTD.device))
        if self._stores is not None:
            return self._in_session(self._continued(call), self._stores)
        return self._one_pass(call)[0]

    @contextmanager
    def session(self) -> Iterator[None]:
        """A step-by-step run; see ``AttentionPolicy``."""
        self._stores, self._passed, self._carrying = {}, {}, Carrying()
        self._windows, self._last = {}, {}
        try:
            yield
        finally:
            self._stores, self._windows = None, {}

    @contextmanager
    def noting(self) -> Iterator[list[AttentionCall]]:
        """See ``AttentionPolicy``."""
        self._noted = []
        try:
            yield self._noted
        finally:
            self._noted = None

    def follow(self, calls: Sequence[AttentionCall], ids_BT: Tensor) -> None:
        """Compress every layer's prompt; its attention is known."""
        self._ids_BT, self._following = ids_BT, True
        try:
            for call in calls:
                self.attend(call)
        finally:
            self._following = False
        if self.spans_layers:
            self._span(self.stores())

    def stores(self) -> dict[int, LayerStore]:
        """What each layer holds in the open session, by its number. Raises ValueError outside one."""
        if self._stores is None:
            raise ValueError(f"method {self.method.name}: no session is open")
        return self._stores

    def forget(self) -> None:
        """Nothing has been run yet, as far as ``report`` knows; a session goes on."""
        self._reports = {}

    def report(self) -> CacheReport:
        """Sums over the layers of the last pass.

        Raises:
            ValueError: nothing was compressed yet.
        """
        if not self._reports:
            raise ValueError(f"method {self.method.name}: no prompt has been compressed yet")
        parts = list(self._reports.values())
        return CacheReport(*(sum(getattr(p, name) for p in parts) for name in CacheReport.__dataclass_fields__))

    def _continued(self, call: AttentionCall) -> AttentionCall:
        """Number a call's tokens on from those that its layer has seen in this session."""
        before = self._passed.get(call.layer, 0)
        new = call.q_BHTD.shape[2] if call.valid_BT is None else call.valid_BT.sum(-1, keepdim=True)
        self._passed[call.layer] = before + new
        return replace(call, order_BT=order_of(call.valid_BT, call.q_BHTD.shape[2], call.q_BHTD.device, before))

    def _within_window(self, call: AttentionCall) -> Tensor:
        """A layer that no method acts on: exact, and counted as the window that its cache holds."""
        if self._stores is None:
            out_BTHD, first = causal_attention(call), True
        else:
            call, first = self._continued(call), call.layer not in self._windows
            out_BTHD = self._windows.setdefault(call.layer, WindowCache()).attend(call)
        if first:
            prompt = self._counted(slice_call(call, 0, self.prefix)).dense
            self._prompts[call.layer] = prompt, prompt
        held = self._counted(call).dense
        self._reports[call.layer] = CacheReport(held, held, *self._prompts[call.layer], held)
        return out_BTHD

    def _in_session(self, call: AttentionCall, stores: dict[int, LayerStore]) -> Tensor:
        if call.layer in stores:
            return self._go_on(call, stores[call.layer])
        out_BTHD, stores[call.layer] = self._one_pass(call)
        return out_BTHD

    def _one_pass(self, call: AttentionCall) -> tuple[Tensor, LayerStore]:
        """The prompt, all of the call without a ``prefix``, and the tokens behind it: their attention, and the store."""
        call = replace(call, examples_B=moved(self.examples_B, call.q_BHTD.device))
        prompt = slice_call(call, 0, self.prefix)
        rest = slice_call(call, prompt.q_BHTD.shape[2], call.q_BHTD.shape[2])
        if self.method.spans_layers and (self._stores is None or rest.q_BHTD.shape[2]):
            raise ValueError(
                f"method {self.method.name} spans layers: the prompt takes a pass of its own, in a session"
            )
        self._widths[call.layer] = prompt.q_BHTD.shape[2]
        out_BTHD, store = self._prefill(prompt)
        if rest.q_BHTD.shape[2]:
            out_BTHD = torch.cat((out_BTHD, self._go_on(rest, store)), dim=1)
        return out_BTHD, store

    def _prefill(self, prompt: AttentionCall) -> tuple[Tensor, LayerStore]:
        prompt = self._carrying.onto(prompt, ("prompt", prompt.q_BHTD.shape[2]))
        if self._following:
            out_BTHD, store = (
                prompt.q_BHTD.transpose(1, 2),
                self.method.compress(prompt, self.prepared),
            )  # the output is not read
        else:
            out_BTHD, store = self.method.prefill(prompt, self.prepared)
        self._prompt_passed = True
        self._note_prompt(self._counted(prompt), store)
        self._note(self._counted(prompt), store)
        return out_BTHD, store

    def _go_on(self, tokens: AttentionCall, store: LayerStore) -> Tensor:
        """Tokens behind the prompt, in pieces within which the store does not change.

        Nor do they hold more queries than can be read for at once, so that memory does not grow with their number. That goes
        by the tokens that have come and not by those that are left, which makes pieces the same in all layers.
        """
        rows, heads, length = tokens.q_BHTD.shape[:3]
        most = queries_at_once(tokens.q_BHTD.device, rows * heads, int(tokens.order_BT.max()) + 1)
        start, outs = 0, []
        while start < length:
            stride = self.method.stride(store)
            piece = slice_call(tokens, start, start + (most if stride is None else min(most, stride)))
            piece = self._carrying.onto(piece, (self._widths[tokens.layer], start, start + piece.q_BHTD.shape[2]))
            append_recent(store, piece)
            outs.append(self.method.step(piece, store, self.prepared))
            start += piece.q_BHTD.shape[2]
        self._note(self._counted(tokens), store)
        return outs[0] if len(outs) == 1 else torch.cat(outs, dim=1)

    def _span(self, stores: dict[int, LayerStore]) -> None:
        """What a cache that spans layers does when a pass has been through all of them; shared tensors count once."""
        if self._prompt_passed or self.method.merges_later:
            self.method.merge(stores, self.prepared)
        counted: set[int] = set()
        for layer, store in stores.items():
            if self._prompt_passed:
                self._note_prompt(self._last[layer], store, set(counted))
            self._note(self._last[layer], store, counted)
        self._prompt_passed = False

    def _note_prompt(self, prompt: Counted, store: LayerStore, counted: set[int] | None = None) -> None:
        self._prompts[prompt.layer] = self._stored_bytes(store, counted) / prompt.rows, prompt.dense

    def _note(self, tokens: Counted, store: LayerStore, counted: set[int] | None = None) -> None:
        """Count the layer's bytes as they are now.

        Args:
            counted: what other layers hold and have counted; what this one holds is added.
        """
        fetched = [t for segment in store.all() for t in segment.read_tensors()]
        self._last[tokens.layer] = tokens
        self._reports[tokens.layer] = CacheReport(
            self._stored_bytes(store, counted) / tokens.rows,
            tokens.dense,
            *self._prompts[tokens.layer],
            self.method.read_bytes(store, fetched, self._dense_bits) / tokens.rows,
        )

    def _counted(self, call: AttentionCall) -> Counted:
        token = sum(tensor_bytes(t[:1, :, :1], self._dense_bits) for t in (call.k_BGTD, call.v_BGTD))
        tokens = int(call.order_BT.max()) + 1
        return Counted(
            call.layer, call.q_BHTD.shape[0], token * (tokens if call.window is None else min(call.window, tokens))
        )

    def _stored_bytes(self, store: LayerStore, counted: set[int] | None) -> float:
        held = [*store.resident(), *store.recent.tensors()]
        if counted is not None:
            held = [t for t in held if t.data_ptr() not in counted]
            counted.update(t.data_ptr() for t in held)
        return stored_bytes(held, self._dense_bits)
