"""``compress-then-prompt``: a soft prompt that is learned through a compressed model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Self

from torch import nn

from isoflop.core.hook import Hook
from isoflop.core.stage import StageContext
from isoflop.methods.base import METHODS
from isoflop.methods.repair.soft_prompts import OnePrompt, SoftPrompt, SoftPromptMethod, begin_with
from isoflop.models.base import Model, ModelInfo
from isoflop.models.hooks.occupant import Occupant
from isoflop.models.hooks.soft_prompt import SOFT_PROMPT


@METHODS.register("compress-then-prompt")
@dataclass(frozen=True)
class CompressThenPrompt(SoftPromptMethod):
    """Before every input stand ``tokens`` embeddings, which were learned through the compressed model to lower its loss.

    1. The model is compressed by whatever weight method the trial has, `[sparsegpt: {sparsity: 0.8}, compress-then-prompt: {tokens: 16}]`.
    2. P (n x d) begins with the embeddings of tokens (``init``).
    3. Every text is read as [P; text]; P and nothing else learns, by the loss of the text's tokens from its second one on.
    4. At work P stands at the positions 0 … n - 1 and takes n slots of the cache, where methods on the cache treat it like
       the first n tokens of a prompt: they count it, those that keep first tokens keep it, others may drop it.

    The prompt's bytes count once for the model (``method_bytes``), its slots and FLOPs with every request. What scores tokens
    scores the same ones as without it; texts may be n tokens shorter. A prompt that was learned behind one compression is used
    behind another with ``learned_on``: ``none`` shows what of the gain is repair, and what adaptation to the text.

    More tokens repair more and cost more of each request; a prompt helps where compression did much damage, and can do harm where
    it did little. The released script has 100 tokens, 30,000 steps of 2 texts, and keeps the state with the best loss on held-out text; here
    rates fall to nothing, and the last state is kept.
    """

    paper: ClassVar[str] = "arXiv 2305.11186"

    @classmethod
    def identity(cls, info: ModelInfo) -> Self:
        """No tokens."""
        return cls(tokens=0, steps=0)

    def build(self, info: ModelInfo) -> nn.Module:
        """Random embeddings."""
        return SoftPrompt(info, self.tokens)

    def drawn(self, model: Model, ctx: StageContext, seed: int) -> nn.Module:
        """As ``init`` says."""
        prompt = self.untrained(model.info, seed)
        assert isinstance(prompt, SoftPrompt)
        begin_with(prompt, model, ctx, seed, self.init)
        return prompt

    def occupants(self, model: Model, prepared: Any) -> dict[Hook[Any], Occupant]:
        """The prompt."""
        prompt = self.module_of(model, prepared)
        assert isinstance(prompt, SoftPrompt)
        return {SOFT_PROMPT: OnePrompt(prompt, self.seconds_of(prepared))}
