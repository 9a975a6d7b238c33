"""Learned prompts: embeddings, how they begin, the occupant that puts one before every input, and what methods on them share.

Shape suffixes: N tokens of a prompt, W vocabulary, d width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, nn

from isoflop.core.errors import Infeasible
from isoflop.core.hashing import derive_seed
from isoflop.core.hook import Hook
from isoflop.core.knobs import Knob, KnobValue
from isoflop.core.stage import StageContext
from isoflop.methods.base import Method
from isoflop.methods.repair.base import Learned, RepairMethod
from isoflop.models.base import Model, ModelInfo
from isoflop.models.decoder_model import DecoderModel
from isoflop.models.hooks.soft_prompt import SOFT_PROMPT, Before, PromptPolicy

BEGINNINGS = ("vocab", "text", "random")
SPREAD = 0.5
"""Of what is drawn: uniform between plus and minus this (the released code, after Lester et al. 2021)."""


class SoftPrompt(Learned):
    """Embeddings (N, d), drawn from torch's global state, and for which model they are.

    Args:
        info: of the model.
        tokens: N.
    """

    def __init__(self, info: ModelInfo, tokens: int) -> None:
        super().__init__(info)
        self.embeds_Nd = nn.Parameter((torch.rand(tokens, info.geometry["width"]) - 0.5) * 2 * SPREAD)


@torch.no_grad()
def begin_with(prompt: SoftPrompt, model: Model, ctx: StageContext, seed: int, init: str, number: int = 0) -> None:
    """Where the training starts: the embeddings of some tokens, or what is drawn already.

    Args:
        init: ``vocab``: the first N of the vocabulary, as released; ``text``: those of the beginning of a calibration text;
            ``random``.
        number: of several prompts, each of which begins with the next N of the vocabulary, or with a text of its own.
    """
    assert isinstance(model, DecoderModel)
    tokens, vocabulary = len(prompt.embeds_Nd), model.info.geometry["vocab_size"]
    if init == "random" or not tokens:
        return
    ids_N = (number * tokens + torch.arange(tokens)) % vocabulary
    if init == "text":
        own = (number,) if number else ()
        read = next(iter(model.calibration(ctx, 1, derive_seed("prompt", seed, *own)))).ids_BT[0].cpu()
        ids_N = read[torch.arange(tokens) % len(read)]
    found_Nd = model.decoder.get_input_embeddings()(ids_N.to(model.device)[None])[0]
    prompt.embeds_Nd.copy_(found_Nd)


class OnePrompt(PromptPolicy):
    """The same prompt before every input.

    Args:
        prompt: learned, or about to be.
        seconds: CPU seconds of its training.
    """

    def __init__(self, prompt: SoftPrompt, seconds: float) -> None:
        self.prompt, self.seconds = prompt, seconds
        self.tokens = len(prompt.embeds_Nd)

    def begin(self, ids_BT: Tensor, valid_BT: Tensor | None) -> Before:
        """The prompt."""
        return Before(self.prompt.embeds_Nd[None])

    def tensors(self) -> Sequence[Tensor]:
        """Its embeddings; none of a prompt without tokens."""
        return [self.prompt.embeds_Nd] if self.tokens else []


@dataclass(frozen=True)
class SoftPromptMethod(RepairMethod):
    """Base class of methods that put learned embeddings before every input."""

    hooks: ClassVar[tuple[Hook[Any], ...]] = (SOFT_PROMPT,)

    tokens: Annotated[int, Knob(low=0, high=4096, unit="tokens", doc="n, of a prompt; the released script has 100")] = (
        16
    )
    init: Annotated[str, Knob(choices=BEGINNINGS, doc="embeddings that it begins with: the first of the vocabulary (as released), of a text, or random ones")] = "vocab"  # fmt: skip

    def tokens_before(self, info: ModelInfo) -> int:
        """n."""
        return self.tokens

    def check(self, info: ModelInfo) -> None:
        """Refuse prompts that leave no room for a text, and those that have nothing to learn."""
        super().check(info)
        room = info.geometry.get("positions")
        if room is not None and self.tokens >= room:
            raise Infeasible(
                f"method {self.name}: tokens = {self.tokens} leave nothing of the {room} positions of model {info.ref}; allowed: up to {room - 1}"
            )
        if self.steps and not self.tokens:
            raise Infeasible(f"method {self.name}: tokens = 0 have nothing to learn; allowed: 1 or more, or steps: 0")

    def check_beside(self, others: Sequence[Method], info: ModelInfo) -> None:
        """Refuse methods that read a prompt a second time by its token ids, which a learned one has not."""
        for other in others:
            if getattr(other, "rereads", False):
                raise Infeasible(
                    f"method {other.name} has the model read a prompt again by its token ids, and what method {self.name} puts before it "
                    "has none; a trial has one of them"
                )

    @classmethod
    def tried(cls) -> Mapping[str, Sequence[Mapping[str, KnobValue]]]:
        """``learned_on`` by what the first steps lead to."""
        return {"learned_on": [{"learned_on": name} for name in ("none", "rtn?bits=2&group=16")]}
