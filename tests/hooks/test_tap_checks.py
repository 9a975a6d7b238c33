"""The attention tap compares itself once with the attention of the architecture, and refuses what it gets wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from vlm_cases import grouped_model

from isoflop.core.errors import Infeasible
from isoflop.methods.decoder_tokens.fastv import DropRandom, FastV
from isoflop.models import taps
from isoflop.models.hooks.attention import replaced_attention
from isoflop.models.prefix import Part, build
from isoflop.models.taps import Tap

SHAPE: dict[str, Any] = {
    "vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": None, "initializer_range": 0.2,
}  # fmt: skip
FULL = ["full_attention"] * 2
RIGHT = {
    "llama": transformers.LlamaConfig(**SHAPE),
    "qwen2": transformers.Qwen2Config(**SHAPE),
    "qwen3": transformers.Qwen3Config(**SHAPE, head_dim=12),
    "mistral": transformers.MistralConfig(**SHAPE, sliding_window=None),
    "granite": transformers.GraniteConfig(**SHAPE, attention_multiplier=0.3),
    "olmo": transformers.OlmoConfig(**SHAPE),
    "caps": transformers.Gemma2Config(**SHAPE, head_dim=8, layer_types=FULL),
    "sinks": transformers.GptOssConfig(
        **SHAPE, head_dim=8, layer_types=FULL, num_local_experts=2, num_experts_per_tok=1
    ),
    "olmo that clips in place": transformers.OlmoConfig(**SHAPE, clip_qkv=0.1),
}
WRONG = {
    "norms behind the rotation": transformers.HunYuanDenseV1Config(**SHAPE, head_dim=8),
    "rotates a part": transformers.PhiConfig(**SHAPE, partial_rotary_factor=0.5),
    "norms over all heads": transformers.Olmo2Config(**SHAPE),
    "one projection": transformers.Phi3Config(**SHAPE),
    "a cap that attention is not handed": transformers.Gemma3TextConfig(
        **SHAPE, head_dim=8, layer_types=FULL, attn_logit_softcapping=50.0
    ),
}


def decoder(config: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return transformers.AutoModel.from_config(config).eval()


@torch.no_grad()
def last_row(module: Any, times: int = 1, padded: bool = False) -> torch.Tensor:
    """What the tap says of the second layer, as a policy between layers asks: in the pre-hook of what comes behind."""
    ids = torch.randint(0, 60, (2, 9), generator=torch.Generator().manual_seed(1))
    valid = torch.ones(2, 9, dtype=torch.bool)
    if padded:
        valid[0, :4] = False
    positions = (valid.long().cumsum(-1) - 1).clamp(min=0)
    rope: list[Any] = []
    handle = module.layers[1].register_forward_pre_hook(
        lambda m, args, kwargs: rope.append(kwargs["position_embeddings"]), with_kwargs=True
    )
    try:
        with Tap(module.layers[1].self_attn).listening() as tap:
            for _ in range(times):
                module(input_ids=ids, attention_mask=valid.long(), position_ids=positions, use_cache=False)
                found = tap.last_row(rope[-1], valid if padded else None)
    finally:
        handle.remove()
    return found


@pytest.fixture(autouse=True)
def _nothing_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(taps, "_KNOWN", {})


@pytest.mark.parametrize("name", RIGHT)
@pytest.mark.parametrize("padded", [False, True])
@torch.no_grad()
def test_what_the_tap_knows_passes(name: str, padded: bool) -> None:
    module = decoder(RIGHT[name])
    before = module.config._attn_implementation
    found = last_row(module, padded=padded)
    assert module.config._attn_implementation == before
    assert list(taps._KNOWN.values()) == [True]
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in module.layers.modules())
    if name == "sinks":
        assert (found.sum(-1) < 1).all()
    else:
        torch.testing.assert_close(found.sum(-1), torch.ones(2, 4))


@pytest.mark.parametrize("name", WRONG)
def test_what_it_would_get_wrong_is_refused_by_name(name: str) -> None:
    module = decoder(WRONG[name])
    before = module.config._attn_implementation
    with pytest.raises(Infeasible, match=r"read off \w+Attention, which .*; allowed: ") as error:
        last_row(module)
    assert "\n" not in str(error.value)
    assert module.config._attn_implementation == before
    with pytest.raises(Infeasible):  # and again, without another look
        last_row(module)


def test_uniform_attention_does_not_hide_a_wrong_formula() -> None:
    """Weights near zero give near-even attention under any formula; logits still tell."""
    module = decoder(transformers.HunYuanDenseV1Config(**{**SHAPE, "initializer_range": 1e-3}, head_dim=8))
    with pytest.raises(Infeasible):
        last_row(module)


def test_it_looks_once_per_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    looked = []
    own = taps.own_last_row
    monkeypatch.setattr(taps, "own_last_row", lambda *args: looked.append(args[0]) or own(*args))
    module = decoder(RIGHT["llama"])
    for _ in range(2):
        last_row(module, times=3)
    assert len(looked) == 1
    last_row(decoder(RIGHT["qwen2"]))
    assert len(looked) == 2


def test_it_looks_while_the_attention_is_occupied() -> None:
    """By a policy that is not asked meanwhile, and still in place afterwards."""
    module, layers = decoder(RIGHT["llama"]), []

    def attend(call: Any) -> torch.Tensor:
        layers.append(call.layer)
        return call.q_BHTD.transpose(1, 2)

    with replaced_attention(module, attend):
        last_row(module, times=2, padded=True)
    assert layers == [0, 1, 0, 1]
    assert list(taps._KNOWN.values()) == [True]


@torch.no_grad()
def test_what_does_not_ask_is_not_refused() -> None:
    """A policy that may ask for attention, and does not, runs on every architecture."""
    module = decoder(WRONG["one projection"])
    with Tap(module.layers[1].self_attn).listening():
        module(input_ids=torch.zeros(1, 3, dtype=torch.long), use_cache=False)


@pytest.mark.parametrize("inside", ["Phi", "Phi3", "Olmo2", "HunYuanDenseV1"])
@torch.no_grad()
def test_dropping_by_attention_is_refused_inside_a_vision_language_model(inside: str) -> None:
    """And the control that looks at no attention drops as many tokens of the same model."""
    model = grouped_model(decoder=inside)
    prompt = build(
        [[Part("image", embeds_Td=torch.randn(6, 64)), Part("question", torch.tensor([1, 2]))]], model.embed_text
    )
    bare = model.run(prompt)
    with (
        FastV(layer=1, drop=0.5).apply(model, None),
        pytest.raises(Infeasible, match=rf"read off {inside}Attention"),
    ):
        model.run(prompt)
    with DropRandom(layer=1, drop=0.5).apply(model, None):
        assert (model.run(prompt) - bare).abs().max() > 1e-4 * bare.abs().max()
    assert torch.equal(model.run(prompt), bare)


@torch.no_grad()
def test_a_step_behind_a_cache_decides_nothing() -> None:
    """Its keys are not all of them; the next prompt is compared."""
    module = decoder(RIGHT["llama"])
    ids, mask = torch.tensor([[0, 3, 4, 5], [1, 6, 7, 8]]), torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    cache = module(input_ids=ids[:, :3], attention_mask=mask[:, :3], use_cache=True).past_key_values
    with Tap(module.layers[1].self_attn).listening():
        module(input_ids=ids[:, 3:], attention_mask=mask, past_key_values=cache)
        assert not taps._KNOWN
    last_row(module)
    assert list(taps._KNOWN.values()) == [True]
