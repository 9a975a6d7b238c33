"""The last position's output of a Llama-type decoder, computed with the Hugging Face module's own weights, for training.

Training on one-token answers needs the hidden state of the last position only. This forward pass therefore drops the
other positions in the last layer after keys and values, and skips the caches, masks and hooks of the general one. It
gives the same numbers (tests compare it with the Hugging Face forward); evaluation uses the Hugging Face forward.

Shape suffixes: B batch, L tokens, d width, H query heads, K key/value heads, h head width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class LastPosition:
    """A callable that maps input embeddings (B, L, d) to the final norm's output at the last position (B, d).

    Args:
        decoder: a Hugging Face ``LlamaModel`` or ``Qwen2Model`` (pre-norm, RoPE of type ``default``, SwiGLU, no
            sliding window).
    """

    def __init__(self, decoder: nn.Module) -> None:
        self._decoder: Any = decoder
        self._rotary: dict[int, tuple[Tensor, Tensor]] = {}

    def __call__(self, x_BLd: Tensor) -> Tensor:
        """The last position's hidden state, (B, d)."""
        layers = self._decoder.layers
        for layer in layers[:-1]:
            x_BLd = self._layer(layer, x_BLd, last=False)
        return self._norm(self._decoder.norm, self._layer(layers[-1], x_BLd, last=True))[:, 0]

    def _layer(self, layer: Any, x_BLd: Tensor, last: bool) -> Tensor:
        attention = layer.self_attn
        y_BLd = self._norm(layer.input_layernorm, x_BLd)
        q_in = y_BLd[:, -1:] if last else y_BLd
        cos_Lh, sin_Lh = self._rope(x_BLd.shape[1], x_BLd)
        q_BHLh = _heads(attention.q_proj(q_in), attention.head_dim)
        k_BKLh = _heads(attention.k_proj(y_BLd), attention.head_dim)
        v_BKLh = _heads(attention.v_proj(y_BLd), attention.head_dim)
        q_BHLh = _rotate(q_BHLh, cos_Lh[-1:], sin_Lh[-1:]) if last else _rotate(q_BHLh, cos_Lh, sin_Lh)
        k_BKLh = _rotate(k_BKLh, cos_Lh, sin_Lh)
        grouped = attention.num_key_value_groups > 1
        mixed_BHLh = F.scaled_dot_product_attention(q_BHLh, k_BKLh, v_BKLh, is_causal=not last, enable_gqa=grouped)
        x_BLd = (x_BLd[:, -1:] if last else x_BLd) + attention.o_proj(mixed_BHLh.transpose(1, 2).flatten(2))
        z_BLd = self._norm(layer.post_attention_layernorm, x_BLd)
        mlp = layer.mlp
        return x_BLd + mlp.down_proj(F.silu(mlp.gate_proj(z_BLd)) * mlp.up_proj(z_BLd))

    def _rope(self, length: int, like: Tensor) -> tuple[Tensor, Tensor]:
        if length not in self._rotary:
            with torch.no_grad():
                cos_BLh, sin_BLh = self._decoder.rotary_emb(like, torch.arange(length, device=like.device)[None])
            self._rotary[length] = (cos_BLh[0], sin_BLh[0])
        return self._rotary[length]

    @staticmethod
    def _norm(norm: Any, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), norm.weight, norm.variance_epsilon)


def _heads(x_BLd: Tensor, width: int) -> Tensor:
    return x_BLd.unflatten(-1, (-1, width)).transpose(1, 2)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin
