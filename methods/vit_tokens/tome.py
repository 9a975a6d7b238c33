"""ToMe: token merging by bipartite soft matching (arXiv 2210.09461).

Shape suffixes: B batch, N tokens (prefix tokens first), A and B' tokens of the two sets, R that go, Q prefix tokens, D head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor

from isoflop.core.errors import Infeasible
from isoflop.core.knobs import Knob
from isoflop.kernels.merge import bipartite_match
from isoflop.methods.base import METHODS
from isoflop.methods.selection import sortable
from isoflop.methods.vit_tokens.base import VitTokenMethod
from isoflop.methods.vit_tokens.schedule import largest_amount
from isoflop.methods.vit_tokens.tokens import MergePlan, merge
from isoflop.models.hooks.vision_blocks import Signals, TokenState


@METHODS.register("tome")
@dataclass(frozen=True)
class ToMe(VitTokenMethod):
    """Tokens at even places each point at the most similar token at an odd place; the r closest pairs merge.

    Similarity is the cosine of the keys' mean over heads (section 3.2). Merged tokens are means weighted by size, and
    attention adds log sizes (equation 1). Prefix tokens neither go nor take others in. With ``schedule: decreasing``, ``r``
    is the mean of a linear decline to none. Solved for ``macs``, the number per block may be a fraction, which is spread
    over the blocks. Off the shelf, proportional attention is on for supervised models and off for those pre-trained by
    masking (appendix).
    """

    paper: ClassVar[str] = "arXiv 2210.09461"

    schedule: Annotated[
        str,
        Knob(
            choices=("fixed", "decreasing", "ratio"),
            doc="every block removes the same number, or ever fewer down to none, or keeps the same share",
        ),
    ] = "fixed"
    r: Annotated[int, Knob(low=0, high=4096, unit="tokens", doc="tokens merged per block; 0 leaves it to macs")] = 0
    prop_attn: Annotated[bool, Knob(doc="proportional attention: log size added to the logits of a key")] = True

    @property
    def proportional(self) -> bool:
        """``prop_attn``."""
        return self.prop_attn

    def amount(self, patches: int, ref: str) -> float | None:
        """``r``, or what ``ratio`` means."""
        if self.r == 0:
            return super().amount(patches, ref)
        if self.ratio != 0:
            raise Infeasible(
                f"method tome: r = {self.r} and ratio = {self.ratio:g} both set the schedule; give one of them"
            )
        largest = int(largest_amount(self.schedule, patches, self.most))
        return self.native("r", self.r, self.r, patches, ref, f"{largest} at most")

    def most(self, patches: int) -> int:
        """Half of the patches: each pair needs one of either set."""
        return patches // 2

    def scoring_macs(self, geometry: Any, patches: int, removed: int) -> int:
        """Similarities of the two sets."""
        return (patches // 2) * (patches - patches // 2) * (geometry["width"] // geometry["heads"])

    def reduce(self, state: TokenState, signals: Signals, block: int, count: int, layers: int) -> TokenState:
        """Merge the ``count`` most similar pairs."""
        return merge(state, soft_matching(signals.mean_key(), state.prefix, count))


def soft_matching(metric_BND: Tensor, prefix: int, count: int) -> MergePlan:
    """The ``count`` closest pairs between patches at even and at odd places, prefix tokens counted among the places.

    What stays keeps its order: patches at even places first, then those at odd ones.
    """
    batch, tokens = metric_BND.shape[:2]
    places_N = torch.arange(prefix, tokens, device=metric_BND.device)
    even_A, odd_B = places_N[places_N % 2 == 0], places_N[places_N % 2 == 1]
    best_BA, match_BA = bipartite_match(metric_BND[:, even_A], metric_BND[:, odd_B])
    order_BA = sortable(best_BA).argsort(dim=-1, descending=True, stable=True)
    chosen_BR, left_BA = order_BA[:, :count], order_BA[:, count:].sort(-1).values
    front_Q = torch.arange(prefix, device=metric_BND.device)
    kept_BM = torch.cat((front_Q.expand(batch, -1), even_A[left_BA], odd_B.expand(batch, -1)), dim=1)
    return MergePlan(kept_BM, even_A[chosen_BR], odd_B[match_BA.gather(1, chosen_BR)])
