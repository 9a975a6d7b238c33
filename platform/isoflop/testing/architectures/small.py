"""Small configs of every causal language model that the installed transformers knows, made from what each config calls things.

A config's own numbers are replaced by small ones, found by their names; what an architecture needs besides stands in ``SPECIAL``.
Windows and the like are shrunk below the length of the walk's texts, so that they show.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from isoflop.models.checkpoints.source import brief

WORDS = 60
"""Tokens of the vocabularies."""
POSITIONS = 64
RESERVED = 3
"""Tokens below it may be special ones."""

SIZES: tuple[tuple[str, int], ...] = (
    (r"(^|_)(head_dim|headdim|rope_dim)$|^dim_head$", 8),
    (r"(vocab_size(_per_layer_input)?|n_words)$", WORDS),
    (r"^(max_position_embeddings|max_target_positions|n_positions|n_ctx|max_seq_len|max_sequence_length|seq_length)$", POSITIONS),
    (r"(^|_)(hidden_size|d_model|n_embd|dim|embedding_size|embed_dim|emb_dim|word_embed_proj_dim)$", 32),
    (r"(intermediate_size|ffn_dim|n_inner|d_inner|dff|dim_ff|ffn_hidden_size)$", 48),
    (r"^(num_hidden_layers|num_layers|n_layers?|n_layer|encoder_layers|decoder_layers|num_(de|en)coder_layers)$", 2),
    (r"(attention_heads|num_heads|n_heads?|encoder_heads)$", 4),
    (r"(key_value_heads|kv_heads|kv_n_heads)$", 2),
    (r"(num_local_experts|n_routed_experts|num_experts|moe_num_experts|num_routed_experts|zero_expert_num)$", 4),
    (r"(experts_per_tok(en)?|moe_k|moe_topk|moe_top_k|router_top_k)$", 2),
    (r"(_lora_rank|hidden_size_per_layer_input|rank)$", 16),
    (r"^floor_scale$", 2),
    (r"(sliding_window|window_size|window_len|chunk_size|index_topk)$", 4),
    (r"(mamba_n_heads|n_groups|state_size|d_state|conv_kernel|d_conv)$", 4),
    (r"(shape|pronunciation)_embed_dim$", 8),
)  # fmt: skip
"""How whole numbers of a config are called, and what they become where they are larger."""

FULL = ["full_attention", "full_attention"]
SOME = ["sliding_attention", "full_attention"]
_ASSISTANT_TEXT = {
    "hidden_size_per_layer_input": 0,
    "vocab_size_per_layer_input": 0,
    "num_kv_shared_layers": 2,
    "layer_types": FULL,
}
SPECIAL: dict[str, dict[str, Any]] = {
    "blt": {"encoder_hash_byte_group_vocab": 64},
    "cohere_compass_text": {"layer_types": FULL, "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0}, "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2}},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note_text": {"num_key_value_heads": 4},
    "gemma4_assistant": {"text_config": ("gemma4_text", _ASSISTANT_TEXT)},
    "gemma4_unified_assistant": {"text_config": ("gemma4_unified_text", _ASSISTANT_TEXT)},
    "gemma3n_text": {"num_kv_shared_layers": 0, "activation_sparsity_pattern": [0.0, 0.0]},
    "gpt_neo": {"attention_types": [[["global"], 2]]},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"head_dim": 16},
    "ministral": {"head_dim": 8},
    "llama4_text": {"no_rope_layers": [1, 0]},
    "nemotron": {"num_key_value_heads": 2},
    "smollm3": {"no_rope_layers": [1, 0], "layer_types": FULL},
    "reformer": {"is_decoder": True, "attn_layers": ["local", "lsh"], "axial_pos_shape": [8, 8], "axial_pos_embds_dim": [16, 16]},
}  # fmt: skip
"""What an architecture wants besides, by the type of its config."""


class NotSmall(Exception):
    """No small model of an architecture can be built from its config alone; the text says why."""


@dataclass(frozen=True)
class Architecture:
    """A causal language model that transformers knows.

    Attributes:
        model_type: of its config.
        module: name of its class.
    """

    model_type: str
    module: str


def architectures() -> list[Architecture]:
    """All of them, by the type of their configs."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES

    return [Architecture(model_type, str(module)) for model_type, module in sorted(NAMES.items())]


def small_config(model_type: str, **changes: Any) -> Any:
    """A config of an architecture with small numbers.

    Args:
        changes: fields that shall have other values.

    Raises:
        NotSmall: none can be made.
    """
    from transformers import CONFIG_MAPPING

    try:
        return _shrunk(CONFIG_MAPPING[model_type], {**SPECIAL.get(model_type, {}), **changes})
    except Exception as error:  # each config checks its numbers in a way of its own
        raise NotSmall(f"its config takes no small numbers ({brief(error)})") from error


def full_attention(config: Any) -> dict[str, Any]:
    """Changes that leave an architecture without windows, as some of its checkpoints are; empty when it has none."""
    own: dict[str, Any] = config.to_dict()
    off: dict[str, Any] = {}
    if set(own.get("layer_types") or []) - set(FULL):
        off["layer_types"] = FULL
    elif own.get("sliding_window") is not None and not own.get("layer_types"):
        off["sliding_window"] = None
    return off


def some_windows(config: Any) -> dict[str, Any]:
    """Changes that give an architecture windows in its first layer only; empty when it has some so, or has none."""
    own: dict[str, Any] = config.to_dict()
    kinds = own.get("layer_types") or []
    if "sliding_attention" not in kinds or set(kinds) == set(SOME):
        return {}
    return {**full_attention(config), "layer_types": SOME}


def _shrunk(kind: Any, fixed: dict[str, Any]) -> Any:
    given = {name: _inner(value) for name, value in fixed.items()}
    whole = kind(**{name: given[name] for name in kind.sub_configs if name in given})
    values: dict[str, Any] = {}
    for name in kind.sub_configs:
        own: Any = getattr(whole, name, None)
        if name not in given and hasattr(type(own), "sub_configs"):
            values[name] = _shrunk(type(own), SPECIAL.get(own.model_type, {}))
    for name, value in whole.to_dict().items():
        if name in kind.sub_configs:
            continue
        if name.endswith("token_id") and type(value) is int and value >= WORDS:
            values[name] = RESERVED - 1
        elif type(value) is int and (small := _small(name)) is not None and value > small:
            values[name] = small
    return kind(**{**values, **given})


def _inner(value: Any) -> Any:
    """A config inside a config, where ``SPECIAL`` names its type and what it wants."""
    if not isinstance(value, tuple):
        return value
    from transformers import CONFIG_MAPPING

    model_type, fixed = value
    return _shrunk(CONFIG_MAPPING[model_type], {**SPECIAL.get(model_type, {}), **fixed})


def _small(name: str) -> int | None:
    return next((size for pattern, size in SIZES if re.search(pattern, name)), None)
