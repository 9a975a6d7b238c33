"""A cost is what was read between two lines: passes before, behind and of others are not taken for the measured one."""

from __future__ import annotations

import gc

import pytest
import torch

from isoflop.methods.base import build
from isoflop.methods.decoder_tokens.probe import DecoderTokenProbe
from isoflop.methods.kv_cache.probe import PROMPT, TAIL, KvCacheProbe
from isoflop.methods.tokenization.probe import TokenizationProbe
from isoflop.methods.vit_tokens.probe import VitProbe
from isoflop.models.hooks.attention import ATTENTION
from isoflop.models.hooks.byte_view import BYTE_VIEW
from isoflop.models.lm import LmBatch
from isoflop.models.metering import meter, metered

TOKEN = 2 * 2 * 2 * 16 * 2
"""Bytes of a token in the probe's cache: layers, keys and values, heads, width, bytes."""


@pytest.fixture
def probe() -> KvCacheProbe:
    return KvCacheProbe()


def of_length(probe: KvCacheProbe, tokens: int) -> LmBatch:
    batch = probe.batch([0])
    return LmBatch(batch.ids_BT[:, :tokens], batch.targets_BT[:, :tokens], tokens)


def passes_and_fails(probe: KvCacheProbe) -> None:
    probe.outputs([0])
    raise KeyError("behind a pass")


@torch.no_grad()
def test_a_pass_behind_the_meter_changes_nothing_that_was_read(probe: KvCacheProbe) -> None:
    method = build("full-cache", {})
    with method.apply(probe.model, None):
        with meter(probe.model) as reading:
            probe.outputs([0])
        probe.model.logits(of_length(probe, 4))
        assert reading.cache is not None
        assert reading.cache.stored == (PROMPT + TAIL) * TOKEN
        assert method.footprint(probe.model, probe.ctx)["kv_prompt_bytes"] == PROMPT * TOKEN
        assert probe.model.occupant(ATTENTION).report().stored == 4 * TOKEN  # type: ignore[union-attr]


@torch.no_grad()
def test_a_pass_before_the_meter_is_forgotten(probe: KvCacheProbe) -> None:
    with build("full-cache", {}).apply(probe.model, None):
        probe.outputs([0])
        with meter(probe.model) as reading:
            pass
        assert reading.cache is None


@torch.no_grad()
def test_a_session_goes_on_under_a_meter(probe: KvCacheProbe) -> None:
    """The steps of a generation add up to its cache, also where the meter opens behind the prompt."""
    ids_BT = probe.batch([0]).ids_BT
    with build("full-cache", {}).apply(probe.model, None), probe.model.serving() as cache:
        probe.model.module(input_ids=ids_BT[:, :PROMPT], past_key_values=cache, use_cache=True)
        with meter(probe.model) as reading:
            for place in range(PROMPT, PROMPT + 3):
                probe.model.module(input_ids=ids_BT[:, place : place + 1], past_key_values=cache, use_cache=True)
    assert reading.cache is not None
    assert reading.cache.stored == (PROMPT + 3) * TOKEN
    assert reading.cache.prompt_stored == PROMPT * TOKEN


@torch.no_grad()
def test_what_was_read_of_one_method_is_not_told_of_another(probe: KvCacheProbe) -> None:
    half = build("kv-random", {"keep": 0.5})
    with half.apply(probe.model, None):
        probe.cost()
        assert metered(probe.model, ATTENTION) is not None
    with build("full-cache", {}).apply(probe.model, None):
        assert metered(probe.model, ATTENTION) is None
        with pytest.raises(ValueError, match="no prompt has been compressed yet"):
            build("full-cache", {}).footprint(probe.model, probe.ctx)
    assert metered(probe.model, ATTENTION) is None


def test_an_open_meter_tells_nothing_and_takes_no_second(probe: KvCacheProbe) -> None:
    with meter(probe.model) as reading:
        with pytest.raises(RuntimeError, match="still open"):
            _ = reading.cache
        with pytest.raises(RuntimeError, match="is running on model probe/llama already"), meter(probe.model):
            pass
    assert reading.cache is None  # nothing sits there
    with meter(probe.model):
        pass


def test_a_meter_that_an_error_ends_reads_nothing(probe: KvCacheProbe) -> None:
    with build("full-cache", {}).apply(probe.model, None):
        with pytest.raises(KeyError), meter(probe.model):
            passes_and_fails(probe)
        assert metered(probe.model, ATTENTION) is None
        with meter(probe.model) as reading:
            probe.outputs([0])
        assert reading.cache is not None


@torch.no_grad()
def test_layers_of_the_decoder() -> None:
    probe, method = DecoderTokenProbe(), build("drop-random", {"drop": 0.5, "layer": 1})
    with method.apply(probe.model, None):
        with meter(probe.model) as reading:
            probe.outputs([0])
        probe.model.encode_text(torch.tensor([[1, 2, 3]]))
        assert reading.tokens_per_layer == (36, 18, 18)
        assert method.footprint(probe.model, probe.ctx)["layer_visual_tokens"] == 24.0


@torch.no_grad()
def test_blocks_of_the_tower() -> None:
    probe = VitProbe()
    with build("vit-random", {"ratio": 0.75}).apply(probe.model, None):
        with meter(probe.model) as reading:
            probe.outputs([0])
        with probe.model.unreduced():
            probe.outputs([0])
    assert reading.block_tokens is not None
    assert reading.block_tokens.seen == ((65, 49), (49, 37), (37, 28), (28, 22))
    assert reading.block_tokens.left == 21


def test_trees_of_bytes() -> None:
    probe, method = TokenizationProbe(), build("byte-greedy", {})
    with method.apply(probe.model, None):
        probe.outputs([0])
        with meter(probe.model) as reading:
            probe.outputs([2])
        before = method.footprint(probe.model, probe.ctx)
        probe.outputs([0, 1])
        assert method.footprint(probe.model, probe.ctx) == before
        assert metered(probe.model, BYTE_VIEW) == reading.trees


def test_a_meter_keeps_no_occupant_alive(probe: KvCacheProbe) -> None:
    import weakref

    with build("full-cache", {}).apply(probe.model, None):
        probe.cost()
        seen = weakref.ref(probe.model.occupant(ATTENTION))
    gc.collect()
    assert seen() is None
