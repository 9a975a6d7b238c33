"""Small models of several architectures, and one trained on the spot, for the tests of weight methods."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from isoflop.core.folder_context import FolderContext
from isoflop.methods.kv_cache.probe import VOCABULARY, untrained_decoder
from isoflop.models.base import Model, ModelInfo
from isoflop.models.hooks.matrices import MATRICES
from isoflop.models.lm import LmModel
from isoflop.models.worlds.calibration import CalibrationText

TOKENS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}


class Bare(Model):
    """Any Hugging Face model that reads token ids; calibration examples are random ids."""

    def __init__(self, module: nn.Module, vocabulary: int = 48) -> None:
        self.module = module.eval().requires_grad_(False)
        self.info = ModelInfo("bare/model", "bare", "1", 1, frozenset({MATRICES}))
        self.vocabulary = vocabulary

    def calibration(self, ctx: Any, examples: int, seed: int) -> Any:
        rng = np.random.default_rng(seed)
        yield torch.from_numpy(rng.integers(0, self.vocabulary, (examples, 24)))

    def supervised(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.module(input_ids=batch).logits
        return logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten()


def context() -> FolderContext:
    """A stage context in a fresh folder."""
    return FolderContext(Path(mkdtemp(prefix="isoflop-weights-")))


def seeded(build: Any) -> nn.Module:
    """A module built under a fixed seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build()


def mixtral(experts: int = 4, tokens_per: int = 2) -> Bare:
    """A mixture of experts with three-dimensional expert parameters."""
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=48, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=experts, num_experts_per_tok=tokens_per, max_position_embeddings=64,
        initializer_range=0.2, **TOKENS,
    )  # fmt: skip
    return Bare(seeded(lambda: MixtralForCausalLM(config)))


def gpt2() -> Bare:
    """Fused qkv in transposed ``Conv1D`` layers, and a head tied to the embedding."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=48, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.2, **TOKENS)
    return Bare(seeded(lambda: GPT2LMHeadModel(config)))


def llama(kv_heads: int = 4, **extra: Any) -> Bare:
    """A Llama without grouped queries unless asked for."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=48, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=kv_heads, max_position_embeddings=64, initializer_range=0.2, **TOKENS, **extra,
    )  # fmt: skip
    return Bare(seeded(lambda: LlamaForCausalLM(config)))


@dataclass(frozen=True)
class Chain(CalibrationText):
    """Sequences of a Markov chain with few likely successors per symbol."""

    length: int = 48

    def batches(self, ctx: Any, examples: int, seed: int) -> list[Tensor]:  # type: ignore[override]
        table = np.random.default_rng(99).dirichlet(np.full(VOCABULARY, 0.05), VOCABULARY).cumsum(1)
        rng = np.random.default_rng(seed)
        ids = np.zeros((examples, self.length), dtype=np.int64)
        ids[:, 0] = rng.integers(0, VOCABULARY, examples)
        for t in range(1, self.length):
            draws = rng.random((examples, 1))
            ids[:, t] = (table[ids[:, t - 1]] < draws).sum(1).clip(max=VOCABULARY - 1)
        return [torch.from_numpy(ids)]


@lru_cache(maxsize=1)
def trained_decoder() -> LmModel:
    """The probe's decoder after some steps on the chain: weights worth keeping. Treat it as read-only."""
    model = untrained_decoder(layers=1)
    model.info = replace(model.info, text=Chain())
    model.module.requires_grad_(True)
    optimiser = torch.optim.AdamW(model.module.parameters(), lr=3e-3, weight_decay=0.0)
    for step in range(120):
        (ids_BT,) = Chain().batches(None, 16, 1000 + step)
        logits_BTW = model.module(input_ids=ids_BT).logits
        loss = F.cross_entropy(logits_BTW[:, :-1].flatten(0, 1), ids_BT[:, 1:].flatten())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    model.module.requires_grad_(False)
    return model


def held_out_loss(model: Model) -> float:
    """Nats per token on sequences that no calibration draws."""
    from isoflop.methods.weights.level_bank import calibration_loss

    return calibration_loss(model, list(model.calibration(None, 32, 31_337)))  # type: ignore[arg-type]
