"""KVzip: what a model needs to say its context again (arXiv 2505.23416).

Shape suffixes: B batch, G key-value heads, T tokens of the prompt or of a passage, C tokens of a part of the prompt, L layers, D head
width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import torch
from torch import Tensor

from isoflop.core.errors import Infeasible
from isoflop.core.hook import Hook
from isoflop.core.knobs import Knob
from isoflop.core.stage import StageContext
from isoflop.methods.base import METHODS
from isoflop.methods.kv_cache.base import empty_recent, whole_prompt
from isoflop.methods.kv_cache.eviction import KeepsShare
from isoflop.methods.kv_cache.head_budgets import best_of_all, best_of_each
from isoflop.methods.kv_cache.rereading import Passage, columns_of, largest_attention
from isoflop.methods.kv_cache.select import count_of, protect
from isoflop.models.base import Model, ModelInfo
from isoflop.models.decoder_model import decoder_model
from isoflop.models.hooks.attention import AttentionCall
from isoflop.models.hooks.occupant import Occupant
from isoflop.models.ragged import RaggedSegment
from isoflop.models.reading import TextInfo
from isoflop.models.segments import DenseSegment, LayerStore

if TYPE_CHECKING:
    from isoflop.methods.kv_cache.probe import KvCacheProbe

ALL, LAYER, HEAD = "all", "layer", "head"
FIRST = "\n\nRepeat the previous context exactly."
LATER = "\n\nRepeat the part of the previous context exactly, starting with"
OVERLAP = 8
"""Tokens before a later part that stand behind its instruction, so that it is known where to go on."""


@dataclass(frozen=True)
class Reader:
    """What is known of the model.

    Attributes:
        first, later: token ids of the instructions; none where the model reads no text.
        positions: that it has; None where nothing limits them.
    """

    first: tuple[int, ...] = ()
    later: tuple[int, ...] = ()
    positions: int | None = None


@METHODS.register("kvzip")
@dataclass(frozen=True)
class KVzip(KeepsShare):
    """The model is asked to repeat the prompt, and what it never looks at to do so is evicted, whatever the question will be.

    Behind the whole cache it reads an instruction and the prompt again, in parts of ``chunk`` tokens. The score of a cached token is
    the largest attention that it gets from any token of the passage and any query head of its group, in a softmax over the first
    ``sinks`` tokens, the part that is repeated and the passage (section 3.2). The best of all layers and heads stay, so that heads have
    unequal lengths, as they are stored. Models of symbols, which read no text, get no instruction; and there is none of a chat
    template's words before the repeated text, as prompts here have no template.

    The second reading costs more than the first, and is made of every prompt; ``kv_scoring_tokens`` counts what it reads. The paper's parts
    are 2,000 tokens; kvpress keeps four first tokens, which the released code does with a system prompt.
    """

    paper: ClassVar[str] = "arXiv 2505.23416"
    spans_layers: ClassVar[bool] = True
    rereads: ClassVar[bool] = True

    scope: Annotated[str, Knob(choices=(ALL, LAYER, HEAD), doc="what competes: all layers and heads, the heads of a layer, or tokens of a head")] = ALL  # fmt: skip
    sinks: Annotated[int, Knob(low=0, high=1024, unit="tokens", doc="first tokens that stay")] = 4
    chunk: Annotated[int, Knob(low=1, high=1_000_000, log=True, unit="tokens", doc="tokens of the prompt that are repeated at a time")] = 2000  # fmt: skip
    instruct: Annotated[bool, Knob(doc="ask for the text before it is repeated, where the model reads text")] = True

    @classmethod
    def probe(cls) -> KvCacheProbe:
        """Its decoder is given a text's spelling, so that instructions show."""
        from isoflop.methods.kv_cache.probe import KvCacheProbe

        return KvCacheProbe(spells=True)

    def check(self, info: ModelInfo) -> None:
        """Refuse prompts with images."""
        super().check(info)
        if not isinstance(info, TextInfo):
            raise Infeasible(
                f"method kvzip repeats the tokens of a prompt, and those of model {info.ref} are not all text; allowed: language models"
            )

    def check_room(self, info: ModelInfo, tokens: int, task: str) -> None:
        """Refuse prompts that the model has no room to read twice."""
        room, wanted = info.geometry.get("positions"), tokens + self._longest_part(tokens, Reader())
        if room is not None and wanted > room:
            raise Infeasible(self._no_room(wanted, room, tokens, Reader(), f"a prompt of task {task}"))

    def _parts(self, tokens: int, reader: Reader) -> Iterator[tuple[int, int, int, tuple[int, ...]]]:
        """Parts of a prompt, from ``start`` to ``stop``: how many tokens before it are read, too, and words in front."""
        for start in range(0, tokens, self.chunk):
            words = reader.later if start else reader.first
            yield start, min(start + self.chunk, tokens), min(start, OVERLAP), words

    def _longest_part(self, tokens: int, reader: Reader) -> int:
        """Tokens that are read behind the prompt at most at a time."""
        parts = self._parts(tokens, reader)
        return max((stop - start + before + len(words) for start, stop, before, words in parts), default=0)

    def _no_room(self, wanted: int, room: int, tokens: int, reader: Reader, what: str) -> str:
        left = room - tokens - OVERLAP
        spoken = min(left - len(reader.later), left + OVERLAP - len(reader.first))
        fits = "; shorter prompts fit"
        if left > 0:
            fits = f"; chunk up to {spoken} fits" if spoken > 0 else f"; instruct: false and chunk up to {left} fit"
        return f"method kvzip reads {what} again, in all {wanted} tokens, and the model has {room} positions{fits}"

    def occupants(self, model: Model, prepared: Any) -> dict[Hook[Any], Occupant]:
        """The cache, which knows the words of the instructions."""
        tokenizer = None
        if self.instruct:
            try:
                tokenizer = decoder_model(model, self.name).tokenizer
            except Infeasible:
                tokenizer = None
        first, later = (
            () if tokenizer is None else tuple(tokenizer.encode(text, add_special_tokens=False))
            for text in (FIRST, LATER)
        )
        return super().occupants(model, Reader(first, later, model.info.geometry.get("positions")))

    def compress(self, prompt: AttentionCall, prepared: Any) -> LayerStore:
        """The prompt as it is, until it has been read again."""
        return LayerStore([whole_prompt(prompt)], empty_recent(prompt))

    def passages(self, ids_BT: Tensor, valid_BT: Tensor | None, prepared: Any) -> Iterator[Passage]:
        """Parts of the prompt, each behind its instruction."""
        reader = prepared if isinstance(prepared, Reader) else Reader()
        rows, width = ids_BT.shape
        columns_BT, lengths_B = columns_of(valid_BT, width, ids_BT.device)
        columns_BT, lengths_B1 = columns_BT.expand(rows, -1), lengths_B.expand(rows)[:, None]
        longest = int(lengths_B1.max())
        wanted = longest + self._longest_part(longest, reader)
        if reader.positions is not None and wanted > reader.positions:
            raise Infeasible(self._no_room(wanted, reader.positions, longest, reader, "its prompt"))
        for start, stop, before, said in self._parts(longest, reader):
            words = torch.tensor(said, dtype=ids_BT.dtype, device=ids_BT.device)
            ids_BT_ = torch.cat((words.expand(rows, -1), ids_BT.gather(1, columns_BT[:, start - before : stop])), dim=1)
            numbers_T = torch.arange(stop - start + before, device=ids_BT.device) + start - before
            # a row that ends before this part has nothing to read here, instruction included
            read_BT = torch.cat((numbers_T.new_full((len(words),), start), numbers_T.clamp(min=start))) < lengths_B1
            places_T = torch.arange(ids_BT_.shape[1], device=ids_BT.device)
            yield Passage(ids_BT_, read_BT, lengths_B1 + places_T, start, stop)

    def notice(self, call: AttentionCall, store: LayerStore, passage: Passage, noticed: dict[int, Tensor]) -> None:
        """The largest attention to each token of the part."""
        whole = store.segments[0]
        assert isinstance(whole, DenseSegment)
        device, (rows, groups, width, _) = whole.k_BGND.device, whole.k_BGND.shape
        columns_BT, lengths_B = columns_of(_real(whole), width, device)
        sinks = min(self.sinks, passage.start)
        numbers_C = torch.cat((torch.arange(sinks), torch.arange(passage.start, passage.stop))).to(device)
        there_BC = (numbers_C < lengths_B[:, None]).expand(rows, -1)
        index_BGC = columns_BT[:, numbers_C].expand(rows, -1)[:, None].expand(-1, groups, -1)
        k_BGCD = whole.k_BGND.gather(2, index_BGC[..., None].expand(-1, -1, -1, whole.k_BGND.shape[-1]))
        k_BGND = torch.cat((k_BGCD, call.k_BGTD), dim=2)
        best_BGC = largest_attention(call.q_BHTD, k_BGND, call.softmax, there_BC, passage.real_BT.to(device))
        before_BGT = noticed.get(call.layer, best_BGC.new_zeros(rows, groups, width))
        noticed[call.layer] = before_BGT.scatter(2, index_BGC[..., sinks:], best_BGC[..., sinks:])

    def merge(self, stores: dict[int, LayerStore], prepared: Any) -> None:
        """Evict, in all layers at once."""
        held = {layer: store.segments[0] for layer, store in sorted(stores.items())}
        first = next(iter(held.values()))
        rows, groups, width = first.positions_BGN.shape
        noticed = [stores[layer].state.pop("noticed").to(first.positions_BGN.device) for layer in held]
        scores_BLT = torch.cat(noticed, dim=1)  # of all layers' heads
        real_BT = _real(first)
        seen = [width] * rows if real_BT is None else real_BT.sum(-1).tolist()
        counts = [count_of(self.keep, n) for n in seen]
        sinks = [min(self.sinks, count) for count in counts]
        scores_BLT = protect(scores_BLT, first.positions_BGN[:, :1], seen, sinks, [0] * rows)
        if real_BT is not None:
            scores_BLT = scores_BLT.masked_fill(~real_BT[:, None], float("-inf"))
        kept_BLT = self._kept(scores_BLT, counts, groups)
        for (layer, whole), kept_BGT in zip(held.items(), kept_BLT.split(groups, dim=1), strict=True):
            assert isinstance(whole, DenseSegment)
            kept_BGT = kept_BGT.to(whole.k_BGND.device)
            stores[layer].segments = [RaggedSegment.kept(kept_BGT, whole.positions_BGN, whole.k_BGND, whole.v_BGND)]

    def _kept(self, scores_BLT: Tensor, counts: list[int], groups: int) -> Tensor:
        """True at what stays, of heads of all layers."""
        if self.scope == HEAD:
            counts_B1 = torch.tensor(counts, device=scores_BLT.device)[:, None]
            return best_of_each(scores_BLT, counts_B1.expand(-1, scores_BLT.shape[1]))
        together = scores_BLT.split(scores_BLT.shape[1] if self.scope == ALL else groups, dim=1)
        return torch.cat([best_of_all(part, [part.shape[1] * n for n in counts]) for part in together], dim=1)

    def footprint(self, model: Model, ctx: StageContext) -> dict[str, float]:
        """Also ``kv_scoring_tokens``: read behind the prompt to score it, per example."""
        return {**super().footprint(model, ctx), "kv_scoring_tokens": self.cache(model).reread_tokens}


def _real(whole: DenseSegment | Any) -> Tensor | None:
    """False at padding of a whole prompt, (B, T); None where nothing is padded."""
    return None if whole.log_bias_BGN is None else whole.log_bias_BGN[:, 0] == 0
