"""Random numbers made of example numbers or token ids: the same for an example whatever its batch, padding and device.

No generator has a state that a neighbour in the batch, or a second pass, could move. Images share their placeholder ids,
so that models with example numbers are keyed by those. A job's seed takes no part: repeats of a cell share their draws,
whose spread is that over examples, layers and heads.

Shape suffixes: B batch, G key-value heads, T tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from isoflop.core.hashing import derive_seed
from isoflop.methods.selection import mix, shifted
from isoflop.models.hooks.attention import AttentionCall


def row_keys(call: AttentionCall) -> Tensor:
    """A number for each row, (B,): of its example, or its sequence of token ids without padding, or zero."""
    batch, device = call.k_BGTD.shape[0], call.k_BGTD.device
    if call.examples_B is not None:
        return mix(call.examples_B.long().to(device))
    if call.ids_BT is None:
        return torch.zeros(batch, dtype=torch.int64, device=device)
    marks_BT = mix(mix(call.order_BT.long()) + call.ids_BT.long())
    if call.valid_BT is not None:
        marks_BT = marks_BT.masked_fill(~call.valid_BT, 0)
    return marks_BT.sum(-1)


def uniform(call: AttentionCall, purpose: str) -> Tensor:
    """Numbers in [0, 1) for every token of every key-value head, (B, G, T), float64.

    Args:
        purpose: draws for different purposes are independent, and so are those of different layers.
    """
    groups = call.k_BGTD.shape[1]
    heads_G = torch.arange(groups, device=call.k_BGTD.device)
    keys_BG = mix(row_keys(call)[:, None] + mix(heads_G + derive_seed(purpose, call.layer)))
    numbers_BGT = mix(keys_BG[:, :, None] + mix(call.order_BT.long())[:, None])
    return shifted(numbers_BGT, 11).double() / 2**53
