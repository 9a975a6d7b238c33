"""What a model reads behind a stored prompt so that a method sees what it attends to, and largest weights of attention.

Shape suffixes: B batch, H query heads, G key-value heads, T tokens of a passage, C tokens of the prompt, N of both, M query rows of a
key-value head, D head width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from isoflop.kernels.blocks import queries_at_once
from isoflop.kernels.softmax import Softmax


@dataclass(frozen=True, eq=False)
class Passage:
    """Tokens that are read once, right behind the prompt.

    Attributes:
        ids_BT: tokens; rows that have fewer end in any others, which no token before them sees.
        real_BT: False for these.
        positions_BT: each row's go on where its prompt ended.
        start, stop: tokens of the prompt that it repeats, by their numbers in each row.
    """

    ids_BT: Tensor
    real_BT: Tensor
    positions_BT: Tensor
    start: int
    stop: int


@dataclass(frozen=True, eq=False)
class Rereading:
    """A passage that is being read, and what has been noticed, by layer."""

    passage: Passage
    noticed: dict[int, Tensor]


def columns_of(valid_BT: Tensor | None, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Where each row's tokens stand, by their numbers, (B or 1, T), those of padding last; and how many are real, (B or 1)."""
    if valid_BT is None:
        return torch.arange(length, device=device)[None], torch.tensor([length], device=device)
    return (~valid_BT).long().sort(dim=-1, stable=True).indices, valid_BT.sum(-1)


def largest_attention(q_BHTD: Tensor, k_BGND: Tensor, softmax: Softmax, there_BC: Tensor, real_BT: Tensor) -> Tensor:
    """The largest weight that each of the first C keys gets from any query of any head of its group, (B, G, C), float32.

    Args:
        k_BGND: C keys that all queries see, and then those of the queries themselves, which see each other up to their own.
        there_BC: False for keys that no query sees.
        real_BT: False for queries that do not count.
    """
    groups, length, first = k_BGND.shape[1], q_BHTD.shape[2], there_BC.shape[-1]
    k_BGDN = k_BGND.float().transpose(-1, -2)
    best_BGC = k_BGDN.new_zeros(*k_BGND.shape[:2], first)
    places_T = torch.arange(length, device=q_BHTD.device)
    rows = queries_at_once(q_BHTD.device, q_BHTD.shape[0] * q_BHTD.shape[1], k_BGND.shape[2])
    for start in range(0, length, rows):
        q = q_BHTD[:, :, start : start + rows].float()
        logits = softmax.logits(q.unflatten(1, (groups, -1)).flatten(2, 3) @ k_BGDN).view(*q.shape[:3], -1)
        logits[..., :first].masked_fill_(~there_BC[:, None, None], float("-inf"))
        logits[..., first:].masked_fill_(places_T > places_T[start : start + rows, None], float("-inf"))
        p = softmax.weights(logits)[..., :first] * real_BT[:, None, start : start + rows, None]
        best_BGC = torch.maximum(best_BGC, p.unflatten(1, (groups, -1)).amax((2, 3)))
    return best_BGC
