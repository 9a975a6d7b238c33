"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: pictures in their own shape, merged patches, positions by row and column.

A picture has as many tokens as its pixels ask for: the processor scales it to whole blocks of s × s patches, each of which
becomes a token. The hook ``visual_tokens`` stands between the merging and the merger's layers. What is left has no square grid,
and these towers keep their attention in one matrix: methods that want the one or the other are refused.

Visual tokens are told their row and column (M-RoPE). Where all are there, or a method keeps the ``original`` places, each has its
own and the text goes on where it would; what has places in a row has one number on all axes, as text has. Qwen3-VL adds features of
earlier vision layers to the same tokens between its first layers, so that a method there has to keep tokens as they are.

Shape suffixes: B pictures, R rows of pixels' patches, P merged tokens, V those that are left, L columns, D width.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from isoflop.core.errors import Infeasible, UserError
from isoflop.models.checkpoints.source import brief
from isoflop.models.checkpoints.vision_language.kind import (
    MERGED,
    MERGED_LACKS,
    Seen,
    VisionLanguageKind,
    check_processor,
    image_processor,
    whole,
)
from isoflop.models.features import LayerKey, Vision
from isoflop.models.visual_side import PLAIN, Layout, ProcessedSide
from isoflop.models.vlm_info import VlmInfo

PLANNED = 448
"""Pixels per side of the picture that plans go by."""


class QwenSide(ProcessedSide):
    """Qwen2-VL's and Qwen2.5-VL's."""

    keeps_places = True
    marks = ("<|vision_start|>", "<|vision_end|>")
    layers: ClassVar[tuple[str, ...]] = ("mlp",)
    """Of the merger, behind its merging."""

    @property
    def projector(self) -> nn.Module:
        """The merger's layers."""
        merger = self.vision.tower.merger
        return nn.Sequential(*(getattr(merger, name) for name in self.layers))

    def layout(self, height: int, width: int) -> Layout:
        """Rows and columns of patches."""
        return layout_of(self.processor, height, width)

    def pixels(self, pictures: Sequence[Any]) -> Tensor:
        """Flattened patches, (B·R, C)."""
        found: Tensor = self.processed(pictures)["pixel_values"]
        return found

    def read(self, pixels: Tensor, keys: Iterable[LayerKey], layout: Layout = PLAIN) -> dict[LayerKey, Tensor]:
        """Merged tokens of the last layer.

        Raises:
            Infeasible: another layer is asked for, or attention.
        """
        keys = list(keys)
        others = [key for key in keys if key != len(self.vision.tower.blocks)]  # type: ignore[arg-type]
        if others:
            raise Infeasible(
                f"nothing but the last hidden state is read of the tower of a {type(self.module).__name__}, which keeps queries, keys and "
                f"values in one matrix; asked: {', '.join(map(str, others))}"
            )
        patches = layout.rows * layout.columns
        count = len(pixels) // patches
        grid = torch.tensor([[1, layout.rows, layout.columns]] * count, device=pixels.device)
        tower: Any = self.vision.tower
        with unprojected(tower.merger, self.layers):
            outputs = tower(pixels.to(tower.dtype), grid_thw=grid)
        found: dict[LayerKey, Tensor] = dict.fromkeys(keys, outputs.pooler_output.unflatten(0, (count, -1)))
        for number, features in enumerate(getattr(outputs, "deepstack_features", None) or ()):
            found[f"{DEEP}{number}"] = features.unflatten(0, (count, -1))
        return found

    def tokens(self, layout: Layout = PLAIN) -> int:
        """Merged patches."""
        return layout.rows * layout.columns // int(self.processor.merge_size) ** 2

    def axes(self, layout: Layout, image_BL: Tensor, positions_BL: Tensor, places_BV: Tensor | None) -> Tensor | None:
        """Time, row and column of every token, (B, L, 3); None where image tokens stand in a row like text."""
        count = int(image_BL[0].sum())
        if places_BV is None:
            if count != self.tokens(layout):
                return None
            places_BV = torch.arange(count, device=image_BL.device).expand(len(image_BL), -1)
        merge = int(self.processor.merge_size)
        rows, columns = layout.rows // merge, layout.columns // merge
        first_B1 = positions_BL.gather(1, image_BL.int().argmax(1, keepdim=True))
        coordinates = torch.zeros_like(places_BV), places_BV // columns, places_BV % columns
        own_BV3 = torch.stack(coordinates, dim=-1) + first_B1[..., None]
        behind_BL = (image_BL.cumsum(1) == count) & ~image_BL
        moved_BL = positions_BL + behind_BL * (max(rows, columns) - count)
        return moved_BL[..., None].expand(-1, -1, 3).masked_scatter(image_BL[..., None], own_BV3)


class Qwen3Side(QwenSide):
    """Qwen3-VL's."""

    layers = ("linear_fc1", "act_fn", "linear_fc2")

    def deep(self, hidden: Any) -> tuple[Tensor, ...]:
        """Features of earlier layers for the merged tokens, (B, P, d) each."""
        count = sum(str(key).startswith(DEEP) for key in hidden)
        return tuple(hidden[f"{DEEP}{number}"] for number in range(count))


DEEP = "deepstack-"


@contextmanager
def unprojected(merger: nn.Module, layers: Sequence[str]) -> Iterator[None]:
    """Inside the block a merger norms and merges, and nothing more."""
    kept = {name: merger._modules[name] for name in layers}
    try:
        merger._modules.update({name: nn.Identity() for name in layers})
        yield
    finally:
        merger._modules.update(kept)


class Qwen2Vl(VisionLanguageKind):
    """Qwen2-VL, one picture."""

    architecture = "Qwen2VLForConditionalGeneration"
    hooks = MERGED
    lacks = MERGED_LACKS
    side_of: ClassVar[type[QwenSide]] = QwenSide

    def seen(self, ref: str, config: Any, source: Path) -> Seen:
        """A picture of 448 x 448 pixels."""
        check_processor(ref, source, self.architecture)
        processor, vision = image_processor(source), config.vision_config
        for key, own in (
            ("patch_size", "patch_size"),
            ("merge_size", "spatial_merge_size"),
            ("temporal_patch_size",) * 2,
        ):
            if getattr(processor, key) != whole(ref, vision, own):
                raise Infeasible(
                    f"model {ref}: its processor has {key} = {getattr(processor, key)!r}, and its config {own} = {getattr(vision, own)}; "
                    "allowed: the same in both"
                )
        merge, depth = whole(ref, vision, "spatial_merge_size"), whole(ref, vision, "depth")
        grid = layout_of(processor, PLANNED, PLANNED).rows // merge
        return Seen(grid, self.width(vision) * merge**2, depth, depth, square=False)

    def width(self, vision: Any) -> int:
        """Of the tower."""
        return int(vision.embed_dim)

    def side(self, module: Any, info: VlmInfo, source: Path, tokenizer: Callable[[], Any] | None) -> QwenSide:
        """With the checkpoint's processor."""
        processor = image_processor(source)
        vision = Vision(module.model.visual, PLANNED, tuple(processor.image_mean), tuple(processor.image_std), 0)
        return self.side_of(module, vision, info.geometry, processor, tokenizer)


class Qwen25Vl(Qwen2Vl):
    """Qwen2.5-VL, one picture."""

    architecture = "Qwen2_5_VLForConditionalGeneration"

    def width(self, vision: Any) -> int:
        """Of the tower."""
        return int(vision.hidden_size)


class Qwen3Vl(Qwen25Vl):
    """Qwen3-VL, one picture."""

    architecture = "Qwen3VLForConditionalGeneration"
    side_of = Qwen3Side


class Qwen3VlMoe(Qwen3Vl):
    """Qwen3-VL with experts."""

    architecture = "Qwen3VLMoeForConditionalGeneration"


def layout_of(processor: Any, height: int, width: int) -> Layout:
    """Patches of a picture in rows and columns.

    Raises:
        UserError: the processor takes no picture of this shape (two hundred times as long as wide).
    """
    resize = sys.modules[type(processor).__module__].smart_resize  # each processor has its own
    patch, size = int(processor.patch_size), processor.size
    try:
        high, wide = resize(
            height,
            width,
            patch * int(processor.merge_size),
            min_pixels=size["shortest_edge"],
            max_pixels=size["longest_edge"],
        )
    except ValueError as error:
        raise UserError(f"a picture of {width} x {height} pixels: {brief(error)}") from error
    return Layout(1, high // patch, wide // patch)
