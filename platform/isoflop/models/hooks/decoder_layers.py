"""The hook ``decoder_layers``: tokens of a prompt leave, or change, between the layers of the decoder.

Pre-hooks on the decoder's layers cut hidden states, rotary embeddings, positions and masks to the tokens that are left; every
token keeps the position it had. The hook ``attention`` sees shorter calls from that layer on, so that methods on the KV cache
compress what is left. Rows may keep different numbers of tokens: those that keep fewer get columns of padding on the left.

Shape suffixes: B batch, L tokens of the prompt, K tokens that are left (of the row that keeps most, padding in the others), V
visual tokens, d width.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from isoflop.core.errors import Infeasible
from isoflop.core.hook import Hook
from isoflop.models.hooks.attention import ATTENTION, IMPLEMENTATION
from isoflop.models.hooks.occupant import Occupant
from isoflop.models.moving import moved


@dataclass(frozen=True)
class PromptLayout:
    """Where the visual tokens of a batch of prompts are.

    Attributes:
        image_BL: True at visual tokens.
        ids_B: example numbers.
        valid_BL: False for padding; None when nothing is padded.
        parts_BL: the segment of its row's prompt that each token belongs to, -1 for padding (see ``isoflop.models.prefix``);
            None where the prompt is an image and text.
        prompt_BL: False at tokens behind the prompt (``end``), an answer that is scored along with it: what a policy does must
            not depend on them. None where there are none.
    """

    image_BL: Tensor
    ids_B: Tensor
    valid_BL: Tensor | None
    parts_BL: Tensor | None = None
    prompt_BL: Tensor | None = None

    @property
    def count(self) -> int:
        """V, where every row has as many.

        Raises:
            Infeasible: the rows disagree.
        """
        counts_B = self.counts_B
        if not bool((counts_B == counts_B[0]).all()):
            raise Infeasible(
                f"the prompts of a batch hold from {int(counts_B.min())} to {int(counts_B.max())} visual tokens, and what acts "
                "between the decoder's layers wants as many in each; batches of one, or of equal counts, work"
            )
        return int(counts_B[0])

    @property
    def counts_B(self) -> Tensor:
        """Visual tokens of each row."""
        return self.image_BL.sum(1)

    @property
    def end(self) -> int | None:
        """Column behind the prompt, the same in every row; None where nothing comes behind it.

        Raises:
            Infeasible: the rows disagree.
        """
        if self.prompt_BL is None:
            return None
        ends_B = self.prompt_BL.sum(1)
        if not bool((ends_B == ends_B[0]).all()):
            raise Infeasible(
                "what looks at a prompt's last token wants answers of one length in a batch; batches of one work"
            )
        return int(ends_B[0])

    def cut(self, kept_BK: Tensor) -> PromptLayout:
        """The layout of the tokens that are left; see ``LayerChange.kept_BK``."""
        real_BK, places_BK = kept_BK >= 0, kept_BK.clamp(min=0)
        valid_BK = None if self.valid_BL is None else self.valid_BL.gather(1, places_BK) & real_BK
        if valid_BK is None and not bool(real_BK.all()):
            valid_BK = real_BK
        parts_BK = None if self.parts_BL is None else self.parts_BL.gather(1, places_BK).masked_fill(~real_BK, -1)
        prompt_BK = None if self.prompt_BL is None else self.prompt_BL.gather(1, places_BK)
        return PromptLayout(self.image_BL.gather(1, places_BK) & real_BK, self.ids_B, valid_BK, parts_BK, prompt_BK)


class LayerPolicy(Occupant):
    """The occupant: acts before decoder layers, by pre-hooks of its own (``at_work``) on passes over prompts.

    Attributes:
        left_BK: columns of the last prompt that have come out of the decoder's last layer, as in ``LayerChange.kept_BK``;
            None for all of them.
    """

    left_BK: Tensor | None = None

    @property
    def kept_BK(self) -> Tensor | None:
        """Columns of the prompt that are left where its pass is now, as in ``LayerChange.kept_BK``; None for all of them."""
        return None

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
        kept_BK: places of those that stay among the present ones, ascending; -1, on the left, in rows that keep fewer than
            others (``kept_of``). None for all of them.
        hidden_BKd: hidden states of those that stay where they change (merging); None where they do not.
    """

    kept_BK: Tensor | None = None
    hidden_BKd: Tensor | None = None


class TokenPolicy(LayerPolicy):
    """Base class of occupants that let tokens go before some layers; acts on prompts and leaves every other pass alone.

    Args:
        model: a ``DecoderModel``.

    Attributes:
        per_layer: visual tokens that each layer processed in the last pass over a prompt, the mean over the rows.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.per_layer: list[float] = []
        self.left_BK = None
        self._prompt: PromptLayout | None = None
        self._present: PromptLayout | None = None
        self._kept_BK: Tensor | None = None
        self._mask: Tensor | None = None
        self._prefix = 0

    @property
    def kept_BK(self) -> Tensor | None:
        """What the layers so far have left."""
        return self._kept_BK

    @abstractmethod
    def change(self, tokens: LayerTokens) -> LayerChange | None:
        """What becomes of the tokens before a layer, or None where nothing does.

        Where a policy acts on the cache, too, every row must keep as many tokens behind the end of what that compresses.
        """

    @contextmanager
    def at_work(self, model: Any) -> Iterator[None]:
        """Hooks on all layers."""
        with ExitStack() as stack:
            for number, layer in enumerate(self.model.decoder_layers):
                hook = partial(self._before, number)
                stack.callback(layer.register_forward_pre_hook(hook, with_kwargs=True).remove)
            yield

    @contextmanager
    def prompt(self, layout: PromptLayout) -> Iterator[None]:
        """The pass inside the block is over a prompt."""
        policy = self.model.occupant(ATTENTION)
        self._prefix = policy.prefix if policy is not None and policy.prefix is not None else 0
        self._prompt = self._present = layout
        self.per_layer, self.left_BK = [], None
        try:
            yield
        finally:
            self.left_BK = moved(self._kept_BK, layout.image_BL.device)
            self._prompt = self._present = self._kept_BK = self._mask = None

    def _before(
        self, number: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if self._prompt is None or self._present is None:
            return None
        hidden_BKd, changed = args[0], False
        self._follow(hidden_BKd.device)
        here = kwargs if self._kept_BK is None else self._cut(kwargs)
        found = self.change(LayerTokens(number, hidden_BKd, self._present, here))
        if found is not None:
            if found.kept_BK is not None:
                hidden_BKd = rows_of(hidden_BKd, found.kept_BK)
                self._keep(found.kept_BK, hidden_BKd)
                here = self._cut(kwargs)
            if found.hidden_BKd is not None:
                hidden_BKd, changed = found.hidden_BKd, True
        self.per_layer.append(_mean(self._present.counts_B))
        if self._kept_BK is None and not changed:
            return None
        return (hidden_BKd, *args[1:]), here

    def _follow(self, device: torch.device) -> None:
        """What is known of the prompt's tokens goes where the layer is that comes next."""
        known = self._prompt, self._present, self._kept_BK, self._mask
        self._prompt, self._present, self._kept_BK, self._mask = moved(known, device)

    def _keep(self, kept_BK: Tensor, hidden_BKd: Tensor) -> None:
        """Note which tokens of the prompt are left, and the mask where rows keep different numbers of them."""
        assert self._prompt is not None
        if self._kept_BK is not None:
            kept_BK = self._kept_BK.gather(1, kept_BK.clamp(min=0)).masked_fill(kept_BK < 0, -1)
        self._kept_BK = kept_BK
        self._move_prefix(kept_BK)
        self._present = self._prompt.cut(kept_BK)
        ragged = bool((kept_BK < 0).any())
        valid_BK = self._present.valid_BL
        self._mask = (
            mask_over(valid_BK, self.model.decoder.config, hidden_BKd) if ragged and valid_BK is not None else None
        )

    def _cut(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        assert self._kept_BK is not None
        if self._mask is None:
            return cut(kwargs, self._kept_BK)
        return {**cut({**kwargs, "attention_mask": None}, self._kept_BK), "attention_mask": self._mask}

    def _move_prefix(self, kept_BK: Tensor) -> None:
        """Tell the attention policy how many columns of its prefix are left; the prompt's end restores it."""
        policy = self.model.occupant(ATTENTION)
        if policy is None or policy.prefix is None:
            return
        left_B = (kept_BK < self._prefix).sum(1)  # padding counts: it is on the left
        if not bool((left_B == left_B[0]).all()):
            raise Infeasible(
                "methods on the KV cache need the prompts of a batch to keep as many tokens behind their images in every layer; "
                "batches of one work"
            )
        policy.prefix = int(left_B[0])


def kept_of(stays_BL: Tensor) -> Tensor:
    """Places of the tokens that stay, (B, K), ascending; -1 on the left in rows where fewer stay.

    Args:
        stays_BL: True for the present tokens that stay.
    """
    length = stays_BL.shape[1]
    places_BL = torch.where(stays_BL, torch.arange(length, device=stays_BL.device), -1)
    return places_BL.sort(dim=1).values[:, length - int(stays_BL.sum(1).max()) :]


def mask_over(valid_BK: Tensor, config: Any, like: Tensor) -> Tensor:
    """A causal mask over real tokens in the form that a decoder's layers want of it.

    Args:
        config: of the decoder, which names its attention.
        like: hidden states, whose type an additive mask has.

    Raises:
        Infeasible: attention of a kind that takes other masks.
    """
    kind, length = config._attn_implementation, valid_BK.shape[1]
    if kind == IMPLEMENTATION or kind.startswith("flash"):
        return valid_BK
    causal_KK = torch.ones(length, length, dtype=torch.bool, device=valid_BK.device).tril()
    own_KK = torch.eye(length, dtype=torch.bool, device=valid_BK.device)  # padding rows see themselves
    sees_B1KK = (causal_KK & valid_BK[:, None, None, :]) | own_KK
    if kind == "sdpa":
        return sees_B1KK
    if kind == "eager":
        return torch.zeros_like(sees_B1KK, dtype=like.dtype).masked_fill(~sees_B1KK, torch.finfo(like.dtype).min)
    raise Infeasible(
        f"rows cannot keep different numbers of tokens with attention {kind!r}; allowed: sdpa, eager, flash"
    )


def _mean(counts_B: Tensor) -> float:
    mean = float(counts_B.float().mean())
    return int(mean) if mean.is_integer() else mean


def rows_of(x: Tensor, kept_BK: Tensor) -> Tensor:
    """Rows of (B or 1, L, …) that stay, (B, K, …); where ``kept_BK`` is -1, the first one in place of padding."""
    kept_BK = kept_BK.clamp(min=0)
    x = x.expand(len(kept_BK), *x.shape[1:])
    index = kept_BK.view(*kept_BK.shape, *[1] * (x.dim() - 2)).expand(-1, -1, *x.shape[2:])
    return x.gather(1, index)


def cut(kwargs: dict[str, Any], kept_BK: Tensor) -> dict[str, Any]:
    """A decoder layer's keyword arguments for the tokens that stay.

    Raises:
        Infeasible: the layer is told of positions in a way of its own.
    """
    if not isinstance(kwargs.get("position_embeddings"), tuple):
        raise Infeasible(
            "tokens cannot leave between the layers of this decoder, which are not handed one cosine and sine of each token; allowed: "
            "decoders with layers like those of Llama, Qwen2 or Qwen3"
        )
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
    return rows_BKL.gather(2, kept_BK.clamp(min=0)[:, None].expand(-1, kept_BK.shape[1], -1))[:, None]
