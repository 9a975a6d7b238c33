"""How many queries go through attention at once, where logits are held for them: memory that grows with keys, not with queries."""

from __future__ import annotations

import torch

BLOCK_VALUES = {"cpu": 1 << 22, "cuda": 1 << 27}
"""Logits that are held at a time: what stays near a processor; on a GPU, enough to keep it busy."""
LEAST_ROWS = 32
"""Queries of a block at least: with fewer, reading the keys takes longer than computing with them."""


def block_values(device: torch.device) -> int:
    """``BLOCK_VALUES`` of a device."""
    return BLOCK_VALUES.get(device.type, BLOCK_VALUES["cuda"])


def queries_at_once(device: torch.device, heads: int, keys: int) -> int:
    """Queries of a block with so many keys each, for all ``heads`` (of all rows) together."""
    return max(LEAST_ROWS, block_values(device) // max(1, heads * keys))
