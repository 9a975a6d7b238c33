"""Rotations taken back: queries of many architectures as they were before positions turned them."""

from __future__ import annotations

import pytest
import torch

from isoflop.core.errors import Infeasible
from isoflop.models.checkpoints.decoder import decoder_geometry
from isoflop.models.decoder_model import decoder_of
from isoflop.models.hooks.attention import AttentionCall, causal_attention, once_per_pass
from isoflop.models.rotary import (
    HALVES,
    HALVES_ONCE,
    NEIGHBOURS,
    NEIGHBOURS_ONCE,
    Rotation,
    followed_rotations,
    rotation_known,
)
from isoflop.testing.architectures import small_config

LAYOUT = {
    "llama": HALVES,
    "gpt_neox": HALVES,  # a share of the channels
    "gemma3_text": HALVES,  # other angles within windows
    "gpt_oss": HALVES_ONCE,  # and scaled (yarn)
    "cohere": NEIGHBOURS,
    "glm": NEIGHBOURS_ONCE,
    "smollm3": HALVES,  # in its first layer only
    "gpt2": None,
}


def decoder(kind: str, device: str = "cpu") -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]), torch.device(device):
        torch.manual_seed(0)
        found: torch.nn.Module = decoder_of(AutoModelForCausalLM.from_config(small_config(kind)).eval().float())
    return found


@torch.no_grad()
def calls(module: torch.nn.Module, follow: bool = True, **given: torch.Tensor) -> dict[int, AttentionCall]:
    found: dict[int, AttentionCall] = {}

    def attend(call: AttentionCall) -> torch.Tensor:
        found[call.layer] = call
        return causal_attention(call)

    ids = torch.arange(24).view(2, 12) + 5
    with followed_rotations(module) as rotation_of, once_per_pass(module, attend, rotation_of if follow else None):
        module(input_ids=ids, use_cache=False, **given)
    return found


@pytest.mark.parametrize("kind", LAYOUT)
def test_queries_come_back_as_they_are_where_nothing_turns(kind: str) -> None:
    """At position 0, but for a factor where angles are scaled; the first layer's hidden states are the same."""
    module = decoder(kind)
    found = calls(module)
    call, rotation = found[0], found[0].rotation
    assert (rotation.layout if rotation else None) == LAYOUT[kind]
    if rotation is None:
        return
    still = calls(module, follow=False, position_ids=torch.zeros(2, 12, dtype=torch.long))[0].q_BHTD
    factor = rotation.embed(torch.zeros(1, 1, dtype=torch.long))[0][0, 0, 0]
    torch.testing.assert_close(factor * rotation.undone(call.q_BHTD), still, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(call.q_BHTD, still, atol=1e-2), "positions do turn"
    if kind == "smollm3":
        assert found[1].rotation is None


@pytest.mark.parametrize("kind", [k for k, v in LAYOUT.items() if v])
def test_the_mean_ahead_is_that_of_the_positions_behind_the_last_token(kind: str) -> None:
    """What the architecture itself does to the same queries at the next positions."""
    module = decoder(kind)
    call = calls(module)[0]
    assert call.rotation is not None
    same = call.rotation.undone(call.q_BHTD)
    later = [calls(module, follow=False, position_ids=torch.full((2, 12), 12 + step))[0].q_BHTD for step in range(3)]
    torch.testing.assert_close(call.rotation.ahead(3)(same), torch.stack(later).mean(0), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_looking_ahead_changes_no_frequencies(kind: str) -> None:
    """Where these follow the positions asked for: neither the model's, nor what is found when one looks again."""
    from transformers import LlamaConfig, LlamaModel

    own = {"dynamic": {}, "longrope": {"short_factor": [1.0] * 4, "long_factor": [3.0] * 4}}[kind]
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=16 if kind == "dynamic" else 64,
        rope_parameters={"rope_type": kind, "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16, **own},
    )  # fmt: skip
    module = LlamaModel(config).eval()
    found = calls(module)
    before = module.rotary_emb.inv_freq.clone()
    rotation = found[0].rotation
    assert rotation is not None
    x = torch.randn(1, 4, 3, 8, generator=torch.Generator().manual_seed(0))
    near = rotation.ahead(10)(x)
    rotation.ahead(500)(x)
    assert torch.equal(rotation.ahead(10)(x), near)
    assert torch.equal(module.rotary_emb.inv_freq, before)
    later = torch.arange(2, 14)[None].expand(2, -1)
    assert torch.equal(calls(module, position_ids=later)[1].q_BHTD, calls(module, False, position_ids=later)[1].q_BHTD)
    calls(module, position_ids=later + 400)
    assert torch.equal(rotation.ahead(10)(x), near), "of the pass in which it was noted"


def test_parts_of_a_call_keep_their_own_positions() -> None:
    call = calls(decoder("llama"))[0]
    assert call.rotation is not None
    plain = call.rotation.undone(call.q_BHTD)
    for start, stop in ((0, 7), (3, None), (2, 9)):
        part = call.rotation.sliced(start, stop)
        torch.testing.assert_close(part.undone(call.q_BHTD[:, :, start:stop]), plain[:, :, start:stop])
        assert int(part.positions_BT[0, -1]) == (12 if stop is None else stop) - 1


def test_positions_of_dropped_tokens_are_skipped() -> None:
    """A layer that three tokens of twelve reach: the last of them is the last one of all."""
    whole = calls(decoder("llama"))[0].rotation
    assert whole is not None
    kept = Rotation(whole.cos_BTr[:, [0, 5, 11]], whole.sin_BTr[:, [0, 5, 11]], whole.positions_BT, whole.embed)
    assert int(kept.sliced(0, 2).positions_BT[0, -1]) == 10
    assert int(kept.sliced(1, None).positions_BT[0, -1]) == 11


@pytest.mark.parametrize("kind", ["hunyuan_v1_dense", "nanochat"])
def test_other_rotations_are_refused_at_plan_and_in_a_pass(kind: str) -> None:
    """Queries that are normalised behind the rotation, or turn the other way round."""
    assert decoder_geometry("x", decoder(kind, "meta"), kind)["rotation"] == "other"
    with pytest.raises(Infeasible, match=r"layer 0 of .* turns queries by their positions .*; allowed: rotary"):
        calls(decoder(kind))


@pytest.mark.parametrize("kind", LAYOUT)
def test_known_rotations_are_known_without_weights(kind: str) -> None:
    assert rotation_known(decoder(kind, "meta"), 8)
