"""Decoder-only language models: what is known of one, and the loaded model.

Tiny models trained here and Hugging Face checkpoints run through this one class.

Shape suffixes: B batch, T tokens, S scored positions, W vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from isoflop.core.errors import Infeasible
from isoflop.core.stage import StageContext
from isoflop.models.base import ModelInfo
from isoflop.models.decoder_model import DecoderModel, decoder_of
from isoflop.models.heads import head_logits
from isoflop.models.hooks.attention import ATTENTION, AttentionPolicy
from isoflop.models.prompt_passes import PromptPasses
from isoflop.models.reading import TextInfo
from isoflop.models.worlds.lm_text import TokensStage
from isoflop.models.worlds.own_text import own_text
from isoflop.models.worlds.text_pool import TrainingPool

NOT_SCORED = -100
MOST_LOGITS = 2**24
"""Numbers of one tensor of logits, unless a pass cannot do with fewer."""


@dataclass(frozen=True, kw_only=True)
class LmInfo(TextInfo):
    """What is known of a language model without loading its weights.

    Attributes:
        vocabulary: name of the raw vocabulary it was trained on, or None for one with a tokenizer.
        test: held-out text of what it was trained for, in its tokens; None for that of the English corpus.
        pool: the training documents that data-selection methods choose from, or None.

    ``geometry`` holds ``width``, ``layers``, ``heads``, ``kv_heads``, ``head_width``, ``vocab_size``, ``positions``,
    and where some layers attend within windows ``windows``, one for each layer, None for all tokens before.
    """

    vocabulary: str | None = None
    test: TokensStage | None = None
    pool: TrainingPool | None = None

    @property
    def uncalibrated(self) -> str:
        """Without text there is nothing to read."""
        return "" if self.text is not None else "it has neither a tokenizer nor a known vocabulary"


@dataclass(frozen=True)
class LmBatch:
    """Sequences and what is scored in them.

    Attributes:
        ids_BT: token ids.
        targets_BT: the token that follows each position, NOT_SCORED where nothing is asked.
        prefix: tokens of the prompt that methods on the KV cache compress before the rest is seen; 0 for none.
        valid_BT: False for padding, which is on the left; None when nothing is padded.
    """

    ids_BT: Tensor
    targets_BT: Tensor
    prefix: int = 0
    valid_BT: Tensor | None = None

    def to(self, device: torch.device) -> LmBatch:
        """The batch on a device."""
        valid = None if self.valid_BT is None else self.valid_BT.to(device)
        return LmBatch(self.ids_BT.to(device), self.targets_BT.to(device), self.prefix, valid)


class LmModel(DecoderModel):
    """A loaded Hugging Face causal language model.

    Args:
        tokenizer: gives the model's tokenizer, which is read when text is handed to the model; None where it has none.
    """

    info: LmInfo

    def __init__(self, info: LmInfo, module: nn.Module, tokenizer: Callable[[], Any] | None = None) -> None:
        super().__init__(tokenizer)
        self.info = info
        self.module: Any = module
        self.passes = PromptPasses()

    @property
    def decoder(self) -> Any:
        """The language model without its head."""
        return decoder_of(self.module)

    def logits(self, batch: LmBatch) -> Tensor:
        """Logits (B, T, W) in one forward pass, the prompt compressed by whatever is applied.

        A cache that spans layers takes two passes, the prompt through all layers first, or one per token behind it.
        """
        return torch.cat([output.logits for output in self._passes(self.module, batch)], dim=1)

    def scored_logits(self, batch: LmBatch, most: int = MOST_LOGITS) -> Iterator[tuple[Tensor, Tensor]]:
        """Logits (S, W) of the scored positions, row by row, and their targets (S,); at most ``most`` numbers at a time.

        The decoder runs once, its head on nothing but what is scored.
        """
        outputs = list(self._passes(self.decoder, batch))
        states_BTd = torch.cat([output.last_hidden_state for output in outputs], dim=1)
        scored_BT = batch.targets_BT != NOT_SCORED
        states_Sd, targets_S = states_BTd[scored_BT], batch.targets_BT[scored_BT]
        size = max(1, most // self.info.geometry["vocab_size"])
        for part_Sd, wanted_S in zip(states_Sd.split(size), targets_S.split(size), strict=True):
            yield head_logits(self.module, self.decoder, outputs[-1], part_Sd), wanted_S

    def _passes(self, module: Any, batch: LmBatch) -> Iterator[Any]:
        """Outputs of the language model, or of its decoder, over the columns of a batch, in as many passes as it takes."""
        policy = self.occupant(ATTENTION)
        if policy is not None and policy.spans_layers and batch.prefix:
            yield from self._in_passes(module, batch, policy, 1 if policy.token_by_token else None)
            return
        with self.compressing_prefix(batch.prefix) if batch.prefix else nullcontext():
            yield module(
                input_ids=batch.ids_BT,
                attention_mask=None if batch.valid_BT is None else batch.valid_BT.long(),
                position_ids=positions_of(batch),
                use_cache=False,
            )

    @torch.no_grad()
    def stepwise_logits(self, batch: LmBatch) -> Tensor:
        """The same as ``logits``, computed as in serving: the prompt, then one token after the other."""
        policy = self.occupant(ATTENTION)
        if policy is None or not batch.prefix:
            raise ValueError("stepwise_logits needs a method on the KV cache and a prompt")
        return torch.cat([output.logits for output in self._in_passes(self.module, batch, policy, 1)], dim=1)

    def _in_passes(self, module: Any, batch: LmBatch, policy: AttentionPolicy, stride: int | None) -> Iterator[Any]:
        """The prompt, and what is behind it: ``stride`` tokens in each pass, or all in one."""
        positions_BT, length = positions_of(batch), batch.ids_BT.shape[1]
        starts = [0, *range(batch.prefix, length, stride or max(length - batch.prefix, 1))]
        with policy.session():
            for start, stop in pairwise([*starts, length]):
                valid_BT = None if start or batch.valid_BT is None else batch.valid_BT[:, :stop].long()
                yield module(
                    input_ids=batch.ids_BT[:, start:stop],
                    attention_mask=valid_BT,
                    position_ids=positions_BT[:, start:stop],
                    use_cache=False,
                )

    @contextmanager
    def serving(self) -> Iterator[Any]:
        """A cache for one generation, to be passed to the Hugging Face module as ``past_key_values``.

        Inside the block a method on the KV cache compresses the prompt, which is the first forward pass, and follows
        the tokens after it; ``module.generate(ids, past_key_values=cache)`` works as ever (one beam).
        """
        from transformers import DynamicCache

        from isoflop.models.lm_cache import SessionCache

        policy = self.occupant(ATTENTION)
        if policy is None:
            yield DynamicCache(config=self.decoder.config)
            return
        with policy.session():
            yield SessionCache()

    @torch.no_grad()
    def tokens(self, ids_BT: Tensor, count: int) -> Iterator[Tensor]:
        """The most likely next token (B, 1), ``count`` times, one forward pass each; nothing ends a sequence early."""
        with self.serving() as cache:
            for _ in range(count):
                output = self.module(input_ids=ids_BT, past_key_values=cache, use_cache=True, logits_to_keep=1)
                ids_BT = output.logits[:, -1].argmax(-1, keepdim=True)
                yield ids_BT

    def greedy(self, ids_BT: Tensor, count: int) -> Tensor:
        """``count`` most likely tokens behind a prompt, (B, count)."""
        return torch.cat(list(self.tokens(ids_BT, count)), dim=1)

    def supervised(self, batch: LmBatch) -> tuple[Tensor, Tensor]:
        """Logits (S, W) and targets (S,) of the scored positions."""
        batch = batch.to(self.device)
        scored_BT = batch.targets_BT != NOT_SCORED
        return self.logits(batch)[scored_BT], batch.targets_BT[scored_BT]

    def calibration(self, ctx: StageContext, examples: int, seed: int) -> Iterator[LmBatch]:
        """Batches of training sequences, every position scored.

        Raises:
            Infeasible: nothing is known of the text that the model was trained on.
        """
        self.info.check_calibration()
        assert self.info.text is not None
        for ids_BT in self.info.text.batches(ctx, examples, seed):
            targets_BT = torch.full_like(ids_BT, NOT_SCORED)
            targets_BT[:, :-1] = ids_BT[:, 1:]
            yield LmBatch(ids_BT, targets_BT).to(self.device)


def calibrated_on(info: ModelInfo, choice: Mapping[str, Any]) -> TextInfo:
    """A model whose calibration examples come from a user's own text; see ``own_text``.

    Raises:
        Infeasible: it is no language model or text encoder, or reads no text.
    """
    if not isinstance(info, TextInfo):
        raise Infeasible(f"calibration: model {info.ref} is no language model; allowed: language models that read text")
    return replace(info, text=own_text(choice, info.tokenizer, info.window_at_most, info.ref))


def tokenizer_of(info: Any, ctx: StageContext) -> Callable[[], Any] | None:
    """What a loaded model wants of the stage that holds its tokenizer (``info.tokenizer``)."""
    return None if info.tokenizer is None else partial(ctx.get, info.tokenizer)


def positions_of(batch: LmBatch) -> Tensor:
    """Positions (B or 1, T), counted over real tokens."""
    if batch.valid_BT is None:
        return torch.arange(batch.ids_BT.shape[1], device=batch.ids_BT.device)[None]
    return (batch.valid_BT.long().cumsum(-1) - 1).clamp(min=0)
