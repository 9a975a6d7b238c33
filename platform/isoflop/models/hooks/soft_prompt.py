"""The hook ``soft_prompt``: embeddings that stand before every input of a decoder, as if they were its first tokens.

A sequence begins with n more columns in the decoder's first pass over it, and they are gone from what the pass gives: whoever runs the
model sees as many tokens as before, scored at the same places. The prompt takes the positions 0 … n - 1, and those of the text go on
from there. Its keys and values are computed in that first pass and lie in the cache like those of any token, where methods on the
cache count them, and may drop them. Passes that go on behind a cache are told where they are, and nothing is added to them.

The columns of a row are padding, prompt, text, so that prompt and text are neighbours however a batch is padded.

Shape suffixes: B batch, T tokens of the text, N columns of the prompt, L = N + T, K queries and C columns of a mask, d width.
"""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from isoflop.core.errors import Infeasible
from isoflop.core.hook import Hook
from isoflop.models.hooks.occupant import Occupant

_PLACEHOLDER = 0
"""The token id of a prompt's columns, whose embedding is never read."""


@dataclass(frozen=True)
class Before:
    """What stands before the inputs of a batch.

    Attributes:
        embeds_BNd: as they leave the layer of input embeddings; batch dimension 1 where it is the same for every row.
        valid_BN: False in the first columns of rows whose prompt is shorter; None where all are as long.
    """

    embeds_BNd: Tensor
    valid_BN: Tensor | None = None


class PromptPolicy(Occupant):
    """The occupant: says what stands before each input. Gradients flow.

    Attributes:
        tokens: N, the most tokens that it puts there.
        prefix: tokens of the text that are its prompt, in a one-pass evaluation with what follows it; None where all of them are.
    """

    tokens: int = 0
    prefix: int | None = None

    @abstractmethod
    def begin(self, ids_BT: Tensor, valid_BT: Tensor | None) -> Before:
        """What stands before inputs that are about to be read.

        Args:
            ids_BT: of the pass; what comes behind ``prefix`` must not be looked at.
            valid_BT: False for padding; None where nothing is padded.
        """


class SoftPromptHook(Hook[PromptPolicy]):
    """Hooks on the decoder and on its layer of input embeddings; none for a prompt without tokens."""

    @contextmanager
    def installed(self, model: Any, occupant: PromptPolicy) -> Iterator[None]:
        """See the head of this file."""
        if not occupant.tokens:
            yield
            return
        passes = _Passes(occupant, model.info)
        handles = [
            model.decoder.register_forward_pre_hook(passes.enter, with_kwargs=True),
            model.decoder.get_input_embeddings().register_forward_hook(passes.embed),
            model.decoder.register_forward_hook(passes.leave),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


SOFT_PROMPT = SoftPromptHook("soft_prompt", 18, "puts learned embeddings before every input of the decoder")


@dataclass(frozen=True)
class _Begun:
    """How the sequences of a batch began.

    Attributes:
        length: T.
        shift_B1: tokens of each row's prompt.
        valid_BN: its real columns.
        order_BL: number in (prompt, text) of what stands in each column; None where it stands there as it is.
    """

    length: int
    shift_B1: Tensor
    valid_BN: Tensor
    order_BL: Tensor | None

    def laid(self, prompt_BN: Tensor, text_BT: Tensor) -> Tensor:
        """Prompt and text of every row in its columns, (B, L, …)."""
        both_BL = torch.cat((prompt_BN, text_BT), dim=1)
        if self.order_BL is None:
            return both_BL
        index_BL = self.order_BL.view(*self.order_BL.shape, *[1] * (both_BL.dim() - 2))
        return both_BL.gather(1, index_BL.expand_as(both_BL))


class _Passes:
    """The passes of one decoder with a prompt in place."""

    def __init__(self, occupant: PromptPolicy, info: Any) -> None:
        self._occupant, self._info = occupant, info
        self._begun: _Begun | None = None
        self._entering: Tensor | None = None  # the prompt of the pass whose embeddings come next
        self._cutting = False

    def enter(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Lengthen what begins; move what goes on."""
        given = dict(kwargs)
        ids_BT = args[0] if args else given.pop("input_ids", None)
        if ids_BT is None or len(args) > 1:
            raise Infeasible(
                f"model {self._info.ref}: a learned prompt stands before token ids, and a pass has none; allowed: passes over input_ids"
            )
        past, positions_BT = _tokens_in(given.get("past_key_values")), given.get("position_ids")
        begins = not past if past is not None else positions_BT is None or bool((positions_BT == 0).any())
        self._entering, self._cutting = None, begins
        mask = given.get("attention_mask")
        if begins:
            self._begun = self._begin(ids_BT, mask)
        begun = self._begun
        if begun is None or begun.shift_B1.shape[0] != ids_BT.shape[0]:
            raise RuntimeError("a pass goes on behind a sequence that did not begin with the learned prompt in place")
        if positions_BT is None:
            before = 0 if begins else (past or 0) - self._occupant.tokens
            positions_BT = torch.arange(ids_BT.shape[1], device=ids_BT.device)[None] + before
        positions_BT = (positions_BT + begun.shift_B1).clamp(max=self._info.geometry["positions"] - 1)
        if begins:
            places_BN = (begun.valid_BN.long().cumsum(-1) - 1).clamp(min=0)
            positions_BT = begun.laid(places_BN, positions_BT)
            ids_BT = begun.laid(torch.full_like(begun.valid_BN, _PLACEHOLDER, dtype=ids_BT.dtype), ids_BT)
        if "position_ids" in given or "position_ids" in inspect.signature(decoder.forward).parameters:
            given["position_ids"] = positions_BT
        behind = ids_BT.shape[1] + (past or 0) - self._occupant.tokens if past is not None else None
        given["attention_mask"] = _extended(mask, begun, begins, behind)
        return (), {**given, "input_ids": ids_BT}

    def embed(self, embedding: nn.Module, args: Any, output_BLd: Tensor) -> Tensor | None:
        """The prompt in its columns."""
        prompt_BNd, begun = self._entering, self._begun
        if prompt_BNd is None or begun is None:
            return None
        self._entering = None
        rows, length = output_BLd.shape[0], prompt_BNd.shape[1]
        prompt_BNd = prompt_BNd.to(output_BLd).expand(rows, -1, -1)
        if begun.order_BL is None:
            return torch.cat((prompt_BNd, output_BLd[:, length:]), dim=1)
        index_BL1 = begun.order_BL.clamp(max=length - 1)[..., None]
        placed_BLd = prompt_BNd.gather(1, index_BL1.expand(-1, -1, prompt_BNd.shape[2]))
        return torch.where(begun.order_BL[..., None] < length, placed_BLd, output_BLd)

    def leave(self, decoder: nn.Module, args: Any, output: Any) -> Any:
        """The states of the text alone."""
        if not self._cutting:
            return None
        first = self._occupant.tokens
        if isinstance(output, tuple):
            return (output[0][:, first:], *output[1:])
        output["last_hidden_state"] = output["last_hidden_state"][:, first:]
        if output.get("hidden_states") is not None:
            output["hidden_states"] = tuple(states_BLd[:, first:] for states_BLd in output["hidden_states"])
        return output

    def _begin(self, ids_BT: Tensor, mask: Tensor | None) -> _Begun:
        rows, length = ids_BT.shape
        tokens, room = self._occupant.tokens, self._info.geometry["positions"]
        if tokens + length > room:
            raise Infeasible(
                f"model {self._info.ref} has room for {room} tokens; a prompt of {tokens} learned ones leaves {room - tokens}, and a "
                f"text has {length}"
            )
        valid_BT = mask.bool() if mask is not None and mask.dim() == 2 else None
        if valid_BT is not None and bool(valid_BT.all()):
            valid_BT = None
        before = self._occupant.begin(ids_BT, valid_BT)
        self._entering = before.embeds_BNd
        valid_BN = before.valid_BN
        if valid_BN is None:
            valid_BN = torch.ones(rows, tokens, dtype=torch.bool, device=ids_BT.device)
        order_BL = None
        if valid_BT is not None and not bool(valid_BT[:, 0].all()):
            padding_B1 = valid_BT.int().argmax(-1, keepdim=True)
            column_L = torch.arange(tokens + length, device=ids_BT.device)
            text_BL = torch.where(column_L < padding_B1, column_L + tokens, column_L)
            in_prompt_BL = (column_L >= padding_B1) & (column_L < padding_B1 + tokens)
            order_BL = torch.where(in_prompt_BL, column_L - padding_B1, text_BL)
        return _Begun(length, valid_BN.sum(-1, keepdim=True), valid_BN, order_BL)


def _tokens_in(past: Any) -> int | None:
    """Columns of a cache; None where there is none."""
    return None if past is None else int(past.get_seq_length())


def _extended(mask: Tensor | None, begun: _Begun, begins: bool, tokens: int | None) -> Tensor | None:
    """A mask with the prompt's columns; its rows as well where the pass has them.

    Args:
        tokens: of the text up to the end of the pass, as a cache has counted them; None where the pass has none, or a method's own,
            which knows what is padding.
    """
    if mask is None:
        length = begun.length if begins else tokens
        if length is None or bool(begun.valid_BN.all()):
            return None
        mask = torch.ones(len(begun.valid_BN), length, dtype=torch.long, device=begun.valid_BN.device)
    if mask.dim() == 2:
        start, rest = mask[:, : begun.length], mask[:, begun.length :]
        return torch.cat((begun.laid(begun.valid_BN.to(mask), start), rest), dim=1)
    return _extended_pairs(mask, begun, begins)


def _extended_pairs(mask_B1KC: Tensor, begun: _Begun, begins: bool) -> Tensor:
    """A mask of queries and columns, boolean or added to logits: everything behind it sees the prompt, which is causal in itself."""
    rows, _, queries, _ = mask_B1KC.shape
    valid_BN = begun.valid_BN.to(mask_B1KC.device)
    tokens = valid_BN.shape[1]
    sees_BKN = valid_BN[:, None].expand(rows, queries, tokens)
    whole = torch.cat((_like(sees_BKN, mask_B1KC), mask_B1KC.expand(rows, -1, -1, -1)), dim=3)
    if not begins:
        return whole
    causal_NN = torch.ones(tokens, tokens, dtype=torch.bool, device=valid_BN.device).tril()
    own_BNN = causal_NN & valid_BN[:, None] | torch.eye(tokens, dtype=torch.bool, device=valid_BN.device)
    behind_BNC = torch.zeros(rows, tokens, mask_B1KC.shape[3], dtype=torch.bool, device=valid_BN.device)
    return torch.cat((_like(torch.cat((own_BNN, behind_BNC), dim=2), mask_B1KC), whole), dim=2)


def _like(sees_BKC: Tensor, mask: Tensor) -> Tensor:
    if mask.dtype is torch.bool:
        return sees_BKC[:, None]
    added = torch.zeros(sees_BKC.shape, dtype=mask.dtype, device=mask.device)
    return added.masked_fill(~sees_BKC, torch.finfo(mask.dtype).min)[:, None]
