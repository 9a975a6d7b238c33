"""How many tokens a pass may hold at once, by the memory of the device rather than by a number."""

from __future__ import annotations

import torch

from isoflop.models.decoder_model import DecoderModel
from isoflop.models.memory import memory_of

HOST_BYTES = 2**29
"""Of one pass on a processor: a fixed number, so that the same batches come out on every machine."""
DEVICE_SHARE = 0.25
"""Of an accelerator's free memory."""
_WIDTHS = 24
"""Numbers that a pass holds of each token at its widest place, in widths: the residual, queries, keys and values, and the
gated feed-forward block, whose inner width is mostly between 2.7 and 4 widths."""


def tokens_at_once(model: DecoderModel, length: int) -> int:
    """Tokens of a pass over rows of ``length`` tokens, padding included; enough for one row in any case.

    A method that looks at attention holds a weight for every pair of tokens in every head, which is counted for all.
    """
    geometry = model.info.geometry
    of_token = 4 * (_WIDTHS * geometry["width"] + geometry["heads"] * length)
    return max(length, min(pass_bytes(device) for device in model.devices) // of_token)


def pass_bytes(device: torch.device) -> int:
    """Bytes that activations of one pass may take on a device."""
    if device.type != "cuda":
        return HOST_BYTES
    return int(DEVICE_SHARE * memory_of(str(device))[0])
