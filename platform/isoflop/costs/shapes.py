"""Sizes of a model that its costs depend on, read from a Hugging Face configuration (no weights needed)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from isoflop.core.errors import UserError


@dataclass(frozen=True)
class DecoderShape:
    """A decoder-only language model of the Llama kind (also Mistral, Qwen2 and 3, Gemma without extras).

    Attributes:
        layers, hidden, heads, kv_heads, head_dim, mlp, vocab: its sizes.
        gated: the MLP has three matrices (SwiGLU) instead of two.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    vocab: int
    gated: bool = True

    @classmethod
    def from_config(cls, config: Any) -> DecoderShape:
        """From a text configuration, or a vision-language one (its ``text_config``)."""
        text = getattr(config, "text_config", config)
        heads = _need(text, "num_attention_heads")
        hidden = _need(text, "hidden_size")
        gated = (
            getattr(text, "hidden_act", "silu") in ("silu", "swish")
            or getattr(text, "hidden_activation", None) is not None
        )
        return cls(
            layers=_need(text, "num_hidden_layers"),
            hidden=hidden,
            heads=heads,
            kv_heads=getattr(text, "num_key_value_heads", None) or heads,
            head_dim=getattr(text, "head_dim", None) or hidden // heads,
            mlp=_need(text, "intermediate_size"),
            vocab=_need(text, "vocab_size"),
            gated=gated,
        )

    @property
    def attention_params(self) -> int:
        """Weights of the four projections of one layer."""
        return self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)

    @property
    def mlp_params(self) -> int:
        """Weights of the MLP of one layer."""
        return (3 if self.gated else 2) * self.hidden * self.mlp

    @property
    def matrix_params(self) -> int:
        """Weights in matrix products of all layers: N without norms and biases."""
        return self.layers * (self.attention_params + self.mlp_params)


@dataclass(frozen=True)
class VisionShape:
    """A CLIP- or SigLIP-like tower.

    Attributes:
        layers: layers that are computed; hidden, heads, mlp: sizes; patches: tokens from the image; extra: class tokens;
            patch_inputs: numbers per patch (channels x patch side squared).
    """

    layers: int
    hidden: int
    heads: int
    mlp: int
    patches: int
    patch_inputs: int
    extra: int = 1

    @classmethod
    def from_config(cls, config: Any) -> VisionShape:
        """From a vision configuration, or a vision-language one (its ``vision_config``)."""
        vision = getattr(config, "vision_config", config)
        side = _need(vision, "image_size") // _need(vision, "patch_size")
        return cls(
            layers=_need(vision, "num_hidden_layers"),
            hidden=_need(vision, "hidden_size"),
            heads=_need(vision, "num_attention_heads"),
            mlp=_need(vision, "intermediate_size"),
            patches=side * side,
            patch_inputs=getattr(vision, "num_channels", 3) * vision.patch_size**2,
            extra=0 if "siglip" in getattr(vision, "model_type", "") else 1,
        )

    @property
    def tokens(self) -> int:
        """Tokens inside the tower."""
        return self.patches + self.extra


def _need(config: Any, name: str) -> int:
    value = getattr(config, name, None)
    if not isinstance(value, int) or value <= 0:
        raise UserError(f"costs: the model's configuration has no usable {name!r} (got {value!r})")
    return value
