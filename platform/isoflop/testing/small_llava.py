"""A small LLaVA checkpoint with a tokenizer and a processor, untrained, in ``save_pretrained`` form."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from isoflop.models.quiet import no_progress_bars

PATCHES = 16


def save_small_llava(folder: Path, tokenizer: Any, seed: int = 0) -> None:
    """Write one whose images have ``PATCHES`` tokens.

    Args:
        tokenizer: a fast tokenizer; gets the token ``<image>``.
    """
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    vision = CLIPVisionConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=32,
        patch_size=8,
        initializer_range=0.3,
    )
    text = LlamaConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=64,
        initializer_range=0.3,
        vocab_size=len(tokenizer),
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=PATCHES,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]), no_progress_bars():
        torch.manual_seed(seed)
        LlavaForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    square = {"height": 32, "width": 32}
    processor = {"size": {"shortest_edge": 32}, "crop_size": square, "resample": 3}
    normalisation = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.25]}
    (folder / "preprocessor_config.json").write_text(json.dumps({**processor, **normalisation}))
