"""The whole key-value cache: what sits in the attention while a model decodes step by step and no method acts there.

Each layer holds what has reached it, so that layers and rows may hold different numbers of tokens.

Shape suffixes: B batch, H query heads, T tokens of a pass, D head width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from isoflop.core.errors import Infeasible
from isoflop.kernels.blocks import queries_at_once
from isoflop.models.hooks.attention import (
    AttentionCall,
    AttentionPolicy,
    CacheReport,
    causal_attention,
    order_of,
    whole_attention,
)
from isoflop.models.segments import DenseSegment, attend_segments, key_positions, stored_bytes, whole_prompt


class WholeCache(AttentionPolicy):
    """Keeps every key and value as it is; outside a session it is plain causal attention.

    Args:
        dense_bits: see ``ModelInfo``.
        bidirectional: tokens of the prompt see those behind them.
    """

    held_in_session = ("_held", "_passed")

    def __init__(self, dense_bits: int, bidirectional: bool = False) -> None:
        self.prefix: int | None = None
        self.examples_B: Tensor | None = None
        self._dense_bits = dense_bits
        self._bidirectional = bidirectional
        self._held: dict[int, DenseSegment] | None = None
        self._passed: dict[int, Tensor | int] = {}
        self._bytes: dict[int, tuple[float, float]] = {}

    def attend(self, call: AttentionCall) -> Tensor:
        """Causal attention over the tokens that the layer has seen, (B, T, H, D)."""
        if self._held is None:
            return causal_attention(call)
        if call.window is not None:
            raise Infeasible(
                f"layer {call.layer} attends within a window of {call.window} tokens, which is not held step by step here"
            )
        before, length = self._passed.get(call.layer, 0), call.q_BHTD.shape[2]
        self._passed[call.layer] = before + (length if call.valid_BT is None else call.valid_BT.sum(-1, keepdim=True))
        if call.layer not in self._held:
            self._held[call.layer] = whole_prompt(call)
            self._note(call, first=True)
            return whole_attention(call) if self._bidirectional else causal_attention(call)
        if call.valid_BT is not None and not bool(call.valid_BT.all()):
            raise ValueError("tokens behind a prompt cannot be padding")
        call = replace(call, order_BT=order_of(None, length, call.q_BHTD.device, before))
        held = self._held[call.layer]
        held.append(call.k_BGTD, call.v_BGTD, key_positions(call).expand(call.k_BGTD.shape[:3]))
        self._note(call, first=False)
        most = queries_at_once(call.q_BHTD.device, call.q_BHTD.shape[0] * call.q_BHTD.shape[1], held.tokens)
        blocks = zip(call.q_BHTD.split(most, dim=2), call.order_BT.split(most, dim=1), strict=True)
        return torch.cat([attend_segments(q, [held], call.softmax, order)[0] for q, order in blocks], dim=1)

    @contextmanager
    def session(self) -> Iterator[None]:
        """See ``AttentionPolicy``."""
        with self._putting_back():
            self._held, self._passed, self._bytes = {}, {}, {}
            yield

    def forget(self) -> None:
        """See ``AttentionPolicy``."""
        self._bytes = {}

    def report(self) -> CacheReport:
        """Bytes of the last session, padding included; what is stored is what is read.

        Raises:
            ValueError: there was none.
        """
        if not self._bytes:
            raise ValueError("the whole cache has held nothing yet")
        prompt, now = (sum(pair[n] for pair in self._bytes.values()) for n in (0, 1))
        return CacheReport(now, now, prompt, prompt, now)

    def _note(self, call: AttentionCall, first: bool) -> None:
        assert self._held is not None
        segment = self._held[call.layer]
        now = stored_bytes((segment.k_BGND, segment.v_BGND), self._dense_bits) / call.q_BHTD.shape[0]
        self._bytes[call.layer] = (now if first else self._bytes.get(call.layer, (now, now))[0], now)
