"""Bytes: weights, KV cache and the peak while an answer is made."""

from __future__ import annotations

from isoflop.costs.flops import Tokens, per_layer
from isoflop.costs.shapes import DecoderShape


def weight_bytes(
    params: float, bits: float = 16.0, group: int | None = None, scale_bits: float = 16.0, zero_bits: float = 0.0
) -> float:
    """Weights at ``bits`` each; with groups, one scale (and zero point) per ``group`` weights is added."""
    overhead = 0.0 if group is None else (scale_bits + zero_bits) / group
    return params * (bits + overhead) / 8


def kv_cache_bytes(
    shape: DecoderShape,
    tokens: Tokens,
    bits: float = 16.0,
    batch: int = 1,
    group: int | None = None,
    scale_bits: float = 32.0,
) -> float:
    """Keys and values of all layers: 2 * kv_heads * head_dim numbers per token and layer.

    ``group``: quantization groups, each with ``scale_bits`` of scale and zero point.
    """
    overhead = 0.0 if group is None else scale_bits / group
    entries = sum(per_layer(tokens, shape.layers, "cached tokens"))
    return batch * entries * 2 * shape.kv_heads * shape.head_dim * (bits + overhead) / 8


def peak_bytes(
    shape: DecoderShape,
    tokens: Tokens,
    params: float,
    weight_bits: float = 16.0,
    kv_bits: float = 16.0,
    activation_bits: float = 16.0,
    batch: int = 1,
    eager_attention: bool = False,
) -> float:
    """Weights + KV cache + the largest activations of one prefill layer.

    Activations: residual stream, normalised copy and the widest intermediate (gate and up of the MLP, or q, k, v), plus the
    heads x T x T score matrix when attention is eager. An estimate: allocators round up, frameworks keep workspaces.
    """
    longest = max(per_layer(tokens, shape.layers))
    wide = max((2 if shape.gated else 1) * shape.mlp, shape.head_dim * (shape.heads + 2 * shape.kv_heads))
    activations = batch * longest * (2 * shape.hidden + wide) * activation_bits / 8
    scores = batch * shape.heads * longest**2 * activation_bits / 8 if eager_attention else 0.0
    return weight_bytes(params, weight_bits) + kv_cache_bytes(shape, tokens, kv_bits, batch) + activations + scores
