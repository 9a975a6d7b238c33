"""KV-cache methods: what becomes of the prompt's keys and values, and how later queries read them.

The base class owns the hook point, the attention slot of a decoder. A method turns the prompt of one layer into a store
of segments (``compress``), may change how queries read it (``read``) and what happens while tokens are generated
(``step``). Everything runs per layer, and per row of a batch: no row sees another.

Shape suffixes: B batch, H query heads, G key-value heads, T tokens of a pass, N tokens of a segment, D head width.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from isoflop.core.stage import StageContext
from isoflop.methods.base import Method
from isoflop.models.attention import AttentionCall, CacheReport, causal_attention
from isoflop.models.base import Model, tensor_bytes
from isoflop.models.decoder_model import decoder_model
from isoflop.models.segments import DenseSegment, LayerStore, attend_segments, stored_bytes

if TYPE_CHECKING:
    from isoflop.methods.probe import Probe


@dataclass(frozen=True)
class KvCacheMethod(Method):
    """Base class of methods on the key-value cache.

    Class attributes:
        one_pass: an evaluation in one pass equals generating token by token. False for methods that change the cache
            while tokens are generated; tasks then run step by step.
    """

    family: ClassVar[str] = "kv-cache"
    needs: ClassVar[frozenset[str]] = frozenset({"kv-cache"})
    order: ClassVar[int] = 30
    one_pass: ClassVar[bool] = True

    @abstractmethod
    def compress(self, prompt: AttentionCall, prepared: Any) -> LayerStore:
        """The store of one layer after the prompt. Padding must get a log bias of -inf or be left out."""

    def read(self, query: AttentionCall, store: LayerStore, prepared: Any) -> Tensor:
        """Attention of the tokens in ``query`` (already in ``store.recent``) over the store, (B, T, H, D).

        Each query must be treated as if it came alone: in a one-pass evaluation there are many of them.
        """
        return attend_segments(query.q_BHTD, store.all(), query.scaling, query.positions_BT)[0]

    def step(self, query: AttentionCall, store: LayerStore, prepared: Any) -> Tensor:
        """One step of generation: read, then change the store if the method does so; by default only read."""
        return self.read(query, store, prepared)

    def read_bytes(self, store: LayerStore, fetched: list[Tensor], dense_bits: int) -> float:
        """Bytes that one step fetches for the whole batch; ``fetched`` are the segments' ``read_tensors``."""
        return stored_bytes([*fetched, *store.extra], dense_bits)

    @contextmanager
    def apply(self, model: Model, prepared: Any) -> Iterator[None]:
        """Put the method into the decoder's attention."""
        decoder = decoder_model(model, self.name)
        self.check(model.info)
        with decoder.attending(CompressedCache(self, prepared, model.info.dense_bits)):
            yield

    def footprint(self, model: Model, ctx: StageContext) -> dict[str, float]:
        """``ratio``: bytes of the dense prompt over those of its store, from the last pass; ``kv_read_ratio`` likewise.

        Both count everything that must stay resident, or that a step fetches: scales, indices, labels, exact tokens.
        """
        policy = decoder_model(model, self.name).attention
        if not isinstance(policy, CompressedCache):
            raise ValueError(f"method {self.name} is not applied")
        report = policy.report()
        return {
            "ratio": report.prompt_dense / report.prompt_stored,
            "kv_prompt_bytes": report.prompt_stored,
            "kv_read_ratio": report.dense / report.read,
        }

    @classmethod
    def probe(cls) -> Probe:
        """An untrained decoder with grouped queries."""
        from isoflop.methods.kv_cache.probe import KvCacheProbe

        return KvCacheProbe()


class CompressedCache:
    """A KV-cache method at work in a decoder (an ``AttentionPolicy``).

    Args:
        method: what compresses.
        prepared: value of its ``prepare`` stage.
        dense_bits: see ``ModelInfo``.
    """

    def __init__(self, method: KvCacheMethod, prepared: Any, dense_bits: int) -> None:
        self.method = method
        self.prefix: int | None = None
        self._prepared = prepared
        self._dense_bits = dense_bits
        self._stores: dict[int, LayerStore] | None = None
        self._reports: dict[int, CacheReport] = {}

    def attend(self, call: AttentionCall) -> Tensor:
        """Plain causal attention, the one-pass form, or a step of a session."""
        if self._stores is not None:
            return self._in_session(call, self._stores)
        if self.prefix is None:
            return causal_attention(call)
        return self._one_pass(call, self.prefix)

    @contextmanager
    def session(self) -> Iterator[None]:
        """A step-by-step run; see ``AttentionPolicy``."""
        self._stores = {}
        try:
            yield
        finally:
            self._stores = None

    def report(self) -> CacheReport:
        """Sums over the layers of the last pass.

        Raises:
            ValueError: nothing was compressed yet.
        """
        if not self._reports:
            raise ValueError(f"method {self.method.name}: no prompt has been compressed yet")
        parts = list(self._reports.values())
        return CacheReport(*(sum(getattr(p, name) for p in parts) for name in CacheReport.__dataclass_fields__))

    def _one_pass(self, call: AttentionCall, prefix: int) -> Tensor:
        prompt = slice_call(call, 0, prefix)
        out_BTHD = causal_attention(prompt)
        store = self.method.compress(prompt, self._prepared)
        rest = slice_call(call, prefix, call.q_BHTD.shape[2])
        if rest.q_BHTD.shape[2] == 0:
            self._note(call, store, prompt)
            return out_BTHD
        append_recent(store, rest)
        out_BTHD = torch.cat((out_BTHD, self.method.read(rest, store, self._prepared)), dim=1)
        self._note(call, store, prompt)
        return out_BTHD

    def _in_session(self, call: AttentionCall, stores: dict[int, LayerStore]) -> Tensor:
        if call.layer not in stores:
            stores[call.layer] = self.method.compress(call, self._prepared)
            self._note(call, stores[call.layer], call)
            return causal_attention(call)
        store = stores[call.layer]
        append_recent(store, call)
        out_BTHD = self.method.step(call, store, self._prepared)
        self._note(call, store, None)
        return out_BTHD

    def _note(self, call: AttentionCall, store: LayerStore, prompt: AttentionCall | None) -> None:
        """Count the layer's bytes; ``prompt`` when it was compressed in this pass."""
        rows = call.q_BHTD.shape[0]
        tokens = int(call.positions_BT.max()) + 1
        row_bytes = 2 * tensor_bytes(call.k_BGTD[:1, :, :1], self._dense_bits)
        compressed = [t for segment in store.segments for t in segment.tensors()]
        everything = [*compressed, *store.extra, *store.recent.tensors()]
        fetched = [t for segment in store.all() for t in segment.read_tensors()]
        if prompt is not None:
            prompt_stored = stored_bytes([*compressed, *store.extra], self._dense_bits) / rows
            prompt_dense = row_bytes * prompt.q_BHTD.shape[2]
        else:
            prompt_stored = self._reports[call.layer].prompt_stored
            prompt_dense = self._reports[call.layer].prompt_dense
        self._reports[call.layer] = CacheReport(
            stored_bytes(everything, self._dense_bits) / rows,
            row_bytes * tokens,
            prompt_stored,
            prompt_dense,
            self.method.read_bytes(store, fetched, self._dense_bits) / rows,
        )


def slice_call(call: AttentionCall, start: int, stop: int) -> AttentionCall:
    """Tokens ``start`` to ``stop`` of a call."""
    return replace(
        call,
        q_BHTD=call.q_BHTD[:, :, start:stop],
        k_BGTD=call.k_BGTD[:, :, start:stop],
        v_BGTD=call.v_BGTD[:, :, start:stop],
        positions_BT=call.positions_BT[:, start:stop],
        valid_BT=None if call.valid_BT is None else call.valid_BT[:, start:stop],
    )


def append_recent(store: LayerStore, call: AttentionCall) -> None:
    """Add a call's tokens to the exact tokens behind the prompt."""
    store.recent.append(call.k_BGTD, call.v_BGTD, key_positions(call))


def key_positions(call: AttentionCall) -> Tensor:
    """Positions of a call's keys, (B, G, T)."""
    batch, groups, length, _ = call.k_BGTD.shape
    return call.positions_BT[:, None].expand(batch, groups, length)


def padding_bias(call: AttentionCall) -> Tensor | None:
    """-inf at padding and 0 elsewhere, (B, G, T); None when nothing is padded."""
    if call.valid_BT is None:
        return None
    bias_BT = torch.zeros_like(call.valid_BT, dtype=call.k_BGTD.dtype).masked_fill(~call.valid_BT, float("-inf"))
    return bias_BT[:, None].expand(call.k_BGTD.shape[:3])


def empty_recent(call: AttentionCall) -> DenseSegment:
    """A segment without tokens, to which later ones are added."""
    return DenseSegment(key_positions(call)[:, :, :0], None, call.k_BGTD[:, :, :0], call.v_BGTD[:, :, :0])
