"""What eviction keeps, in fewer bits: two methods of the cache in one trial, one after the other.

Which tokens stay and in how many bits they stay are two questions, and budgets below an eighth of the bytes need both. A method
that turns exact tokens into packed ones without asking what attends to them (``Packs``) can follow one that keeps exact
tokens (:class:`~isoflop.methods.kv_cache.eviction.Eviction`): the survivors of the prompt are packed, and what comes behind the prompt is
treated as the packing method treats it.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from isoflop.core.errors import Infeasible
from isoflop.core.hook import Hook
from isoflop.core.knobs import KnobValue
from isoflop.core.stage import Stage
from isoflop.methods.base import Axes, Method
from isoflop.methods.kv_cache.base import CompressedCache, KvCacheMethod
from isoflop.methods.kv_cache.eviction import Eviction
from isoflop.methods.kv_cache.select import KeptTokens
from isoflop.models.base import Model, ModelInfo
from isoflop.models.hooks.attention import ATTENTION, AttentionCall
from isoflop.models.hooks.occupant import Occupant
from isoflop.models.segments import DenseSegment, LayerStore, Segment


class Packs(KvCacheMethod):
    """Base class of low-precision caches that look at keys and values alone."""

    @abstractmethod
    def pack(self, kept: DenseSegment) -> list[Segment]:
        """Exact tokens of the prompt in the method's form; empty entries (a bias of -inf) repeat another token and count for nothing."""

    def over(self, other: Method) -> Method | None:
        """Behind an eviction, whose survivors are packed."""
        if not isinstance(other, Eviction) or not other.even or other.spans_layers or other.hooks != self.hooks:
            return None
        return EvictThenPack(other, self)


def everything(kept: DenseSegment) -> KeptTokens:
    """All tokens of a segment as a choice."""
    index_N = torch.arange(kept.tokens, device=kept.positions_BGN.device)
    empty_BGN = None if kept.log_bias_BGN is None else kept.log_bias_BGN == float("-inf")
    return KeptTokens(index_N.expand_as(kept.positions_BGN), empty_BGN)


@dataclass(frozen=True)
class EvictThenPack(KvCacheMethod):
    """Two methods at work as one; not registered, since a trial names the two.

    Attributes:
        keeps: which tokens stay.
        packs: in what form.
    """

    keeps: Eviction
    packs: Packs

    @property
    def name(self) -> str:  # type: ignore[override]
        """Both names, as rows have them."""
        return f"{self.keeps.name}+{self.packs.name}"

    @property
    def follows_rotation(self) -> bool:  # type: ignore[override]
        """Where the eviction or what packs looks behind RoPE."""
        return self.keeps.follows_rotation or self.packs.follows_rotation

    def knobs(self) -> dict[str, KnobValue]:
        """Those of both, behind their names."""
        return {f"{m.name}.{knob}": value for m in (self.keeps, self.packs) for knob, value in m.knobs().items()}

    def axes(self, info: ModelInfo) -> Axes:
        """Bits of what packs; the two ratios multiplied."""
        evicted, packed = self.keeps.axes(info), self.packs.axes(info)
        ratio = None
        if evicted.ratio is not None and packed.ratio is not None:
            ratio = evicted.ratio * packed.ratio
        return Axes(bits=packed.bits, ratio=ratio)

    def check(self, info: ModelInfo) -> None:
        """What each refuses, and eviction that goes on while decoding, which needs exact tokens."""
        self.keeps.check(info)
        self.packs.check(info)
        if not self.keeps.exact_prompt:
            raise Infeasible(
                f"method {self.keeps.name} evicts while it reads the prompt, before {self.packs.name} could pack what stays; beside "
                f"it set {self.keeps.name}.prompt: exact"
            )
        if getattr(self.keeps, "rolling", False):
            raise Infeasible(
                f"method {self.keeps.name} goes on evicting while tokens are generated, which packed tokens cannot leave; beside "
                f"{self.packs.name} set {self.keeps.name}.rolling: false"
            )
        if getattr(self.keeps, "count_bias", False):
            raise Infeasible(
                f"method {self.keeps.name} counts what each token stands for, which packed tokens do not; beside "
                f"{self.packs.name} set {self.keeps.name}.count_bias: false"
            )

    def check_prompt(self, tokens: int, task: str) -> None:
        """What each refuses."""
        self.keeps.check_prompt(tokens, task)
        self.packs.check_prompt(tokens, task)

    def prepare(
        self, info: ModelInfo, weights: Stage | None, seed: int, trained_with: tuple[Method, ...] = ()
    ) -> Stage | None:
        """That of the eviction; what packs looks at nothing before."""
        return self.keeps.prepare(info, weights, seed, trained_with)

    def occupants(self, model: Model, prepared: Any) -> dict[Hook[Any], Occupant]:
        """A cache that hands the eviction what it would have had alone."""
        alone = self.keeps.occupants(model, prepared)[ATTENTION]
        assert isinstance(alone, CompressedCache)
        return {ATTENTION: CompressedCache(self, alone.prepared, model.info.dense_bits)}

    def compress(self, prompt: AttentionCall, prepared: Any) -> LayerStore:
        """The survivors, packed."""
        store = self.keeps.compress(prompt, prepared)
        packed: list[Segment] = []
        for kept in store.segments:
            assert isinstance(kept, DenseSegment)
            packed += self.packs.pack(kept)
        return LayerStore(packed, store.recent)

    def read(self, query: AttentionCall, store: LayerStore, prepared: Any) -> Tensor:
        """As what packs reads."""
        return self.packs.read(query, store, None)

    def stride(self, store: LayerStore) -> int | None:
        """As what packs says."""
        return self.packs.stride(store)

    def step(self, query: AttentionCall, store: LayerStore, prepared: Any) -> Tensor:
        """As what packs does with new tokens."""
        return self.packs.step(query, store, None)
