"""Methods on the cache that have learned something of a model which stays as it is: weights beside it, or which heads to spare."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from isoflop.core.stage import StageContext
from isoflop.methods.kv_cache.base import CompressedCache, KvCacheMethod
from isoflop.methods.own_weights import Learner
from isoflop.models.base import Model
from isoflop.models.hooks.occupant import tensor_bytes


@dataclass(frozen=True)
class LearnedCacheMethod(KvCacheMethod, Learner):
    """Base class; what is learned is put to use in a ``LearnedCache``."""

    def footprint(self, model: Model, ctx: StageContext) -> dict[str, float]:
        """Bytes of the cache, of weights beside it, and what the training took."""
        found, cache = super().footprint(model, ctx), self.cache(model)
        if isinstance(cache, LearnedCache):
            found["training_seconds"] = cache.training_seconds
            if held := cache.tensors():
                found["method_params"] = float(sum(t.numel() for t in held))
                found["method_bytes"] = sum(tensor_bytes(t, model.info.dense_bits) for t in held)
        return found


class LearnedCache(CompressedCache):
    """A cache with what was learned for it.

    Args:
        prepared: what the method reads of it.
        weights: those of it that stay in memory beside the model.
        training_seconds: CPU seconds that the training took.
    """

    def __init__(
        self,
        method: LearnedCacheMethod,
        prepared: Any,
        dense_bits: int,
        weights: nn.Module | None,
        training_seconds: float,
    ) -> None:
        super().__init__(method, prepared, dense_bits)
        self.training_seconds = training_seconds
        self._weights = weights

    def tensors(self) -> Sequence[Tensor]:
        """Weights beside the model's."""
        return [] if self._weights is None else list(self._weights.parameters())
