"""Toy methods for what the cache must allow: across layers, over some heads, with choices that go from layer to layer.

Each is compared with a version that compresses nothing, and with decoding token by token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from by_hand import Masked, causal, logits_of
from torch import Tensor

from isoflop.core.errors import Infeasible
from isoflop.methods.base import METHODS, Method
from isoflop.methods.decoder_tokens.fastv import DropRandom
from isoflop.methods.decoder_tokens.probe import DecoderTokenProbe
from isoflop.methods.kv_cache.base import KvCacheMethod, empty_recent, whole_prompt
from isoflop.methods.kv_cache.probe import PROMPT, TAIL, KvCacheProbe
from isoflop.methods.sparse_attention.base import SparseAttention
from isoflop.models.hooks.attention import ATTENTION, AttentionCall, CacheReport
from isoflop.models.lm import LmBatch
from isoflop.models.segments import DenseSegment, LayerStore

LAYERS, ROWS = 4, [0, 1, 2]


@dataclass(frozen=True)
class MergePairs(KvCacheMethod):
    """Two layers share the mean of their caches; ``later``: also of the tokens behind the prompt, one after the other."""

    name: ClassVar[str] = "toy-merge-pairs"
    spans_layers: ClassVar[bool] = True
    later: bool = False

    @property
    def merges_later(self) -> bool:
        return self.later

    def compress(self, prompt: AttentionCall, prepared: Any) -> LayerStore:
        return LayerStore([whole_prompt(prompt)], empty_recent(prompt))

    def merge(self, stores: dict[int, LayerStore], prepared: Any) -> None:
        layers = sorted(stores)
        for lower, upper in zip(layers[::2], layers[1::2], strict=True):
            pair = stores[lower], stores[upper]
            old = [self.exact(store) for store in pair]
            if pair[0].segments[0] is pair[1].segments[0]:  # of the prompt, merged before
                old = [store.recent for store in pair]
            k, v = ((getattr(old[0], name) + getattr(old[1], name)) / 2 for name in ("k_BGND", "v_BGND"))
            shared = DenseSegment(old[0].positions_BGN, old[0].log_bias_BGN, k, v)
            if pair[0].segments[0] is pair[1].segments[0]:
                shared, grown = pair[0].segments[0], shared  # type: ignore[assignment]
                shared.append(grown.k_BGND, grown.v_BGND, grown.positions_BGN)
            for store in pair:
                store.segments = [shared]
                if self.later:
                    store.recent = DenseSegment(*(x[:, :, :0] for x in (old[0].positions_BGN,)), None, *(x[:, :, :0] for x in (k, v)))  # fmt: skip

    def exact(self, store: LayerStore) -> DenseSegment:
        assert isinstance(store.segments[0], DenseSegment)
        return store.segments[0]


@dataclass(frozen=True)
class HalfTheHeads(KvCacheMethod):
    """The first half of each layer's key-value heads keep everything, the others the newest ``window`` tokens."""

    name: ClassVar[str] = "toy-half-the-heads"
    window: int = 6

    def compress(self, prompt: AttentionCall, prepared: Any) -> LayerStore:
        whole = whole_prompt(prompt)
        groups = prompt.k_BGTD.shape[1]
        full_G = torch.arange(groups, device=prompt.k_BGTD.device) < groups // 2
        bias = None if whole.log_bias_BGN is None else whole.log_bias_BGN[:, :, -self.window :]
        newest = (x[:, :, -self.window :] for x in (whole.k_BGND, whole.v_BGND))
        short = DenseSegment(whole.positions_BGN[:, :, -self.window :], bias, *newest)
        return LayerStore([whole.of_heads(full_G), short.of_heads(~full_G)], empty_recent(prompt))


@dataclass(frozen=True)
class ChooseOnce(SparseAttention):
    """Layers 0 and 1 read everything; layer 1 chooses per query head, and all layers behind it read what it chose."""

    name: ClassVar[str] = "toy-choose-once"
    shares_choices: ClassVar[bool] = True
    at_once: int | None = None

    def stride(self, store: LayerStore) -> int | None:
        return self.at_once

    def dense(self, layer: int) -> bool:
        return layer <= 1

    def chooses(self, layer: int) -> bool:
        return layer == 1

    def index(self, tokens: AttentionCall, store: LayerStore, prepared: Any) -> None:
        """No tables: the cache itself is scored."""

    def approximate(self, query: AttentionCall, store: LayerStore, prepared: Any) -> Tensor:
        k_BGND = store.segments[0].keys()
        q_BGRTD = query.q_BHTD.unflatten(1, (k_BGND.shape[1], -1))
        return (q_BGRTD @ k_BGND[:, :, None].transpose(-1, -2)).flatten(1, 2)


@pytest.fixture(scope="module")
def probe() -> KvCacheProbe:
    return KvCacheProbe(layers=LAYERS)


def padded(batch: LmBatch) -> LmBatch:
    """The same with padding on the left."""
    pads, rows = 4, len(batch.ids_BT)
    ids = torch.cat((torch.full((rows, pads), 3), batch.ids_BT), dim=1)
    valid = (torch.arange(ids.shape[1]) >= pads).expand(rows, -1)
    return LmBatch(ids, torch.zeros_like(ids), batch.prefix + pads, valid)


@torch.no_grad()
def both_ways(probe: KvCacheProbe, method: Method, batch: LmBatch) -> tuple[Tensor, CacheReport]:
    """The tail's logits in one evaluation, equal to those of decoding step by step; and the bytes."""
    bare = probe.model.logits(batch)
    with method.apply(probe.model, None):
        policy = probe.model.occupant(ATTENTION)
        assert policy is not None
        found = probe.model.logits(batch)
        report = policy.report()
        steps = probe.model.stepwise_logits(batch)
        assert policy.report() == report
        assert policy.prefix is None
    assert (found - steps).abs()[:, batch.prefix :].max() <= 1e-5 * found.abs().max()
    assert torch.equal(probe.model.logits(batch), bare)  # as it was
    assert probe.model.occupied == ()
    return found[:, batch.prefix :], report


def close(found: Tensor, expected: Tensor, other: Tensor) -> None:
    """Equal to what was worked out by hand, and to nothing that does without the method."""
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert (found - other).abs().max() > 1e-2 * other.abs().max()


@pytest.mark.parametrize("later", [False, True])
@torch.no_grad()
def test_a_cache_that_merges_pairs_of_layers(probe: KvCacheProbe, later: bool) -> None:
    """Against the stock cache, whose tensors are overwritten by their means after the prompt, or after every token."""
    batch = probe.batch(ROWS)
    module = probe.model.module
    cache = module(batch.ids_BT[:, :PROMPT], use_cache=True).past_key_values
    expected = []
    for place in range(PROMPT, PROMPT + TAIL):
        for a, b in zip(cache.layers[::2], cache.layers[1::2], strict=True):
            count = place if later else PROMPT
            for name in ("keys", "values"):
                x, y = getattr(a, name), getattr(b, name)
                mean = (x[:, :, :count] + y[:, :, :count]) / 2 if place == PROMPT or later else x[:, :, :count]
                setattr(a, name, torch.cat((mean, x[:, :, count:]), dim=2))
                setattr(b, name, torch.cat((mean, y[:, :, count:]), dim=2))
        expected.append(module(batch.ids_BT[:, place : place + 1], past_key_values=cache).logits)
    found, report = both_ways(probe, MergePairs(later=later), batch)
    close(found, torch.cat(expected, dim=1), probe.model.logits(batch)[:, PROMPT:])
    token = 2 * 2 * 16 * 2.0  # keys and values of two heads of width 16 at 16 bits
    exact_tail, shared = (0, TAIL) if later else (TAIL, 0)
    assert report.prompt_stored == report.prompt_dense / 2 == LAYERS / 2 * PROMPT * token
    # of the tail's last token, the lower layer's is merged as well: all layers have seen it
    assert report.stored == LAYERS * exact_tail * token + LAYERS / 2 * (PROMPT + shared) * token
    assert report.read >= report.dense - LAYERS * token  # a shared tensor is stored once and read by each layer
    close(
        both_ways(probe, MergePairs(later=later), padded(batch))[0],
        torch.cat(expected, dim=1),
        probe.model.logits(batch)[:, PROMPT:],
    )


@pytest.mark.parametrize("later", [False, True])
@torch.no_grad()
def test_serving_merges_layers_too(probe: KvCacheProbe, later: bool) -> None:
    """Generating with Hugging Face's module gives what scoring the generated text as one evaluation gives."""
    prompt = probe.batch(ROWS).ids_BT[:, :PROMPT]
    with MergePairs(later=later).apply(probe.model, None):
        answer = probe.model.greedy(prompt, TAIL)
        text = torch.cat((prompt, answer), dim=1)
        logits = probe.model.logits(LmBatch(text, torch.zeros_like(text), PROMPT))
    assert torch.equal(logits[:, PROMPT - 1 : -1].argmax(-1), answer)


@torch.no_grad()
def test_half_of_the_heads_keep_everything(probe: KvCacheProbe) -> None:
    batch, method = probe.batch(ROWS), HalfTheHeads()

    def sees(call: AttentionCall) -> Tensor:
        seen_BHTT = causal(call)
        seen_BHTT[:, 2:, PROMPT:, : PROMPT - method.window] = False  # query heads 2 and 3 share key-value head 1
        return seen_BHTT

    with probe.model.occupy(ATTENTION, Masked(sees)):
        expected = probe.model.logits(batch)[:, PROMPT:]
    bare = probe.model.logits(batch)[:, PROMPT:]
    found, report = both_ways(probe, method, batch)
    close(found, expected, bare)
    close(both_ways(probe, method, padded(batch))[0], expected, bare)
    head = 2 * 16 * 2.0  # keys and values of one token of one head of width 16 at 16 bits
    assert report.prompt_stored == LAYERS * (PROMPT + method.window) * head
    assert report.stored == report.prompt_stored + LAYERS * TAIL * 2 * head


@pytest.mark.parametrize("at_once", [None, 3, 1])
@torch.no_grad()
def test_a_choice_goes_from_layer_to_layer(probe: KvCacheProbe, at_once: int | None) -> None:
    """Every query reads, in layers 2 and 3, the tokens that its own logits in layer 1 were highest at.

    However many queries a layer takes at once.
    """
    batch, method = probe.batch(ROWS), ChooseOnce(k_share=0.2, at_once=at_once)
    chosen: list[Tensor] = []

    def sees(call: AttentionCall) -> Tensor:
        seen_BHTT = causal(call)
        if call.layer == 1:
            best = torch.zeros_like(seen_BHTT)
            for t in range(PROMPT, PROMPT + TAIL):
                places = logits_of(call)[:, :, t, : t + 1].topk(round((t + 1) * 0.2), dim=-1).indices
                best[:, :, t] = best[:, :, t].scatter(-1, places, True)
            chosen[:] = [best]
        if call.layer > 1:
            seen_BHTT[:, :, PROMPT:] &= chosen[0][:, :, PROMPT:]
        return seen_BHTT

    with probe.model.occupy(ATTENTION, Masked(sees)):
        expected = probe.model.logits(batch)[:, PROMPT:]
    found, report = both_ways(probe, method, batch)
    bare = probe.model.logits(batch)[:, PROMPT:]
    close(found, expected, bare)
    close(both_ways(probe, method, padded(batch))[0], expected, bare)
    assert report.stored == report.dense
    per_head = 2 * 16 * 2.0
    last = chosen[0][:, :, -1].unflatten(1, (2, 2)).any(2).sum() / len(ROWS)  # of a head's two query heads, together
    assert report.read == pytest.approx(2 * (PROMPT + TAIL) * 2 * per_head + 2 * float(last) * per_head)


def test_a_choice_about_tokens_that_are_gone_is_refused() -> None:
    """Tokens that leave between the choosing layer and a reading one would make its numbers mean others."""
    probe = DecoderTokenProbe(examples=2)
    with (
        DropRandom(layer=2, drop=0.5).apply(probe.model, None),
        ChooseOnce(k_share=0.5).apply(probe.model, None),
        pytest.raises(Infeasible, match="nothing may drop tokens between"),
    ):
        probe.outputs([0, 1])


def test_toys_are_short_and_nobody_else_sees_them() -> None:
    import inspect

    for toy in (MergePairs, HalfTheHeads, ChooseOnce):
        assert len(inspect.getsource(toy).splitlines()) <= 60
        assert toy.name not in METHODS.names()
