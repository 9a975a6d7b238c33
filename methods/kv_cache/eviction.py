"""Eviction: keep a share of the tokens exactly and forget the others.

``Eviction`` owns budget, windows and choice; a method gives the scores. ``Rolling`` goes on while tokens are generated.
Surviving keys keep the rotation of their own positions, and nothing is numbered anew.

Shape suffixes: B batch, H query heads, G key-value heads (1 where all heads of a layer share their scores), T tokens,
N candidates, D head width.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Self

import torch
from torch import Tensor

from isoflop.core.knobs import Knob
from isoflop.methods.base import Axes
from isoflop.methods.kv_cache.base import KvCacheMethod, empty_recent, key_positions, slice_call, whole_prompt
from isoflop.methods.kv_cache.calls import take_in
from isoflop.methods.kv_cache.scores import over_group
from isoflop.methods.kv_cache.select import KeptTokens, candidates, check_share, count_of, lengths, protect, select
from isoflop.models.base import ModelInfo
from isoflop.models.hooks.attention import AttentionCall
from isoflop.models.segments import DenseSegment, LayerStore, attend_segments


@dataclass(frozen=True)
class KeepsShare(KvCacheMethod):
    """Base class: a share of the prompt's tokens is kept, per head or on average; at least one."""

    keep: Annotated[
        float,
        Knob(
            low=0.01,
            high=1.0,
            ratio=True,
            doc="share of the tokens kept, to the nearest number; a share that leaves none of a known prompt is refused",
        ),
    ] = 0.5

    @classmethod
    def identity(cls, info: ModelInfo) -> Self:
        """Everything kept."""
        return cls(keep=1.0)

    def axes(self, info: ModelInfo) -> Axes:
        """1 / keep."""
        return Axes(ratio=1 / self.keep)

    def check_prompt(self, tokens: int, task: str) -> None:
        """At least one token is left without rounding up."""
        check_share(self.name, "keep", self.keep, tokens, task)


@dataclass(frozen=True)
class Eviction(KeepsShare):
    """Base class: each key-value head keeps its best tokens of the prompt.

    Class attributes:
        even: heads of a row keep as many tokens each, exactly, so that a method can pack what stays (see ``packing``).
    """

    even: ClassVar[bool] = True

    @abstractmethod
    def score(self, prompt: AttentionCall) -> Tensor:
        """How much each token of the prompt should stay, (B, G, T); (B, 1, T) where the heads of a layer choose alike."""

    def windows(self, kept: int) -> tuple[int, int]:
        """How many first and newest tokens a budget of ``kept`` protects whatever their score, (sinks, recent)."""
        return 0, 0

    def counts(self, layer: int, seen: list[int], prepared: Any) -> list[int]:
        """How many tokens each row keeps in a layer."""
        return [count_of(self.keep, length) for length in seen]

    def choose(
        self, scores_BGN: Tensor, positions_BGN: Tensor, seen: list[int], counts: list[int], live_BGN: Tensor | None
    ) -> KeptTokens:
        """``counts[b]`` tokens of each head of row b: the protected ones, then the highest scores."""
        windows = [self.windows(count) for count in counts]
        sinks, recent = [w[0] for w in windows], [w[1] for w in windows]
        scored = protect(scores_BGN, positions_BGN[:, : scores_BGN.shape[1]], seen, sinks, recent)
        chosen = select(scored, counts, None if live_BGN is None else live_BGN[:, : scores_BGN.shape[1]])
        return chosen.of_heads(positions_BGN.shape[1])

    def compress(self, prompt: AttentionCall, prepared: Any) -> LayerStore:
        """One dense segment with the survivors."""
        seen = lengths(prompt)
        counts = self.counts(prompt.layer, seen, prepared)
        scores_BGT = self.score(prompt)
        chosen = self.choose(scores_BGT, key_positions(prompt), seen, counts, candidates(prompt))
        store = LayerStore([_kept(whole_prompt(prompt), chosen)], empty_recent(prompt))
        self.start_rolling(store, chosen.of_heads(scores_BGT.shape[1]).take(scores_BGT), seen, counts)
        return store

    def start_rolling(self, store: LayerStore, scores_BGN: Tensor, seen: list[int], held: list[int]) -> None:
        """What a method needs to go on evicting while decoding; by default it does not."""


@dataclass
class Tally:
    """Tokens of each row: seen so far, held in the cache, and of the whole prompt."""

    seen: list[int]
    held: list[int]
    prompt: list[int]

    def take_in(self, query: AttentionCall, keep: float) -> bool:
        """Count one more token per row, padding apart, and cut to the budgets; whether a row was over its own."""
        real = [1] * len(self.seen) if query.valid_BT is None else query.valid_BT[:, 0].long().tolist()
        self.seen = [n + r for n, r in zip(self.seen, real, strict=True)]
        waiting = [h + r for h, r in zip(self.held, real, strict=True)]
        budgets = [count_of(keep, max(n, p)) for n, p in zip(self.seen, self.prompt, strict=True)]
        self.held = [min(pair) for pair in zip(waiting, budgets, strict=True)]
        return self.held != waiting


@dataclass(frozen=True)
class Rolling(Eviction):
    """Base class of methods that can go on while decoding: each new token competes with the survivors."""

    rolling: Annotated[
        bool, Knob(doc="go on evicting while tokens are generated, so that the share holds for all tokens seen")
    ] = True

    @property
    def remembers(self) -> bool:
        """Whether scores live from one step to the next and so take memory."""
        return True

    @abstractmethod
    def update(self, scores_BGN: Tensor, received_BGN: Tensor) -> Tensor:
        """Scores after a step.

        Args:
            scores_BGN: before the step, 0 for the new token, which stands last.
            received_BGN: attention in this step, added up over each group of query heads.
        """

    def start_rolling(self, store: LayerStore, scores_BGN: Tensor, seen: list[int], held: list[int]) -> None:
        """Keep the survivors' scores, in float32."""
        if self.rolling:
            self._keep_scores(store, scores_BGN.float())
            store.state["tally"] = Tally(list(seen), list(held), list(seen))

    def stride(self, store: LayerStore) -> int | None:
        """One token at a time, or no limit when nothing changes."""
        return 1 if self.rolling else None

    def step(self, query: AttentionCall, store: LayerStore, prepared: Any) -> Tensor:
        """Attend, update the scores, and evict where a row is over its budget."""
        if not self.rolling:
            return self.read(query, store, prepared)
        store.recent = empty_recent(query)
        return self.advance(query, store)

    def advance(self, query: AttentionCall, store: LayerStore) -> Tensor:
        """Take in one token per row, (B, 1, H, D); rows for which it is padding stay as they are."""
        kept = store.segments[0]
        assert isinstance(kept, DenseSegment)
        take_in(kept, query)
        out_B1HD, p_BH1N = attend_segments(query.q_BHTD, [kept], query.softmax, query.order_BT)
        if query.valid_BT is not None:  # a padding query may see nothing at all
            out_B1HD, p_BH1N = out_B1HD.nan_to_num(), p_BH1N.nan_to_num()
        received_BGN = over_group(p_BH1N[:, :, 0], query.k_BGTD.shape[1])
        scores_BGN = self.update(torch.nn.functional.pad(store.state["scores"], (0, 1)), received_BGN)
        tally: Tally = store.state["tally"]
        over = tally.take_in(query, self.keep)
        if over or kept.tokens > max(tally.held):
            live_BGN = None if kept.log_bias_BGN is None else kept.log_bias_BGN == 0
            chosen = self.choose(scores_BGN, kept.positions_BGN, tally.seen, tally.held, live_BGN)
            kept, scores_BGN = _kept(kept, chosen, growing=True), chosen.of_heads(scores_BGN.shape[1]).take(scores_BGN)
        store.segments = [kept]
        self._keep_scores(store, scores_BGN)
        return out_B1HD

    def sequential(self, prompt: AttentionCall) -> tuple[Tensor, LayerStore]:
        """A prompt under the budget from its first token on: as soon as it is full, each token evicts one.

        Later tokens of the prompt do not see evicted ones, and their attention is a softmax over the survivors.
        """
        seen = lengths(prompt)
        rows, _, length, _ = prompt.q_BHTD.shape
        start = length - max(seen)
        store = LayerStore([whole_prompt(slice_call(prompt, 0, 0))], empty_recent(prompt))
        self._keep_scores(store, self.score(slice_call(prompt, 0, 1))[..., :0].float())
        store.state["tally"] = Tally([0] * rows, [0] * rows, seen)
        outs = [torch.zeros_like(prompt.q_BHTD[:, :, :start]).transpose(1, 2)]
        outs += [self.advance(slice_call(prompt, t, t + 1), store) for t in range(start, length)]
        if not self.rolling:
            store.extra = []
        return torch.cat(outs, dim=1), store

    def _keep_scores(self, store: LayerStore, scores_BGN: Tensor) -> None:
        scores_BGN = scores_BGN.contiguous()
        store.state["scores"] = scores_BGN
        # seen as integers, so that they count their 4 bytes also where float32 stands for 16 bits
        store.extra = [scores_BGN.view(torch.int32)] if self.remembers else []


def _kept(segment: DenseSegment, chosen: KeptTokens, growing: bool = False) -> DenseSegment:
    return segment.taken(chosen.index_BGM, chosen.bias(segment.k_BGND.dtype), growing)
