"""Attention taps equal the weights that eager attention gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaModel,
    Qwen2Config,
    Qwen2Model,
    Qwen3Config,
    Qwen3Model,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from isoflop.models.features import Vision, attention_in
from isoflop.models.taps import Tap

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}


def tower(cls: Any, config: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = cls(config(**SIZES, image_size=24, patch_size=8)).eval()
        for name, p in module.named_parameters():
            if "q_proj" in name or "k_proj" in name:
                p.data.mul_(10)  # far from uniform attention
    return module


@pytest.mark.parametrize(
    ("cls", "config", "prefix"), [(CLIPVisionModel, CLIPVisionConfig, 1), (SiglipVisionModel, SiglipVisionConfig, 0)]
)
@torch.no_grad()
def test_vision_rows_equal_eager_attention(cls: Any, config: Any, prefix: int) -> None:
    module = tower(cls, config)
    vision = Vision(module, 24, (0.5,) * 3, (0.5,) * 3, prefix)
    images = torch.rand(2, 3, 24, 24, generator=torch.Generator().manual_seed(1))
    found = vision.read(images, [attention_in(n) for n in range(3)])
    assert module.config._attn_implementation != "eager"
    module.set_attn_implementation("eager")
    weights = module(vision.preprocess(images), output_attentions=True).attentions
    for n in range(3):
        mean = weights[n].mean(1)
        expected = mean[:, 0, 1:] if prefix else mean.mean(1)  # without a class token: attention received
        assert float(expected.std()) > 1e-3
        torch.testing.assert_close(found[attention_in(n)], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("cls", "config"), [(LlamaModel, LlamaConfig), (Qwen2Model, Qwen2Config), (Qwen3Model, Qwen3Config)]
)
@pytest.mark.parametrize("padded", [False, True])
@torch.no_grad()
def test_the_last_row_of_a_decoder_layer_equals_eager_attention(cls: Any, config: Any, padded: bool) -> None:
    """Grouped queries, RoPE, left padding, and per-head norms where the architecture has them."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = cls(config(**SIZES, num_key_value_heads=2, vocab_size=64, initializer_range=0.3)).eval()
    ids = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(1))
    valid = torch.ones(2, 9, dtype=torch.bool)
    if padded:
        valid[0, :4] = False
    positions = (valid.long().cumsum(-1) - 1).clamp(min=0)
    rope: list[Any] = []
    handle = module.layers[1].register_forward_pre_hook(
        lambda m, args, kwargs: rope.append(kwargs["position_embeddings"]), with_kwargs=True
    )
    inputs = {"input_ids": ids, "attention_mask": valid.long(), "position_ids": positions, "use_cache": False}
    with Tap(module.layers[1].self_attn).listening() as tap:
        module(**inputs)
        found = tap.last_row(rope[0], valid if padded else None)
    handle.remove()
    assert not module.layers[1].self_attn.q_proj._forward_hooks
    module.set_attn_implementation("eager")
    expected = module(**inputs, output_attentions=True).attentions[1][:, :, -1]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_a_tap_that_heard_nothing_says_so() -> None:
    module = tower(CLIPVisionModel, CLIPVisionConfig)
    with Tap(module.encoder.layers[0].self_attn).listening() as tap, pytest.raises(RuntimeError, match="has not run"):
        tap.vision_rows(slice(0, 1))
