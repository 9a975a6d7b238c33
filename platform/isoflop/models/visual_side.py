"""The visual side of a vision-language model: from pictures to the tokens that its language model reads in their place.

Every class of models has its own (``isoflop.models.checkpoints.vision_language``). A picture becomes one or several views
(crops, a thumbnail), which the tower sees alone; each view gives P patch features that enter a projector token by token. The
hook ``visual_tokens`` stands there and sees one view at a time. What comes out of the projector is arranged into the tokens of
the picture: put into rows, cut where a crop was padded, ended by newlines. They take the place of the one placeholder in a
prompt, with the class's own separators between them.

Shape suffixes: B pictures, N views of each, C channels, H height, W width, P patches of a view, V tokens of a view after
compression, M visual tokens of a picture, T all tokens of a picture (separators among them), D vision width, d language width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from isoflop.models.features import LayerKey, Vision
from isoflop.models.resizing import SQUEEZED, Resizing, pixels_of


@dataclass(frozen=True)
class Layout:
    """How a picture becomes views. Pictures of one layout share a batch.

    Attributes:
        views: N.
        rows, columns: of the crops; 0 where there are none.
        size: height and width of the picture, where its class arranges tokens by it.
    """

    views: int = 1
    rows: int = 0
    columns: int = 0
    size: tuple[int, int] | None = None


PLAIN = Layout()
"""One view."""


def decoder_in(module: Any) -> Any:
    """The language model inside a vision-language model, without its head; Idefics3 calls it the text model."""
    inner = module.model
    return inner.language_model if hasattr(inner, "language_model") else inner.text_model


class VisualSide:
    """One square view, whose tokens stand one after the other (LLaVA-1.5); base class of all others.

    Args:
        module: the Hugging Face model.
        vision: its tower.
        geometry: see ``VlmInfo``.
        resizing: how pictures of other sizes become the tower's.

    Attributes:
        image_token: the id that stands where visual tokens do.
        patches: P.
    """

    sized = False
    """Whether a picture's size decides how many tokens it has."""
    keeps_places = True
    """Whether what is left of a picture may stand where it stood among all of its tokens."""
    marks: ClassVar[tuple[str, str]] = "", ""
    """Text around an image that the class's chat templates write; prompts without one get it, too."""

    begins = True
    """What begins a text stands before its image, not in ``marks``."""
    bidirectional = False
    """Tokens of a prompt see those behind them, up to its end."""
    first_position = 0
    """Of a prompt's first token."""

    def __init__(
        self, module: nn.Module, vision: Vision, geometry: Mapping[str, Any], resizing: Resizing = SQUEEZED
    ) -> None:
        self.module: Any = module
        self.vision = vision
        self.image_token: int = geometry["image_token"]
        self.patches: int = geometry["visual_tokens"]
        self.resizing = resizing

    @property
    def decoder(self) -> Any:
        """The language model without its head."""
        return decoder_in(self.module)

    @property
    def projector(self) -> nn.Module:
        """Takes the features of each token, (…, V, D), to the language model's width."""
        found: nn.Module = self.module.model.multi_modal_projector
        return found

    def layout(self, height: int, width: int) -> Layout:
        """Of a picture with so many pixels."""
        return PLAIN

    def pixels(self, pictures: Sequence[Any]) -> Tensor:
        """Pictures (PIL, RGB, of one layout) as ``read`` takes them, (B·N, C, H, W)."""
        return torch.stack([pixels_of(picture, self.vision.image_size, self.resizing) for picture in pictures])

    def read(self, pixels: Tensor, keys: Iterable[LayerKey], layout: Layout = PLAIN) -> dict[LayerKey, Tensor]:
        """What ``keys`` name of every view: features as they enter the projector, (B·N, P, D), attention (B·N, P)."""
        return self.vision.read(pixels, keys)

    def tokens(self, layout: Layout = PLAIN) -> int:
        """M of a picture of which nothing is compressed."""
        return self.patches

    def arranged(self, views_NVd: Tensor, layout: Layout = PLAIN) -> Tensor:
        """The visual tokens of each picture (B, M, d) of those of its views (B·N, V, d)."""
        return views_NVd.unflatten(0, (-1, layout.views)).flatten(1, 2) if layout.views > 1 else views_NVd

    def ids(self, layout: Layout, count: int) -> Tensor:
        """The ids (T,) that stand for a picture with M = ``count``: the image token at visual tokens, separators elsewhere."""
        return torch.full((count,), self.image_token)

    def axes(self, layout: Layout, image_BL: Tensor, positions_BL: Tensor, places_BV: Tensor | None) -> Tensor | None:
        """Positions (B, L, A) by axis where the decoder tells image tokens their row and column; None where it does not.

        Args:
            image_BL: True at visual tokens.
            positions_BL: of all tokens in a row.
            places_BV: places of the visual tokens among all of the picture; None for places in a row.
        """
        return None

    def deep(self, hidden: Mapping[LayerKey, Tensor]) -> tuple[Tensor, ...]:
        """What is added to the visual tokens behind the decoder's first layers, (B, P, d) each, of what ``read`` gave."""
        return ()


class ProcessedSide(VisualSide):
    """A visual side whose pictures go through transformers' own image processor.

    Args:
        processor: it, on PIL and numpy.
        tokenizer: gives the model's tokenizer.
    """

    sized = True
    keeps_places = False

    def __init__(
        self,
        module: nn.Module,
        vision: Vision,
        geometry: Mapping[str, Any],
        processor: Any,
        tokenizer: Callable[[], Any] | None,
    ) -> None:
        super().__init__(module, vision, geometry)
        self.processor = processor
        self.tokenizer = tokenizer

    def read(self, pixels: Tensor, keys: Iterable[LayerKey], layout: Layout = PLAIN) -> dict[LayerKey, Tensor]:
        """The processor's values need no more preparation."""
        return self.vision.read_pixels(pixels, keys)

    def processed(self, pictures: Sequence[Any], **settings: Any) -> Any:
        """What transformers' processor makes of pictures."""
        return self.processor(images=list(pictures), return_tensors="pt", **settings)
