"""``idp``: several soft prompts, of which each input gets the one that it attends to most.

Shape suffixes: B batch, T tokens, H query heads, G key-value heads, D head width, P prompts, N tokens of a prompt, d width.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Self

import torch
from torch import Tensor, nn

from isoflop.core.errors import Infeasible
from isoflop.core.hook import Hook
from isoflop.core.knobs import Knob, KnobValue
from isoflop.core.stage import StageContext
from isoflop.kernels.softmax import Softmax
from isoflop.methods.base import METHODS
from isoflop.methods.repair.base import Learned, RepairSchedule, text_loss
from isoflop.methods.repair.soft_prompts import OnePrompt, SoftPrompt, SoftPromptMethod, begin_with
from isoflop.models.base import Model, ModelInfo
from isoflop.models.hooks.occupant import Occupant
from isoflop.models.hooks.one_attention import first_call
from isoflop.models.hooks.soft_prompt import SOFT_PROMPT, Before, PromptPolicy
from isoflop.models.lm import LmBatch

ATTENTION, RANDOM, FIRST, MEAN = "attention", "random", "first", "mean"
PROBABILITY, LOGIT = "prob", "logit"
ALL, LAST = "all", "last"


class SoftPrompts(Learned):
    """Prompts of one length."""

    def __init__(self, info: ModelInfo, prompts: int, tokens: int) -> None:
        super().__init__(info)
        self.prompts = nn.ModuleList(SoftPrompt(info, tokens) for _ in range(prompts))

    def embeds_PNd(self) -> Tensor:
        """All of them."""
        return torch.stack([prompt.embeds_Nd for prompt in self.prompts])  # type: ignore[misc]


def scores(
    q_BHTD: Tensor, k_PGND: Tensor, softmax: Softmax, valid_BT: Tensor | None, score: str = PROBABILITY
) -> Tensor:
    """How much the queries attend to each prompt, (B, P), in float32: mean over real queries, heads and a prompt's tokens.

    Args:
        score: ``prob``: of probabilities, of a softmax over the tokens of all prompts; ``logit``: of logits.
    """
    heads, groups = q_BHTD.shape[1], k_PGND.shape[1]
    k_PHND = k_PGND.float().repeat_interleave(heads // groups, dim=1)
    logits_BHTPN = softmax.logits(torch.einsum("bhtd,phnd->bhtpn", q_BHTD.float(), k_PHND))
    if score == PROBABILITY:
        logits_BHTPN = logits_BHTPN.flatten(-2).softmax(-1).view_as(logits_BHTPN)
    score_BTP = logits_BHTPN.mean(dim=(1, 4))
    if valid_BT is None:
        return score_BTP.mean(1)
    valid_BT = valid_BT.to(score_BTP.device)
    return (score_BTP * valid_BT[..., None]).sum(1) / valid_BT.sum(1, keepdim=True)


class Choosing(PromptPolicy):
    """One of several prompts for each row.

    Args:
        module: the prompts.
        method: says how they are chosen.
        seconds: CPU seconds of their training.
    """

    def __init__(self, module: SoftPrompts, method: Idp, seconds: float) -> None:
        self.module, self.method, self.seconds = module, method, seconds
        self.tokens = method.tokens
        self.chosen_B: Tensor | None = None
        """Numbers of the prompts of the last batch that began."""
        self._decoder: Any = None
        self._positions = 0
        self._k_PGND: Tensor | None = None

    @contextmanager
    def at_work(self, model: Any) -> Iterator[None]:
        """The prompts' keys are computed once: they do not depend on the input."""
        self._decoder, self._positions = model.decoder, model.info.geometry["positions"]
        if self.method.by_attention:
            self._refuse_fixed_positions(model)
            self._k_PGND = self._prompt_keys(next(model.module.parameters()))
        try:
            yield
        finally:
            self._decoder = self._k_PGND = self.chosen_B = None

    @torch.no_grad()
    def begin(self, ids_BT: Tensor, valid_BT: Tensor | None) -> Before:
        """The prompt of each row; what is behind ``prefix`` is not looked at."""
        embeds_PNd = self.module.embeds_PNd()
        if self.method.select == MEAN:
            return Before(embeds_PNd.mean(0, keepdim=True))
        if len(embeds_PNd) == 1 or self.method.select == FIRST:
            return Before(embeds_PNd[:1])
        seen = slice(0, self.prefix)
        ids_BT, valid_BT = ids_BT[:, seen], None if valid_BT is None else valid_BT[:, seen]
        choose = self._by_attention if self.method.by_attention else self._at_random
        self.chosen_B = choose(ids_BT, valid_BT).to(embeds_PNd.device)
        return Before(embeds_PNd[self.chosen_B])

    def tensors(self) -> Sequence[Tensor]:
        """All prompts, and their keys in the first layer."""
        embeds = [prompt.embeds_Nd for prompt in self.module.prompts] if self.tokens else []
        return [*embeds, *([] if self._k_PGND is None else [self._k_PGND])]  # type: ignore[list-item]

    def _by_attention(self, ids_BT: Tensor, valid_BT: Tensor | None) -> Tensor:
        """The most attended to, by the first layer's queries behind a prompt."""
        assert self._k_PGND is not None
        real_BT = torch.ones_like(ids_BT, dtype=torch.bool) if valid_BT is None else valid_BT
        places_BT = (real_BT.long().cumsum(-1) - 1).clamp(min=0) + self.tokens
        call = first_call(
            self._decoder,
            input_ids=ids_BT,
            attention_mask=None if valid_BT is None else valid_BT.long(),
            position_ids=places_BT.clamp(max=self._positions - 1),
        )
        if self.method.queries == LAST:
            real_BT = real_BT & (real_BT.long().flip(-1).cumsum(-1).flip(-1) == 1)
        found_BP = scores(call.q_BHTD, self._k_PGND, call.softmax.without_sinks, real_BT, self.method.score)
        return found_BP.argmax(-1)

    def _at_random(self, ids_BT: Tensor, valid_BT: Tensor | None) -> Tensor:
        """By a hash of the row's own tokens, wherever they stand."""
        ids_BT = ids_BT + 1 if valid_BT is None else (ids_BT + 1) * valid_BT
        rng = torch.Generator().manual_seed(0)
        odd_T = torch.randint(0, 2**20, (ids_BT.shape[1],), generator=rng).flip(0).to(ids_BT) * 2 + 1
        return ((ids_BT * odd_T).sum(-1) // 64) % len(self.module.prompts)

    @torch.no_grad()
    def _prompt_keys(self, like: Tensor) -> Tensor:
        """(P, G, N, D), each prompt for itself at the positions 0 … N - 1."""
        embeds_PNd = self.module.embeds_PNd().to(like)
        places_1N = torch.arange(self.tokens, device=embeds_PNd.device)[None]
        return first_call(self._decoder, inputs_embeds=embeds_PNd, position_ids=places_1N).k_BGTD

    @staticmethod
    def _refuse_fixed_positions(model: Any) -> None:
        if "position_ids" not in inspect.signature(model.decoder.forward).parameters:
            raise Infeasible(
                f"method idp: {type(model.decoder).__name__} of model {model.info.ref} is not told positions, so that no query stands "
                "behind a prompt before it is chosen; allowed: select: random, first or mean"
            )


@METHODS.register("idp")
@dataclass(frozen=True)
class Idp(SoftPromptMethod):
    """Inference-time dynamic prompting: of several learned prompts each input gets the one that it attends to most.

    1. Each of ``prompts`` is learned by itself as ``compress-then-prompt`` does it, from its own beginning (the next n tokens of the
       vocabulary, another text) and on its own texts: one of them learns in a step, in turns.
    2. The keys of all prompts in the first layer are computed once; no prompt sees another, each stands at the positions 0 … n - 1.
    3. The queries of an input in the first layer, at the positions n …, attend to the tokens of all prompts; a prompt's score is the
       mean over real queries, heads and its tokens, and the best one is put before the input, as if there were no other.

    Costs are those of one prompt per request (n slots), the bytes of all prompts and of their keys, and FLOPs of the first
    layer's queries. What comes behind a prompt is not looked at, so that a task must have a prompt to choose by. Use it where inputs
    differ; on texts of one kind one longer prompt is as good. ``random``, ``first`` and ``mean`` are controls. No code was released, and the
    paper does not say over which tokens its softmax goes: here those of the prompts.
    """

    paper: ClassVar[str] = "arXiv 2310.00867"

    prompts: Annotated[int, Knob(low=1, high=64, doc="p; 1 is compress-then-prompt")] = 4
    select: Annotated[str, Knob(choices=(ATTENTION, RANDOM, FIRST, MEAN), doc="by attention, at random by the input's tokens, the first, or the mean of all embeddings")] = ATTENTION  # fmt: skip
    score: Annotated[str, Knob(choices=(PROBABILITY, LOGIT), doc="of attention: probabilities over all prompts, or logits")] = PROBABILITY  # fmt: skip
    queries: Annotated[str, Knob(choices=(ALL, LAST), doc="of the input that attend: all its tokens, or the last one")] = ALL  # fmt: skip

    @property
    def by_attention(self) -> bool:
        """Whether there is something to choose by."""
        return self.select == ATTENTION and self.prompts > 1 and self.tokens > 0

    @classmethod
    def identity(cls, info: ModelInfo) -> Self:
        """No tokens."""
        return cls(tokens=0, steps=0)

    def as_trained(self) -> Self:
        """The same for all ways to choose."""
        return replace(super().as_trained(), select=ATTENTION, score=PROBABILITY, queries=ALL)

    @property
    def schedule(self) -> RepairSchedule:
        """``steps`` of each prompt."""
        return RepairSchedule(self.steps * self.prompts, self.warmup)

    @property
    def examples(self) -> int:
        """Texts of all prompts."""
        return self.steps * self.prompts * self.batch

    def check_prompt(self, tokens: int, task: str) -> None:
        """Refuse tasks without a prompt: a choice by what is scored would know it."""
        super().check_prompt(tokens, task)
        if not tokens and self.by_attention:
            raise Infeasible(
                f"method {self.name}: task {task} has no prompt to choose by; allowed: select: first or mean, or a task with a prompt (prefix)"
            )

    def build(self, info: ModelInfo) -> nn.Module:
        """Random embeddings."""
        return SoftPrompts(info, self.prompts, self.tokens)

    def drawn(self, model: Model, ctx: StageContext, seed: int) -> nn.Module:
        """As ``init`` says, each prompt for itself."""
        module = self.untrained(model.info, seed)
        assert isinstance(module, SoftPrompts)
        for number, prompt in enumerate(module.prompts):
            assert isinstance(prompt, SoftPrompt)
            begin_with(prompt, model, ctx, seed, self.init, number)
        return module

    def lessons(self, model: Model, ctx: StageContext, seed: int) -> Iterator[tuple[int, LmBatch]]:
        """Which prompt learns, and from which texts."""
        for step, texts in enumerate(self.texts(model, ctx, self.schedule.steps, seed)):
            yield step % self.prompts, texts

    def loss(self, model: Model, module: nn.Module, lesson: tuple[int, LmBatch]) -> Tensor:
        """Behind the one prompt that learns."""
        number, texts = lesson
        assert isinstance(module, SoftPrompts)
        prompt = module.prompts[number]
        assert isinstance(prompt, SoftPrompt)
        with model.occupy(SOFT_PROMPT, OnePrompt(prompt, 0.0)):
            return text_loss(model, texts)

    def occupants(self, model: Model, prepared: Any) -> dict[Hook[Any], Occupant]:
        """All prompts, and the choice."""
        module = self.module_of(model, prepared)
        assert isinstance(module, SoftPrompts)
        return {SOFT_PROMPT: Choosing(module, self, self.seconds_of(prepared))}

    @classmethod
    def tried(cls) -> Mapping[str, Sequence[Mapping[str, KnobValue]]]:
        """Choices differ where there is much to choose from."""
        many: dict[str, KnobValue] = {"prompts": 16, "tokens": 2, "init": "random", "steps": 0}
        return {
            **super().tried(),
            "score": [{**many, "score": score} for score in (PROBABILITY, LOGIT)],
            "queries": [{**many, "queries": queries} for queries in (ALL, LAST)],
        }
