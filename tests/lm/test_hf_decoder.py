"""Decoders of checkpoints: one geometry and one set of refusals for language models and vision-language models."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from isoflop.core.errors import Infeasible
from isoflop.core.folder_context import FolderContext
from isoflop.methods.base import build
from isoflop.models.family import family_of
from isoflop.models.hooks.attention import ATTENTION
from isoflop.models.tiny.vision import save_preprocessing
from isoflop.models.vlm import VlmModel
from isoflop.models.vlm_info import VlmBatch, VlmInfo

WORDS, IMAGE = 60, 5
SHAPE: dict[str, Any] = {
    "vocab_size": WORDS, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
GQA = {**SHAPE, "intermediate_size": 48, "num_key_value_heads": 2}
VISION: dict[str, int] = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 12, "patch_size": 4}  # fmt: skip
MLA = {
    "kv_lora_rank": 16, "q_lora_rank": None, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16,
    "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 2,
}  # fmt: skip
FULL = ["full_attention"] * 2
REFUSED: dict[str, tuple[Any, str, str]] = {
    "falcon": (transformers.FalconConfig, r"does not call its attention through", "FalconForCausalLM"),
    "bloom": (transformers.BloomConfig, r"does not call its attention through", "BloomForCausalLM"),
    "windows": (lambda **k: transformers.MistralConfig(**{**GQA, **k}, sliding_window=16), r"within windows .*16", "MistralForCausalLM"),
    "chunks": (lambda **k: transformers.Llama4TextConfig(**{**GQA, **k}, head_dim=8), r"within windows .*chunked", "Llama4ForCausalLM"),
    "dynamic rotation": (
        lambda **k: transformers.LlamaConfig(**{**GQA, **k}, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}),
        r"rotates a text of another length in another way", "LlamaForCausalLM",
    ),
    "recurrent layers": (
        lambda **k: transformers.JambaConfig(**{**GQA, **k}, mamba_d_state=4), r"do not attend to all tokens before \(.*linear_attention", "JambaForCausalLM",
    ),
    "shared keys": (
        lambda **k: transformers.Gemma3nTextConfig(
            **{**GQA, **k}, head_dim=8, layer_types=FULL, num_kv_shared_layers=1, activation_sparsity_pattern=[0.0, 0.0],
        ),
        r"takes keys and values of its last 1 layers from", "Gemma3nForCausalLM",
    ),
    "a mask of its own": (
        lambda **k: transformers.DogeConfig(**{**GQA, **k}), r"a mask of the architecture's own", "DogeForCausalLM",
    ),
    "two widths": (
        lambda **k: transformers.DeepseekV3Config(**{**GQA, "num_key_value_heads": 4, **k}, **MLA),
        r"keys of width 24 and values of width 16", "DeepseekV3ForCausalLM",
    ),
}  # fmt: skip


def llava(text: Any, vision: Any, strategy: str) -> Any:
    return transformers.LlavaConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=IMAGE,
        vision_feature_layer=-1,
        vision_feature_select_strategy=strategy,
        architectures=["LlavaForConditionalGeneration"],
    )


def refused(config: Any, folder: Path) -> str:
    config.save_pretrained(folder)
    save_preprocessing(folder, VISION["image_size"])
    with pytest.raises(Infeasible) as error:
        family_of("hf:x").info(f"hf:{folder}", {})
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("inside", ["language model", "vision-language model"])
def test_attention_that_cannot_be_replaced_is_refused_when_planned(case: str, inside: str, tmp_path: Path) -> None:
    make, message, architecture = REFUSED[case]
    config = make(**SHAPE)
    config.architectures = [architecture]
    if inside != "language model":
        config = llava(config, transformers.CLIPVisionConfig(**VISION), "default")
    found = refused(config, tmp_path)
    assert re.search(message, found), found


def test_windows_in_some_layers_are_refused_where_tokens_leave_between_layers(tmp_path: Path) -> None:
    kinds = ["sliding_attention", "full_attention"]
    text = transformers.Gemma3TextConfig(**GQA, head_dim=8, sliding_window=16, layer_types=kinds)
    found = refused(llava(text, transformers.CLIPVisionConfig(**VISION), "default"), tmp_path)
    assert re.search(
        r"attends within windows \(sliding_attention, sliding_window = 16\), and tokens that leave", found
    ), found


@pytest.mark.parametrize(
    ("config", "architecture"),
    [
        (transformers.BertConfig(**SHAPE, intermediate_size=48), "BertLMHeadModel"),
        (transformers.XGLMConfig(vocab_size=WORDS, d_model=32, ffn_dim=48, num_layers=2, attention_heads=4), "XGLMForCausalLM"),
        (transformers.JambaConfig(**GQA, mamba_d_state=4), "JambaForCausalLM"),
    ],
)  # fmt: skip
def test_other_modules_are_refused_in_one_line(config: Any, architecture: str, tmp_path: Path) -> None:
    config.architectures = [architecture]
    assert f": {architecture} " in refused(config, tmp_path)


def test_heads_are_those_of_the_attention(tmp_path: Path) -> None:
    """Configs name heads for keys and values in different ways, or not at all."""
    config = transformers.GPTBigCodeConfig(**SHAPE, multi_query=True, architectures=["GPTBigCodeForCausalLM"])
    config.save_pretrained(tmp_path)
    geometry = family_of("hf:x").info(f"hf:{tmp_path}", {}).geometry
    assert (geometry["heads"], geometry["kv_heads"], geometry["head_width"]) == (4, 1, 8)


@pytest.mark.parametrize(
    ("tower", "strategy", "allowed"),
    [("siglip", "default", "'full'"), ("clip", "full", "'default'"), ("pixtral", "full", "clip_vision_model")],
)
def test_features_that_are_not_the_patches_are_refused(tower: str, strategy: str, allowed: str, tmp_path: Path) -> None:
    kinds = {"siglip": "SiglipVisionConfig", "clip": "CLIPVisionConfig", "pixtral": "PixtralVisionConfig"}
    vision = getattr(transformers, kinds[tower])(**VISION)
    message = refused(llava(transformers.LlamaConfig(**GQA), vision, strategy), tmp_path)
    assert f"allowed: {allowed}" in message


@pytest.mark.parametrize(("tower", "strategy"), [("SiglipVisionConfig", "full"), ("CLIPVisionConfig", "default")])
@torch.no_grad()
def test_a_checkpoint_gives_stock_logits_from_pixels(tower: str, strategy: str, tmp_path: Path) -> None:
    text = transformers.Qwen3Config(**GQA, head_dim=12, initializer_range=0.2)
    config = llava(text, getattr(transformers, tower)(**VISION), strategy)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        stock = transformers.LlavaForConditionalGeneration(config).eval()
    stock.save_pretrained(tmp_path / "model")
    save_preprocessing(tmp_path / "model", VISION["image_size"])
    ref = f"hf:{tmp_path / 'model'}"
    info = family_of(ref).info(ref, {})
    assert isinstance(info, VlmInfo)
    assert info.geometry["head_width"] == 12
    assert info.geometry["visual_tokens"] == 9
    model = family_of(ref).load(info, None, FolderContext(tmp_path / "cache"))
    assert isinstance(model, VlmModel)
    rng = torch.Generator().manual_seed(1)
    images, words = torch.rand(2, 3, 12, 12, generator=rng), torch.randint(6, WORDS, (2, 4), generator=rng)
    hidden = model.look(images)
    ids = torch.cat((torch.full((2, 1), IMAGE), words), dim=1)
    batch = VlmBatch(hidden, ids, words, torch.arange(2))
    whole = torch.cat((torch.full((2, 9), IMAGE), words), dim=1)
    expected = stock(input_ids=whole, pixel_values=model.vision.preprocess(images)).logits[:, -1]
    torch.testing.assert_close(model.answer_logits(batch), expected, atol=1e-5, rtol=1e-4)
    with build("full-cache", {}).apply(model, None):
        torch.testing.assert_close(model.answer_logits(batch), expected, atol=1e-5, rtol=1e-4)
        report = model.occupant(ATTENTION).report()  # type: ignore[union-attr]
    assert report.dense == model.dense_cache_bytes(9 + 4)
