"""Sizes of the tiny LLaVA family, their configs and their initial weights.

Shape suffixes are not needed here; d is the language model's width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from isoflop.models.hooks.matrices import llama_shapes
from isoflop.models.tiny.vision import KINDS, WIDTH, tower_config
from isoflop.models.training.loop import draw_weights
from isoflop.models.worlds import digit_world as world

if TYPE_CHECKING:
    from transformers import CLIPVisionConfig, LlavaConfig

ROPE_BASE = 1000.0
MAX_POSITIONS = 64
EMBEDDING_STD = 0.2


@dataclass(frozen=True)
class TinySize:
    """One member: width, layers, heads, MLP width, and the decoder's type (``llama`` or ``qwen2``)."""

    width: int
    layers: int
    heads: int
    mlp: int
    decoder: str = "llama"

    @property
    def n_params(self) -> int:
        """N: parameters of the decoder layers, their norms and biases included.

        Embeddings, head and the final norm (d numbers, part of the head's side) are left out.
        """
        qkv_bias = 3 * self.width if self.decoder == "qwen2" else 0
        per_layer = 4 * self.width**2 + 3 * self.width * self.mlp + 2 * self.width + qkv_bias
        return self.layers * per_layer

    def geometry(self, tower: str = "dense") -> dict[str, Any]:
        """Sizes that methods check against (see ``VlmInfo``)."""
        return {
            "grid": world.GRID,
            "visual_tokens": world.TILES,
            "vision_width": WIDTH,
            "vision_layers": KINDS[tower].layers,
            "width": self.width,
            "layers": self.layers,
            "heads": self.heads,
            "kv_heads": self.heads,
            "head_width": self.width // self.heads,
            "vocab_size": world.VOCAB_SIZE,
            "image_token": world.IMAGE,
            "matrices": llama_shapes(self.width, self.layers, self.width, self.width, self.mlp),
        }


_LLAMA = {
    "d24": TinySize(24, 2, 2, 64),
    "d32": TinySize(32, 2, 2, 88),
    "d48": TinySize(48, 2, 4, 128),
    "d96": TinySize(96, 2, 4, 256),
    "d128": TinySize(128, 3, 4, 344),
}
SIZES: dict[str, TinySize] = {
    **_LLAMA,
    **{f"{name}-qwen": TinySize(s.width, s.layers, s.heads, s.mlp, "qwen2") for name, s in _LLAMA.items()},
}


def llava_config(size: TinySize, tower: str = "dense") -> LlavaConfig:
    """The Hugging Face config; declares the raw vocabulary under ``isoflop``, and what a tower of kind ``cls`` adds."""
    return config_of(
        size,
        tower_config(tower),
        vocab_size=world.VOCAB_SIZE,
        image_token=world.IMAGE,
        positions=MAX_POSITIONS,
        patches=world.TILES,
        feature_layer=KINDS[tower].feature_layer,
        isoflop={"vocabulary": world.VOCABULARY},
    )


def config_of(
    size: TinySize,
    vision: CLIPVisionConfig,
    *,
    vocab_size: int,
    image_token: int,
    positions: int,
    patches: int,
    feature_layer: int,
    **extra: Any,
) -> LlavaConfig:
    """The Hugging Face config of a decoder of some size behind a tower.

    Args:
        feature_layer: hidden state that feeds the projector, counted from 0.
        extra: fields of its own.
    """
    from transformers import LlamaConfig, LlavaConfig, Qwen2Config

    text_class = {"llama": LlamaConfig, "qwen2": Qwen2Config}[size.decoder]
    text = text_class(
        vocab_size=vocab_size,
        hidden_size=size.width,
        intermediate_size=size.mlp,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        max_position_embeddings=positions,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_BASE},
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=image_token,
        image_seq_length=patches,
        vision_feature_layer=feature_layer - vision.num_hidden_layers - 1,
        vision_feature_select_strategy="default",
        projector_hidden_act="gelu",
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        **extra,
    )


def initialise(module: Any, seed: int) -> None:
    """Draw the projector's and the language model's weights (see ``draw_weights``); the tower is left alone."""
    decoder = module.model.language_model
    named = [*module.model.multi_modal_projector.named_parameters(), *decoder.named_parameters()]
    draw_weights(named, module.lm_head.weight, len(decoder.layers), EMBEDDING_STD, seed)
