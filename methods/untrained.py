"""Untrained decoders for probes: the same weights for the same arguments, whatever torch's global random state."""

from __future__ import annotations

from typing import Any

import torch


def untrained_llama(
    vocabulary: int,
    *,
    width: int,
    mlp: int,
    layers: int,
    heads: int,
    kv_heads: int,
    positions: int,
    spread: float,
    seed: int,
) -> tuple[Any, int, dict[str, int]]:
    """A small Llama in evaluation mode without gradients, its N, and its geometry as ``ModelInfo`` wants it.

    Args:
        spread: standard deviation of the initial weights; large ones attend unevenly and prefer some tokens.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=positions,
        initializer_range=spread,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = LlamaForCausalLM(config).eval().requires_grad_(False)
    geometry = {
        "width": width,
        "layers": layers,
        "heads": heads,
        "kv_heads": kv_heads,
        "head_width": width // heads,
        "vocab_size": vocabulary,
        "positions": positions,
    }
    return module, sum(p.numel() for p in module.model.layers.parameters()), geometry
