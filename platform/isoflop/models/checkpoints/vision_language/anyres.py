"""LLaVA-NeXT and LLaVA-OneVision: a thumbnail and square crops of the best resolution, an MLP on each patch.

With all patches the tokens of a picture are those of the thumbnail, and then the crops' as one raster, without what padding
gave (and made coarser where OneVision's limit says so), a newline at the end of every row: the class's own packing. What a
method leaves of each view has no rows any more: the tokens of the thumbnail, of every crop, and one newline, as the class packs a
picture without crops. Padding is compressed like the rest of a crop.

Shape suffixes: B pictures, N views, P patches of a view, V tokens of a view, M visual tokens of a picture, d language width.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from isoflop.core.errors import Infeasible
from isoflop.models.checkpoints.vision_language.kind import (
    Seen,
    VisionLanguageKind,
    check_processor,
    check_tower,
    image_processor,
    single_layer,
    whole,
)
from isoflop.models.features import vision_of
from isoflop.models.visual_side import PLAIN, Layout, ProcessedSide
from isoflop.models.vlm_info import VlmInfo

LIMIT = "anyres_max_"
"""Stands before the number of views to which OneVision makes a raster coarser."""


class AnyResSide(ProcessedSide):
    """Packs the views of a picture as transformers does."""

    @property
    def config(self) -> Any:
        """The checkpoint's."""
        return self.module.config

    def layout(self, height: int, width: int) -> Layout:
        """By the best of the config's resolutions."""
        return layout_of(self.config, height, width)

    def pixels(self, pictures: Sequence[Any]) -> Tensor:
        """All views, the thumbnail first."""
        found: Tensor = self.processed(pictures)["pixel_values"]
        return found.flatten(0, 1)

    def tokens(self, layout: Layout = PLAIN) -> int:
        """Thumbnail, raster and newlines."""
        return packed_tokens(self.config, layout)

    def arranged(self, views_NVd: Tensor, layout: Layout = PLAIN) -> Tensor:
        """The class's packing of whole rasters; views in a row and a newline of what is left of them."""
        views_BNVd = views_NVd.unflatten(0, (-1, layout.views))
        inner = self.module.model
        if views_BNVd.shape[2] == self.patches:
            size = torch.tensor(layout.size)
            packed = self._packed(list(views_BNVd), [size] * len(views_BNVd), inner.image_newline)
            return torch.stack(list(packed))
        newline_B1d = inner.image_newline.to(views_NVd).expand(len(views_BNVd), 1, -1)
        return torch.cat((views_BNVd.flatten(1, 2), newline_B1d), dim=1)

    def _packed(self, views: list[Tensor], sizes: list[Tensor], newline: Tensor) -> Sequence[Tensor]:
        raise NotImplementedError


class NextSide(AnyResSide):
    """LLaVA-NeXT's."""

    def _packed(self, views: list[Tensor], sizes: list[Tensor], newline: Tensor) -> Sequence[Tensor]:
        strategy = self.config.vision_feature_select_strategy
        found: Sequence[Tensor] = self.module.model.pack_image_features(views, sizes, strategy, newline)[0]
        return found


class OneVisionSide(AnyResSide):
    """LLaVA-OneVision's."""

    def _packed(self, views: list[Tensor], sizes: list[Tensor], newline: Tensor) -> Sequence[Tensor]:
        ratio = self.config.vision_aspect_ratio
        found: Sequence[Tensor] = self.module.model.pack_image_features(views, sizes, newline, ratio)[0]
        return found


class AnyRes(VisionLanguageKind):
    """A class that packs crops.

    Attributes:
        side_of: its visual side.
    """

    side_of: ClassVar[type[AnyResSide]]

    def seen(self, ref: str, config: Any, source: Path) -> Seen:
        """A CLIP or SigLIP tower; a picture as large as a view has the crops of the best resolution for it."""
        check_processor(ref, source, self.architecture)
        vision = config.vision_config
        layers, side = whole(ref, vision, "num_hidden_layers"), whole(ref, vision, "image_size")
        grid = side // whole(ref, vision, "patch_size")
        layer = single_layer(ref, config, layers)
        check_tower(ref, config)
        _check_packing(ref, config, side)
        _check_crops(ref, config, image_processor(source))
        layout = layout_of(config, side, side)
        tokens = packed_tokens(config, layout)
        return Seen(grid, int(vision.hidden_size), layers, layer, layout.views, 1, tokens)

    def side(self, module: Any, info: VlmInfo, source: Path, tokenizer: Callable[[], Any] | None) -> AnyResSide:
        """With the checkpoint's processor."""
        vision = vision_of(module.model.vision_tower, source)
        return self.side_of(module, vision, info.geometry, image_processor(source), tokenizer)


class LlavaNext(AnyRes):
    """LLaVA-1.6."""

    architecture = "LlavaNextForConditionalGeneration"
    side_of = NextSide


class LlavaOneVision(AnyRes):
    """LLaVA-OneVision, one picture."""

    architecture = "LlavaOnevisionForConditionalGeneration"
    side_of = OneVisionSide


def _check_packing(ref: str, config: Any, side: int) -> None:
    """Raise Infeasible for resolutions that are not made of crops, and for a limit that the class knows no number of."""
    pinpoints = config.image_grid_pinpoints
    if (
        not isinstance(pinpoints, list | tuple)
        or not pinpoints
        or not all(_of_crops(point, side) for point in pinpoints)
    ):
        raise Infeasible(
            f"model {ref}: image_grid_pinpoints = {str(pinpoints)[:60]} in its config; allowed: a list of heights and widths that are "
            f"multiples of {side} pixels"
        )
    limit = getattr(config, "vision_aspect_ratio", None)
    if limit is not None and not re.fullmatch(f"{LIMIT}[1-9][0-9]*", str(limit)):
        raise Infeasible(
            f"model {ref}: vision_aspect_ratio = {limit!r} in its config; allowed: {LIMIT}<number of views>"
        )


def _of_crops(point: Any, side: int) -> bool:
    return (
        isinstance(point, list | tuple)
        and len(point) == 2
        and all(isinstance(n, int) and n > 0 and n % side == 0 for n in point)
    )


def _check_crops(ref: str, config: Any, processor: Any) -> None:
    """Raise Infeasible where a processor cuts other crops than a config packs."""
    side, given = int(config.vision_config.image_size), processor.crop_size or processor.size
    cut = given["height"] or given["shortest_edge"]
    pinpoints = [list(map(int, point)) for point in processor.image_grid_pinpoints]
    if cut != side or pinpoints != [list(map(int, point)) for point in config.image_grid_pinpoints]:
        raise Infeasible(
            f"model {ref}: its processor cuts crops of {cut} pixels for {len(pinpoints)} resolutions ({pinpoints[0]} …), and its config "
            f"packs crops of {side} pixels for {len(config.image_grid_pinpoints)} ({list(config.image_grid_pinpoints[0])} …); allowed: the same "
            "in both"
        )


def layout_of(config: Any, height: int, width: int) -> Layout:
    """Crops of the resolution that shows most of a picture."""
    from transformers.image_processing_utils import select_best_resolution

    side = int(config.vision_config.image_size)
    high, wide = select_best_resolution((height, width), config.image_grid_pinpoints)
    rows, columns = high // side, wide // side
    return Layout(1 + rows * columns, rows, columns, (height, width))


def packed_tokens(config: Any, layout: Layout) -> int:
    """M of a picture of which nothing is compressed."""
    grid = int(config.vision_config.image_size) // int(config.vision_config.patch_size)
    limit = getattr(config, "vision_aspect_ratio", None)
    assert layout.size is not None
    return _packed_tokens(grid, layout, None if limit is None else int(limit.removeprefix(LIMIT)))


@lru_cache(maxsize=1024)
def _packed_tokens(grid: int, layout: Layout, limit: int | None) -> int:
    from transformers.models.llava_next.modeling_llava_next import unpad_image

    whole = torch.empty(1, layout.rows * grid, layout.columns * grid, device="meta")
    height, width = unpad_image(whole, layout.size).shape[1:]
    if limit is not None:
        ratio = math.sqrt(height * width / (limit * grid**2))
        if ratio > 1.1:
            height, width = int(height // ratio), int(width // ratio)
    return grid**2 + height * (width + 1)
