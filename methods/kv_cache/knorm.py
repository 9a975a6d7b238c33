"""Key norms: small keys draw attention (arXiv 2406.11430)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from isoflop.methods.base import METHODS
from isoflop.methods.kv_cache.eviction import Eviction
from isoflop.models.hooks.attention import AttentionCall


@METHODS.register("knorm")
@dataclass(frozen=True)
class Knorm(Eviction):
    """Each head keeps the keys of the smallest L2 norm; no attention is looked at."""

    paper: ClassVar[str] = "arXiv 2406.11430"

    def score(self, prompt: AttentionCall) -> Tensor:
        """Minus the norm."""
        return -prompt.k_BGTD.float().norm(dim=-1)
