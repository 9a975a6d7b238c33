"""Caps on logits and sinks beside them: what transformers' own eager attention gives, behind every method that compresses nothing.

Shape suffixes: B rows, G key-value heads, H query heads, T tokens of a prompt.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from kv_cases import GROUPS, HEADS, a_call, small, tolerance
from torch import Tensor

from isoflop.core.errors import Infeasible
from isoflop.kernels import blocks
from isoflop.kernels.softmax import Softmax
from isoflop.methods.base import METHODS, build
from isoflop.methods.kv_cache.base import KvCacheMethod
from isoflop.methods.kv_cache.eviction import Eviction
from isoflop.methods.kv_cache.probe import PROMPT, VOCABULARY, KvCacheProbe
from isoflop.models.decoder_model import layers_of
from isoflop.models.hooks.attention import AttentionCall, causal_attention, replaced_attention
from isoflop.models.lm import LmBatch, LmModel

NAMES = [name for name in METHODS.names() if issubclass(METHODS.get(name), KvCacheMethod)]
KINDS = ["full_attention", "sliding_attention", "full_attention", "full_attention"]
WINDOW = 16
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": len(KINDS), "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256, "sliding_window": WINDOW, "layer_types": KINDS,
    "initializer_range": 0.15, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
DECODERS: dict[str, Any] = {
    "caps": lambda: transformers.Gemma2Config(**SHAPE, attn_logit_softcapping=0.5, query_pre_attn_scalar=16),
    "sinks": lambda: transformers.GptOssConfig(**SHAPE, num_local_experts=2, num_experts_per_tok=1),
}


class SoftmaxProbe(KvCacheProbe):
    """The decoder of the KV-cache probe as Gemma 2 or gpt-oss is built, a window included."""

    def __init__(self, kind: str) -> None:
        super().__init__(layers=len(KINDS))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            module: Any = transformers.AutoModelForCausalLM.from_config(DECODERS[kind]())
        for layer in layers_of(module.model):
            if hasattr(layer.self_attn, "sinks"):
                layer.self_attn.sinks.data = torch.tensor([-1.0, 0.0, 1.0, 3.0])
        geometry = {
            **self.model.info.geometry,
            "windows": tuple(WINDOW if kind == "sliding_attention" else None for kind in KINDS),
        }
        self.model = LmModel(replace(self.model.info, geometry=geometry), module.eval().requires_grad_(False))


@pytest.fixture(scope="module", params=DECODERS)
def probe(request: pytest.FixtureRequest) -> SoftmaxProbe:
    return SoftmaxProbe(request.param)


@pytest.fixture(scope="module")
def stock_BTW(probe: SoftmaxProbe) -> Tensor:
    """Logits by transformers' own attention."""
    assert probe.model.module.config._attn_implementation == "eager"
    logits: Tensor = probe.model.module(input_ids=probe.batch(range(2)).ids_BT, use_cache=False).logits
    return logits


def close(found: Tensor, expected: Tensor, off: float) -> None:
    assert (found - expected).abs().max() <= off * expected.abs().max()


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_no_compression_is_the_models_own_attention(name: str, probe: SoftmaxProbe, stock_BTW: Tensor) -> None:
    """In one pass and token by token, where the text is and where padding stands before it."""
    method, batch = METHODS.get(name).identity(probe.model.info), probe.batch(range(2))
    pads = torch.zeros(2, 3, dtype=torch.long)
    valid_BT = torch.cat((pads.bool(), torch.ones_like(batch.ids_BT, dtype=torch.bool)), dim=1)
    ids_BT, targets_BT = (torch.cat((pads, x), dim=1) for x in (batch.ids_BT, batch.targets_BT))
    padded = LmBatch(ids_BT, targets_BT, PROMPT + 3, valid_BT)
    with method.apply(probe.model, probe.prepared(method, 0)):
        for found in (probe.model.logits(batch), probe.model.stepwise_logits(batch)):
            close(found, stock_BTW, 1e-5)
        for found in (probe.model.logits(padded), probe.model.stepwise_logits(padded)):
            close(found[:, 3:], stock_BTW, 1e-5)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_one_pass_is_decoding_token_by_token(name: str, probe: SoftmaxProbe, stock_BTW: Tensor) -> None:
    """As methods come; sinks and caps are seen wherever tokens go away."""
    method, batch = small(name), probe.batch(range(2))
    with method.apply(probe.model, probe.prepared(method, 0)):
        together, alone = probe.model.logits(batch), probe.model.stepwise_logits(batch)
    close(together, alone, tolerance(method))


def weights_by_hand(call: AttentionCall) -> Tensor:
    """The sink's share left out, (B, H, T, T)."""
    softmax, length = call.softmax, call.q_BHTD.shape[2]
    assert softmax.cap is not None
    assert softmax.sinks_H is not None
    k_BHTD = call.k_BGTD.repeat_interleave(HEADS // GROUPS, dim=1)
    logits = (call.q_BHTD @ k_BHTD.transpose(-1, -2) * softmax.scaling / softmax.cap).tanh() * softmax.cap
    logits = logits.masked_fill(~torch.ones(length, length, dtype=torch.bool).tril(), float("-inf"))
    sinks = softmax.sinks_H[:, None, None].expand(*logits.shape[:3], 1)
    return torch.cat((logits, sinks), dim=-1).softmax(-1)[..., :-1]


def a_capped_call() -> AttentionCall:
    call = a_call(24)
    return replace(call, softmax=Softmax(call.softmax.scaling, 0.8, torch.tensor([-2.0, 0.0, 2.0, 4.0])))


@pytest.mark.parametrize("block", [1, 1 << 22])
def test_causal_attention_in_blocks_of_any_size(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK_VALUES", dict.fromkeys(("cpu", "cuda"), block))
    monkeypatch.setattr(blocks, "LEAST_ROWS", 5)
    call = a_capped_call()
    expected = weights_by_hand(call) @ call.v_BGTD.repeat_interleave(HEADS // GROUPS, dim=1)
    torch.testing.assert_close(causal_attention(call).transpose(1, 2), expected, rtol=1e-5, atol=1e-6)


def test_eviction_scores_follow_the_weights_that_tokens_get() -> None:
    """H2O: column sums of what is left beside the sinks, heads with strong ones having little say."""
    call = a_capped_call()
    method: Any = build("h2o", {})
    assert isinstance(method, Eviction)
    expected_BGT = weights_by_hand(call).sum(2).unflatten(1, (GROUPS, -1)).sum(2)
    torch.testing.assert_close(method.score(call), expected_BGT, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("extra", [{"position_bias": torch.zeros(1)}, {"cu_seq_lens_q": torch.zeros(1)}])
@torch.no_grad()
def test_what_else_changes_a_softmax_is_refused(extra: dict[str, Tensor], probe: SoftmaxProbe) -> None:
    ids_BT = torch.zeros(1, 3, dtype=torch.long)
    with (
        replaced_attention(probe.model.decoder, causal_attention),
        pytest.raises(
            Infeasible, match=rf"attention with {next(iter(extra))} cannot be replaced; allowed: a softmax over"
        ),
    ):
        probe.model.module(input_ids=ids_BT, use_cache=False, **extra)


def test_a_cap_lets_gradients_through() -> None:
    """Methods are trained through attention, whose logits are changed in place."""
    call = a_capped_call()
    q_BHTD = call.q_BHTD.clone().requires_grad_()
    causal_attention(replace(call, q_BHTD=q_BHTD)).sum().backward()
    by_hand = call.q_BHTD.clone().requires_grad_()
    weights = weights_by_hand(replace(call, q_BHTD=by_hand))
    (weights @ call.v_BGTD.repeat_interleave(HEADS // GROUPS, dim=1)).sum().backward()
    torch.testing.assert_close(q_BHTD.grad, by_hand.grad, rtol=1e-4, atol=1e-5)
