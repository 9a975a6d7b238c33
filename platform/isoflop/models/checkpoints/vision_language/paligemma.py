"""PaliGemma: one square view, one matrix on each patch, and a prompt that reads itself in both directions.

Every token of a prompt sees all of them, the image sees the question; an answer is read forward. Methods on the cache compress an
image before its question is known, and methods between the layers go by what a token has seen so far: neither is what this class
computes, so that these places are not offered. A text begins behind the image: ``<image><bos>answer en …``, ended by a new line.

Shape suffixes: B rows, L columns.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

from isoflop.models.checkpoints.vision_language.kind import (
    LACKS,
    Seen,
    VisionLanguageKind,
    patches_of,
    square_views,
    whole,
)
from isoflop.models.features import Vision, vision_of
from isoflop.models.hooks.attention import ATTENTION
from isoflop.models.hooks.decoder_layers import DECODER_LAYERS
from isoflop.models.visual_side import VisualSide
from isoflop.models.vlm_info import HOOKS, VlmInfo


class PaliGemmaSide(VisualSide):
    """Positions from 1, no direction in the prompt, BOS behind the image."""

    bidirectional = True
    first_position = 1
    begins = False

    def __init__(self, module: Any, vision: Vision, info: VlmInfo, tokenizer: Callable[[], Any] | None) -> None:
        super().__init__(module, vision, info.geometry, info.resizing)
        self._tokenizer = tokenizer

    @property
    def marks(self) -> tuple[str, str]:  # type: ignore[override]
        """BOS behind the image."""
        return "", (self._tokenizer().bos_token or "") if self._tokenizer is not None else ""


class PaliGemma(VisionLanguageKind):
    """PaliGemma, the first and the second, which caps the logits of its attention and of its head."""

    architecture = "PaliGemmaForConditionalGeneration"
    hooks = HOOKS - {ATTENTION, DECODER_LAYERS}
    lacks: ClassVar[dict[str, str]] = {
        **LACKS,
        ATTENTION.name: "its prompts read themselves in both directions, so that no image can be compressed before its question",
        DECODER_LAYERS.name: "its prompts read themselves in both directions, which is not followed where tokens leave",
    }

    def seen(self, ref: str, config: Any, source: Path) -> Seen:
        """A SigLIP tower behind its last norm."""
        vision = config.vision_config
        layers, side = whole(ref, vision, "num_hidden_layers"), whole(ref, vision, "image_size")
        patches_of(ref, vision)
        resizing = square_views(ref, source, self.architecture, side)
        grid = side // whole(ref, vision, "patch_size")
        return Seen(grid, int(vision.hidden_size), layers, layers, resizing=resizing)

    def side(self, module: Any, info: VlmInfo, source: Path, tokenizer: Callable[[], Any] | None) -> VisualSide:
        """With the tokenizer, which says how a text begins."""
        tower = vision_of(module.model.vision_tower, source)
        vision = Vision(tower.tower, tower.image_size, tower.mean, tower.std, tower.prefix, normed=True)
        return PaliGemmaSide(module, vision, info, tokenizer)
