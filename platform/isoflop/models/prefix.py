"""Prompts built from segments: text, images or their crops, frames, audio, a question, an answer, each in ids or embeddings.

A row of a batch is a list of parts. ``build`` lays the rows side by side, pads them on either side, and says of every column
what it is, to which part it belongs and which position it has. Positions follow one of two policies: ``keep`` gives every
token the place that it would have had if nothing had been compressed, ``contiguous`` numbers what is there in a row.

Shape suffixes: B rows, L columns, T tokens of a part, S appended tokens, Q question tokens, V visual tokens, d width.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from isoflop.core.errors import Infeasible
from isoflop.models.hooks.decoder_layers import PromptLayout

KINDS = ("system", "image", "crop", "frame", "audio", "question", "answer")
SEEN = frozenset({"image", "crop", "frame"})
"""Kinds of visual tokens, which methods between the decoder's layers act on."""
MEDIA = SEEN | {"audio"}
"""Kinds of what is encoded once and asked many questions: a method on the cache compresses up to the last of it."""
NOT_LABELLED = -100


@dataclass(frozen=True)
class Part:
    """A segment of one row.

    Attributes:
        kind: one of ``KINDS``.
        ids_T: token ids, or
        embeds_Td: embeddings; exactly one of the two.
        room: places that the segment would take uncompressed; None for as many as it has tokens.
        places_T: place of each token among those, ascending; None for the first ones.
    """

    kind: str
    ids_T: Tensor | None = None
    embeds_Td: Tensor | None = None
    room: int | None = None
    places_T: Tensor | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"no kind of segment is called {self.kind!r}; allowed: {', '.join(KINDS)}")
        if (self.ids_T is None) == (self.embeds_Td is None):
            raise ValueError(f"a segment of the kind {self.kind} needs either ids or embeddings")
        last = self.tokens - 1 if self.places_T is None or not self.tokens else int(self.places_T[-1])
        if self.room is not None and last >= self.room:
            raise ValueError(f"a segment with room for {self.room} tokens has one at place {last}")

    @property
    def tokens(self) -> int:
        """T."""
        held = self.ids_T if self.ids_T is not None else self.embeds_Td
        assert held is not None
        return len(held)

    def positions(self, start: int, keep: bool) -> tuple[Tensor, int]:
        """Of its tokens, (T,), and the position behind the segment."""
        if not keep:
            return torch.arange(start, start + self.tokens), start + self.tokens
        places_T = torch.arange(self.tokens) if self.places_T is None else self.places_T.cpu()
        return start + places_T, start + (self.tokens if self.room is None else self.room)


@dataclass(frozen=True)
class Span:
    """Where a segment stands in its row: columns ``start`` to ``stop``, excluded."""

    kind: str
    start: int
    stop: int


@dataclass(frozen=True)
class SegmentedPrompt:
    """A batch of prompts, ready for the decoder.

    Attributes:
        embeds_BLd: input embeddings, zero at padding.
        positions_BL: of RoPE.
        axes_BL3: of RoPE by time, row and column, for decoders that are told them; None where ``positions_BL`` says all.
        deep: added to the hidden states behind the decoder's first layers, (B, L, d) each.
        kinds_BL: number of each token's kind in ``KINDS``, -1 for padding.
        parts_BL: number of each token's segment in its row, -1 for padding.
        ids_B: example numbers.
        next_B: position of the token behind each row.
        labels_BL: ids of the labelled tokens at their own columns, NOT_LABELLED elsewhere; None where none were asked for.
    """

    embeds_BLd: Tensor
    positions_BL: Tensor
    kinds_BL: Tensor
    parts_BL: Tensor
    ids_B: Tensor
    next_B: Tensor
    labels_BL: Tensor | None = None
    axes_BL3: Tensor | None = None
    deep: tuple[Tensor, ...] = ()

    @property
    def position_ids(self) -> Tensor:
        """As a decoder takes them, (B, L) or (3, B, L)."""
        return self.positions_BL if self.axes_BL3 is None else self.axes_BL3.permute(2, 0, 1)

    @property
    def valid_BL(self) -> Tensor:
        """False for padding."""
        return self.kinds_BL >= 0

    @property
    def length(self) -> int:
        """L."""
        return self.kinds_BL.shape[1]

    def of(self, kinds: Collection[str]) -> Tensor:
        """True at tokens of some kinds, (B, L)."""
        numbers = torch.tensor([KINDS.index(kind) for kind in kinds], device=self.kinds_BL.device)
        return torch.isin(self.kinds_BL, numbers)

    def spans(self) -> list[list[Span]]:
        """The segments of every row, in order; those without tokens left out."""
        found = []
        for kinds_L, parts_L in zip(self.kinds_BL, self.parts_BL, strict=True):
            columns = [(parts_L == part).nonzero()[:, 0] for part in parts_L[parts_L >= 0].unique().tolist()]
            found.append([Span(KINDS[int(kinds_L[c[0]])], int(c[0]), int(c[-1]) + 1) for c in columns])
        return found

    def layout(self) -> PromptLayout:
        """What methods between the decoder's layers see."""
        valid_BL, answer_BL = self.valid_BL, self.of({"answer"})
        return PromptLayout(
            self.of(SEEN),
            self.ids_B,
            None if bool(valid_BL.all()) else valid_BL,
            self.parts_BL,
            ~answer_BL if bool(answer_BL.any()) else None,
        )

    def prefix(self) -> int:
        """Column behind the last image, crop, frame or audio: what comes before is compressed by a method on the cache.

        Raises:
            Infeasible: there is none, or the rows disagree.
        """
        return media_end(self.of(MEDIA))

    def aligned(self) -> tuple[SegmentedPrompt, Tensor]:
        """The same with all padding on the left, and the old column of each new one, (B, L)."""
        order_BL = self.valid_BL.int().argsort(dim=1, stable=True)
        if bool((order_BL == torch.arange(self.length, device=order_BL.device)).all()):
            return self, order_BL
        tensors = {
            name: getattr(self, name).gather(1, order_BL)
            for name in ("positions_BL", "kinds_BL", "parts_BL", "labels_BL")
            if getattr(self, name) is not None
        }
        wide = {n: x.gather(1, order_BL[..., None].expand(x.shape)) for n, x in self._wide.items()}
        deep = tuple(x.gather(1, order_BL[..., None].expand(x.shape)) for x in self.deep)
        return replace(self, **wide, **tensors, deep=deep), order_BL

    def columns(self, start: int, stop: int) -> SegmentedPrompt:
        """Some columns, without labels."""
        cut = {n: getattr(self, n)[:, start:stop] for n in ("positions_BL", "kinds_BL", "parts_BL")}
        wide = {n: x[:, start:stop] for n, x in self._wide.items()}
        return replace(self, **cut, **wide, labels_BL=None, deep=tuple(x[:, start:stop] for x in self.deep))

    @property
    def _wide(self) -> dict[str, Tensor]:
        found = {"embeds_BLd": self.embeds_BLd}
        return found if self.axes_BL3 is None else {**found, "axes_BL3": self.axes_BL3}

    def followed_by(self, embeds_BSd: Tensor, kind: str = "answer") -> SegmentedPrompt:
        """The prompts, padding on the left, with one more segment behind them, as long in every row; without labels."""
        own, _ = self.aligned()
        steps = torch.arange(embeds_BSd.shape[1], device=own.next_B.device)
        like_BS = torch.ones_like(own.next_B)[:, None].expand(-1, len(steps))
        last_B1 = own.parts_BL.amax(1, keepdim=True) + 1
        places_BS, axes_BL3 = own.next_B[:, None] + steps, own.axes_BL3
        if axes_BL3 is not None:
            axes_BL3 = torch.cat((axes_BL3, places_BS[..., None].expand(-1, -1, axes_BL3.shape[2])), dim=1)
        return SegmentedPrompt(
            torch.cat((own.embeds_BLd, embeds_BSd), dim=1),
            torch.cat((own.positions_BL, places_BS), dim=1),
            torch.cat((own.kinds_BL, KINDS.index(kind) * like_BS), dim=1),
            torch.cat((own.parts_BL, last_B1 * like_BS), dim=1),
            own.ids_B,
            own.next_B + len(steps),
            axes_BL3=axes_BL3,
            deep=tuple(torch.cat((x, torch.zeros_like(embeds_BSd)), dim=1) for x in own.deep),
        )


def build(
    rows: Sequence[Sequence[Part]],
    embed: Callable[[Tensor], Tensor],
    ids_B: Tensor | None = None,
    positions: Literal["keep", "contiguous"] = "keep",
    padding: Literal["left", "right"] = "left",
    labelled: Collection[str] = (),
) -> SegmentedPrompt:
    """Lay rows of parts side by side.

    Args:
        embed: token ids (1, T) to embeddings (1, T, d).
        ids_B: example numbers; the rows' places when None.
        labelled: kinds whose ids become labels.

    Raises:
        ValueError: no rows, a row without tokens, or a labelled segment without ids.
    """
    built = [_row(parts, embed, positions == "keep", labelled) for parts in rows]
    if not built:
        raise ValueError("a prompt needs at least one row")
    length = max(len(row.embeds_Ld) for row in built)
    device = built[0].embeds_Ld.device

    def padded(name: str, fill: int) -> Tensor:
        return torch.stack([_padded(getattr(row, name), length, fill, padding) for row in built]).to(device)

    return SegmentedPrompt(
        padded("embeds_Ld", 0),
        padded("positions_L", 0),
        padded("kinds_L", -1),
        padded("parts_L", -1),
        torch.arange(len(built), device=device) if ids_B is None else ids_B,
        torch.tensor([row.next for row in built], device=device),
        padded("labels_L", NOT_LABELLED) if labelled else None,
    )


@dataclass(frozen=True)
class _Row:
    embeds_Ld: Tensor
    positions_L: Tensor
    kinds_L: Tensor
    parts_L: Tensor
    labels_L: Tensor
    next: int


def _row(parts: Sequence[Part], embed: Callable[[Tensor], Tensor], keep: bool, labelled: Collection[str]) -> _Row:
    if not any(part.tokens for part in parts):
        raise ValueError("a row of a prompt needs at least one token")
    embeds, positions, labels, start = [], [], [], 0
    for part in parts:
        embeds.append(part.embeds_Td if part.ids_T is None else embed(part.ids_T[None])[0])
        positions_T, start = part.positions(start, keep)
        positions.append(positions_T)
        if part.kind in labelled and part.ids_T is None:
            raise ValueError(f"a segment of the kind {part.kind} cannot be labelled without ids")
        none_T = torch.full((part.tokens,), NOT_LABELLED)
        labels.append(part.ids_T.cpu() if part.kind in labelled and part.ids_T is not None else none_T)
    counts = torch.tensor([part.tokens for part in parts])
    kinds = torch.tensor([KINDS.index(part.kind) for part in parts])
    return _Row(
        torch.cat([x for x in embeds if x is not None]),
        torch.cat(positions),
        kinds.repeat_interleave(counts),
        torch.arange(len(parts)).repeat_interleave(counts),
        torch.cat(labels),
        start,
    )


def _padded(x_L: Tensor, length: int, fill: int, side: str) -> Tensor:
    pad = x_L.new_full((length - len(x_L), *x_L.shape[1:]), fill)
    return torch.cat((pad, x_L) if side == "left" else (x_L, pad))


def media_end(media_BL: Tensor) -> int:
    """Column behind the last token that is True, the same in every row.

    Raises:
        Infeasible: the rows disagree, or have none.
    """
    places_L = torch.arange(1, media_BL.shape[1] + 1, device=media_BL.device)
    ends_B = (media_BL * places_L).amax(-1)
    if not bool((ends_B == ends_B[0]).all()) or not int(ends_B[0]):
        raise Infeasible(
            "methods on the KV cache need the images of a batch to end in the same column; prompts padded to one length "
            "before the image, or batches of one, work"
        )
    return int(ends_B[0])


def expand_placeholders(
    ids_BT: Tensor, mask_BT: Tensor | None, image_token: int, picture_M: Tensor
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Put the ids of a picture in place of the one image placeholder of every row, (B, T) → (B, T - 1 + M).

    Returns:
        ids, mask, and True at the picture's ids.

    Raises:
        ValueError: a row does not hold exactly one placeholder.
    """
    here_BT = ids_BT == image_token
    if not bool((here_BT.sum(-1) == 1).all()):
        raise ValueError("every prompt needs exactly one image placeholder")
    repeats = torch.where(here_BT, len(picture_M), 1).flatten()
    length = ids_BT.shape[1] - 1 + len(picture_M)

    def expanded(x_BT: Tensor) -> Tensor:
        return x_BT.flatten().repeat_interleave(repeats).view(-1, length)

    picture_BL = expanded(here_BT)
    ids_BL = expanded(ids_BT).masked_scatter(picture_BL, picture_M.to(ids_BT).repeat(len(ids_BT)))
    return ids_BL, None if mask_BT is None else expanded(mask_BT), picture_BL


def places_kept(positions_BL: Tensor | None, image_BL: Tensor, places_BV: Tensor, patches: int) -> Tensor:
    """Positions (B, L) that the tokens would have had with all ``patches`` visual tokens in the prompt.

    Args:
        positions_BL: positions with the tokens in a row, None for 0 … L-1.
        image_BL: True at visual tokens, which lie side by side.
        places_BV: place of each visual token among the patches.
    """
    if positions_BL is None:
        positions_BL = torch.arange(image_BL.shape[1], device=image_BL.device).expand(image_BL.shape)
    first_B1 = image_BL.int().argmax(-1, keepdim=True)
    behind_BL = (image_BL.cumsum(-1) == places_BV.shape[1]) & ~image_BL
    moved_BL = positions_BL + behind_BL * (patches - places_BV.shape[1])
    return moved_BL.masked_scatter(image_BL, positions_BL.gather(1, first_B1) + places_BV)


def replace_question(
    embeds_BLd: Tensor, ids_BL: Tensor, picture_BL: Tensor, ids_BQ: Tensor, mask_BQ: Tensor | None, question_BQd: Tensor
) -> Tensor:
    """The prompts' embeddings with those of the question, the text right behind the image, replaced, (B, L, d).

    Args:
        picture_BL: True at the image's tokens and its separators.
        ids_BQ, mask_BQ: the question as the compressor has seen it; its padding, on either side, is skipped.

    Raises:
        ValueError: these ids do not stand behind the image, or there are not as many embeddings.
    """
    if question_BQd.shape[:2] != ids_BQ.shape:
        raise ValueError(f"a question of {tuple(ids_BQ.shape)} ids got {tuple(question_BQd.shape[:2])} embeddings")
    real_BQ = torch.ones_like(ids_BQ, dtype=torch.bool) if mask_BQ is None else mask_BQ.bool()
    end_B1 = picture_BL.shape[1] - picture_BL.flip(1).int().argmax(1, keepdim=True)
    columns_BQ = end_B1 + (real_BQ.cumsum(1) - 1).clamp(min=0)
    inside = bool((columns_BQ[real_BQ] < ids_BL.shape[1]).all())
    if not inside or not torch.equal(ids_BL.gather(1, columns_BQ)[real_BQ], ids_BQ[real_BQ]):
        raise ValueError("the question that got embeddings of its own does not stand right behind the image")
    rows_BQ = torch.arange(len(ids_BL), device=ids_BL.device)[:, None].expand_as(columns_BQ)
    return embeds_BLd.index_put((rows_BQ[real_BQ], columns_BQ[real_BQ]), question_BQd[real_BQ].to(embeds_BLd.dtype))
