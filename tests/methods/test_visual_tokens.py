"""Average pooling, random tokens and QueCC against brute force, and what the papers promise."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from isoflop.core.errors import Infeasible
from isoflop.methods.base import build
from isoflop.methods.selection import random_subset
from isoflop.methods.visual_tokens.avgpool import AvgPool
from isoflop.methods.visual_tokens.probe import VisualTokenProbe
from isoflop.methods.visual_tokens.quecc import QueCC, QueCCModule, fold_windows, last_real, layers_at, masked_mean
from isoflop.models.hooks.visual_tokens import VISUAL_TOKENS
from isoflop.models.vlm import VisualInput


@pytest.fixture(scope="module")
def probe() -> VisualTokenProbe:
    return VisualTokenProbe()


def view_of(x_BPD: Tensor, grid: int = 6) -> VisualInput:
    ids = torch.arange(len(x_BPD))
    return VisualInput(x_BPD, {}, grid, None, None, ids, lambda i, m: x_BPD, lambda i: x_BPD)


@pytest.mark.parametrize(("tokens", "window"), [(1, 6), (4, 3), (9, 2), (36, 1)])
def test_avgpool_is_the_mean_of_each_window(tokens: int, window: int) -> None:
    x = torch.randn(2, 36, 5)
    pooled = AvgPool(tokens=tokens).compress(view_of(x), None).tokens_BVD
    side = 6 // window
    grid = x.view(2, 6, 6, 5)
    for v in range(tokens):
        row, column = divmod(v, side)
        block = grid[:, row * window : (row + 1) * window, column * window : (column + 1) * window]
        torch.testing.assert_close(pooled[:, v], block.reshape(2, -1, 5).mean(1))


@given(patches=st.integers(1, 64), share=st.floats(0, 1), draw=st.integers(0, 10**6), first=st.integers(0, 10**9))
@settings(max_examples=40, deadline=None)
def test_random_subsets_are_subsets(patches: int, share: float, draw: int, first: int) -> None:
    count = max(1, round(share * patches))
    ids = torch.arange(first, first + 5)
    kept = random_subset(ids, patches, count, draw)
    assert kept.shape == (5, count)
    assert bool((kept[:, 1:] > kept[:, :-1]).all())
    assert int(kept.min()) >= 0
    assert int(kept.max()) < patches
    assert torch.equal(random_subset(ids[3:4], patches, count, draw), kept[3:4])


def test_random_subsets_are_uniform_and_differ() -> None:
    kept = random_subset(torch.arange(4000), 36, 9, draw=0)
    frequency = torch.bincount(kept.flatten(), minlength=36) / 4000
    assert float((frequency - 0.25).abs().max()) < 0.04  # 6 standard errors
    assert len({tuple(row) for row in kept.tolist()}) > 3990
    assert not torch.equal(kept, random_subset(torch.arange(4000), 36, 9, draw=1))


def test_quecc_reads_the_papers_layers() -> None:
    assert layers_at((0.50, 0.67, 0.92, 0.96), 24) == (12, 16, 22, 23)
    assert layers_at((0.50, 0.67, 0.92, 0.96), 1) == (0, 1)


def quecc_parts(probe: VisualTokenProbe, **knobs: object) -> tuple[QueCC, QueCCModule, Tensor, Tensor, Tensor]:
    method = QueCC(**knobs)  # type: ignore[arg-type]
    module = method.untrained(probe.model.info, 0)
    assert isinstance(module, QueCCModule)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 36, 64, generator=generator)
    multi = torch.randn(2, 36, 128, generator=generator)
    return method, module.eval(), x, multi, torch.randn(2, 24, generator=generator)


@pytest.mark.parametrize("k", [2, 3])
def test_quecc_is_local(probe: VisualTokenProbe, k: int) -> None:
    """Changing x or x_multi at patch (r, c) changes only output floor(r/k)·(P/k) + floor(c/k)."""
    _, module, x, multi, text = quecc_parts(probe, k=k)
    before = module(x, multi, text, 6).detach()
    for patch in (0, 8, 35):
        row, column = divmod(patch, 6)
        expected = (row // k) * (6 // k) + column // k
        for number in range(2):
            inputs = [x.clone(), multi.clone()]
            inputs[number][:, patch] += 1.0
            moved = (module(*inputs, text, 6).detach() - before).abs().amax((0, 2))
            assert float(moved[expected]) > 1e-4
            moved[expected] = 0
            assert float(moved.max()) == 0


def test_quecc_equals_a_loop_over_windows(probe: VisualTokenProbe) -> None:
    method, module, x, multi, text = quecc_parts(probe, k=2, heads=4)
    found = module(x, multi, text, 6)
    assert module.text is not None
    queries = module.query(x + module.text(text)[:, None]).view(2, 6, 6, 64)
    keys, values = module.key(multi).view(2, 6, 6, 64), module.value(multi).view(2, 6, 6, 64)
    kernel = module.downsample.weight[:, 0].permute(1, 2, 0)
    wq, wk, wv = module.attention.in_proj_weight.chunk(3)
    bq, bk, bv = module.attention.in_proj_bias.chunk(3)
    for row in range(3):
        for column in range(3):
            here = (slice(None), slice(2 * row, 2 * row + 2), slice(2 * column, 2 * column + 2))
            q = (queries[here] * kernel).sum((1, 2)) + module.downsample.bias
            q = (q @ wq.T + bq).view(2, 4, 16)
            k = (keys[here].flatten(1, 2) @ wk.T + bk).view(2, 4, 4, 16)
            v = (values[here].flatten(1, 2) @ wv.T + bv).view(2, 4, 4, 16)
            weights = (torch.einsum("bhc,bkhc->bhk", q, k) / 4.0).softmax(-1)
            expected = module.attention.out_proj(torch.einsum("bhk,bkhc->bhc", weights, v).flatten(1))
            torch.testing.assert_close(found[:, row * 3 + column], expected, atol=1e-5, rtol=1e-4)
    assert method.tokens_left(6) == 9


def test_quecc_norms_add_a_millionth_to_the_variance(probe: VisualTokenProbe) -> None:
    """All of ``multimodal_projector/quecc.py`` of locuslab/llava-token-compression; a question of small variance shows it."""
    _, module, _, _, text = quecc_parts(probe, k=2)
    assert module.text is not None
    for mlp in (module.text, module.query, module.key, module.value):
        assert mlp[-1].eps == 1e-6
    h = module.text[0](1e-3 * text).double()
    h = h - h.mean(-1, keepdim=True)
    expected = h / (h.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(module.text(1e-3 * text).double(), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("source", ["llm_last", "token_mean", "none"])
def test_quecc_knows_the_question_or_not(probe: VisualTokenProbe, source: str) -> None:
    """Another question changes every output token; with text_source=none it changes none."""
    method = QueCC(k=3, text_source=source)
    batch = probe.batch(range(3))
    assert batch.question_BQ is not None
    other = dataclasses.replace(batch, question_BQ=batch.question_BQ.roll(1, 0) + 1)
    with method.apply(probe.model, probe.prepared(method, 0)):
        wide = dataclasses.replace(batch, hidden=probe.model.look(probe._images[:3]))
        other = dataclasses.replace(other, hidden=wide.hidden)
        before, after = (probe.model.compress(b).tokens_BVD for b in (wide, other))
    moved = (after - before).abs().amax(-1)
    assert bool((moved > 0).all()) if source != "none" else bool((moved == 0).all())


def test_quecc_text_pass_takes_no_gradient_and_no_cache(probe: VisualTokenProbe) -> None:
    probe.model.module.requires_grad_(True)
    try:
        batch = probe.batch([0])
        assert batch.question_BQ is not None
        assert not probe.model.encode_text(batch.question_BQ).requires_grad
        assert not probe.model.embed_text(batch.question_BQ).requires_grad
    finally:
        probe.model.module.requires_grad_(False)


@pytest.mark.parametrize("k", [4, 5, 7])
def test_quecc_refuses_windows_that_do_not_tile(probe: VisualTokenProbe, k: int) -> None:
    with pytest.raises(Infeasible, match=rf"k = {k} does not divide the 6x6 patch grid; allowed: 1, 2, 3, 6"):
        build("quecc", {"k": k}).check(probe.model.info)


def test_quecc_refuses_heads_that_do_not_divide_the_width(probe: VisualTokenProbe) -> None:
    with pytest.raises(Infeasible, match=r"heads = 7 does not divide the vision width 64"):
        build("quecc", {"heads": 7}).check(probe.model.info)


@given(lengths=st.lists(st.integers(1, 6), min_size=1, max_size=5), left=st.booleans())
@settings(max_examples=30, deadline=None)
def test_last_token_and_mean_work_for_left_and_right_padding(lengths: list[int], left: bool) -> None:
    width = max(lengths)
    h = torch.randn(len(lengths), width, 3)
    mask = torch.zeros(len(lengths), width, dtype=torch.long)
    for row, length in enumerate(lengths):
        mask[row, width - length :] = 1 if left else 0
        mask[row, :length] = mask[row, :length] if left else 1
    for row, length in enumerate(lengths):
        real = h[row, width - length :] if left else h[row, :length]
        assert torch.equal(last_real(h, mask)[row], real[-1])
        torch.testing.assert_close(masked_mean(h, mask)[row], real.mean(0))


def test_fold_windows_keeps_raster_order() -> None:
    numbers = torch.arange(36.0).view(1, 36, 1)
    folded = fold_windows(numbers, 6, 3)
    assert folded.shape == (4, 9, 1)
    assert folded[1, :, 0].tolist() == [3, 4, 5, 9, 10, 11, 15, 16, 17]


def test_two_compressors_cannot_be_stacked(probe: VisualTokenProbe) -> None:
    with (
        AvgPool().apply(probe.model, None),
        pytest.raises(Infeasible, match="a trial has one method there"),
        AvgPool().apply(probe.model, None),
    ):
        pass
    assert probe.model.occupant(VISUAL_TOKENS) is None
