"""Small random checkpoints of Hugging Face's classes of vision-language models, each with a tokenizer and an image processor.

``SMALL`` maps the name of a class to what its checkpoint is made of; ``save_small`` writes one in ``save_pretrained`` form.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from isoflop.models.quiet import no_progress_bars

SIDE, PATCH = 24, 4
"""Pixels per side of a view and of a patch."""
TEXT = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 2048, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
SQUARE = {"height": SIDE, "width": SIDE}
PINPOINTS = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]
MARKS = (
    "<pad>", "<s>", "</s>", "<image>", "<IMG_CONTEXT>", "<img>", "</img>", "<fake_token_around_image>", "<global-img>",
    "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>",
    *(f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5)),
)  # fmt: skip


@dataclass(frozen=True)
class Small:
    """What a small checkpoint is made of.

    Attributes:
        config: from the tokenizer.
        processor: class of its image processor.
        settings: of that.
        image: what stands for a visual token in the class's own prompts.
        told: to the image processor by the class's processor.
    """

    config: Callable[[Any], Any]
    processor: str
    settings: dict[str, Any]
    image: str = "<image>"
    told: dict[str, Any] = field(default_factory=dict)


def byte_tokenizer() -> Any:
    """A fast tokenizer whose tokens are the bytes and ``MARKS``."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(letters)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    found = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    found.add_tokens(list(MARKS), special_tokens=True)
    return found


def _text(kind: str, tokenizer: Any, **changes: Any) -> Any:
    import transformers

    return getattr(transformers, kind)(vocab_size=len(tokenizer), **{**TEXT, **changes})


def _llava(tokenizer: Any) -> Any:
    from transformers import CLIPVisionConfig, LlavaConfig

    return LlavaConfig(
        text_config=_text("LlamaConfig", tokenizer), vision_config=CLIPVisionConfig(**VISION, image_size=SIDE, patch_size=PATCH),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"), vision_feature_layer=-2, vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )  # fmt: skip


def _anyres(kind: str, tower: str, strategy: str, text: str, **changes: Any) -> Callable[[Any], Any]:
    def make(tokenizer: Any) -> Any:
        import transformers

        return getattr(transformers, kind)(
            text_config=_text(text, tokenizer), vision_config=getattr(transformers, tower)(**VISION, image_size=SIDE, patch_size=PATCH),
            image_token_id=tokenizer.convert_tokens_to_ids("<image>"), vision_feature_layer=-2 if strategy == "default" else -1,
            vision_feature_select_strategy=strategy, image_grid_pinpoints=PINPOINTS, tie_word_embeddings=False, **changes,
        )  # fmt: skip

    return make


def _internvl(tokenizer: Any) -> Any:
    from transformers import InternVLConfig, InternVLVisionConfig

    return InternVLConfig(
        text_config=_text("Qwen2Config", tokenizer), downsample_ratio=0.5,
        vision_config=InternVLVisionConfig(**VISION, image_size=[SIDE, SIDE], patch_size=[PATCH, PATCH], use_qk_norm=True),
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"), tie_word_embeddings=False,
    )  # fmt: skip


def _idefics(kind: str, tower: str) -> Callable[[Any], Any]:
    def make(tokenizer: Any) -> Any:
        import transformers

        return getattr(transformers, kind)(
            text_config=_text("LlamaConfig", tokenizer), vision_config=getattr(transformers, tower)(**VISION, image_size=SIDE, patch_size=PATCH),
            image_token_id=tokenizer.convert_tokens_to_ids("<image>"), scale_factor=2, tie_word_embeddings=False, pad_token_id=None,
        )  # fmt: skip

    return make


def _paligemma(tokenizer: Any) -> Any:
    from transformers import PaliGemmaConfig

    text = {**TEXT, "model_type": "gemma", "vocab_size": len(tokenizer), "head_dim": 8}
    vision = {
        **VISION,
        "model_type": "siglip_vision_model",
        "image_size": SIDE,
        "patch_size": PATCH,
        "projection_dim": 32,
    }
    return PaliGemmaConfig(
        text_config=text, vision_config={**vision, "vision_use_head": False}, projection_dim=32, hidden_size=32,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"), vocab_size=len(tokenizer),
    )  # fmt: skip


def _qwen(generation: str) -> Callable[[Any], Any]:
    def make(tokenizer: Any) -> Any:
        import transformers

        vision: dict[str, Any] = {
            "depth": 3,
            "patch_size": PATCH,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "num_heads": 2,
            "in_channels": 3,
        }
        own: dict[str, dict[str, Any]] = {
            "Qwen2VL": {"embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2},
            "Qwen2_5_VL": {"hidden_size": 16, "intermediate_size": 24, "out_hidden_size": 32, "window_size": 16, "fullatt_block_indexes": [1]},
            "Qwen3VL": {"hidden_size": 16, "intermediate_size": 24, "out_hidden_size": 32, "num_position_embeddings": 36, "deepstack_visual_indexes": [0, 1]},
        }  # fmt: skip
        vision |= own[generation.removesuffix("Moe")]
        text: dict[str, Any] = {
            **TEXT,
            "vocab_size": len(tokenizer),
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
        }
        text |= {"head_dim": 8, "num_hidden_layers": 3} if generation.startswith("Qwen3") else {}
        text |= (
            {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
            if generation.endswith("Moe")
            else {}
        )
        ids = {f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{name}_pad|>") for name in ("image", "video")}
        marks = {
            f"vision_{end}_token_id": tokenizer.convert_tokens_to_ids(f"<|vision_{end}|>") for end in ("start", "end")
        }
        return getattr(transformers, f"{generation}Config")(
            text_config=text, vision_config=vision, **ids, **marks, tie_word_embeddings=False
        )

    return make


QWEN = {
    "patch_size": PATCH,
    "merge_size": 2,
    "temporal_patch_size": 2,
    "size": {"shortest_edge": 16 * 16, "longest_edge": 56 * 56},
}
IDEFICS = {"size": {"longest_edge": 3 * SIDE}, "max_image_size": {"longest_edge": SIDE}}
SMALL: dict[str, Small] = {
    "LlavaForConditionalGeneration": Small(
        _llava,
        "CLIPImageProcessorPil",
        {"size": {"shortest_edge": SIDE}, "crop_size": SQUARE, "resample": 3},
    ),
    "LlavaNextForConditionalGeneration": Small(
        _anyres("LlavaNextConfig", "CLIPVisionConfig", "default", "MistralConfig"),
        "LlavaNextImageProcessorPil",
        {"size": {"shortest_edge": SIDE}, "crop_size": SQUARE, "image_grid_pinpoints": PINPOINTS},
    ),
    "LlavaOnevisionForConditionalGeneration": Small(
        _anyres(
            "LlavaOnevisionConfig", "SiglipVisionConfig", "full", "Qwen2Config", vision_aspect_ratio="anyres_max_2"
        ),
        "LlavaOnevisionImageProcessorPil",
        {"size": SQUARE, "image_grid_pinpoints": PINPOINTS},
    ),
    "InternVLForConditionalGeneration": Small(
        _internvl,
        "GotOcr2ImageProcessorPil",
        {"size": SQUARE, "max_patches": 4},
        "<IMG_CONTEXT>",
        {"crop_to_patches": True},
    ),
    "Idefics3ForConditionalGeneration": Small(
        _idefics("Idefics3Config", "Idefics3VisionConfig"), "Idefics3ImageProcessorPil", IDEFICS
    ),
    "SmolVLMForConditionalGeneration": Small(
        _idefics("SmolVLMConfig", "SmolVLMVisionConfig"), "SmolVLMImageProcessorPil", IDEFICS
    ),
}

SMALL["PaliGemmaForConditionalGeneration"] = Small(
    _paligemma,
    "SiglipImageProcessorPil",
    {"size": SQUARE, "resample": 3, "image_mean": [0.5] * 3, "image_std": [0.5] * 3},
)
for _generation in ("Qwen2VL", "Qwen2_5_VL", "Qwen3VL", "Qwen3VLMoe"):
    SMALL[f"{_generation}ForConditionalGeneration"] = Small(
        _qwen(_generation), "Qwen2VLImageProcessorPil", QWEN, "<|image_pad|>"
    )


MOST = tuple(
    f"{name}ForConditionalGeneration"
    for name in ("LlavaNext", "LlavaOnevision", "InternVL", "Idefics3", "Qwen2_5_VL", "Qwen3VL", "PaliGemma")
)
"""Classes that differ from one another; the others are nearly the same as one of these, or have tests of their own."""


def save_small(architecture: str, folder: Path) -> Any:
    """Write the small checkpoint of a class, with weights large enough to attend unevenly; transformers' own module of it."""
    import transformers

    from isoflop.testing.architectures.walk import redrawn

    small, tokenizer = SMALL[architecture], byte_tokenizer()
    with torch.random.fork_rng(devices=[]), torch.no_grad(), no_progress_bars():
        torch.manual_seed(0)
        module = redrawn(getattr(transformers, architecture)(small.config(tokenizer)))
        module.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    getattr(transformers, small.processor)(**small.settings).save_pretrained(folder)
    return module
