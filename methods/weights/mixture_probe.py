"""The conformance suite's model for methods on mixtures: an untrained decoder of Mixtral's class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from isoflop.core.knobs import KnobValue
from isoflop.methods.kv_cache.probe import PROMPT, TAIL, VOCABULARY, RandomTokens
from isoflop.methods.probe import AbsoluteCost
from isoflop.methods.weights.probe import WeightProbe
from isoflop.models.hooks.attention import ATTENTION
from isoflop.models.hooks.experts import EXPERTS, mixture_geometry
from isoflop.models.hooks.matrices import MATRICES, matrix_shapes
from isoflop.models.hooks.residual import RESIDUAL
from isoflop.models.lm import LmInfo, LmModel

WIDTH, MLP, EXPERT_COUNT = 64, 32, 4
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 256, "initializer_range": 0.15,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip


def untrained_mixture(layers: int = 1, experts: int = EXPERT_COUNT, active: int = 2, seed: int = 0) -> LmModel:
    """A Mixtral with 4 query heads on 2 key-value heads, width 64, and routers that use some experts more than others."""
    from transformers import MixtralConfig

    shape = {"intermediate_size": MLP, "num_hidden_layers": layers, "num_local_experts": experts}
    return mixture_of(MixtralConfig(**SHAPE, **shape, num_experts_per_tok=active, sliding_window=None), seed)


def mixture_of(config: Any, seed: int = 0) -> LmModel:
    """An untrained model of any class with experts; ``config`` has the fields of ``SHAPE``."""
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for name, parameter in module.named_parameters():
            if name.endswith(("gate.weight", "router.weight")):
                torch.nn.init.normal_(parameter, std=config.initializer_range)
    module.eval().requires_grad_(False)
    decoder = module.model
    geometry = {
        "width": WIDTH, "layers": config.num_hidden_layers, "heads": 4, "kv_heads": 2, "head_width": WIDTH // 4,
        "vocab_size": VOCABULARY, "positions": 256, "matrices": matrix_shapes(decoder), **mixture_geometry(decoder),
    }  # fmt: skip
    info = LmInfo(
        ref=f"probe/{config.model_type}",
        family="probe",
        version="1",
        n_params=sum(p.numel() for p in decoder.layers.parameters()),
        hooks=frozenset({ATTENTION, MATRICES, RESIDUAL, EXPERTS}),
        geometry=geometry,
        text=RandomTokens(VOCABULARY, PROMPT + TAIL),
        vocabulary="probe",
    )
    return LmModel(info, module)


class MixtureProbe(WeightProbe):
    """Logits of an untrained mixture; the cost is the bytes of its matrices as stored."""

    def __init__(self, examples: int = 4, tried: Mapping[str, Sequence[Mapping[str, KnobValue]]] | None = None) -> None:
        super().__init__(examples, tried=tried, model=untrained_mixture())

    def absolute(self) -> Sequence[AbsoluteCost]:
        """A layer of width 64 with keys of 32 and 4 experts of 32: 2·64² + 2·64·32 = 12288 weights of attention, 3·64·32 = 6144 each.

        At a mean of 2 bits, of 1 to 3, experts have 3, 2, 2 and 1 or 3, 3, 1 and 1, 8 bits together, and attention 4 bits; a grid is 4
        bytes for every group of 32.
        """
        from isoflop.methods.base import build

        attention, expert = 12288, 6144
        mixed = build("mc-moe", {"bits": 2.0, "group": 32})
        flat = build("mc-moe", {"bits": 2.0, "allocation": "uniform", "group": 32, "attn_bits": 8})
        grids = (attention + 4 * expert) / 32 * 4
        return (
            AbsoluteCost(flat, "cost", attention + 4 * expert * 2 / 8 + grids),
            AbsoluteCost(mixed, "compressed_params", attention + 4 * expert),
        )
