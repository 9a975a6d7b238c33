"""``isoflop bench memory``: what is counted is what is alive, and the large model's figures are what its shapes say."""

from __future__ import annotations

import pytest
import torch

from isoflop.bench.memory import (
    DEPTHS,
    HEADS,
    KV_HEADS,
    LAYERS,
    SCORED,
    WIDTH,
    _method,
    bench_memory,
    cache_methods,
    decoder,
)
from isoflop.core.errors import UserError
from isoflop.models.live_bytes import LiveBytes


def test_bytes_live_as_long_as_some_tensor_on_them() -> None:
    with LiveBytes() as live:
        x = torch.zeros(1000)
        y = x + 1
        assert live.now == 8000
        view = y.view(10, 100)[2:]
        del y
        assert live.now == 8000
        del view
        assert live.now == 4000
        x.add_(1)
        wide = x.double()
        del wide
        assert (live.now, live.peak) == (4000, 12000)
        live.forget_peak()
        assert live.peak == 4000
        del x
        assert live.now == 0
    before = torch.ones(50)
    with LiveBytes() as live:
        half = before[:25]
        assert (live.now, len(half)) == (0, 25), "what was there before is nothing new"


def test_a_whole_cache_of_the_large_model_is_what_its_shapes_say() -> None:
    found = bench_memory((256, 512), 32768, ("none", "snapkv"))
    none, snapkv = (row["cache_gib"] for row in found["rows"])
    assert none == pytest.approx(2 * 2 * LAYERS * KV_HEADS * (WIDTH // HEADS) * 32768 / 2**30, rel=1e-3)
    assert snapkv == pytest.approx(none / 2, rel=0.03)
    row = found["rows"][0]
    assert row["peak_bytes"][512]["read"] == pytest.approx(2 * row["peak_bytes"][256]["read"], rel=0.02)
    assert row["read_slope"] == pytest.approx(1, abs=0.02)
    assert SCORED < 256


@pytest.mark.parametrize("depth", DEPTHS)
def test_every_method_of_the_default_list_works_on_both_decoders(depth: int) -> None:
    info = decoder(depth, 300).info
    for name in cache_methods():
        method = _method(name)
        if method is not None:
            method.check(info)


def test_bad_input_is_said_in_a_line() -> None:
    with pytest.raises(UserError, match=r"--tokens: one length has no slope"):
        bench_memory((512, 512), 1024)
    with pytest.raises(UserError, match=r"unknown method on the KV cache 'snapvk' .did you mean 'snapkv'"):
        bench_memory((256, 512), 1024, ("snapvk",))
