"""Expected attention: scores and choices of the released code, queries as they were before rotation, in closed form and by sampling."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from kv_cases import one_row
from torch import Tensor

from isoflop.core.errors import Infeasible
from isoflop.kernels.softmax import Softmax
from isoflop.methods.base import build
from isoflop.methods.kv_cache.base import slice_call
from isoflop.methods.kv_cache.expected_attention import ExpectedAttention
from isoflop.methods.kv_cache.probe import KvCacheProbe
from isoflop.models.hooks.attention import AttentionCall
from isoflop.models.rotary import HALVES, Rotation, turned

NUMBERS = json.loads((Path(__file__).parent / "numbers" / "expected-attention.json").read_text())
"""Of ``ExpectedAttentionPress.score`` of NVIDIA/kvpress 0.5.5 (the authors' code) on ``rotated()``, whose queries its module gives before
RoPE: every 7th score behind the first tokens, and the half that is kept."""
KNOBS: dict[str, dict[str, Any]] = {
    "default": {},
    "near": {"future": 16, "epsilon": 0.02},
    "mean": {"covariance": False, "future": 64},
    "no_values": {"value_norm": False, "sinks": 2},
}
HEADS, GROUPS, WIDTH, LENGTH = 4, 2, 16, 60
FREQUENCIES = 10000.0 ** -(torch.arange(0, WIDTH, 2) / WIDTH)


def angles(positions_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Llama's, of halves."""
    angle = (positions_BT[..., None].float() * FREQUENCIES).repeat(1, 1, 2)
    return angle.cos(), angle.sin()


def queries(rows: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """Queries before RoPE around a mean of their head, keys, and values."""
    rng = torch.Generator().manual_seed(5)
    q = torch.randn(2, HEADS, LENGTH, WIDTH, generator=rng) + torch.randn(2, HEADS, 1, WIDTH, generator=rng)
    k, v = (torch.randn(2, GROUPS, LENGTH, WIDTH, generator=rng) for _ in range(2))
    return q[:rows], k[:rows], v[:rows]


def rotated(positions: Tensor | None = None) -> AttentionCall:
    q, k, v = queries()
    positions = torch.arange(LENGTH)[None] if positions is None else positions
    cos, sin = angles(positions)
    rotation = Rotation(cos, sin, positions, angles)
    order = torch.arange(LENGTH)[None]
    return AttentionCall(0, turned(q, cos, sin, HALVES), k, v, Softmax(WIDTH**-0.5), order, None, rotation=rotation)


@pytest.mark.parametrize("case", KNOBS)
def test_scores_and_choices_are_those_of_the_released_code(case: str) -> None:
    method = ExpectedAttention(keep=0.5, **KNOBS[case])
    call = rotated()
    found = method.score(call)[..., method.sinks :].flatten()[::7]
    torch.testing.assert_close(found, torch.tensor(NUMBERS[case]["sample"]), rtol=2e-4, atol=1e-6)
    kept = method.compress(call, None).segments[0].positions_BGN
    assert kept.tolist() == NUMBERS[case]["kept"]


def test_logits_are_the_expectation_over_queries_and_positions_to_come() -> None:
    """log E[exp(s q·k)] by sampling normal queries, with each position's own rotation where the mean over positions is exact: one."""
    method, call = ExpectedAttention(future=1), rotated()
    plain = queries()[0][:, :, method.sinks :].double()
    mean, cov = plain.mean(2), torch.stack([torch.stack([torch.cov(h.T, correction=0) for h in row]) for row in plain])
    draws = torch.distributions.MultivariateNormal(mean, cov).sample((40000,))
    cos, sin = angles(torch.tensor([[LENGTH]]))
    turned_draws = turned(draws.flatten(1, 2)[:, :, None].float(), cos, sin, HALVES)[:, :, 0]
    k = call.k_BGTD.repeat_interleave(HEADS // GROUPS, 1)[:, :, 10:14].flatten(0, 1) * 0.3
    sampled = (call.softmax.scaling * torch.einsum("nhd,htd->nht", turned_draws, k)).exp().mean(0).log()
    one = replace(call, k_BGTD=call.k_BGTD * 0.3)
    counted = (torch.arange(LENGTH) >= method.sinks).float()[None]
    found = method._logits(one, *method.queries_ahead(one, counted))[..., 10:14].flatten(0, 2)
    torch.testing.assert_close(found, sampled, atol=0.02, rtol=0)


def test_keys_in_pieces_are_keys_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    call, method = rotated(), ExpectedAttention()
    whole = method.score(call)
    monkeypatch.setattr("isoflop.methods.kv_cache.expected_attention.queries_at_once", lambda *args: 7)
    torch.testing.assert_close(method.score(call), whole)


def test_the_model_s_own_queries_come_back_as_they_were() -> None:
    """Of every layer of a decoder: what its projection gives, and the mean rotation of the positions behind the prompt."""
    probe = KvCacheProbe()
    decoder = probe.model.module.model
    found: dict[int, AttentionCall] = {}
    method = build("expected-attention", {"keep": 0.5, "future": 3})
    projected: list[Tensor] = []
    handles = [
        layer.self_attn.q_proj.register_forward_hook(lambda m, a, out: projected.append(out))
        for layer in decoder.layers
    ]
    with method.apply(probe.model, None):
        cache = method.cache(probe.model)  # type: ignore[attr-defined]
        inner = cache.method.score
        object.__setattr__(cache.method, "score", lambda call: found.setdefault(call.layer, call) and inner(call))
        probe.outputs([0, 1])
        object.__delattr__(cache.method, "score")
    for handle in handles:
        handle.remove()
    projected = [x for x in projected if x.shape[:2] == (2, 48)]
    assert len(projected) == len(found) == 2
    for layer, call in found.items():
        assert call.rotation is not None
        length = call.q_BHTD.shape[2]
        plain = projected[layer].unflatten(-1, (HEADS, -1)).transpose(1, 2)[:, :, :length]
        torch.testing.assert_close(call.rotation.undone(call.q_BHTD), plain, atol=1e-4, rtol=1e-4)
        cos, sin = decoder.rotary_emb(plain, torch.arange(length, length + 3)[None])
        each = torch.stack([turned(plain, cos[:, n : n + 1], sin[:, n : n + 1], HALVES) for n in range(3)]).mean(0)
        torch.testing.assert_close(call.rotation.ahead(3)(plain), each, atol=1e-5, rtol=1e-5)


def test_how_a_prompt_ends_matters_as_much_as_how_it_begins() -> None:
    """No attention is read: any order of the prompt's queries, each turned by its own position, keeps the same tokens."""
    call = rotated()
    assert call.rotation is not None
    plain = call.rotation.undone(call.q_BHTD)
    mixed = torch.cat((plain[:, :, :4], plain[:, :, 4:].flip(2)), 2)
    other = replace(call, q_BHTD=turned(mixed, call.rotation.cos_BTr, call.rotation.sin_BTr, HALVES))
    method = ExpectedAttention()
    torch.testing.assert_close(method.score(other), method.score(call), atol=1e-6, rtol=1e-4)


def test_rows_of_unequal_lengths_score_as_they_do_alone() -> None:
    call, pads = rotated(), 9
    valid = torch.arange(LENGTH)[None] >= torch.tensor([0, pads])[:, None]
    order = (valid.long().cumsum(-1) - 1).clamp(min=0)
    cos, sin = angles(order)
    assert call.rotation is not None
    q = turned(call.rotation.undone(call.q_BHTD), cos, sin, HALVES)
    rotation = Rotation(cos, sin, order, angles)
    both = replace(call, q_BHTD=q, order_BT=order, valid_BT=valid, rotation=rotation)
    alone = one_row(both, 1, pads)
    alone = replace(alone, rotation=Rotation(cos[1:, pads:], sin[1:, pads:], order[1:, pads:], angles))
    method = ExpectedAttention()
    torch.testing.assert_close(method.score(both)[1:, :, pads:], method.score(alone), atol=1e-6, rtol=1e-4)
    kept = method.compress(both, None).segments[0]
    assert kept.log_bias_BGN is not None
    ours = kept.positions_BGN[1][kept.log_bias_BGN[1] == 0]
    assert ours.tolist() == method.compress(alone, None).segments[0].positions_BGN[0].flatten().tolist()


@pytest.mark.parametrize("tokens", [1, 3, 4, 5])
def test_prompts_of_no_more_than_the_first_tokens_work(tokens: int) -> None:
    call = slice_call(rotated(), 0, tokens)
    assert ExpectedAttention(keep=0.5).compress(call, None).segments[0].tokens == max(1, (tokens + 1) // 2)
    assert bool(ExpectedAttention().score(call).isfinite().all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_scores_are_near(dtype: torch.dtype) -> None:
    call = rotated()
    assert call.rotation is not None
    rotation = replace(call.rotation, cos_BTr=call.rotation.cos_BTr.to(dtype), sin_BTr=call.rotation.sin_BTr.to(dtype))
    half = replace(
        call,
        q_BHTD=call.q_BHTD.to(dtype),
        k_BGTD=call.k_BGTD.to(dtype),
        v_BGTD=call.v_BGTD.to(dtype),
        rotation=rotation,
    )
    torch.testing.assert_close(ExpectedAttention().score(half), ExpectedAttention().score(call), rtol=0.1, atol=2e-3)


def test_models_whose_rotation_is_not_known_are_refused() -> None:
    info = KvCacheProbe().model.info
    odd = replace(info, geometry={**info.geometry, "rotation": "other"})
    with pytest.raises(
        Infeasible,
        match=r"turns queries by their positions .*; allowed: rotary embeddings of halves or of neighbouring",
    ):
        build("expected-attention", {}).check(odd)
    build("snapkv", {}).check(odd)
