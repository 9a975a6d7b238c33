"""Which tokens stay: counts, windows, and the choice by score.

Rules that hold for every method: a share of a length is the nearest whole number, halves up; the newest tokens are
protected before the first ones; among equal scores the lower index wins; what is kept stands in ascending order.

Shape suffixes: B batch, G key-value heads, N candidates, M entries of the kept ones, T tokens, D head width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from isoflop.core.errors import Infeasible
from isoflop.methods.selection import sortable
from isoflop.models.hooks.attention import AttentionCall


@dataclass(frozen=True, eq=False)
class KeptTokens:
    """Chosen tokens of every row and head.

    Attributes:
        index_BGM: their places, ascending; rows that keep fewer than M repeat their last one in the entries left over,
            so that those change no range of values.
        empty_BGM: True at those entries; None where there are none.
    """

    index_BGM: Tensor
    empty_BGM: Tensor | None

    def take(self, x_BGN: Tensor) -> Tensor:
        """The chosen entries of (B, G, N) or (B, G, N, D)."""
        if x_BGN.dim() == 3:
            return x_BGN.gather(2, self.index_BGM)
        return x_BGN.gather(2, self.index_BGM[..., None].expand(-1, -1, -1, x_BGN.shape[-1]))

    def mask(self, length: int) -> Tensor:
        """True at the chosen places, (B, G, length)."""
        live_BGM = torch.ones_like(self.index_BGM) if self.empty_BGM is None else (~self.empty_BGM).long()
        zeros_BGN = self.index_BGM.new_zeros(*self.index_BGM.shape[:2], length)
        return zeros_BGN.scatter_add(2, self.index_BGM, live_BGM) > 0

    def of_heads(self, groups: int) -> KeptTokens:
        """The same choice for so many heads: one head's for all, or the first of heads that choose alike."""
        if groups == self.index_BGM.shape[1]:
            return self
        index_BGM, empty_BGM = self.index_BGM[:, :1], self.empty_BGM
        empty_BGM = None if empty_BGM is None else empty_BGM[:, :1].expand(-1, groups, -1)
        return KeptTokens(index_BGM.expand(-1, groups, -1), empty_BGM)

    def bias(self, dtype: torch.dtype) -> Tensor | None:
        """-inf at empty entries and 0 elsewhere, (B, G, M); None where there are none."""
        if self.empty_BGM is None:
            return None
        return torch.zeros(self.empty_BGM.shape, dtype=dtype, device=self.empty_BGM.device).masked_fill(
            self.empty_BGM, float("-inf")
        )


def lengths(call: AttentionCall) -> list[int]:
    """Real tokens of each row."""
    batch, length = call.k_BGTD.shape[0], call.k_BGTD.shape[2]
    return [length] * batch if call.valid_BT is None else call.valid_BT.sum(-1).tolist()


def count_of(share: float, length: int, least: int = 1) -> int:
    """The number of tokens that ``share`` of ``length`` stands for: the nearest, halves up, at least ``least``."""
    return min(length, max(least, math.floor(share * length + 0.5 + 1e-9)))


def check_share(method: str, knob: str, share: float, prompt: int, task: str) -> None:
    """Raise Infeasible when ``share`` of a prompt of ``prompt`` tokens rounds to none of them."""
    if prompt < 1:
        raise Infeasible(f"method {method}: task {task} has no prompt that it could compress")
    if count_of(share, prompt, least=0) == 0:
        raise Infeasible(
            f"method {method}: {knob} = {share:g} of the {prompt} tokens of a prompt of task {task} keeps none of them; "
            f"{knob} from {math.ceil(500 / prompt) / 1000:g} on keeps one"
        )


def select(scores_BGN: Tensor, counts: list[int], candidates_BGN: Tensor | None = None) -> KeptTokens:
    """The ``counts[b]`` highest scores of every head.

    Args:
        scores_BGN: no NaN; +inf for what must be kept.
        counts: of each row; never more than it has candidates.
        candidates_BGN: False for what must not be kept (padding, empty entries); broadcasts.
    """
    if candidates_BGN is not None:
        scores_BGN = scores_BGN.masked_fill(~candidates_BGN, float("-inf"))
    order_BGN = sortable(scores_BGN).sort(dim=-1, descending=True, stable=True).indices
    most, least = max(counts), min(counts)
    best_BGM = order_BGN[..., :most]
    if most == least:
        return KeptTokens(best_BGM.sort(dim=-1).values, None)
    ranks_M = torch.arange(most, device=scores_BGN.device)
    surplus_BGM = (ranks_M >= torch.tensor(counts, device=scores_BGN.device)[:, None, None]).expand_as(best_BGM)
    places_BGM = best_BGM.masked_fill(surplus_BGM, scores_BGN.shape[-1]).sort(dim=-1).values
    empty_BGM = places_BGM == scores_BGN.shape[-1]
    last_BG1 = places_BGM.masked_fill(empty_BGM, 0).amax(-1, keepdim=True)
    return KeptTokens(torch.where(empty_BGM, last_BG1, places_BGM), empty_BGM)


def all_tokens(call: AttentionCall) -> KeptTokens:
    """All real tokens, those of each row in front."""
    return select(torch.zeros_like(call.k_BGTD[..., 0], dtype=torch.float32), lengths(call), candidates(call))


def split(
    scores_BGN: Tensor, counts: list[int], total: list[int], candidates_BGN: Tensor | None = None
) -> tuple[KeptTokens, KeptTokens]:
    """The ``counts[b]`` highest scores, and all other candidates: each of a row's ``total[b]`` is in exactly one."""
    best = select(scores_BGN, counts, candidates_BGN)
    others_BGN = (~best.mask(scores_BGN.shape[-1])).float()
    return best, select(others_BGN, [n - c for n, c in zip(total, counts, strict=True)], candidates_BGN)


def protect(scores_BGN: Tensor, positions_BGN: Tensor, seen: list[int], sinks: list[int], recent: list[int]) -> Tensor:
    """``scores`` with +inf at each row's first ``sinks`` and last ``recent`` positions.

    Args:
        positions_BGN: of the candidates, counted from 0 over the row's real tokens.
        seen: tokens of each row so far; the newest has position ``seen - 1``.
    """
    first_B11, after_B11 = (
        torch.tensor(x, device=scores_BGN.device)[:, None, None]
        for x in (sinks, [n - r for n, r in zip(seen, recent, strict=True)])
    )
    return scores_BGN.masked_fill((positions_BGN < first_B11) | (positions_BGN >= after_B11), float("inf"))


def candidates(call: AttentionCall) -> Tensor | None:
    """True at real tokens, (B, 1, T); None when nothing is padded."""
    return None if call.valid_BT is None else call.valid_BT[:, None]
