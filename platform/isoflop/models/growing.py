"""Tensors that tokens are added to one after the other, without being copied each time.

A step of decoding adds a token to every layer's keys and values. Joined to those before it, it would cost a new tensor and a
copy of everything held; here it is written into room behind them, and what is held is a view of the buffer's beginning.
Bytes are counted on that view: room that holds nothing yet is no content.

Shape suffixes: B batch, G key-value heads, N tokens held, T tokens added, M tokens chosen.
"""

from __future__ import annotations

import torch
from torch import Tensor

SHARE, LEAST = 0.25, 16
"""Room behind what has grown: a share of it, and tokens at least. All growth together then copies each token 1 / SHARE times."""


class Rooms:
    """The buffers behind the tensors of one owner, by name. Tokens lie along dimension 2.

    What an owner's copy or slice holds has no room here, so that two owners never write into the same.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def append(self, name: str, held: Tensor, new: Tensor) -> Tensor:
        """``held`` with ``new`` behind it, (B, G, N + T, …); where gradients may flow, a tensor of its own.

        Args:
            held: what the last call of this name returned. Anything else, and what does not fit, moves into a new buffer.
        """
        if torch.is_grad_enabled():  # what is held may have to stay as it is for the way back
            return torch.cat((held, new), dim=2)
        count, total = held.shape[2], held.shape[2] + new.shape[2]
        buffer = self._buffers.get(name)
        if buffer is None or not _begins(held, buffer) or total > buffer.shape[2] or new.dtype != buffer.dtype:
            room = _room(total) if count else 0  # what comes first may well be all
            dtype = torch.promote_types(held.dtype, new.dtype)
            buffer = self._buffers[name] = _empty(new, total + room, dtype)
            buffer[:, :, :count] = held
        buffer[:, :, count:total] = new
        return buffer[:, :, :total]

    def gather(self, name: str, x: Tensor, index_BGM: Tensor, growing: bool) -> Tensor:
        """Chosen tokens of ``x``, (B, G, M, …); with room where more are to follow."""
        index = index_BGM.reshape(*index_BGM.shape, *[1] * (x.dim() - 3)).expand(-1, -1, -1, *x.shape[3:])
        if not growing or torch.is_grad_enabled():
            return x.gather(2, index)
        chosen = index_BGM.shape[2]
        buffer = self._buffers[name] = _empty(x, chosen + _room(chosen), x.dtype)
        torch.gather(x, 2, index, out=buffer[:, :, :chosen])
        return buffer[:, :, :chosen]


def _room(tokens: int) -> int:
    return max(LEAST, int(SHARE * tokens))


def _begins(held: Tensor, buffer: Tensor) -> bool:
    """Whether ``held`` is a view of the buffer's beginning, of all rows and heads."""
    whole = (*held.shape[:2], *held.shape[3:]) == (*buffer.shape[:2], *buffer.shape[3:])
    return whole and held.data_ptr() == buffer.data_ptr() and held.stride() == buffer.stride()


def _empty(like: Tensor, tokens: int, dtype: torch.dtype) -> Tensor:
    return like.new_empty((*like.shape[:2], tokens, *like.shape[3:]), dtype=dtype)
