"""PyramidKV: budgets of the released code, and each layer's choice as SnapKV's at its budget."""

from __future__ import annotations

import pytest
import torch
from kv_cases import a_call

from isoflop.methods.kv_cache.probe import KvCacheProbe
from isoflop.methods.kv_cache.pyramidkv import Layers, PyramidKV, layer_budget
from isoflop.methods.kv_cache.snapkv import SnapKV

OFFICIAL = {
    (64, 8, 20, 120, 6): [118, 97, 76, 55, 34, 13],
    (96, 8, 20, 150, 8): [96] * 8,
    (256, 16, 5, 600, 12): [448, 414, 380, 346, 312, 278, 244, 210, 176, 142, 108, 74],
}
"""Tokens by layer for (mean, window, beta, prompt, layers), by the formula of ``PyramidKVCluster.update_kv`` of Zefan-Cai/KVCache-Factory
(pyramidkv/pyramidkv_utils.py), window included."""


@pytest.mark.parametrize("case", OFFICIAL)
def test_budgets_are_those_of_the_released_code(case: tuple[int, int, int, int, int]) -> None:
    *rest, layers = case
    assert [layer_budget(*rest, layer, layers) for layer in range(layers)] == OFFICIAL[case]


@pytest.mark.parametrize("keep", [0.1, 0.25, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("tokens", [5, 40, 333])
def test_budgets_fall_have_the_mean_that_was_asked_for_and_fit_the_prompt(keep: float, tokens: int) -> None:
    for layers in (1, 2, 7, 32):
        mean = max(1, round(keep * tokens))
        found = [layer_budget(mean, 8, 20, tokens, layer, layers) for layer in range(layers)]
        assert found == sorted(found, reverse=True)
        assert 1 <= min(found) <= max(found) <= tokens
        assert 0 <= sum(found) - layers * mean < layers * layers, "steps are whole tokens, rounded down"


def test_each_layer_chooses_as_snapkv_does_with_its_budget() -> None:
    layers = Layers([0, 2, 3])
    pyramid = PyramidKV(keep=0.3, window=4)
    for place, layer in enumerate(layers.numbers):
        call = a_call(60, layer=layer)
        budget = layer_budget(18, 4, 20, 60, place, 3)
        found = pyramid.compress(call, layers).segments[0].positions_BGN
        expected = SnapKV(keep=budget / 60, window=4).compress(call, None).segments[0].positions_BGN
        assert torch.equal(found, expected)
        assert found.shape[2] == budget
    with pytest.raises(ValueError, match="needs the layers of the model"):
        pyramid.compress(a_call(60, layer=1), layers)


def test_lower_layers_hold_more_of_a_model() -> None:
    probe = KvCacheProbe(layers=3)
    method = PyramidKV(keep=0.3, window=4)
    with method.apply(probe.model, None), torch.no_grad():
        cache = method.cache(probe.model)
        with cache.session():
            probe.model.module(probe.batch([0]).ids_BT[:, :40], use_cache=False)
            tokens = [store.segments[0].tokens for _, store in sorted(cache.stores().items())]
    assert tokens[0] > tokens[1] > tokens[2]
    assert sum(tokens) == pytest.approx(3 * 12, abs=3)
