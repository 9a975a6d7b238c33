"""The hook ``experts`` on mixtures of transformers: what routers chose is asked, and nothing else changes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, MixtralConfig, OlmoeConfig, Qwen2MoeConfig, Qwen3MoeConfig

from isoflop.core.folder_context import FolderContext
from isoflop.models.base import Model
from isoflop.models.family import family_of
from isoflop.models.hooks.experts import EXPERTS, ExpertPolicy, Routing
from isoflop.models.lm import NOT_SCORED, LmBatch
from isoflop.testing.neutral import neutral
from isoflop.testing.snapshot import Snapshot

PLAIN: dict[str, Any] = {
    "vocab_size": 48, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "num_experts_per_tok": 2, "norm_topk_prob": True,
    "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
MIXTURES = {
    "mixtral": MixtralConfig(**PLAIN, num_local_experts=4),
    "qwen2": Qwen2MoeConfig(**PLAIN, num_experts=4),
    "qwen3": Qwen3MoeConfig(**PLAIN, num_experts=4),
    "olmoe": OlmoeConfig(**PLAIN, num_experts=4),
}


class First(ExpertPolicy):
    """Every token goes to the first of its experts alone."""

    def __init__(self) -> None:
        self.layers: list[int] = []

    def route(self, layer: int, hidden_Sd: Tensor, routing: Routing) -> Routing:
        self.layers.append(layer)
        assert routing.logits_SE.shape == (len(hidden_Sd), 4)
        weights_Sk = torch.zeros_like(routing.weights_Sk)
        weights_Sk[:, 0] = 1.0
        return replace(routing, weights_Sk=weights_Sk)


@pytest.fixture(params=MIXTURES)
def mixture(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Model, Any]:
    """A mixture as the family ``hf`` loads it, and the same weights with one expert per token."""
    config = MIXTURES[request.param]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    module.save_pretrained(tmp_path / "whole")
    single_config = type(config).from_dict({**config.to_dict(), "num_experts_per_tok": 1})
    single = AutoModelForCausalLM.from_config(single_config, dtype=torch.float32).eval()
    single.load_state_dict(module.state_dict())
    ref = f"hf:{tmp_path / 'whole'}"
    family = family_of(ref)
    return family.load(family.info(ref, {}), None, FolderContext(tmp_path)), single


@torch.no_grad()
def test_one_expert_per_token_is_the_model_with_one_expert_per_token(mixture: tuple[Model, Any]) -> None:
    model, single = mixture
    ids_BT = torch.arange(22).view(2, 11)
    batch = LmBatch(ids_BT, torch.full_like(ids_BT, NOT_SCORED))
    stock_BTW, before = model.logits(batch), Snapshot(model)  # type: ignore[attr-defined]
    untouched = neutral(EXPERTS, model)
    assert isinstance(untouched, ExpertPolicy)
    with model.occupy(EXPERTS, untouched):
        assert torch.equal(model.logits(batch), stock_BTW)  # type: ignore[attr-defined]
    policy = First()
    with model.occupy(EXPERTS, policy):
        found_BTW = model.logits(batch)  # type: ignore[attr-defined]
    assert policy.layers == [0, 1]
    assert not torch.allclose(found_BTW, stock_BTW, atol=1e-4)
    torch.testing.assert_close(found_BTW, single(input_ids=ids_BT).logits, rtol=1e-4, atol=1e-6)
    before.compare(model)
