"""Dropping and merging tokens: one plan of indices per image, applied to hidden states, sizes and sources alike.

Shape suffixes: B batch, N tokens, M tokens that stay, R tokens that go, C width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from isoflop.kernels.merge import merge_tokens
from isoflop.models.hooks.vision_blocks import TokenState


@dataclass(frozen=True)
class MergePlan:
    """Which tokens join which, by their places in the state.

    Attributes:
        kept_BM: tokens that stay, in their new order.
        gone_BR: tokens that go.
        into_BR: for each of them the kept token that it joins.
    """

    kept_BM: Tensor
    gone_BR: Tensor
    into_BR: Tensor

    def behind(self, prefix: int) -> MergePlan:
        """A plan over patches as one over all tokens; the prefix tokens in front stay as they are."""
        front_BQ = torch.arange(prefix, device=self.kept_BM.device).expand(len(self.kept_BM), -1)
        kept_BM = torch.cat((front_BQ, prefix + self.kept_BM), dim=1)
        return MergePlan(kept_BM, prefix + self.gone_BR, prefix + self.into_BR)


def merge(state: TokenState, plan: MergePlan) -> TokenState:
    """Tokens join others as means weighted by size; sizes add up."""
    indices = (plan.kept_BM, plan.gone_BR, plan.into_BR)
    x_BMC, size_BM1 = merge_tokens(state.x_BNC, state.sizes(), *indices)
    source_BMN = None
    if state.source_BNM is not None:
        source_BMN, _ = merge_tokens(state.source_BNM, state.sizes(), *indices, mode="sum")
    return replace(state, x_BNC=x_BMC, size_BN1=size_BM1, source_BNM=source_BMN)


def keep(state: TokenState, kept_BM: Tensor) -> TokenState:
    """Only these patches, in this order, and the prefix tokens; what the others held is lost."""
    front_BQ = torch.arange(state.prefix, device=kept_BM.device).expand(len(kept_BM), -1)
    index_BM1 = torch.cat((front_BQ, state.prefix + kept_BM), dim=1)[:, :, None]

    def take(value_BNC: Tensor) -> Tensor:
        return value_BNC.gather(1, index_BM1.expand(-1, -1, value_BNC.shape[2]))

    return replace(
        state,
        x_BNC=take(state.x_BNC),
        size_BN1=None if state.size_BN1 is None else take(state.size_BN1),
        source_BNM=None if state.source_BNM is None else take(state.source_BNM),
    )
