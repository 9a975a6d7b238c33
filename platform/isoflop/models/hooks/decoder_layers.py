"""The hook ``decoder_layers``: tokens of a prompt leave, or change, between the layers of the decoder.

Pre-hooks on the decoder's layers cut hidden states, rotary embeddings, positions and masks to the tokens that are left; every
token keeps the position it had. The hook ``attention`` sees shorter calls from that layer on, so that methods on the KV cache
compress what is left.

Shape suffixes: B batch, L tokens of the prompt, K tokens that are left, V visual tokens, d width.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from isoflop.core.hook import Hook
from isoflop.models.hooks.attention import ATTENTION
from isoflop.models.hooks.occupant import Occupant


@dataclass(frozen=True)
class PromptLayout:
    """Where the visual tokens of a batch of prompts are.

    Attributes:
        image_BL: True at visual tokens; equally many in every row.
        ids_B: example numbers.
        valid_BL: False for padding; None when nothing is padded.
    """

    image_BL: Tensor
    ids_B: Tensor
    valid_BL: Tensor | None

    @property
    def count(self) -> int:
        """V."""
        return int(self.image_BL[0].sum())

    def cut(self, kept_BK: Tensor) -> PromptLayout:
        """The layout of the tokens that are left."""
        valid_BK = None if self.valid_BL is None else self.valid_BL.gather(1, kept_BK)
        return PromptLayout(self.image_BL.gather(1, kept_BK), self.ids_B, valid_BK)


class LayerPolicy(Occupant):
    """The occupant: acts before decoder layers, by pre-hooks of its own (``at_work``) on passes over prompts."""

    @abstractmethod
    def prompt(self, layout: PromptLayout) -> AbstractContextManager[None]:
        """The decoder's pass inside the block is over a prompt."""


DECODER_LAYERS: Hook[LayerPolicy] = Hook("decoder_layers", 20, "drops or changes tokens between the decoder's layers")


@dataclass(frozen=True)
class LayerTokens:
    """What stands before a layer of the decoder.

    Attributes:
        layer: its number.
        hidden_BKd: the hidden states of the tokens that are left.
        layout: of these tokens.
        kwargs: what the layer before would have been called with: rotary embeddings and masks of these tokens.
    """

    layer: int
    hidden_BKd: Tensor
    layout: PromptLayout
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class LayerChange:
    """What becomes of the tokens before a layer.

    Attributes:
        kept_BK: places of those that stay among the present ones, ascending; None for all of them.
        hidden_BKd: hidden states of those that stay where they change (merging); None where they do not.
    """

    kept_BK: Tensor | None = None
    hidden_BKd: Tensor | None = None


class TokenPolicy(LayerPolicy):
    """Base class of occupants that let tokens go before some layers; acts on prompts and leaves every other pass alone.

    Args:
        model: a ``DecoderModel``.

    Attributes:
        per_layer: visual tokens that each layer processed in the last pass over a prompt.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.per_layer: list[int] = []
        self._prompt: PromptLayout | None = None
        self._kept_BK: Tensor | None = None
        self._prefix = 0

    @abstractmethod
    def change(self, tokens: LayerTokens) -> LayerChange | None:
        """What becomes of the tokens before a layer, or None where nothing does.

        Every row must keep as many tokens, and as many before the end of what a policy on the cache compresses.
        """

    @contextmanager
    def at_work(self, model: Any) -> Iterator[None]:
        """Hooks on all layers."""
        with ExitStack() as stack:
            for number, layer in enumerate(self.model.decoder.layers):
                hook = partial(self._before, number)
                stack.callback(layer.register_forward_pre_hook(hook, with_kwargs=True).remove)
            yield

    @contextmanager
    def prompt(self, layout: PromptLayout) -> Iterator[None]:
        """The pass inside the block is over a prompt."""
        policy = self.model.occupant(ATTENTION)
        self._prefix = policy.prefix if policy is not None and policy.prefix is not None else 0
        self._prompt, self.per_layer = layout, []
        try:
            yield
        finally:
            self._prompt = self._kept_BK = None

    def _before(
        self, number: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if self._prompt is None:
            return None
        hidden_BKd, changed = args[0], False
        present = self._prompt if self._kept_BK is None else self._prompt.cut(self._kept_BK)
        here = kwargs if self._kept_BK is None else cut(kwargs, self._kept_BK)
        found = self.change(LayerTokens(number, hidden_BKd, present, here))
        if found is not None:
            if found.kept_BK is not None:
                hidden_BKd = rows_of(hidden_BKd, found.kept_BK)
                self._kept_BK = found.kept_BK if self._kept_BK is None else self._kept_BK.gather(1, found.kept_BK)
                self._move_prefix(self._kept_BK)
                here, present = cut(kwargs, self._kept_BK), self._prompt.cut(self._kept_BK)
            if found.hidden_BKd is not None:
                hidden_BKd, changed = found.hidden_BKd, True
        self.per_layer.append(present.count)
        if self._kept_BK is None and not changed:
            return None
        return (hidden_BKd, *args[1:]), here

    def _move_prefix(self, kept_BK: Tensor) -> None:
        """Tell the attention policy how much of its prefix is left; the prompt's end restores it."""
        policy = self.model.occupant(ATTENTION)
        if policy is None or policy.prefix is None:
            return
        left_B = (kept_BK < self._prefix).sum(1)
        if not bool((left_B == left_B[0]).all()):
            raise ValueError("the prompts of a batch must keep as many tokens before the question")
        policy.prefix = int(left_B[0])


def rows_of(x: Tensor, kept_BK: Tensor) -> Tensor:
    """Rows of (B or 1, L, …) that stay, (B, K, …)."""
    x = x.expand(len(kept_BK), *x.shape[1:])
    index = kept_BK.view(*kept_BK.shape, *[1] * (x.dim() - 2)).expand(-1, -1, *x.shape[2:])
    return x.gather(1, index)


def cut(kwargs: dict[str, Any], kept_BK: Tensor) -> dict[str, Any]:
    """A decoder layer's keyword arguments for the tokens that stay."""
    cos, sin = kwargs["position_embeddings"]
    found = {**kwargs, "position_embeddings": (rows_of(cos, kept_BK), rows_of(sin, kept_BK))}
    if kwargs.get("position_ids") is not None:
        found["position_ids"] = rows_of(kwargs["position_ids"], kept_BK)
    mask = kwargs.get("attention_mask")
    if mask is not None:
        found["attention_mask"] = rows_of(mask, kept_BK) if mask.dim() == 2 else _cut_square(mask, kept_BK)
    return found


def _cut_square(mask_B1LL: Tensor, kept_BK: Tensor) -> Tensor:
    rows_BKL = rows_of(mask_B1LL[:, 0], kept_BK)
    return rows_BKL.gather(2, kept_BK[:, None].expand(-1, kept_BK.shape[1], -1))[:, None]
