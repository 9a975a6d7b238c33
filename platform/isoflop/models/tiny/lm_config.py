"""Sizes of the tiny language models, and their configs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from isoflop.models.hooks.matrices import llama_shapes

if TYPE_CHECKING:
    from transformers import LlamaConfig

HEAD_WIDTH = 32
ROPE_BASE = 10_000.0
POSITIONS = 1024
EMBEDDING_STD = 0.2


@dataclass(frozen=True)
class LmSize:
    """One member: width, layers, MLP width. Heads are 32 wide; two query heads share a key-value head."""

    width: int
    layers: int
    mlp: int

    @property
    def heads(self) -> int:
        """Query heads."""
        return self.width // HEAD_WIDTH

    @property
    def kv_heads(self) -> int:
        """Key-value heads."""
        return max(1, self.heads // 2)

    @property
    def n_params(self) -> int:
        """N: parameters of the decoder layers, their norms included; embeddings, final norm and head are left out."""
        attention = 2 * self.width**2 + 2 * self.width * self.kv_heads * HEAD_WIDTH
        return self.layers * (attention + 3 * self.width * self.mlp + 2 * self.width)

    def geometry(self, vocabulary: int) -> dict[str, Any]:
        """Sizes that methods check against (see ``LmInfo``)."""
        return {
            "width": self.width,
            "layers": self.layers,
            "heads": self.heads,
            "kv_heads": self.kv_heads,
            "head_width": HEAD_WIDTH,
            "vocab_size": vocabulary,
            "positions": POSITIONS,
            "matrices": llama_shapes(self.width, self.layers, self.width, self.kv_heads * HEAD_WIDTH, self.mlp),
        }


RECALL_SIZES = {
    "d64": LmSize(64, 2, 64),
    "d128": LmSize(128, 2, 128),
    "d128x4": LmSize(128, 4, 128),
    "d192": LmSize(192, 2, 192),
}
FACT_SIZES = {
    "d64": LmSize(64, 2, 64),
    "d128": LmSize(128, 2, 128),
    "d192": LmSize(192, 2, 192),
}
TEXT_SIZES = {
    "d32": LmSize(32, 4, 88),
    "d64": LmSize(64, 4, 176),
    "d96": LmSize(96, 4, 264),
    "d128": LmSize(128, 4, 352),
    "d192": LmSize(192, 4, 512),
    "d256": LmSize(256, 4, 688),
}


def lm_config(size: LmSize, vocabulary: int, **extra: Any) -> LlamaConfig:
    """The Hugging Face config, with an untied head."""
    from transformers import LlamaConfig

    return LlamaConfig(**lm_fields(size, vocabulary), **extra)


def lm_fields(size: LmSize, vocabulary: int) -> dict[str, Any]:
    """Fields of a decoder's config that its class does not change."""
    return {
        "vocab_size": vocabulary,
        "hidden_size": size.width,
        "intermediate_size": size.mlp,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.kv_heads,
        "head_dim": HEAD_WIDTH,
        "max_position_embeddings": POSITIONS,
        "rope_parameters": {"rope_type": "default", "rope_theta": ROPE_BASE},
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
