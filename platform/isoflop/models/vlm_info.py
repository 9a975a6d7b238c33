"""What is known of a vision-language model without its weights, and the prompts that it is asked.

Shape suffixes: B batch, N views of an image, P patches of a view, Q question tokens, T prompt tokens (one image placeholder among
them), D vision width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from isoflop.core.hook import Hook
from isoflop.models.base import ModelInfo
from isoflop.models.features import LayerKey, TowerSource
from isoflop.models.hooks.attention import ATTENTION
from isoflop.models.hooks.decoder_layers import DECODER_LAYERS
from isoflop.models.hooks.feed_forward import FEED_FORWARD
from isoflop.models.hooks.matrices import MATRICES
from isoflop.models.hooks.residual import RESIDUAL
from isoflop.models.hooks.vision_blocks import VISION_BLOCKS
from isoflop.models.hooks.visual_tokens import VISUAL_TOKENS
from isoflop.models.resizing import SQUEEZED, Resizing
from isoflop.models.visual_side import PLAIN, Layout
from isoflop.models.worlds.digit_world import VOCABULARY
from isoflop.models.worlds.lessons import Lessons, LessonSource
from isoflop.models.worlds.lm_text import TokenizerSource

HOOKS: frozenset[Hook[Any]] = frozenset(
    {VISION_BLOCKS, VISUAL_TOKENS, DECODER_LAYERS, RESIDUAL, FEED_FORWARD, ATTENTION, MATRICES}
)
"""What every model of this kind offers; see ``isoflop.models.hooks``."""


@dataclass(frozen=True, kw_only=True)
class VlmInfo(ModelInfo):
    """What is known of a vision-language model without loading its weights.

    Attributes:
        tower: the stage whose value is the model's vision tower.
        feature_layer: hidden state that feeds the projector, counted from 0 (the embedding) to the number of layers.
        vocabulary: name of the raw vocabulary the checkpoint declares, or None for one with a tokenizer.
        lessons: what the model was trained on, where it was trained here.
        joint: a model that is trained here is trained with its visual-token method in place.
        tokenizer: the stage whose value is its tokenizer, or None.
        resizing: how images of other sizes become the tower's.
        views: N of an image as large as one view, which is what plans go by.
        newlines: visual tokens of a compressed image that are no patches.
        image_tokens: V of such an image of which nothing is compressed; None for ``visual_tokens``.
        square: all views have the same square grid, and the tower's attention can be read; images in shapes of their own have
            neither.

    ``geometry`` holds ``grid`` (patches per side of a view), ``visual_tokens`` (P), ``vision_width`` (D), ``vision_layers``,
    ``width``, ``layers``, ``heads``, ``kv_heads``, ``vocab_size``, ``image_token``.
    """

    tower: TowerSource
    feature_layer: int
    vocabulary: str | None = None
    lessons: LessonSource | None = None
    joint: bool = True
    tokenizer: TokenizerSource | None = None
    resizing: Resizing = SQUEEZED
    views: int = 1
    newlines: int = 0
    image_tokens: int | None = None
    square: bool = True

    def tokens_of_image(self, left: int | None = None) -> int:
        """V of an image as large as one view, of every view of which ``left`` patches are left; None for all of them."""
        patches: int = self.geometry["visual_tokens"]
        if left is None or left == patches:
            return patches if self.image_tokens is None else self.image_tokens
        return self.views * left + self.newlines

    @property
    def known_lessons(self) -> LessonSource | None:
        """Training examples for this model: its own, the usual ones for a checkpoint of the same vocabulary, or None."""
        return self.lessons or (Lessons() if self.vocabulary == VOCABULARY else None)

    @property
    def uncalibrated(self) -> str:
        """Without lessons nothing is asked."""
        missing = f"there are some only for checkpoints that declare the vocabulary {VOCABULARY}"
        return "" if self.known_lessons is not None else missing


@dataclass(frozen=True)
class VlmBatch:
    """Prompts about images, one image each.

    Attributes:
        hidden: what was read of the tower by key, the views of an image one after the other, (B·N, …); holds at least
            ``VlmModel.layers_needed``.
        prompt_BT: token ids with exactly one image placeholder per row.
        question_BQ: the text after the placeholder, for query-conditioned compressors.
        ids_B: example numbers.
        prompt_mask_BT, question_mask_BQ: 1 for real tokens, 0 for padding; None when nothing is padded.
        answers_B: the token that follows each prompt, where it is known (``supervised``).
        layout: of all images.
    """

    hidden: Mapping[LayerKey, Tensor]
    prompt_BT: Tensor
    question_BQ: Tensor | None
    ids_B: Tensor
    prompt_mask_BT: Tensor | None = None
    question_mask_BQ: Tensor | None = None
    answers_B: Tensor | None = None
    layout: Layout = PLAIN
