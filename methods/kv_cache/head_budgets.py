"""How much of a layer's budget each of its heads gets, by the scores of all its tokens.

Shape suffixes: B batch, G key-value heads, T tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from isoflop.methods.kv_cache.select import select
from isoflop.methods.selection import sortable

SHARED, OFFICIAL, AT_LEAST = "shared", "official", "at-least"


def best_of_all(scores_BGT: Tensor, totals: list[int]) -> Tensor:
    """True at the ``totals[b]`` highest scores of a row, whichever heads they are of, (B, G, T); -inf must not be among them."""
    chosen = select(scores_BGT.flatten(1)[:, None], totals)
    return chosen.mask(scores_BGT[0].numel()).view(scores_BGT.shape)


def best_of_each(scores_BGT: Tensor, counts_BG: Tensor) -> Tensor:
    """True at the ``counts_BG`` highest scores of each head, (B, G, T); among equal ones the first."""
    return _ranks(scores_BGT) < counts_BG[..., None]


def adaptive(scores_BGT: Tensor, means: list[int], floor: float, form: str) -> Tensor:
    """True at what each head keeps, (B, G, T), where a row's heads keep ``means[b]`` on average.

    Args:
        scores_BGT: -inf where there is nothing to keep; at least ``means[b]`` of every head of row b are more.
        means: tokens per head.
        floor: share of the budget that heads have whatever their scores.
        form: ``SHARED``: of what one choice over all heads gives a head, the rest of the shares, and ``floor`` of the mean; whole
            numbers by largest remainders, so that the sum is what it was. ``OFFICIAL``: the same with the second part rounded
            down and the sum to the nearest, as the released code does, whose totals are off by that. ``AT_LEAST``: the best
            ``floor`` of the mean, one at least, are safe, and one choice over all heads gives out the rest.
    """
    groups = scores_BGT.shape[1]
    totals = [groups * mean for mean in means]
    if form == AT_LEAST:
        safe_B1 = torch.tensor(
            [min(n, max(1, int(n * floor))) if floor else 0 for n in means], device=scores_BGT.device
        )
        safe_BGT = best_of_each(scores_BGT, safe_B1[:, None].expand(-1, groups))
        return best_of_all(scores_BGT.masked_fill(safe_BGT, torch.inf), totals)
    given_BG = best_of_all(scores_BGT, totals).sum(-1)
    if form == OFFICIAL:
        even_B1 = torch.tensor([int(n * floor) for n in means], device=scores_BGT.device)[:, None]
        counts_BG = torch.round(given_BG * (1 - floor) + even_B1).long()
    else:
        means_B1 = torch.tensor(means, device=scores_BGT.device)[:, None]
        counts_BG = _whole(given_BG.double() * (1 - floor) + means_B1.double() * floor, means_B1 * groups)
    return best_of_each(scores_BGT, counts_BG)


def _whole(shares_BG: Tensor, totals_B1: Tensor) -> Tensor:
    """Whole numbers of the same sum: rounded down, and one more where most was lost, lower heads first."""
    down_BG = (shares_BG + 1e-6).floor()
    lost_BG = ((shares_BG - down_BG) * 1e6).round()  # equal ones shall stay equal
    left_B1 = totals_B1 - down_BG.sum(-1, keepdim=True)
    return (down_BG + (_ranks(lost_BG) < left_B1)).long()


def _ranks(scores: Tensor) -> Tensor:
    """Each entry's place in descending order along the last dimension, from 0; equal ones in their order."""
    order = sortable(scores).sort(dim=-1, descending=True, stable=True).indices
    return torch.empty_like(order).scatter_(
        -1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order)
    )
