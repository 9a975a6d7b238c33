"""Rows of a batch that are read each by itself and hold different numbers of tokens: apart for the reading, together in the store.

A store of this kind knows for each row how many entries its first segment holds (``state["kept"]``), and with recent ones (``held``).

Shape suffixes: B batch, H query heads, G key-value heads, T tokens of a pass, N cached tokens, D head width.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from isoflop.methods.kv_cache.calls import empty_recent
from isoflop.models.hooks.attention import AttentionCall, standing_alike
from isoflop.models.segments import DenseSegment, LayerStore


def rows_alike(call: AttentionCall) -> Iterable[tuple[slice, slice | Tensor]]:
    """Rows with their real tokens in the same columns, and those columns."""
    return [(slice(None), slice(None))] if call.valid_BT is None else standing_alike(call.valid_BT)


def real_part(call: AttentionCall, rows: slice | list[int], columns: slice | Tensor) -> AttentionCall:
    """Some rows of a call, in columns where none of them is padding."""
    q_BHTD, k_BGTD, v_BGTD = (x[rows][:, :, columns] for x in (call.q_BHTD, call.k_BGTD, call.v_BGTD))
    order_BT = call.order_BT.expand(call.q_BHTD.shape[0], -1)[rows][:, columns]
    return replace(
        call, q_BHTD=q_BHTD, k_BGTD=k_BGTD, v_BGTD=v_BGTD, order_BT=order_BT, valid_BT=None, ids_BT=None, examples_B=None
    )  # fmt: skip


def first_tokens(segment: DenseSegment, rows: list[int], tokens: int) -> DenseSegment:
    """The first tokens of some rows."""
    positions_BGN, k_BGND, v_BGND = (
        x[rows, :, :tokens] for x in (segment.positions_BGN, segment.k_BGND, segment.v_BGND)
    )
    return DenseSegment(positions_BGN, None, k_BGND, v_BGND)


def compact(store: LayerStore) -> DenseSegment:
    """Merged entries and recent tokens of each row without a gap, from the first place on; what is behind them means nothing."""
    kept, recent = store.segments[0], store.recent
    assert isinstance(kept, DenseSegment)
    kept_B1 = torch.tensor(store.state["kept"], device=recent.k_BGND.device)[:, None]
    places_BN = torch.arange(max(store.state["held"]), device=recent.k_BGND.device).expand(len(kept_B1), -1)
    places_BN = torch.where(places_BN < kept_B1, places_BN, places_BN - kept_B1 + kept.tokens)
    places_BN = places_BN.clamp(max=kept.tokens + recent.tokens - 1)  # of rows that hold fewer
    pairs = zip(_tensors(kept), _tensors(recent), strict=True)
    positions_BGN, k_BGND, v_BGND = (torch.cat(pair, dim=2) for pair in pairs)
    index_BGN = places_BN[:, None].expand(-1, k_BGND.shape[1], -1)
    return DenseSegment(positions_BGN, None, k_BGND, v_BGND).taken(index_BGN, None)


def store_of_rows(call: AttentionCall, parts: Sequence[tuple[list[int], DenseSegment]], held: list[int]) -> LayerStore:
    """What the rows of some parts hold, later parts over earlier ones; rows that hold less than others end in empty entries."""
    width, state = max(held), {"kept": held, "held": held}
    if len(parts) == 1 and len(parts[0][0]) == len(held):
        return LayerStore([parts[0][1]], empty_recent(call), state)
    like = _tensors(empty_recent(call))
    filled = [x.new_zeros(len(held), x.shape[1], width, *x.shape[3:]) for x in like]
    for rows, part in parts:
        for whole, some in zip(filled, _tensors(part), strict=True):
            whole[rows, :, : some.shape[2]] = some
    bias_BGN = None
    if min(held) < width:
        empty_BN = torch.arange(width) >= torch.tensor(held)[:, None]
        bias_BN = filled[1].new_zeros(empty_BN.shape).masked_fill(empty_BN.to(filled[1].device), float("-inf"))
        bias_BGN = bias_BN[:, None].expand(-1, filled[1].shape[1], -1)
    positions_BGN, k_BGND, v_BGND = filled
    return LayerStore([DenseSegment(positions_BGN, bias_BGN, k_BGND, v_BGND)], empty_recent(call), state)


def _tensors(segment: DenseSegment) -> tuple[Tensor, Tensor, Tensor]:
    return segment.positions_BGN, segment.k_BGND, segment.v_BGND
