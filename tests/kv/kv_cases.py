"""Queries, keys and values to try parts of the cache on, and plain references for attention.

Shape suffixes: B batch, H query heads, G key-value heads, T tokens, D head width.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from isoflop.kernels.softmax import Softmax
from isoflop.methods.base import build
from isoflop.methods.kv_cache.base import KvCacheMethod, append_recent, slice_call
from isoflop.methods.kv_cache.mikv import MiKV
from isoflop.methods.kv_cache.quantised import LowBit
from isoflop.models.hooks.attention import AttentionCall
from isoflop.models.segments import LayerStore

HEADS, GROUPS, WIDTH = 4, 2, 8
FITTING: dict[str, dict[str, Any]] = {
    "tidaldecode": {"sparse_start": 0},
    "lococo": {"mem_size": 8, "chunk": 12, "buffer": 4, "steps": 0},
    "quest": {"dense_layers": 0, "page": 4},
    "minicache": {"start": 0.0},
    "mikv": {"bits_lo": 8},
    "gear": {"bits": 8},
    "ems": {"window": 4},
    "kivi": {"bits": 8},
    "quarot-kv": {"bits": 8},
}
"""Knobs of methods whose defaults ask for more layers than models of two or three have, or for longer answers, or whose codes are so
coarse that one at a tie, which noise moves, would be seen."""
EXACT, PACKED = 1e-5, 1e-3


def tolerance(method: KvCacheMethod) -> float:
    """Of logits: noise in the last bit of a value can move the float16 grid that it is on the edge of."""
    return PACKED if isinstance(method, (LowBit, MiKV)) else EXACT


def small(name: str) -> KvCacheMethod:
    """A method as it is tried on small models."""
    method = build(name, FITTING.get(name, {}))
    assert isinstance(method, KvCacheMethod)
    return method


def a_call(
    length: int, rows: int = 2, seed: int = 0, pads: tuple[int, ...] | None = None, layer: int = 0
) -> AttentionCall:
    """Random queries and keys that attend unevenly; ``pads`` are columns of padding on the left of each row."""
    rng = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(rows, heads, length, WIDTH, generator=rng) * scale
        for heads, scale in ((HEADS, 2.0), (GROUPS, 1.0), (GROUPS, 1.0))
    )
    ids = torch.randint(0, 50, (rows, length), generator=rng)
    positions, valid = torch.arange(length)[None], None
    if pads is not None:
        valid = torch.arange(length)[None] >= torch.tensor(pads)[:, None]
        positions = (valid.long().cumsum(-1) - 1).clamp(min=0)
    return AttentionCall(layer, q, k, v, Softmax(WIDTH**-0.5), positions, valid, ids)


def left_padded(call: AttentionCall, pads: int) -> AttentionCall:
    """The same call with columns of rubbish in front, marked as padding."""
    rows, length = call.q_BHTD.shape[0], call.q_BHTD.shape[2]

    def wide(x: Tensor) -> Tensor:
        return torch.cat((torch.full_like(x[:, :, :1], 7.0).expand(-1, -1, pads, -1), x), dim=2)

    valid = torch.arange(pads + length)[None].expand(rows, -1) >= pads
    positions = (valid.long().cumsum(-1) - 1).clamp(min=0)
    ids = None if call.ids_BT is None else torch.nn.functional.pad(call.ids_BT, (pads, 0), value=3)
    return replace(
        call, q_BHTD=wide(call.q_BHTD), k_BGTD=wide(call.k_BGTD), v_BGTD=wide(call.v_BGTD), order_BT=positions,
        valid_BT=valid, ids_BT=ids,
    )  # fmt: skip


def probabilities(call: AttentionCall) -> Tensor:
    """The whole causal attention matrix, (B, H, T, T), rows of padding zero."""
    k_BHTD = call.k_BGTD.repeat_interleave(call.q_BHTD.shape[1] // call.k_BGTD.shape[1], dim=1)
    logits = call.q_BHTD.double() @ k_BHTD.double().transpose(-1, -2) * call.softmax.scaling
    length = logits.shape[-1]
    seen = torch.ones(length, length, dtype=torch.bool).tril()[None, None]
    if call.valid_BT is not None:
        seen = seen & call.valid_BT[:, None, None] & call.valid_BT[:, None, :, None]
    return logits.masked_fill(~seen, float("-inf")).softmax(-1).nan_to_num()


def column_sums(call: AttentionCall, weight_T: Tensor) -> Tensor:
    """Weighted column sums over queries, added up over each group, (B, G, T)."""
    sums_BHT = (probabilities(call) * weight_T.double()[:, None]).sum(2)
    return sums_BHT.unflatten(1, (call.k_BGTD.shape[1], -1)).sum(2)


def one_row(call: AttentionCall, row: int, start: int = 0) -> AttentionCall:
    """A row of a call by itself, from a column on, without its padding."""
    short = slice_call(call, start, None)
    q_BHTD, k_BGTD, v_BGTD = (x[row : row + 1] for x in (short.q_BHTD, short.k_BGTD, short.v_BGTD))
    order_BT = torch.arange(q_BHTD.shape[2])[None]
    return replace(short, q_BHTD=q_BHTD, k_BGTD=k_BGTD, v_BGTD=v_BGTD, order_BT=order_BT, ids_BT=None, valid_BT=None)


def stepped(method: KvCacheMethod, call: AttentionCall, prompt: int, prepared: Any = None) -> tuple[Tensor, LayerStore]:
    """Outputs (B, T, H, D) of the tokens behind a prompt, one after the other, and the store at the end."""
    _, store = method.prefill(slice_call(call, 0, prompt), prepared)
    outs = []
    for place in range(prompt, call.q_BHTD.shape[2]):
        append_recent(store, token(call, place))
        outs.append(method.step(token(call, place), store, prepared))
    return torch.cat(outs, 1), store


def token(call: AttentionCall, place: int) -> AttentionCall:
    """One token of a call."""
    return slice_call(call, place, place + 1)
