"""The conformance suite's model for repairs: an untrained decoder with grouped queries, read in one pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from isoflop.core.knobs import KnobValue
from isoflop.methods.base import Method
from isoflop.methods.kv_cache.probe import PROMPT, KvCacheProbe, untrained_decoder
from isoflop.methods.own_weights import trained
from isoflop.methods.probe import AbsoluteCost
from isoflop.methods.repair.base import RepairMethod
from isoflop.models.hooks.adapters import ADAPTERS
from isoflop.models.hooks.soft_prompt import SOFT_PROMPT

STEPS = 3
"""Of a training, at most: enough to see where it leads."""


class RepairProbe(KvCacheProbe):
    """Logits behind a prompt; the cost is what the method holds beside the model, and the bytes of the cache."""

    def __init__(self, tried: Mapping[str, Sequence[Mapping[str, KnobValue]]]) -> None:
        super().__init__(tried=tried)
        self.exact = True
        self.model.info = replace(self.model.info, hooks=self.model.info.hooks | {ADAPTERS, SOFT_PROMPT})

    def prepared(self, method: Method, seed: int) -> Any:
        """What is learned, before it is."""
        assert isinstance(method, RepairMethod)
        return method.drawn(self.model, self.ctx, seed)

    def trained(self, method: Method, prepared: Any) -> Any:
        """How it is trained, and where the first steps lead behind what it is learned on."""
        if not isinstance(method, RepairMethod):
            return None
        bare = untrained_decoder(layers=self.model.info.geometry["layers"])
        bare.info = self.model.info
        recipe = method.learning_rate, method.schedule, method.examples
        if not method.steps:
            return recipe
        named = method.named
        with nullcontext() if named is None else named.apply(bare, None):
            module, losses = trained(replace(method, steps=min(STEPS, method.steps)), bare, self.ctx, 0)
        return *recipe, losses, dict(module.named_parameters())

    def absolute(self) -> Sequence[AbsoluteCost]:
        """Of 2 layers of width 64 with keys of 32, 2 bytes a number.

        A prompt of 4 tokens: 4·64 numbers; with 40 tokens of text 44 slots of 256 bytes in the cache. Low-rank adapters of rank 2 on
        queries and values: 2·((64 + 64) + (64 + 32)) numbers in each layer.
        """
        from isoflop.methods.base import build

        prompt, adapters = build("compress-then-prompt", {"tokens": 4}), build("lora", {"rank": 2})
        return (
            AbsoluteCost(prompt, "method_params", 4 * 64),
            AbsoluteCost(prompt, "method_bytes", 4 * 64 * 2),
            AbsoluteCost(prompt, "cost", 4 * 64 * 2 + 44 * 256),
            AbsoluteCost(adapters, "method_bytes", 2 * 2 * (128 + 96) * 2),
            AbsoluteCost(adapters, "cost", 2 * 2 * (128 + 96) * 2 + PROMPT * 256),
        )

    @torch.no_grad()
    def outputs(self, rows: Sequence[int]) -> Tensor:
        """Logits behind the prompt, (B, tail · vocabulary)."""
        return super().outputs(rows)

    @torch.no_grad()
    def cost(self) -> float:
        """Bytes beside the model, and of the cache behind a prompt of 40 tokens."""
        held = self.model.served_bytes() - self.model.weight_bytes()
        return held + super().cost()
