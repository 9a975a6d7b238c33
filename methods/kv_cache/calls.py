"""Pieces of a layer's tokens, and the exact ones behind a compressed prompt.

Shape suffixes: B batch, G key-value heads, T tokens of a pass.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from isoflop.models.hooks.attention import AttentionCall
from isoflop.models.segments import DenseSegment, LayerStore, Segment, key_positions

WORTH_JOINING = 8
"""Queries from which on a cache is read in one piece."""


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
        rotation=None if call.rotation is None else call.rotation.sliced(start, stop),
    )


def attend_joined(query: AttentionCall, store: LayerStore) -> Tensor | None:
    """Attention of many queries over a cache of exact tokens without gaps, (B, T, H, D), by the fused kernel; None for any other.

    The cache of the layer is copied once to be in one piece, which fewer queries would not be worth.
    """
    segments = [segment for segment in store.all() if segment.tokens]
    if query.q_BHTD.shape[2] < WORTH_JOINING or not all(
        isinstance(s, DenseSegment) and s.heads_G is None and s.log_bias_BGN is None for s in segments
    ):
        return None
    *before, last = segments
    first = int(query.order_BT.min())
    if any(int(s.positions_BGN.max()) >= first for s in before):
        return None
    k_BGND, v_BGND = (torch.cat([part(s) for s in segments], dim=2) for part in (_keys, _values))
    # behind the prompt all heads hold the same tokens
    sees_B1TN = last.positions_BGN[:, :1, None] <= query.order_BT[:, None, :, None]
    width = k_BGND.shape[2] - last.tokens
    sees_B1TN = torch.nn.functional.pad(sees_B1TN, (width, 0), value=True)
    return query.softmax.attend(query.q_BHTD, k_BGND, v_BGND, sees_B1TN).transpose(1, 2)


def _keys(segment: Segment) -> Tensor:
    return segment.keys()


def _values(segment: Segment) -> Tensor:
    return segment.values()


def append_recent(store: LayerStore, call: AttentionCall) -> None:
    """Add a call's tokens to the exact tokens behind the prompt."""
    store.recent.append(call.k_BGTD, call.v_BGTD, key_positions(call))


def empty_recent(call: AttentionCall) -> DenseSegment:
    """A segment without tokens, to which later ones are added; it keeps none of the call's tensors alive."""
    positions_BG0 = key_positions(call)[:, :, :0].clone()
    return DenseSegment(positions_BG0, None, *(torch.empty_like(x[:, :, :0]) for x in (call.k_BGTD, call.v_BGTD)))


def take_in(segment: DenseSegment, query: AttentionCall) -> None:
    """Add a call's tokens behind those that are there; padding gets a bias of -inf."""
    if segment.log_bias_BGN is None and query.valid_BT is not None:
        segment.log_bias_BGN = torch.zeros_like(segment.k_BGND[..., 0])
    segment.append(query.k_BGTD, query.v_BGTD, key_positions(query))
    if query.valid_BT is not None:
        assert segment.log_bias_BGN is not None
        new_BGT = segment.log_bias_BGN[:, :, -query.k_BGTD.shape[2] :]
        new_BGT.masked_fill_(~query.valid_BT[:, None], float("-inf"))
