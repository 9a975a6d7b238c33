"""Running prompts of segments through a vision-language model, with whatever sits in its hooks: at once, or step by step.

Tokens that were dropped before some layer leave that layer and those behind it with shorter caches, and rows with caches of
different lengths. Nothing in a layer's cache depends on tokens behind, so one pass over a prompt and its answer gives what
decoding the answer token by token gives.

Shape suffixes: B rows, L columns of the prompt, K columns that come out of the last layer, S tokens of the answer, A asked
places, W vocabulary, d width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from isoflop.core.errors import Infeasible
from isoflop.models.hooks.attention import ATTENTION, AttentionPolicy
from isoflop.models.hooks.decoder_layers import DECODER_LAYERS, rows_of
from isoflop.models.prefix import SegmentedPrompt
from isoflop.models.whole_cache import WholeCache

if TYPE_CHECKING:
    from isoflop.models.vlm import VlmModel


def run(model: VlmModel, prompt: SegmentedPrompt, asked_BL: Tensor | None = None) -> Tensor:
    """Logits behind the last token of every row, (B, W), or behind every asked one, (A, W), row by row; gradients flow.

    Raises:
        Infeasible: what sits in the hooks cannot work with these prompts.
        ValueError: padding, or a token that did not come through all layers, was asked.
    """
    own, order_BL = prompt.aligned()
    hidden_BLd, here_BL = states(model, own)
    if asked_BL is None:
        return model.head(_last(hidden_BLd, here_BL))
    asked_BL = asked_BL.gather(1, order_BL)
    if bool((asked_BL & ~(here_BL & own.valid_BL)).any()):
        raise ValueError("padding, or a token that was dropped between the layers, has no logits")
    return model.head(hidden_BLd[asked_BL])


def stepwise(model: VlmModel, prompt: SegmentedPrompt, ids_BS: Tensor) -> Tensor:
    """Logits behind the prompt and behind each token of a given answer, (B, 1 + S, W), as in serving.

    The prompt runs first; then each token takes a pass of its own, over what every layer keeps of those before.
    """
    found: list[Tensor] = []

    def given(logits_BW: Tensor, place: int) -> Tensor | None:
        found.append(logits_BW)
        return ids_BS[:, place] if place < ids_BS.shape[1] else None

    for _ in _steps(model, prompt, given):
        pass
    return torch.stack(found, dim=1)


def generated(model: VlmModel, prompt: SegmentedPrompt, most: int) -> Iterator[Tensor]:
    """At most ``most`` tokens of greedy decoding, (B,) each; whoever has enough asks for no more."""
    return _steps(model, prompt, lambda logits_BW, place: logits_BW.argmax(-1) if place < most else None)


@torch.no_grad()
def _steps(
    model: VlmModel, prompt: SegmentedPrompt, choose: Callable[[Tensor, int], Tensor | None]
) -> Iterator[Tensor]:
    """The prompt, and then a pass for every token (B,) that ``choose`` gives for logits (B, W), until it gives none."""
    own, _ = prompt.aligned()
    with ExitStack() as stack:
        policy = model.occupant(ATTENTION)
        if policy is None:
            whole = WholeCache(model.info.dense_bits, model.side.bidirectional)
            policy = stack.enter_context(model.occupy(ATTENTION, whole, own=True))
        stack.enter_context(policy.session())
        prompt_BLd, here_BL = _prompt_states(model, own, policy)
        logits_BW = model.head(_last(prompt_BLd, here_BL))
        place = 0
        while (ids_B := choose(logits_BW, place)) is not None:
            yield ids_B
            hidden_B1d = decoded(
                model, model.embed_text(ids_B[:, None]), (own.next_B + place)[:, None]
            ).last_hidden_state
            logits_BW = model.head(hidden_B1d[:, -1])
            place += 1


def _last(hidden_BLd: Tensor, here_BL: Tensor) -> Tensor:
    """States of every row's last token, (B, d). Raises Infeasible where it was dropped: nothing can be asked behind it."""
    if not bool(here_BL[:, -1].all()):
        raise Infeasible(
            "the last token of a prompt was dropped between the decoder's layers: a prompt that ends in an image has no "
            "token behind it to go on from; give it a question"
        )
    return hidden_BLd[:, -1]


def states(model: VlmModel, prompt: SegmentedPrompt) -> tuple[Tensor, Tensor]:
    """The decoder's last hidden states, (B, L, d), zero for tokens that were dropped; and True at the others, (B, L).

    Args:
        prompt: with its padding on the left.
    """
    policy = model.occupant(ATTENTION)
    if policy is None or not policy.spans_layers:
        return _prompt_states(model, prompt, policy)
    with policy.session():
        return _prompt_states(model, prompt, policy)


def _prompt_states(model: VlmModel, prompt: SegmentedPrompt, policy: AttentionPolicy | None) -> tuple[Tensor, Tensor]:
    if policy is not None and policy.spans_layers:
        hidden_BLd = _in_passes(model, prompt, policy)
        return hidden_BLd, torch.ones_like(prompt.valid_BL)
    with _over_prompt(model, prompt, policy):
        hidden_BKd = decoded_prompt(model, prompt)
    dropping = model.occupant(DECODER_LAYERS)
    left_BK = None if dropping is None else dropping.left_BK
    if left_BK is None:
        return hidden_BKd, torch.ones_like(prompt.valid_BL)
    return _back_in_place(hidden_BKd, left_BK, prompt.length)


def _in_passes(model: VlmModel, prompt: SegmentedPrompt, policy: AttentionPolicy) -> Tensor:
    """Up to the end of the images through all layers, then the rest; inside a session of a cache that spans layers."""
    if model.occupant(DECODER_LAYERS) is not None:
        raise Infeasible(
            f"model {model.info.ref}: a cache that spans layers runs images before the question, and what acts between the "
            "decoder's layers looks at both; a trial has one of them"
        )
    end, length = prompt.prefix(), prompt.length
    starts = [0, *range(end, length, 1 if policy.token_by_token else max(length - end, 1))]
    parts = []
    for start, stop in pairwise([*starts, length]):
        piece = prompt.columns(start, stop)
        with model.compressing_prefix(stop, prompt.ids_B) if start == 0 else ExitStack():
            parts.append(decoded_prompt(model, piece))
    return torch.cat(parts, dim=1)


@contextmanager
def _over_prompt(model: VlmModel, prompt: SegmentedPrompt, policy: AttentionPolicy | None) -> Iterator[None]:
    """The decoder's pass inside the block is over ``prompt``, for what sits between its layers and in its attention."""
    dropping = model.occupant(DECODER_LAYERS)
    # the whole cache that stands in where no method acts compresses nothing, wherever the images end
    compresses = policy is not None and not isinstance(policy, WholeCache)
    with ExitStack() as stack:
        if compresses:
            stack.enter_context(model.compressing_prefix(prompt.prefix(), prompt.ids_B))
        if dropping is not None:
            stack.enter_context(dropping.prompt(prompt.layout()))
        yield


def decoded_prompt(model: VlmModel, prompt: SegmentedPrompt) -> Tensor:
    """Last hidden states of a prompt, or of a piece of one, (B, K, d)."""
    mask, answer_BL = prompt.valid_BL.long(), prompt.of({"answer"})
    found: Tensor = decoded(
        model, prompt.embeds_BLd, prompt.position_ids, mask, prompt.deep, answer_BT=answer_BL
    ).last_hidden_state
    return found


def decoded(
    model: VlmModel,
    embeds_BTd: Tensor,
    position_ids: Tensor | None,
    mask_BT: Tensor | None = None,
    deep: Sequence[Tensor] = (),
    use_cache: bool = False,
    answer_BT: Tensor | None = None,
) -> Any:
    """What a model's decoder makes of a prompt's embeddings, or of the next token's.

    Args:
        mask_BT: 1 for real tokens; None for all of them, told in so many words where there are positions: without a mask,
            Hugging Face takes a gap in them for the start of another sequence.
        deep: added behind the first layers, (B, T, d) each.
        answer_BT: True at tokens behind the prompt; None where there are none.
    """
    if mask_BT is None and position_ids is not None:
        mask_BT = torch.ones(embeds_BTd.shape[:2], dtype=torch.long, device=embeds_BTd.device)
    if model.side.bidirectional and embeds_BTd.shape[1] > 1 and model.occupant(ATTENTION) is None:
        mask_BT = _both_ways(model, embeds_BTd, mask_BT, answer_BT)
    with _adding(model, deep):
        return model.decoder(
            inputs_embeds=embeds_BTd, attention_mask=mask_BT, position_ids=position_ids, use_cache=use_cache
        )


def _both_ways(model: VlmModel, embeds_BTd: Tensor, mask_BT: Tensor | None, answer_BT: Tensor | None) -> Tensor | None:
    """The mask of a prompt that reads itself in both directions, in the form that the decoder's layers want."""
    from transformers.masking_utils import create_causal_mask

    blocks_BT = torch.zeros(embeds_BTd.shape[:2], dtype=torch.long, device=embeds_BTd.device)
    if answer_BT is not None:
        blocks_BT = blocks_BT.masked_fill(answer_BT, -1)
    found: Tensor | None = create_causal_mask(
        config=model.decoder.config,
        inputs_embeds=embeds_BTd,
        attention_mask=mask_BT,
        past_key_values=None,
        position_ids=None,
        block_sequence_ids=blocks_BT,
    )
    return found


@contextmanager
def _adding(model: VlmModel, deep: Sequence[Tensor]) -> Iterator[None]:
    """Inside the block each of ``deep`` is added to what its layer gives, for the tokens that are left there."""
    dropping = model.occupant(DECODER_LAYERS)

    def add(number: int, layer: Any, args: Any, output: Any) -> Any:
        kept_BK = None if dropping is None else dropping.kept_BK
        added = deep[number].to(output)  # the layers of one model may lie on several devices
        return output + (added if kept_BK is None else rows_of(added, kept_BK.to(output.device)))

    with ExitStack() as stack:
        for number in range(len(deep)):
            stack.callback(model.decoder_layers[number].register_forward_hook(partial(add, number)).remove)
        yield


def _back_in_place(hidden_BKd: Tensor, left_BK: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Hidden states of the tokens that are left, in their columns of the prompt."""
    real_BK = left_BK >= 0
    rows_BK = torch.arange(len(left_BK), device=left_BK.device)[:, None].expand_as(left_BK)
    places = rows_BK[real_BK], left_BK[real_BK]
    here_BL = torch.zeros(len(left_BK), length, dtype=torch.bool, device=left_BK.device)
    here_BL[places] = True
    empty_BLd = hidden_BKd.new_zeros(len(left_BK), length, hidden_BKd.shape[-1])
    return empty_BLd.index_put(places, hidden_BKd[real_BK]), here_BL
