"""Layers that attend within a window: each token to itself and to those right before it.

Their caches hold the window and no more, so that there is nothing for a method to compress: they are computed exactly beside it,
and count as what they hold.

Shape suffixes: B batch, H query heads, G key-value heads, T tokens of a pass, N tokens held, D head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from isoflop.kernels.softmax import Softmax

if TYPE_CHECKING:
    from isoflop.models.hooks.attention import AttentionCall

BLOCK = 256
"""Queries taken at once, unless the window is wider: memory grows with tokens, not with their square."""


def windowed_attention(
    q_BHTD: Tensor, k_BGND: Tensor, v_BGND: Tensor, softmax: Softmax, window: int, valid_BN: Tensor | None
) -> Tensor:
    """Attention of the last T of N tokens, each to the ``window`` tokens up to itself, (B, T, H, D).

    Args:
        window: in columns, as padding is on the left.
        valid_BN: False for padding, which sees itself; None when nothing is padded.
    """
    length, total = q_BHTD.shape[2], k_BGND.shape[2]
    size = max(window, BLOCK)
    outs = []
    for start in range(0, length, size):
        stop = min(start + size, length)
        own, end = total - length + start, total - length + stop
        first = max(0, own - window + 1)
        age_TN = torch.arange(own, end)[:, None] - torch.arange(first, end)
        age_TN = age_TN.to(q_BHTD.device)
        sees = (age_TN >= 0) & (age_TN < window)
        if valid_BN is not None:
            sees = (sees & valid_BN[:, None, None, first:end]) | (age_TN == 0)
        outs.append(softmax.attend(q_BHTD[:, :, start:stop], k_BGND[:, :, first:end], v_BGND[:, :, first:end], sees))
    return torch.cat(outs, dim=2).transpose(1, 2)


@dataclass
class WindowCache:
    """The newest tokens of one layer in a step-by-step run: as many as its window is wide, exact.

    Attributes:
        k_BGND, v_BGND: keys and values; None before the first pass.
        valid_BN: False for padding; None when nothing is padded.
    """

    k_BGND: Tensor | None = None
    v_BGND: Tensor | None = None
    valid_BN: Tensor | None = None

    def attend(self, call: AttentionCall) -> Tensor:
        """Attention of the next tokens, (B, T, H, D); they are held from then on, and the oldest go.

        Raises:
            ValueError: padding behind the first pass, which would take places of the window.
        """
        assert call.window is not None
        k_BGND, v_BGND, valid_BN = call.k_BGTD, call.v_BGTD, call.valid_BT
        if self.k_BGND is not None and self.v_BGND is not None:
            if valid_BN is not None and not bool(valid_BN.all()):
                raise ValueError("tokens behind a prompt cannot be padding")
            k_BGND, v_BGND = torch.cat((self.k_BGND, k_BGND), dim=2), torch.cat((self.v_BGND, v_BGND), dim=2)
            new = k_BGND.shape[2] - self.k_BGND.shape[2]
            valid_BN = None if self.valid_BN is None else F.pad(self.valid_BN, (0, new), value=True)
        out_BTHD = windowed_attention(call.q_BHTD, k_BGND, v_BGND, call.softmax, call.window, valid_BN)
        # copies, so that what has left the window does not stay in memory with the rest of its tensor
        self.k_BGND, self.v_BGND = k_BGND[:, :, -call.window :].clone(), v_BGND[:, :, -call.window :].clone()
        self.valid_BN = None if valid_BN is None else valid_BN[:, -call.window :]
        return out_BTHD
