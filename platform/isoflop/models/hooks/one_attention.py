"""One attention module by itself: what it calls its softmax with, and what its last row looks like.

Shape suffixes: B batch, H query heads, G key-value heads, T tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from isoflop.core.errors import Infeasible
from isoflop.kernels.softmax import Softmax
from isoflop.models.hooks.attention import AttentionCall, replacing


class _Called(Exception):
    """Ends a module's pass at its attention; nothing went wrong."""

    def __init__(self, call: AttentionCall) -> None:
        self.call = call


def called_with(attention: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> AttentionCall:
    """What an attention module calls its softmax with; it runs up to there, whatever is occupied.

    Args:
        attention: a Hugging Face attention module.
        args, kwargs: what its layer called it with.

    Raises:
        Infeasible: it does not go through transformers' interface.
    """

    # a cache would count the tokens again; a mask, which may have any shape, is for the caller to lay on
    return _first_of(attention, *args, **{**kwargs, "past_key_values": None, "attention_mask": None})


def first_call(decoder: Any, **inputs: Any) -> AttentionCall:
    """What a decoder's first layer calls its softmax with. The pass ends there, and hooks on the decoder itself do not see it.

    Args:
        decoder: a Hugging Face decoder.
        inputs: of a pass without a cache.

    Raises:
        Infeasible: it does not go through transformers' interface.
    """

    return _first_of(decoder, **inputs, use_cache=False)


def _first_of(module: Any, *args: Any, **kwargs: Any) -> AttentionCall:
    """The first call of a softmax in a module's pass, which ends there."""

    def stop(call: AttentionCall) -> Tensor:
        raise _Called(call)

    try:
        with replacing(module.config, stop):
            module.forward(*args, **kwargs)
    except _Called as found:
        return found.call
    raise Infeasible(f"{type(module).__name__} does not call its attention through transformers' interface")


def own_last_row(attention: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Softmax]:
    """Logits of the last token in an attention module as the module itself computes them, masked, (B, H, T) in float32; and
    what makes weights of them.

    Args:
        attention, args, kwargs: see ``called_with``.

    Raises:
        Infeasible: it does not go through transformers' interface, or has a window or another softmax.
    """
    call = called_with(attention, args, kwargs)
    if call.window is not None:
        raise Infeasible(f"{type(attention).__name__} attends within a window of {call.window} tokens")
    heads, groups = call.q_BHTD.shape[1], call.k_BGTD.shape[1]
    k_BHTD = call.k_BGTD.repeat_interleave(heads // groups, dim=1)
    logits_BHT = call.softmax.logits((call.q_BHTD[:, :, -1:].float() @ k_BHTD.float().transpose(-1, -2))[:, :, 0])
    return _masked(logits_BHT, kwargs.get("attention_mask")), call.softmax


def _masked(logits_BHT: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return logits_BHT
    row = mask[:, None] if mask.dim() == 2 else mask[:, :, -1]
    if row.dtype is torch.bool or mask.dim() == 2:
        return logits_BHT.masked_fill(~row.bool(), float("-inf"))
    return (logits_BHT + row.float()).masked_fill(row <= torch.finfo(row.dtype).min / 2, float("-inf"))
