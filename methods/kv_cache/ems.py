"""EMS: evict, then merge (arXiv 2412.08521).

No code was released. The score, the zero class and the norms of keys are the paper's; the size of the window, the threshold, how many
tokens may merge, and what happens while decoding are our choices, where its text was not at hand.

Shape suffixes: B batch, G key-value heads, W sets of weights, T tokens of the prompt or of a pass, N tokens held.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import torch
from torch import Tensor

from isoflop.core.knobs import Knob
from isoflop.kernels.column_scores import column_scores
from isoflop.methods.base import METHODS
from isoflop.methods.kv_cache.base import empty_recent, whole_prompt
from isoflop.methods.kv_cache.eviction import Eviction
from isoflop.methods.kv_cache.merging import Merged, merged
from isoflop.methods.kv_cache.scores import real
from isoflop.methods.kv_cache.select import candidates, count_of, lengths, select
from isoflop.models.hooks.attention import AttentionCall
from isoflop.models.segments import DenseSegment, LayerStore, attend_segments

if TYPE_CHECKING:
    from isoflop.methods.kv_cache.probe import KvCacheProbe

BOTH, GLOBAL, LOCAL = "global-local", "global", "local"


@METHODS.register("ems")
@dataclass(frozen=True)
class EMS(Eviction):
    """Tokens that matter stay; of the next ones, those like one that stays are merged into it; the rest is evicted.

    A token's score is the larger of two sums of attention, over all queries (scaled to the mean of the other) and over the last
    ``window``. Each head keeps its newest ``window`` tokens and the best others. The next best, ``candidates`` times the budget, join
    the kept token with the most similar key, also one of the window, unless no cosine exceeds ``tau``: then they belong to the zero
    class and vanish. So redundant heads merge and sparse ones evict, at the same size. Values are averaged by score, keys in
    direction, at the norm of the kept one. After every ``window`` new tokens the same is done again, with the scores of classes carried
    on. The threshold, the window and the number of candidates are our choice.
    """

    paper: ClassVar[str] = "arXiv 2412.08521"

    tau: Annotated[float, Knob(low=0.0, high=1.0, doc="cosine that keys must exceed to merge; 1 evicts")] = 0.6
    candidates: Annotated[float, Knob(low=0.0, high=1000.0, doc="tokens that may merge, over the budget; 0 evicts, 1000 lets all")] = 1.0  # fmt: skip
    window: Annotated[int, Knob(low=1, high=1024, unit="tokens", doc="queries of the local score, newest tokens that stay, and new ones between merges")] = 16  # fmt: skip
    score_by: Annotated[str, Knob(choices=(BOTH, GLOBAL, LOCAL), doc="whose attention counts: the larger of both, all queries, the last")] = BOTH  # fmt: skip
    merge_keys: Annotated[bool, Knob(doc="merge keys, too, whose rotations differ; off keeps those of the centres")] = True  # fmt: skip
    count_bias: Annotated[bool, Knob(doc="add log n to the logit of a class of n tokens (not the paper's)")] = False
    rolling: Annotated[bool, Knob(doc="go on while tokens are generated, so that the share holds for all tokens seen")] = True  # fmt: skip

    @classmethod
    def probe(cls) -> KvCacheProbe:
        """Windows that fill up behind its prompts."""
        from isoflop.methods.kv_cache.probe import KvCacheProbe

        return KvCacheProbe(tried={"rolling": [{"window": 4, "rolling": on} for on in (False, True)]})

    def windows(self, kept: int) -> tuple[int, int]:
        """The newest tokens, or as many as the budget holds."""
        return 0, min(self.window, kept)

    def score(self, prompt: AttentionCall) -> Tensor:
        """Global-local scores, (B, G, T)."""
        weight_BT = real(prompt)
        local_BT = weight_BT.clone()
        local_BT[:, : -self.window] = 0.0
        order_BT = prompt.order_BT.expand(weight_BT.shape[0], -1)
        weight_BWT = torch.stack((weight_BT, local_BT), dim=1)
        valid_BT = prompt.valid_BT
        sums = column_scores(prompt.q_BHTD, prompt.k_BGTD, prompt.softmax, weight_BWT, order_BT, order_BT, valid_BT)
        return self.combined(sums[:, :, 0], sums[:, :, 1], candidates(prompt))

    def combined(self, global_BGN: Tensor, local_BGN: Tensor, live_BGN: Tensor | None) -> Tensor:
        """max(G · mean(T) / mean(G), T); means over what is there, whose number they share."""
        if self.score_by != BOTH:
            return global_BGN if self.score_by == GLOBAL else local_BGN
        if live_BGN is not None:
            global_BGN, local_BGN = (x.masked_fill(~live_BGN, 0.0) for x in (global_BGN, local_BGN))
        factor_BG1 = local_BGN.sum(-1, keepdim=True) / global_BGN.sum(-1, keepdim=True).clamp(min=1e-30)
        return torch.maximum(global_BGN * factor_BG1, local_BGN)

    def compress(self, prompt: AttentionCall, prepared: Any) -> LayerStore:
        """One dense segment of kept and merged tokens."""
        seen = lengths(prompt)
        found = self.merge_tokens(whole_prompt(prompt), self.score(prompt), seen, seen, candidates(prompt))
        store = LayerStore([found.segment], empty_recent(prompt), {"seen": seen})
        if self.rolling:
            self._remember(store, [found.mass_BGM])
        return store

    def merge_tokens(
        self, tokens: DenseSegment, scores_BGN: Tensor, seen: list[int], held: list[int], live_BGN: Tensor | None
    ) -> Merged:
        """Cut what each row holds to its share of what it has seen.

        Args:
            seen, held: of each row; of the latter only those at ``live_BGN``, where that is given.
        """
        counts = [min(h, count_of(self.keep, n)) for h, n in zip(held, seen, strict=True)]
        centres = self.choose(scores_BGN, tokens.positions_BGN, seen, counts, live_BGN)
        others_BGN = scores_BGN.masked_fill(centres.mask(tokens.tokens), -1.0)
        left = [min(int(self.candidates * c + 0.5), h - c) for c, h in zip(counts, held, strict=True)]
        others = select(others_BGN, left, live_BGN)
        return merged(tokens, scores_BGN, centres, others, self.tau, self.merge_keys, self.count_bias)

    def stride(self, store: LayerStore) -> int | None:
        """What is left of the window."""
        return self.window - store.recent.tokens if self.rolling else None

    def step(self, query: AttentionCall, store: LayerStore, prepared: Any) -> Tensor:
        """Attend and add up what is received; when the window is full, evict and merge."""
        if not self.rolling:
            return self.read(query, store, prepared)
        out_BTHD, p_BHTN = attend_segments(query.q_BHTD, store.all(), query.softmax, query.order_BT)
        p_BHTN = p_BHTN * real(query)[:, None, :, None]
        received_BGN = p_BHTN.unflatten(1, (query.k_BGTD.shape[1], -1)).sum((2, 3))
        scores = [*store.state["scores"], torch.zeros_like(received_BGN[..., :0])][:2]
        total = received_BGN.shape[-1]
        scores = [torch.nn.functional.pad(x, (0, total - x.shape[-1])) + received_BGN for x in scores]
        if store.recent.tokens >= self.window:
            scores = [self._again(query, store, *scores)]
        self._remember(store, scores)
        return out_BTHD

    def _again(self, query: AttentionCall, store: LayerStore, global_BGN: Tensor, local_BGN: Tensor) -> Tensor:
        """Merge what is held with the new tokens; the scores of the classes."""
        (kept,) = store.segments
        assert isinstance(kept, DenseSegment)
        new = store.recent
        fresh_BGN = torch.zeros_like(new.k_BGND[..., 0])
        bias_BGN = None if kept.log_bias_BGN is None else torch.cat((kept.log_bias_BGN, fresh_BGN), dim=-1)
        pairs = ((kept.positions_BGN, new.positions_BGN), (kept.k_BGND, new.k_BGND), (kept.v_BGND, new.v_BGND))
        positions_BGN, k_BGND, v_BGND = (torch.cat(pair, dim=2) for pair in pairs)
        live_BGN = None if bias_BGN is None else bias_BGN > -torch.inf
        seen = [n + new.tokens for n in store.state["seen"]]
        held = [k_BGND.shape[2]] * len(seen) if live_BGN is None else live_BGN[:, 0].sum(-1).tolist()
        scores_BGN = self.combined(global_BGN, local_BGN, live_BGN)
        tokens = DenseSegment(positions_BGN, bias_BGN, k_BGND, v_BGND)
        found = self.merge_tokens(tokens, scores_BGN, seen, held, live_BGN)
        store.segments, store.recent = [found.segment], empty_recent(query)
        store.state["seen"] = seen
        return found.mass_BGM

    def _remember(self, store: LayerStore, scores: list[Tensor]) -> None:
        store.state["scores"] = [x.contiguous() for x in scores]
        # seen as integers, so that they count their 4 bytes also where float32 stands for 16 bits
        store.extra = [x.view(torch.int32) for x in store.state["scores"]]
