"""The whole cache, exact: the baseline of the family."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from isoflop.methods.base import METHODS
from isoflop.methods.kv_cache.base import KvCacheMethod, empty_recent, whole_prompt
from isoflop.models.base import ModelInfo
from isoflop.models.hooks.attention import AttentionCall
from isoflop.models.segments import LayerStore


@METHODS.register("full-cache")
@dataclass(frozen=True)
class FullCache(KvCacheMethod):
    """Keep every key and value as it is: ratio 1."""

    @classmethod
    def identity(cls, info: ModelInfo) -> FullCache:
        """Always."""
        return cls()

    def compress(self, prompt: AttentionCall, prepared: Any) -> LayerStore:
        """One dense segment with everything."""
        return LayerStore([whole_prompt(prompt)], empty_recent(prompt))
