"""Every method on the cache at work in whole models: one pass against decoding token by token, padding, images."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from isoflop.methods.base import METHODS, build
from isoflop.methods.kv_cache.base import KvCacheMethod
from isoflop.methods.kv_cache.probe import PROMPT, KvCacheProbe
from isoflop.methods.kv_cache.quantised import Quantised
from isoflop.methods.visual_tokens.probe import VisualTokenProbe
from isoflop.models.lm import LmBatch

NAMES = [name for name in METHODS.names() if issubclass(METHODS.get(name), KvCacheMethod)]
CASES: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in NAMES),
    ("zipcache", {"streaming_gap": 3, "salient_ratio": 0.4}),
    ("kv-rtn", {"streaming_gap": 1, "bits": 2}),
    ("a2sf", {"keep": 0.3, "prompt": "sequential"}),
    ("a2sf", {"keep": 0.05, "rolling": False}),
    ("a2sf", {"keep": 0.3, "scope": "layer", "sinks": 2}),
    ("double-sparsity", {"dense_layers": 0, "k_share": 0.2, "label_bits": 4, "select_per": "kv-head"}),
]


EXACT = 1e-5
QUANTISED = 1e-3
"""Noise in the last bit of a value can move the float16 grid that it is on the edge of."""


def tolerance(method: object) -> float:
    return QUANTISED if isinstance(method, Quantised) else EXACT


@pytest.fixture(scope="module")
def probe() -> KvCacheProbe:
    return KvCacheProbe(layers=3)


@pytest.mark.parametrize(("name", "knobs"), CASES)
def test_one_pass_equals_decoding_token_by_token(name: str, knobs: dict[str, Any], probe: KvCacheProbe) -> None:
    method, batch = build(name, knobs), probe.batch(range(2))
    with method.apply(probe.model, probe.prepared(method, 0)), torch.no_grad():
        together = probe.model.logits(batch)
        report = probe.model.attention.report()  # type: ignore[union-attr]
        alone = probe.model.stepwise_logits(batch)
        assert probe.model.attention.report() == report  # type: ignore[union-attr]
    assert (together - alone).abs().max() <= tolerance(method) * together.abs().max()


@pytest.mark.parametrize(("name", "knobs"), CASES)
def test_left_padding_changes_nothing(name: str, knobs: dict[str, Any], probe: KvCacheProbe) -> None:
    """Two prompts of different lengths in one batch give what each gives alone."""
    batch, short = probe.batch([0, 1]), 7
    ids = batch.ids_BT.clone()
    ids[1, :short] = 0
    valid = torch.ones_like(ids, dtype=torch.bool)
    valid[1, :short] = False
    padded = LmBatch(ids, torch.zeros_like(ids), PROMPT, valid)
    alone = LmBatch(batch.ids_BT[1:, short:], torch.zeros_like(ids[1:, short:]), PROMPT - short)
    method = build(name, knobs)
    with method.apply(probe.model, probe.prepared(method, 0)), torch.no_grad():
        first = probe.model.logits(probe.batch([0]))[0, PROMPT:]
        second = probe.model.logits(alone)[0, PROMPT - short :]
        both = probe.model.logits(padded)[:, PROMPT:]
        steps = probe.model.stepwise_logits(padded)[:, PROMPT:]
    for found in (both, steps):
        assert (found - torch.stack((first, second))).abs().max() <= tolerance(method) * both.abs().max()


@pytest.mark.parametrize("tokens", [1, 4, 36])
@pytest.mark.parametrize("name", [name for name in NAMES if name != "double-sparsity"])
def test_caches_of_images_keep_at_least_one_token(name: str, tokens: int) -> None:
    probe = VisualTokenProbe(examples=2)
    method, visual = build(name, {}), build("avgpool", {"tokens": tokens})
    bare = None
    with visual.apply(probe.model, None):
        bare = probe.outputs([0, 1])
        with method.apply(probe.model, None):
            found = probe.outputs([0, 1])
            costs = method.footprint(probe.model, probe.ctx)
    assert found.shape == bare.shape
    assert torch.isfinite(found).all()
    assert costs["kv_prompt_bytes"] > 0
    assert costs["kv_read_ratio"] > 0


def test_half_precision_models_run(probe: KvCacheProbe) -> None:
    batch = probe.batch([0])
    probe.model.module.bfloat16()
    try:
        for name in NAMES:
            method = build(name, {})
            with method.apply(probe.model, probe.prepared(method, 0)), torch.no_grad():
                assert torch.isfinite(probe.model.logits(batch)).all()
    finally:
        probe.model.module.float()
