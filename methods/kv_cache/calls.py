"""Pieces of a layer's tokens, and the exact ones behind a compressed prompt.

Shape suffixes: B batch, G key-value heads, T tokens of a pass.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from isoflop.models.hooks.attention import AttentionCall
from isoflop.models.segments import DenseSegment, LayerStore, key_positions


def slice_call(call: AttentionCall, start: int, stop: int | None) -> AttentionCall:
    """Tokens ``start`` to ``stop`` of a call."""
    return replace(
        call,
        q_BHTD=call.q_BHTD[:, :, start:stop],
        k_BGTD=call.k_BGTD[:, :, start:stop],
        v_BGTD=call.v_BGTD[:, :, start:stop],
        order_BT=call.order_BT[:, start:stop],
        valid_BT=None if call.valid_BT is None else call.valid_BT[:, start:stop],
        ids_BT=None if call.ids_BT is None else call.ids_BT[:, start:stop],
    )


def append_recent(store: LayerStore, call: AttentionCall) -> None:
    """Add a call's tokens to the exact tokens behind the prompt."""
    store.recent.append(call.k_BGTD, call.v_BGTD, key_positions(call))


def empty_recent(call: AttentionCall) -> DenseSegment:
    """A segment without tokens, to which later ones are added; it keeps none of the call's tensors alive."""
    positions_BG0 = key_positions(call)[:, :, :0].clone()
    return DenseSegment(positions_BG0, None, *(torch.empty_like(x[:, :, :0]) for x in (call.k_BGTD, call.v_BGTD)))
