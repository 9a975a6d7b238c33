"""From products of queries and keys to attention: a factor, a cap on the logits, and sinks beside the keys.

Attention of every kind here goes through ``Softmax``, so that what an architecture does to its logits is done in one place.

Shape suffixes: B batch, H query heads, G key-value heads, R query heads of a key-value head, T queries, N keys, D head width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from isoflop.kernels.blocks import queries_at_once


@dataclass(frozen=True, eq=False)
class Softmax:
    """How the weights of attention follow from products of queries and keys.

    Attributes:
        scaling: factor on the products.
        cap: c, where logits become c · tanh(logits / c), before masks and biases (Gemma 2, arXiv 2408.00118); None for none.
        sinks_H: a logit of each query head that stands beside those of the keys and has no value (gpt-oss): it takes its
            share of the weights, so that those of the keys sum to less than 1; None for none.
    """

    scaling: float
    cap: float | None = None
    sinks_H: Tensor | None = None

    @property
    def plain(self) -> bool:
        """Whether it is a softmax of scaled products and nothing else."""
        return self.cap is None and self.sinks_H is None

    @property
    def without_sinks(self) -> Softmax:
        """The same over keys alone: of a part of them, before ``with_sinks``."""
        return self if self.sinks_H is None else replace(self, sinks_H=None)

    def equals(self, other: Softmax) -> bool:
        """Whether the weights of all products are the same."""
        if (self.scaling, self.cap) != (other.scaling, other.cap):
            return False
        if self.sinks_H is None or other.sinks_H is None:
            return self.sinks_H is other.sinks_H
        return torch.equal(self.sinks_H, other.sinks_H)

    def of_heads(self, heads: slice | Tensor) -> Softmax:
        """The same for some of the query heads."""
        return self if self.sinks_H is None else replace(self, sinks_H=self.sinks_H[heads])

    def logits(self, products: Tensor) -> Tensor:
        """Of products of any shape, which may be overwritten; masks and biases come behind."""
        return self.capped(products.mul_(self.scaling))

    def capped(self, logits: Tensor) -> Tensor:
        """Of scaled products, which may be overwritten."""
        return logits if self.cap is None else logits.div_(self.cap).tanh_() * self.cap

    def weights(self, logits_BHTN: Tensor) -> Tensor:
        """Of all keys at once, masked ones with logits of -inf; where there are sinks, nothing is left for queries without keys."""
        if self.sinks_H is None:
            return logits_BHTN.softmax(-1)
        return (logits_BHTN - self._lse(logits_BHTN.logsumexp(-1))[..., None]).exp()

    def with_sinks(self, out_BHTD: Tensor, lse_BHT: Tensor) -> tuple[Tensor, Tensor]:
        """Attention over all keys and the log-sum-exp of their logits, both without sinks, as they are with them."""
        if self.sinks_H is None:
            return out_BHTD, lse_BHT
        whole_BHT = self._lse(lse_BHT)
        return out_BHTD * (lse_BHT - whole_BHT).exp()[..., None].to(out_BHTD.dtype), whole_BHT

    def attend(self, q_BHTD: Tensor, k_BGND: Tensor, v_BGND: Tensor, sees: Tensor | None = None) -> Tensor:
        """Attention, (B, H, T, D), in memory that does not grow with the square of the tokens unless ``sees`` does.

        Args:
            sees: True where a query sees a key, of a shape that goes with (B, H, T, N); None where N = T and each query sees the
                keys up to its own.
        """
        if self.plain:
            grouped = q_BHTD.shape[1] != k_BGND.shape[1]
            return F.scaled_dot_product_attention(
                q_BHTD, k_BGND, v_BGND, attn_mask=sees, is_causal=sees is None, scale=self.scaling, enable_gqa=grouped
            )
        batch, heads, length, _ = q_BHTD.shape
        rows = queries_at_once(q_BHTD.device, batch * heads, k_BGND.shape[2])
        starts = range(0, max(length, 1), rows)
        return torch.cat([self._block(q_BHTD, k_BGND, v_BGND, sees, slice(start, start + rows)) for start in starts], 2)

    def _block(self, q_BHTD: Tensor, k_BGND: Tensor, v_BGND: Tensor, sees: Tensor | None, block: slice) -> Tensor:
        q_BHTD = q_BHTD[:, :, block]
        length = q_BHTD.shape[2]
        if sees is None:
            places_N = torch.arange(block.start + length, device=q_BHTD.device)
            k_BGND, v_BGND = k_BGND[:, :, : len(places_N)], v_BGND[:, :, : len(places_N)]
            sees = places_N <= places_N[block.start :, None]
        elif sees.shape[-2] > 1:
            sees = sees[..., block, :]
        batch, heads, _, width = q_BHTD.shape
        groups, exact = k_BGND.shape[1], torch.promote_types(q_BHTD.dtype, torch.float32)
        q_BGMD = q_BHTD.to(exact).reshape(batch, groups, -1, width)  # M query rows of a key-value head
        logits_BGMN = self.logits(q_BGMD @ k_BGND.to(exact).transpose(-1, -2))
        logits_BHTN = logits_BGMN.view(batch, heads, length, -1).masked_fill_(~sees, float("-inf"))
        p_BGMN = self.weights(logits_BHTN).to(v_BGND.dtype).view(logits_BGMN.shape)
        return (p_BGMN @ v_BGND).reshape(batch, heads, length, -1)

    def _lse(self, lse_BHT: Tensor) -> Tensor:
        assert self.sinks_H is not None
        return torch.logaddexp(lse_BHT, self.sinks_H.to(lse_BHT.dtype)[:, None])
