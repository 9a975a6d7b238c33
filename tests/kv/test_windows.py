"""Layers that attend within windows: exact beside every method, which acts on the others, and counted as what they hold."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from kv_cases import small
from torch import Tensor

from isoflop.core.errors import Infeasible
from isoflop.kernels.softmax import Softmax
from isoflop.methods.base import METHODS, build
from isoflop.methods.kv_cache.base import CompressedCache, KvCacheMethod
from isoflop.methods.kv_cache.probe import PROMPT, TAIL, VOCABULARY, KvCacheProbe
from isoflop.methods.kv_cache.quantised import Quantised
from isoflop.models import windows
from isoflop.models.hooks.attention import ATTENTION, AttentionCall, causal_attention, order_of
from isoflop.models.lm import LmBatch, LmModel

NAMES = [name for name in METHODS.names() if issubclass(METHODS.get(name), KvCacheMethod)]
WINDOW, HEADS, GROUPS, WIDTH = 16, 4, 2, 16
TOKEN = 2 * GROUPS * WIDTH * 2
"""Bytes of a token in one layer."""
KINDS = ("full_attention", "sliding_attention", "full_attention", "sliding_attention")


class WindowedProbe(KvCacheProbe):
    """The decoder of the KV-cache probe with windows in two of four layers."""

    def __init__(self) -> None:
        super().__init__(layers=len(KINDS))
        info = self.model.info
        config = transformers.Qwen2Config(
            vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=len(KINDS), num_attention_heads=HEADS,
            num_key_value_heads=GROUPS, max_position_embeddings=256, initializer_range=0.15, use_sliding_window=True,
            sliding_window=WINDOW, layer_types=list(KINDS), bos_token_id=None, eos_token_id=None, pad_token_id=None,
        )  # fmt: skip
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            module = transformers.Qwen2ForCausalLM(config).eval().requires_grad_(False)
        widths = tuple(WINDOW if kind == "sliding_attention" else None for kind in KINDS)
        self.model = LmModel(replace(info, geometry={**info.geometry, "windows": widths}), module)


@pytest.fixture(scope="module")
def probe() -> WindowedProbe:
    return WindowedProbe()


def brute(
    q_BHTD: Tensor, k_BGND: Tensor, v_BGND: Tensor, softmax: Softmax, window: int, valid_BN: Tensor | None
) -> Tensor:
    """A softmax for each query by itself, (B, T, H, D)."""
    batch, heads, length, _ = q_BHTD.shape
    total, groups = k_BGND.shape[2], k_BGND.shape[1]
    out = torch.zeros_like(q_BHTD)
    for b in range(batch):
        for h in range(heads):
            k, v = (x[b, h // (heads // groups)] for x in (k_BGND, v_BGND))
            for t in range(length):
                last = total - length + t
                seen = [n for n in range(max(0, last - window + 1), last + 1) if valid_BN is None or valid_BN[b, n]]
                seen = seen or [last]
                logits = k[seen] @ q_BHTD[b, h, t] * 0.3
                if softmax.cap is not None and softmax.sinks_H is not None:
                    logits = torch.cat(((logits / softmax.cap).tanh() * softmax.cap, softmax.sinks_H[h, None]))
                out[b, h, t] = logits.softmax(0)[: len(seen)] @ v[seen]
    return out.transpose(1, 2)


def drawn(length: int, total: int) -> tuple[Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(length)
    return tuple(torch.randn(2, heads, n, 8, generator=rng) for heads, n in ((4, length), (2, total), (2, total)))  # type: ignore[return-value]


@pytest.mark.parametrize("softmax", [Softmax(0.3), Softmax(0.3, cap=0.7, sinks_H=torch.linspace(-1.0, 2.0, 4))])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("length", "total", "window"), [(13, 13, 4), (5, 9, 4), (1, 4, 4), (3, 3, 8), (9, 9, 1)])
def test_each_query_sees_its_window(
    length: int, total: int, window: int, padded: bool, softmax: Softmax, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k, v = drawn(length, total)
    valid = torch.arange(total)[None] >= torch.tensor([[0], [total // 2]]) if padded else None
    wanted = brute(q, k, v, softmax, window, valid)
    for block in (1, 3, 256):
        monkeypatch.setattr(windows, "BLOCK", block)
        found = windows.windowed_attention(q, k, v, softmax, window, valid)
        torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("steps", [[9, 1, 1, 1, 1], [2, 5, 1, 5], [13]])
def test_a_window_goes_on_as_one_pass_and_holds_no_more(steps: list[int]) -> None:
    q, k, v = drawn(13, 13)
    valid = torch.arange(13)[None] >= torch.tensor([[0], [2]])
    cache, start, outs = windows.WindowCache(), 0, []
    for count in steps:
        part, mask = slice(start, start + count), valid[:, start : start + count]
        call = AttentionCall(
            0, q[:, :, part], k[:, :, part], v[:, :, part], Softmax(0.3), order_of(None, count, q.device), mask if start == 0 else None, window=4
        )  # fmt: skip
        outs.append(cache.attend(call))
        start += count
        assert cache.k_BGND is not None
        assert cache.k_BGND.untyped_storage().nbytes() == 4 * 2 * 2 * 8 * min(start, 4)
    whole = AttentionCall(0, q, k, v, Softmax(0.3), order_of(valid, 13, q.device), valid, window=4)
    torch.testing.assert_close(torch.cat(outs, 1), causal_attention(whole), atol=1e-6, rtol=1e-5)


def test_tokens_behind_a_prompt_cannot_be_padding() -> None:
    q, k, v = drawn(3, 3)
    valid = torch.tensor([[True] * 3, [False, True, True]])
    call = AttentionCall(0, q, k, v, Softmax(0.3), order_of(valid, 3, q.device), valid, window=4)
    cache = windows.WindowCache()
    cache.attend(call)
    with pytest.raises(ValueError, match="cannot be padding"):
        cache.attend(call)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_every_method_acts_on_the_other_layers(name: str, probe: WindowedProbe) -> None:
    """One pass is decoding token by token, in logits and bytes; the method never sees a layer with a window."""
    method, batch = small(name), probe.batch(range(2))
    seen: set[int] = set()
    with method.apply(probe.model, probe.prepared(method, 0)):
        cache: Any = probe.model.occupant(ATTENTION)
        prefill = cache._prefill
        cache._prefill = lambda prompt: (seen.add(prompt.layer), prefill(prompt))[1]
        together, report = probe.model.logits(batch), cache.report()
        alone = probe.model.stepwise_logits(batch)
        assert cache.report() == report
    assert (together - alone).abs().max() <= (1e-3 if isinstance(method, Quantised) else 1e-5) * together.abs().max()
    assert seen == {0, 2}


@pytest.mark.parametrize("length", [PROMPT + TAIL, WINDOW - 4])
@torch.no_grad()
def test_windows_count_what_they_hold(length: int, probe: WindowedProbe) -> None:
    """min(window, tokens) in each layer with one, in the baseline and behind every method alike."""
    ids_BT = probe.batch(range(2)).ids_BT[:, :length]
    prompt, model = length - 4, probe.model
    batch = LmBatch(ids_BT, torch.zeros_like(ids_BT), prompt)
    full, held, kept = length, min(WINDOW, length), prompt // 2
    with build("full-cache", {}).apply(model, None):
        model.logits(batch)
        whole = model.occupant(ATTENTION).report()  # type: ignore[union-attr]
    assert whole.stored == whole.dense == whole.read == 2 * TOKEN * (full + held) == model.dense_cache_bytes(length)
    assert whole.prompt_stored == whole.prompt_dense == model.dense_cache_bytes(prompt)
    with build("kv-random", {"keep": 0.5}).apply(model, None):
        model.logits(batch)
        half = model.occupant(ATTENTION).report()  # type: ignore[union-attr]
    assert half.dense == whole.dense
    assert half.prompt_dense == whole.prompt_dense
    assert half.prompt_stored == 2 * TOKEN * (kept + min(WINDOW, prompt))
    assert half.stored == 2 * TOKEN * (kept + 4 + held)


@torch.no_grad()
def test_padding_on_the_left_changes_nothing(probe: WindowedProbe) -> None:
    """Also where it takes more columns than a window has."""
    batch, pads = probe.batch([0, 1]), WINDOW + 3
    ids_BT = batch.ids_BT.clone()
    ids_BT[1, :pads] = 0
    valid_BT = torch.arange(PROMPT + TAIL)[None] >= torch.tensor([[0], [pads]])
    padded = LmBatch(ids_BT, batch.targets_BT, PROMPT, valid_BT)
    bare = LmBatch(ids_BT[1:, pads:], batch.targets_BT[1:, pads:], PROMPT - pads)
    for name in ("full-cache", "snapkv", "kv-rtn"):
        method = small(name)
        with method.apply(probe.model, None):
            alone = probe.model.logits(bare)
            for found in (probe.model.logits(padded), probe.model.stepwise_logits(padded)):
                assert (found[1:, pads:] - alone).abs().max() <= 1e-3 * alone.abs().max()


@torch.no_grad()
def test_serving_goes_on_behind_a_window(probe: WindowedProbe) -> None:
    """The same tokens from Hugging Face's own cache, from ours, and from passes over everything."""
    prompt_BT = probe.batch([0]).ids_BT[:, :PROMPT]
    plain = probe.model.greedy(prompt_BT, 6)
    with build("full-cache", {}).apply(probe.model, None):
        assert torch.equal(probe.model.greedy(prompt_BT, 6), plain)
        assert isinstance(cache := probe.model.occupant(ATTENTION), CompressedCache)
        assert cache.report().stored == probe.model.dense_cache_bytes(PROMPT + 5)
    for _ in range(6):
        chosen = probe.model.module(input_ids=prompt_BT, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
        prompt_BT = torch.cat((prompt_BT, chosen), dim=1)
    assert torch.equal(prompt_BT[:, PROMPT:], plain)


def test_the_whole_cache_of_images_takes_no_windows(probe: WindowedProbe) -> None:
    from isoflop.models.whole_cache import WholeCache

    policy = WholeCache(16)
    with (
        probe.model.occupy(ATTENTION, policy),
        policy.session(),
        pytest.raises(Infeasible, match="window of 16 tokens"),
    ):
        probe.model.module(input_ids=torch.zeros(1, 4, dtype=torch.long), use_cache=False)


@torch.no_grad()
def test_a_prompt_that_is_read_twice_counts_once(probe: WindowedProbe) -> None:
    """In windows, too, which have room for some of the second reading."""
    ids_BT = probe.batch(range(2)).ids_BT[:, : WINDOW - 4]
    with build("kvzip", {}).apply(probe.model, None):
        policy: Any = probe.model.occupant(ATTENTION)
        with policy.session():
            probe.model.module(ids_BT, use_cache=False)
            report = policy.report()
    assert report.dense == report.prompt_dense == probe.model.dense_cache_bytes(WINDOW - 4)
    assert report.stored == report.prompt_stored
