"""How the states of an encoder become the embedding of a text, as sentence-transformers computes it.

Shape suffixes: B texts, T tokens, d width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

COSINE, DOT, EUCLIDEAN, MANHATTAN = "cosine", "dot", "euclidean", "manhattan"
Pool = Callable[[Tensor, Tensor], Tensor]


def _mean(x_BTd: Tensor, mask_BT1: Tensor) -> Tensor:
    return (x_BTd * mask_BT1).sum(1) / mask_BT1.sum(1).clamp(min=1e-9)


def _mean_sqrt(x_BTd: Tensor, mask_BT1: Tensor) -> Tensor:
    return (x_BTd * mask_BT1).sum(1) / mask_BT1.sum(1).clamp(min=1e-9).sqrt()


def _weighted_mean(x_BTd: Tensor, mask_BT1: Tensor) -> Tensor:
    places_T1 = torch.arange(1, x_BTd.shape[1] + 1, device=x_BTd.device, dtype=x_BTd.dtype)[:, None]
    return _mean(x_BTd, mask_BT1 * places_T1)


def _last(x_BTd: Tensor, mask_BT1: Tensor) -> Tensor:
    last_B = mask_BT1[..., 0].long().cumsum(1).argmax(1)
    return x_BTd[torch.arange(len(x_BTd), device=x_BTd.device), last_B]


POOLS: dict[str, Pool] = {
    "cls": lambda x_BTd, mask_BT1: x_BTd[:, 0],
    "max": lambda x_BTd, mask_BT1: x_BTd.masked_fill(mask_BT1 == 0, -1e9).amax(1),
    "mean": _mean,
    "mean_sqrt_len_tokens": _mean_sqrt,
    "weightedmean": _weighted_mean,
    "lasttoken": _last,
}
"""By the names that sentence-transformers has for them; several are laid side by side in this order."""
SIMILARITIES: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    COSINE: lambda a_Qd, b_Dd: F.normalize(a_Qd, dim=-1) @ F.normalize(b_Dd, dim=-1).T,
    DOT: lambda a_Qd, b_Dd: a_Qd @ b_Dd.T,
    EUCLIDEAN: lambda a_Qd, b_Dd: -torch.cdist(a_Qd, b_Dd),
    MANHATTAN: lambda a_Qd, b_Dd: -torch.cdist(a_Qd, b_Dd, p=1),
}


@dataclass(frozen=True)
class Sentence:
    """An embedding and how two of them compare. The default is what sentence-transformers makes of a bare encoder.

    Attributes:
        pools: names in ``POOLS``.
        normalised: embeddings have length 1.
        similarity: name in ``SIMILARITIES``.
        query, document: put before a text of either kind.
        lower: texts are put in lower case first.
    """

    pools: tuple[str, ...] = ("mean",)
    normalised: bool = False
    similarity: str = COSINE
    query: str = ""
    document: str = ""
    lower: bool = False

    def pooled(self, x_BTd: Tensor, mask_BT: Tensor) -> Tensor:
        """Of states and their mask (B, T), in float32."""
        x_BTd, mask_BT1 = x_BTd.float(), mask_BT[..., None].float()
        return torch.cat([POOLS[name](x_BTd, mask_BT1) for name in self.pools], dim=-1)

    def finished(self, pooled_Bd: Tensor) -> Tensor:
        """The embedding."""
        return F.normalize(pooled_Bd, dim=-1) if self.normalised else pooled_Bd

    def similarities(self, queries_Qd: Tensor, documents_Dd: Tensor) -> Tensor:
        """How near every document is to every query, (Q, D); more is nearer."""
        return SIMILARITIES[self.similarity](queries_Qd, documents_Dd)

    def given(self, text: str, query: bool) -> str:
        """A text as the encoder reads it."""
        whole = (self.query if query else self.document) + text
        return whole.lower() if self.lower else whole
