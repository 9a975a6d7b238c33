"""Eviction by the attention that tokens have received: what A2SF, H2O and TOVA share.

Shape suffixes: B batch, G key-value heads, T tokens, N candidates.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from isoflop.methods.kv_cache.eviction import Rolling
from isoflop.methods.kv_cache.scores import attention_scores, forgetting
from isoflop.methods.kv_cache.select import count_of
from isoflop.models.hooks.attention import AttentionCall


@dataclass(frozen=True)
class Accumulated(Rolling):
    """Base class: S <- alpha S + A at every query, tokens with the least S go."""

    @property
    def forgets(self) -> float:
        """Alpha: 1 never forgets, 0 knows the last query only."""
        return 1.0

    @property
    def per_layer(self) -> bool:
        """Whether all heads of a layer keep the same tokens."""
        return False

    @property
    def protects(self) -> tuple[int, float]:
        """First tokens, and the share of the budget for the newest, that stay whatever their score."""
        return 0, 0.0

    @property
    def remembers(self) -> bool:
        """Not with alpha 0: the current query's attention is the whole score."""
        return self.forgets > 0

    def windows(self, kept: int) -> tuple[int, int]:
        """The newest tokens first; sinks get what is left of the budget."""
        sinks, share = self.protects
        recent = count_of(share, kept, least=0)
        return min(sinks, kept - recent), recent

    def score(self, prompt: AttentionCall) -> Tensor:
        """Column sums with weights alpha^age, (B, G, T), or their mean over heads, (B, 1, T)."""
        return self._pooled(attention_scores(prompt, forgetting(prompt, self.forgets)))

    def update(self, scores_BGN: Tensor, received_BGN: Tensor) -> Tensor:
        """alpha S + A."""
        return self.forgets * scores_BGN + self._pooled(received_BGN)

    def _pooled(self, scores_BGN: Tensor) -> Tensor:
        return scores_BGN.mean(1, keepdim=True) if self.per_layer else scores_BGN
