"""PiToMe: spectrum-preserving token merging, which protects tokens that few others resemble (arXiv 2405.16148).

Shape suffixes: B batch, T patches, A and R tokens that may go and that go, D head width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from isoflop.core.knobs import Knob
from isoflop.methods.base import METHODS
from isoflop.methods.selection import random_subset, sortable
from isoflop.methods.vit_tokens.base import VitTokenMethod
from isoflop.methods.vit_tokens.tokens import MergePlan, merge
from isoflop.models.hooks.vision_blocks import Signals, TokenState

ENERGIES = ("elu", "paper", "gauss")
VARIANTS = ("released", "paper", "no_protect", "random_split")


@METHODS.register("pitome")
@dataclass(frozen=True)
class PiToMe(VitTokenMethod):
    """Tokens in large clusters (high energy) merge among themselves; isolated ones are protected.

    The energy of a patch is the mean over all patches of f(cosine of head-mean keys), with a margin that falls linearly
    over the blocks to 0 (equation 4). To remove r tokens, the 2r of highest energy are split alternately by rank into
    those that go and those that stay; each of the former joins its most similar one of the latter, as means weighted by
    size (algorithm 1). Prefix tokens take no part.

    ``variant`` says who may merge. ``paper``: the rule above in every block. ``released``, the authors' code for
    ViT and DeiT: in the first half of the blocks nobody is protected; all patches are split by energy rank and the r
    closest pairs merge. ``no_protect``: that in every block. ``random_split``: protection, but the 2r tokens are split
    at random. The release keeps sizes but does not use them in attention (``prop_attn``).

    ``energy`` is f: ``elu`` as released, ELU(s - m); ``paper`` as printed, s where s >= m and alpha·(exp(s - m) - 1)
    elsewhere; ``gauss``, the release's kernel for text with deviation 1 - m.
    """

    paper: ClassVar[str] = "arXiv 2405.16148"

    variant: Annotated[str, Knob(choices=VARIANTS, doc="who may merge with whom")] = "released"
    energy: Annotated[
        str, Knob(choices=ENERGIES, doc="function of the similarities whose mean is a token's energy")
    ] = "elu"
    margin0: Annotated[float, Knob(low=0.5, high=0.95, doc="margin m of the first block")] = 0.75
    alpha: Annotated[float, Knob(low=0.0, high=1.0, doc="weight of similarities below the margin")] = 1.0
    prop_attn: Annotated[bool, Knob(doc="proportional attention: log size added to the logits of a key")] = False

    @property
    def proportional(self) -> bool:
        """``prop_attn``."""
        return self.prop_attn

    def most(self, patches: int) -> int:
        """Half of the patches: every merge takes two."""
        return patches // 2

    def scoring_macs(self, geometry: Any, patches: int, removed: int) -> int:
        """Similarities of all pairs of patches; the matching reads them again."""
        return patches**2 * (geometry["width"] // geometry["heads"])

    def reduce(self, state: TokenState, signals: Signals, block: int, count: int, layers: int) -> TokenState:
        """Merge ``count`` tokens into others."""
        similarity_BTT = cosines(signals.mean_key()[:, state.prefix :])
        energy_BT = self.energies(similarity_BTT, self.margin0 * (1 - block / layers))
        rank_BT = sortable(energy_BT).argsort(dim=-1, descending=True, stable=True)
        if self.protects(block, layers):
            plan = self.protected(similarity_BTT, rank_BT, count, state.ids_B, block)
        else:
            plan = closest(similarity_BTT, rank_BT, count)
        return merge(state, plan.behind(state.prefix))

    def protects(self, block: int, layers: int) -> bool:
        """Whether tokens of low energy are protected in this block."""
        if self.variant == "released":
            return block >= math.ceil(layers / 2)
        return self.variant != "no_protect"

    def energies(self, similarity_BTT: Tensor, margin: float) -> Tensor:
        """Energy of every patch (B, T), its similarity with itself included."""
        if self.energy == "gauss":
            deviation = 1 - margin
            kernel = torch.exp(-0.5 * ((1 - similarity_BTT) / deviation) ** 2)
            return kernel.mean(-1) / (deviation * math.sqrt(2 * math.pi))
        below_BTT = self.alpha * torch.expm1((similarity_BTT - margin).clamp(max=0))
        above_BTT = similarity_BTT if self.energy == "paper" else similarity_BTT - margin
        return torch.where(similarity_BTT >= margin, above_BTT, below_BTT).mean(-1)

    def protected(self, similarity_BTT: Tensor, rank_BT: Tensor, count: int, ids_B: Tensor, block: int) -> MergePlan:
        """A plan over patches: the 2·count of highest energy merge in pairs, the others stay as they are.

        Args:
            rank_BT: patches by falling energy.
            ids_B, block: decide the split of ``random_split``.
        """
        mergeable_BA, protected_BM = rank_BT[:, : 2 * count], rank_BT[:, 2 * count :]
        if self.variant == "random_split":
            chosen_BA = torch.zeros_like(mergeable_BA).scatter(1, random_subset(ids_B, 2 * count, count, block), 1)
            shuffled_BA = mergeable_BA.gather(1, chosen_BA.argsort(dim=-1, stable=True))
            stay_BR, gone_BR = shuffled_BA[:, :count], shuffled_BA[:, count:]
        else:
            gone_BR, stay_BR = mergeable_BA[:, ::2], mergeable_BA[:, 1::2]
        match_BR = between(similarity_BTT, gone_BR, stay_BR).argmax(-1)
        return MergePlan(torch.cat((protected_BM, stay_BR), dim=1), gone_BR, stay_BR.gather(1, match_BR))


def closest(similarity_BTT: Tensor, rank_BT: Tensor, count: int) -> MergePlan:
    """A plan over patches: all are split alternately by rank, and the ``count`` closest pairs merge."""
    even_BA, odd_BR = rank_BT[:, ::2], rank_BT[:, 1::2]
    best_BA, match_BA = between(similarity_BTT, even_BA, odd_BR).max(-1)
    order_BA = sortable(best_BA).argsort(dim=-1, descending=True, stable=True)
    chosen_BR, left_BM = order_BA[:, :count], order_BA[:, count:]
    kept_BM = torch.cat((even_BA.gather(1, left_BM), odd_BR), dim=1)
    return MergePlan(kept_BM, even_BA.gather(1, chosen_BR), odd_BR.gather(1, match_BA.gather(1, chosen_BR)))


def cosines(key_BTD: Tensor) -> Tensor:
    """Cosine similarity of all pairs, (B, T, T), in float32."""
    unit_BTD = F.normalize(key_BTD.float(), dim=-1)
    return unit_BTD @ unit_BTD.transpose(-1, -2)


def between(similarity_BTT: Tensor, rows_BR: Tensor, columns_BA: Tensor) -> Tensor:
    """The similarities of some patches with others, (B, R, A)."""
    rows_BRT = similarity_BTT.gather(1, rows_BR[:, :, None].expand(-1, -1, similarity_BTT.shape[2]))
    return rows_BRT.gather(2, columns_BA[:, None, :].expand(-1, rows_BR.shape[1], -1))
