"""Analytic FLOPs against torch's counter on real Hugging Face modules of tiny size.

The counter does not see the fused attention kernel of the CPU, so attention runs eagerly or on the math backend here.
"""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from isoflop.core.errors import UserError
from isoflop.costs import (
    DecoderShape,
    VisionShape,
    answer_flops,
    decode_flops,
    kv_cache_bytes,
    peak_bytes,
    prefill_flops,
    projector_flops,
    vision_flops,
    weight_bytes,
)

TEXT = {
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 160,
    "max_position_embeddings": 256,
}


def count(run) -> float:
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize("kind", [(LlamaConfig, LlamaForCausalLM), (Qwen2Config, Qwen2ForCausalLM)])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_prefill_and_decode_agree_with_the_counter_within_one_percent(kind, attention) -> None:
    config = kind[0](**TEXT, attn_implementation=attention)
    model = kind[1](config).eval()
    shape = DecoderShape.from_config(config)
    ids = torch.arange(48)[None] % TEXT["vocab_size"]
    assert prefill_flops(shape, 48, logits=48) == pytest.approx(count(lambda: model(ids, use_cache=False)), rel=0.01)
    assert prefill_flops(shape, 48, logits=1) == pytest.approx(count(lambda: model(ids, logits_to_keep=1)), rel=0.01)

    cache = model(ids, use_cache=True).past_key_values

    def decode() -> None:
        past = cache
        for _ in range(5):
            past = model(ids[:, :1], past_key_values=past, use_cache=True).past_key_values

    assert decode_flops(shape, 48, 5) == pytest.approx(count(decode), rel=0.01)


def test_matrix_params_are_the_models_own() -> None:
    config = LlamaConfig(**TEXT)
    model = LlamaForCausalLM(config)
    own = sum(p.numel() for n, p in model.named_parameters() if "proj" in n)
    assert DecoderShape.from_config(config).matrix_params == own


def llava() -> LlavaForConditionalGeneration:
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, image_size=48, patch_size=8
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=LlamaConfig(**TEXT),
        image_token_index=159,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_seq_length=36,
    )
    return LlavaForConditionalGeneration(config).eval()


def test_vision_language_answer_agrees_with_the_counter_within_one_percent() -> None:
    model = llava()
    decoder, vision = DecoderShape.from_config(model.config), VisionShape.from_config(model.config)
    ids = torch.cat([torch.full((1, 36), 159), torch.arange(12)[None]], dim=1)
    pixels = torch.zeros(1, 3, 48, 48)
    measured = count(lambda: model(input_ids=ids, pixel_values=pixels, logits_to_keep=1))
    parts = answer_flops(decoder, visual_tokens=36, text_tokens=12, vision=vision)
    assert parts.total == pytest.approx(measured, rel=0.01)
    assert vision_flops(vision) == pytest.approx(count(lambda: model.model.vision_tower(pixels)), rel=0.01)
    assert projector_flops(32, 64, 36) == pytest.approx(
        count(lambda: model.model.multi_modal_projector(torch.zeros(1, 36, 32))), rel=0.01
    )
    without = answer_flops(decoder, visual_tokens=36, text_tokens=12)
    assert without.vision == without.projector == 0
    assert without.prefill == parts.prefill


def test_dropping_tokens_on_the_way_costs_what_each_layer_sees() -> None:
    shape = DecoderShape.from_config(LlamaConfig(**TEXT))
    head = 2 * shape.hidden * shape.vocab
    split = prefill_flops(shape, [40, 20, 10]) - head
    parts = sum((prefill_flops(shape, t) - head) / shape.layers for t in (40, 20, 10))
    assert split == pytest.approx(parts, rel=1e-12)
    assert answer_flops(shape, [30, 10, 0], 10).prefill == prefill_flops(shape, [40, 20, 10])
    with pytest.raises(UserError, match="2 per-layer tokens for 3 layers"):
        prefill_flops(shape, [40, 20])


def test_causal_attention_costs_the_triangle() -> None:
    shape = DecoderShape.from_config(LlamaConfig(**TEXT))
    full, half = prefill_flops(shape, 64), prefill_flops(shape, 64, causal=True)
    attention = 4 * 64 * 64 * shape.heads * shape.head_dim * shape.layers
    assert full - half == pytest.approx(attention * (1 - 65 / 128))


def test_two_n_per_token_is_the_limit_for_wide_models() -> None:
    shape = DecoderShape(layers=32, hidden=4096, heads=32, kv_heads=32, head_dim=128, mlp=11008, vocab=32000)
    assert prefill_flops(shape, 100, logits=0) == pytest.approx(2 * shape.matrix_params * 100, rel=0.01)


def test_kv_cache_bytes_are_the_bytes_of_a_real_cache() -> None:
    config = LlamaConfig(**TEXT)
    cache = LlamaForCausalLM(config).eval()(torch.arange(20)[None], use_cache=True).past_key_values
    real = sum(layer.keys.numel() * 4 + layer.values.numel() * 4 for layer in cache.layers)
    shape = DecoderShape.from_config(config)
    assert kv_cache_bytes(shape, 20, bits=32) == real
    assert kv_cache_bytes(shape, [20, 10, 0], bits=32) == real / 2
    assert kv_cache_bytes(shape, 20, bits=4, group=32) == pytest.approx(real / 32 * 5)


def test_weight_and_peak_bytes_add_up() -> None:
    assert weight_bytes(1000, 16) == 2000
    assert weight_bytes(1024, 4, group=128, scale_bits=16) == 512 + 16
    shape = DecoderShape.from_config(LlamaConfig(**TEXT))
    base = peak_bytes(shape, 20, 1e5)
    assert base > weight_bytes(1e5) + kv_cache_bytes(shape, 20)
    assert peak_bytes(shape, 20, 1e5, eager_attention=True) - base == 4 * 20 * 20 * 2


def test_a_configuration_without_sizes_is_refused() -> None:
    with pytest.raises(UserError, match="num_attention_heads"):
        DecoderShape.from_config(object())
