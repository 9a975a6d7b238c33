"""The task ``bits-per-byte``: language modelling on held-out English."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
import torch

from isoflop.core.errors import Infeasible
from isoflop.core.hashing import derive_seed
from isoflop.core.knobs import Knob
from isoflop.core.stage import Stage, StageContext
from isoflop.methods.base import Method
from isoflop.models.base import ModelInfo
from isoflop.models.hooks.attention import ATTENTION
from isoflop.models.lm import NOT_SCORED, LmBatch, LmInfo
from isoflop.models.worlds.english import EnglishStage, python_release
from isoflop.models.worlds.lm_text import Tokens, TokensStage
from isoflop.tasks.base import TASKS, Shard
from isoflop.tasks.language_task import LanguageTask, Suite, lm_info


@TASKS.register("bits-per-byte")
@dataclass(frozen=True)
class BitsPerByte(LanguageTask):
    """Bits that the model spends per byte of held-out English; an example is a window of a document.

    The first ``prefix`` of a window is the prompt, which methods on the cache compress; the rest is scored. With
    ``prefix: 0`` nothing is compressed and everything but the first token is scored, as suits methods on weights.
    Bits per byte compare models with different tokenizers, though their windows hold different text. Secondary
    metrics: ``nll`` (nats per token) and ``accuracy`` (share of tokens that the model would have chosen).

    The text comes with the Python installation, so that its release is part of the task's version. Documents without
    room for a window are left out; where there are fewer windows than ``examples``, all of them are taken. A model that
    was trained for other text brings its own held-out text (``LmInfo.test``).
    """

    version: ClassVar[str] = f"1-{python_release()}"
    quantity: ClassVar[str] = "bits per byte"
    needs: ClassVar[frozenset[str]] = frozenset({"tokenizer"})
    metrics: ClassVar[tuple[str, ...] | None] = ("nll", "accuracy")

    examples: Annotated[int, Knob(low=1, high=100_000, doc="most windows")] = 128
    tokens: Annotated[int, Knob(low=4, high=100_000, doc="length of a window", unit="tokens")] = 256
    prefix: Annotated[float, Knob(low=0.0, high=0.99, doc="share of a window that is the prompt")] = 0.5

    def check_method(self, method: Method, info: ModelInfo) -> None:
        """Refuse methods on the cache where there is no prompt that they could compress."""
        if ATTENTION in method.hooks and self.prompt_tokens == 0:
            raise Infeasible(
                f"task {self.name}: prefix = {self.prefix} leaves no prompt for method {method.name} to compress; "
                f"raise prefix to {1 / self.tokens:.2g} or more"
            )

    def prompt_length(self, info: ModelInfo) -> int:
        """The share ``prefix`` of a window."""
        return self.prompt_tokens

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompt."""
        return round(self.prefix * self.tokens)

    def check(self, info: ModelInfo) -> None:
        """Something is left to score."""
        super().check(info)
        if self.prompt_tokens > self.tokens - 2:
            raise Infeasible(
                f"task {self.name}: prefix = {self.prefix} leaves nothing of tokens = {self.tokens} to score"
            )

    def tokens_needed(self) -> int:
        """The window."""
        return self.tokens

    def stages(self, info: ModelInfo) -> tuple[Stage, ...]:
        """The test split in the model's tokens."""
        return (_test_tokens(lm_info(info, self.name)),)

    def suite(self, info: LmInfo, ctx: StageContext) -> Suite:
        """Windows of the test split, in a random order that depends on nothing but their number."""
        tokens: Tokens = ctx.get(_test_tokens(info))
        rng = np.random.default_rng(derive_seed("windows", self.name))
        starts_N = rng.permutation(tokens.windows(self.tokens))[: self.examples]
        ids_NT = torch.from_numpy(tokens.ids_N[starts_N[:, None] + np.arange(self.tokens)])
        first = self.prompt_tokens
        targets_NT = torch.full_like(ids_NT, NOT_SCORED)
        targets_NT[:, first:-1] = ids_NT[:, first + 1 :]
        units_N = tokens.end_N[starts_N + self.tokens - 1] - tokens.end_N[starts_N + first]
        return Suite(LmBatch(ids_NT, targets_NT, first), units_N.astype(np.float64))

    def shard_of(
        self, ids_B: np.ndarray, nll_B: np.ndarray, right_B: np.ndarray, scored_B: np.ndarray, units_B: np.ndarray
    ) -> Shard:
        """Error: bits over bytes."""
        bits_B = nll_B / math.log(2)
        return Shard(ids_B, bits_B / units_B, {"nll": nll_B / scored_B, "accuracy": right_B / scored_B})


def _test_tokens(info: LmInfo) -> TokensStage:
    if info.tokenizer is None:
        raise Infeasible(f"task bits-per-byte needs a tokenizer, which model {info.ref} does not offer")
    if info.test is not None:
        return info.test
    return TokensStage(EnglishStage.here(), info.tokenizer, "test")
