"""The task ``generation-latency``: how long a generated token takes, and how much memory."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from isoflop.core.errors import Infeasible
from isoflop.core.hashing import derive_seed
from isoflop.core.hook import Hook
from isoflop.core.knobs import Knob
from isoflop.core.stage import StageContext
from isoflop.models.base import Model, ModelInfo
from isoflop.models.counting import flops_of
from isoflop.models.hooks.attention import ATTENTION
from isoflop.models.hooks.feed_forward import FEED_FORWARD
from isoflop.models.lm import LmModel
from isoflop.tasks.base import TASKS, Shard, Task
from isoflop.tasks.footprint import byte_costs, decoder_cache, peak_bytes_of, synchronize
from isoflop.tasks.language_task import lm_info, lm_model, observed


@TASKS.register("generation-latency")
@dataclass(frozen=True)
class GenerationLatency(Task):
    """Seconds per generated token of greedy generation: the prompt, then one token after the other.

    What is minimised in the place of an error is a time: an example is one generation, its error the wall seconds of
    the whole, prompt included, over the tokens generated. ``prompt_seconds`` and ``step_seconds`` are kept beside it.
    Without a method on the cache the model generates with Hugging Face's own cache and attention; with one, in the
    method's session. The prompt is made of random tokens. Times depend on the machine and on what else runs there;
    compare within one sweep on one machine.
    """

    version: ClassVar[str] = "1"
    quantity: ClassVar[str] = "seconds per token"
    metrics: ClassVar[tuple[str, ...] | None] = ("prompt_seconds", "step_seconds")
    asks: ClassVar[frozenset[Hook[Any]]] = frozenset({FEED_FORWARD})
    hooks: ClassVar[frozenset[Hook[Any]]] = frozenset({ATTENTION})

    prompt: Annotated[int, Knob(low=1, high=1_000_000, doc="tokens of the prompt", unit="tokens")] = 256
    new: Annotated[int, Knob(low=2, high=100_000, doc="generated tokens", unit="tokens")] = 32
    batch: Annotated[int, Knob(low=1, high=1024, doc="sequences generated together")] = 1
    examples: Annotated[int, Knob(low=1, high=10_000, doc="timed generations, after one that is not timed")] = 5

    def check(self, info: ModelInfo) -> None:
        """A language model with room for prompt and answer."""
        super().check(info)
        room = lm_info(info, self.name).geometry["positions"]
        if self.prompt + self.new > room:
            raise Infeasible(
                f"task {self.name}: prompt + new = {self.prompt + self.new} tokens; model {info.ref} has room for {room}"
            )

    def prompt_length(self, info: ModelInfo) -> int:
        """As the options say."""
        return self.prompt

    def evaluate(self, model: Model, ctx: StageContext, seed: int) -> Iterator[Shard]:
        """One generation per shard."""
        lm = lm_model(model, self.name)
        prompt_BT = self._prompt(lm, seed)
        for _ in lm.tokens(prompt_BT, self.new):
            observed(lm)  # of the generation that is not timed: the timed ones run the same passes
        for number in range(self.examples):
            total, first = self._timed(lm, prompt_BT)
            yield Shard(
                np.array([number]),
                np.array([total / self.new]),
                {
                    "prompt_seconds": np.array([first]),
                    "step_seconds": np.array([(total - first) / (self.new - 1)]),
                },
            )

    def measure(self, model: Model, ctx: StageContext) -> dict[str, float]:
        """Footprint of one generation; the cache is that at its end."""
        lm = lm_model(model, self.name)
        prompt_BT = self._prompt(lm, 0)

        def generate() -> Tensor:
            return lm.greedy(prompt_BT, self.new)

        flops, _ = flops_of(generate)
        total, _ = self._timed(lm, prompt_BT)
        return {
            "visual_tokens": 0.0,
            "text_tokens": float(self.prompt + self.new),
            "prompt_tokens": float(self.prompt),
            "flops": flops / self.batch,
            "flops_llm": flops / self.batch,
            **byte_costs(lm, decoder_cache(lm, generate), lm.dense_cache_bytes(self.prompt + self.new - 1)),
            "seconds": total,
            "peak_bytes": float(lm.resident_bytes() + peak_bytes_of(generate, lm.devices)),
        }

    def _prompt(self, model: LmModel, seed: int) -> Tensor:
        rng = np.random.default_rng(derive_seed("prompt", self.name, seed))
        ids = rng.integers(0, model.info.geometry["vocab_size"], (self.batch, self.prompt))
        return torch.from_numpy(ids).to(model.device)

    def _timed(self, model: LmModel, prompt_BT: Tensor) -> tuple[float, float]:
        """Seconds of a whole generation, and until its first token."""
        marks = [time.perf_counter()]
        for _ in model.tokens(prompt_BT, self.new):
            synchronize(model.devices)
            marks.append(time.perf_counter())
        return marks[-1] - marks[0], marks[1] - marks[0]
