"""A method on the key-value cache at work: what sits in the hook ``attention``, session by session.

Shape suffixes: B batch, H query heads, G key-value heads, T tokens of a pass, N tokens of a segment, D head width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from isoflop.core.errors import Infeasible
from isoflop.kernels.blocks import queries_at_once
from isoflop.methods.kv_cache.calls import Counted, append_recent, slice_call
from isoflop.methods.kv_cache.carrying import Carrying
from isoflop.methods.kv_cache.rereading import Rereading
from isoflop.models.hooks.attention import AttentionCall, AttentionPolicy, CacheReport, causal_attention, order_of
from isoflop.models.hooks.occupant import tensor_bytes
from isoflop.models.moving import moved
from isoflop.models.segments import LayerStore, stored_bytes
from isoflop.models.windows import WindowCache

if TYPE_CHECKING:
    from isoflop.methods.kv_cache.base import KvCacheMethod


class CompressedCache(AttentionPolicy):
    """A KV-cache method at work in a decoder.

    Args:
        method: what compresses.
        prepared: value of its ``prepare`` stage.
        dense_bits: see ``ModelInfo``.
    """

    held_in_session = (
        "_stores", "_windows", "_passed", "_prompts", "_last", "_widths", "_carrying", "_prompt_passed"
    )  # fmt: skip

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
        self._prompt: tuple[Tensor | None, Tensor | None] = (None, None)
        self._decoder: Any = None
        self._rereading: Rereading | None = None
        self.reread_tokens = 0.0
        self._noted: list[AttentionCall] | None = None
        self._following = False

    @contextmanager
    def at_work(self, model: Any) -> Iterator[None]:
        """Inside the block the token ids that enter the decoder become known to the method, and where its passes end."""

        def note(module: torch.nn.Module, args: tuple[Any, ...]) -> None:
            self._ids_BT = args[0] if args else None

        def passed(module: torch.nn.Module, args: Any, output: Any) -> None:
            if self._stores is not None and self.method.spans_layers and self._rereading is None:
                self._span(self._stores)

        self._decoder = model.decoder
        handles = [
            model.decoder.get_input_embeddings().register_forward_pre_hook(note),
            model.decoder.register_forward_hook(passed),
        ]
        try:
            yield
        finally:
            self._decoder = None
            for handle in handles:
                handle.remove()

    def attend(self, call: AttentionCall) -> Tensor:
        """Plain causal attention, the one-pass form, or a step of a session."""
        if self._noted is not None and self._rereading is None:
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
        with self._putting_back():
            self._stores, self._windows, self._passed, self._prompts = {}, {}, {}, {}
            self._last, self._widths, self._carrying, self._prompt_passed = {}, {}, Carrying(), False
            yield

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
            if self._rereading is not None:
                self.method.notice(call, stores[call.layer], self._rereading.passage, self._rereading.noticed)
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
        self._prompt_passed, self._prompt = True, (prompt.ids_BT, prompt.valid_BT)
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

    @torch.no_grad()
    def _reread(self, stores: dict[int, LayerStore]) -> None:
        """Have the model read on behind the stored prompt; nothing stays of it but what the method noticed."""
        ids_BT, valid_BT = self._prompt
        if ids_BT is None:
            raise Infeasible(f"method {self.method.name} reads the prompt again, whose token ids are not known here")
        reports, noticed = dict(self._reports), dict[int, Tensor]()
        self.reread_tokens = 0.0
        try:
            for passage in self.method.passages(ids_BT, valid_BT, self.prepared):
                self._rereading = Rereading(passage, noticed)
                self.reread_tokens += float(passage.real_BT.sum()) / len(ids_BT)
                with self.returning():
                    self._decoder(input_ids=passage.ids_BT, position_ids=passage.positions_BT, use_cache=False)
        finally:
            self._rereading, self._reports, self._ids_BT = None, reports, None
        self._prompt = None, None
        for layer, store in stores.items():
            store.state["noticed"] = noticed[layer]

    def _span(self, stores: dict[int, LayerStore]) -> None:
        """What a cache that spans layers does when a pass has been through all of them; shared tensors count once."""
        if self._prompt_passed and self.method.rereads:
            self._reread(stores)
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
