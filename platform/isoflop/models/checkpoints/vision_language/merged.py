"""InternVL, Idefics3 and SmolVLM: a connector that lays neighbouring patches side by side, and then projects token by token.

The hook ``visual_tokens`` stands between the two: its patches are the s × s blocks of a view that become one token, as wide as
s² patches; the attention that a block gets is the mean over its patches. Crops, thumbnail and separators are those of
transformers' own processor. Every view keeps its separators, whatever a method leaves of it.

Shape suffixes: N views, P tokens of a view as they enter the projection, G patches of the tower, D width.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from isoflop.core.errors import Infeasible
from isoflop.models.checkpoints.vision_language.kind import (
    MERGED,
    MERGED_LACKS,
    Seen,
    VisionLanguageKind,
    check_processor,
    image_processor,
    single_layer,
    whole,
)
from isoflop.models.features import LayerKey, Vision
from isoflop.models.visual_side import PLAIN, Layout, ProcessedSide
from isoflop.models.vlm_info import VlmInfo
from isoflop.models.worlds.lm_text import has_tokenizer


class MergedSide(ProcessedSide):
    """Blocks of patches, and texts of the class around each view."""

    @abstractmethod
    def merged(self, x_NGD: Tensor) -> Tensor:
        """The connector's input as its projection takes it, (N, P, s²·D)."""

    @abstractmethod
    def text(self, layout: Layout, each: int) -> str:
        """What stands for a picture of whose views ``each`` tokens are left."""

    def read(self, pixels: Tensor, keys: Iterable[LayerKey], layout: Layout = PLAIN) -> dict[LayerKey, Tensor]:
        """Features and attention of the blocks."""
        found = super().read(pixels, keys, layout)
        return {
            key: self.merged(x[..., None]).mean(-1) if isinstance(key, str) else self.merged(x)
            for key, x in found.items()
        }

    def tokens(self, layout: Layout = PLAIN) -> int:
        """Those of all views."""
        return layout.views * self.patches

    def ids(self, layout: Layout, count: int) -> Tensor:
        """The text's."""
        known = self._ids.get((layout, count))
        if known is None:
            assert self.tokenizer is not None
            text = self.text(layout, count // layout.views)
            known = torch.tensor(self.tokenizer()(text, add_special_tokens=False)["input_ids"])
            self._ids[layout, count] = known
        return known

    @cached_property
    def _ids(self) -> dict[tuple[Layout, int], Tensor]:
        return {}

    @property
    def image(self) -> str:
        """The token that stands for one visual token."""
        assert self.tokenizer is not None
        return str(self.tokenizer().convert_ids_to_tokens(self.image_token))


class InternVlSide(MergedSide):
    """InternVL's: crops, then the thumbnail, between two marks."""

    def layout(self, height: int, width: int) -> Layout:
        """As many crops as the processor cuts."""
        return Layout(self.processor.get_number_of_image_patches(height, width, CROPPED))

    def pixels(self, pictures: Sequence[Any]) -> Tensor:
        """All views."""
        return self.processed(pictures, **CROPPED)["pixel_values"]

    def merged(self, x_NGD: Tensor) -> Tensor:
        """``pixel_shuffle``."""
        side = round(x_NGD.shape[1] ** 0.5)
        model = self.module.model
        found: Tensor = model.pixel_shuffle(x_NGD.unflatten(1, (side, side)), model.config.downsample_ratio)
        return found.flatten(1, 2)

    def text(self, layout: Layout, each: int) -> str:
        """One run of visual tokens."""
        assert self.tokenizer is not None
        tokenizer = self.tokenizer()
        start, end = (getattr(tokenizer, name, default) for name, default in INTERNVL_MARKS)
        return f"{start}{self.image * each * layout.views}{end}"


CROPPED = {"crop_to_patches": True}
"""What InternVL's processor tells its image processor, whatever that is saved with."""
INTERNVL_MARKS = (("start_image_token", "<img>"), ("end_image_token", "</img>"))


class IdeficsSide(MergedSide):
    """Idefics3's and SmolVLM's: rows of crops, each with its place in text, then the thumbnail."""

    @property
    def projector(self) -> nn.Module:
        """Behind the shuffle."""
        found: nn.Module = self.module.model.connector.modality_projection
        return found

    def layout(self, height: int, width: int) -> Layout:
        """Crops in rows and columns, or one view."""
        views, rows, columns = self.processor.get_number_of_image_patches(height, width, {})
        return Layout(max(views, 1), rows, columns)

    def pixels(self, pictures: Sequence[Any]) -> Tensor:
        """All views."""
        found: Tensor = self.processed([[picture] for picture in pictures])["pixel_values"]
        return found.flatten(0, 1)

    def merged(self, x_NGD: Tensor) -> Tensor:
        """``pixel_shuffle``."""
        connector = self.module.model.connector
        found: Tensor = connector.pixel_shuffle(x_NGD, connector.scale_factor)
        return found

    def text(self, layout: Layout, each: int) -> str:
        """``<row_1_col_1>`` before a crop, ``<global-img>`` before the thumbnail."""
        view = self.image * each
        rows = "".join(
            "".join(f"{AROUND}<row_{row}_col_{column}>{view}" for column in range(1, layout.columns + 1)) + "\n"
            for row in range(1, layout.rows + 1)
        )
        return f"{rows}\n{AROUND}<global-img>{view}{AROUND}" if rows else f"{AROUND}<global-img>{view}{AROUND}"


AROUND = "<fake_token_around_image>"


class Merged(VisionLanguageKind):
    """A class whose connector merges patches.

    Attributes:
        side_of: its visual side.
        prefix: tokens of its tower before the patches.
    """

    hooks = MERGED
    lacks = MERGED_LACKS
    side_of: ClassVar[type[MergedSide]]
    prefix: ClassVar[int] = 0

    @abstractmethod
    def scale(self, ref: str, config: Any) -> int:
        """Patches per side of a block. Raises Infeasible for no whole number."""

    @abstractmethod
    def cut_to(self, processor: Any) -> int:
        """Pixels per side of the processor's views."""

    def seen(self, ref: str, config: Any, source: Path) -> Seen:
        """A picture as large as a view has the crops that its processor gives it."""
        check_processor(ref, source, self.architecture)
        if not has_tokenizer(source):
            raise Infeasible(
                f"model {ref}: {self.architecture} writes text around the views of an image, and the folder holds no tokenizer.json; "
                "allowed: a checkpoint saved with its tokenizer"
            )
        vision, scale = config.vision_config, self.scale(ref, config)
        side, patch = whole(ref, vision, "image_size"), whole(ref, vision, "patch_size")
        layers = whole(ref, vision, "num_hidden_layers")
        layer = single_layer(ref, config, layers)
        processor = image_processor(source)
        if self.cut_to(processor) != side or side // patch % scale:
            raise Infeasible(
                f"model {ref}: its processor gives views of {self.cut_to(processor)} pixels, and its tower has {side // patch} x "
                f"{side // patch} patches of {patch} pixels, {scale} x {scale} of which become a token; allowed: views of {side} pixels that "
                "divide into such blocks"
            )
        grid = side // patch // scale
        views = self.side_of.layout(_Planned(processor), side, side).views  # type: ignore[arg-type]
        tokens = views * grid**2
        return Seen(grid, int(vision.hidden_size) * scale**2, layers, layer, views, 0, tokens)

    def side(self, module: Any, info: VlmInfo, source: Path, tokenizer: Callable[[], Any] | None) -> MergedSide:
        """With the checkpoint's processor and tokenizer."""
        processor, config = image_processor(source), module.config
        mean, std = (tuple(getattr(processor, name)) for name in ("image_mean", "image_std"))
        last = getattr(config, "vision_feature_layer", -1) == -1
        vision = Vision(self.tower(module), _side(config.vision_config.image_size), mean, std, self.prefix, last)
        return self.side_of(module, vision, info.geometry, processor, tokenizer)

    def tower(self, module: Any) -> nn.Module:
        """The vision tower of a loaded model."""
        found: nn.Module = module.model.vision_tower
        return found


class _Planned:
    """A side that has a processor and no model yet, to lay out a picture with."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor


class InternVl(Merged):
    """InternVL 2.5, 3 and 3.5 in transformers' form."""

    architecture = "InternVLForConditionalGeneration"
    side_of = InternVlSide
    prefix = 1

    def seen(self, ref: str, config: Any, source: Path) -> Seen:
        """Patches without the class token."""
        if config.vision_feature_select_strategy != "default":
            raise Infeasible(
                f"model {ref}: vision_feature_select_strategy = {config.vision_feature_select_strategy!r} does not give the patches of its "
                "tower; allowed: 'default'"
            )
        return super().seen(ref, config, source)

    def scale(self, ref: str, config: Any) -> int:
        """By the config's ratio."""
        ratio = config.downsample_ratio
        if not 0 < ratio <= 1 or round(1 / ratio) * ratio != 1:
            raise Infeasible(
                f"model {ref}: downsample_ratio = {ratio} in its config; allowed: one divided by a whole number"
            )
        return round(1 / ratio)

    def cut_to(self, processor: Any) -> int:
        """Square views."""
        return int(processor.size["height"])


class Idefics3(Merged):
    """Idefics3."""

    architecture = "Idefics3ForConditionalGeneration"
    side_of = IdeficsSide

    def scale(self, ref: str, config: Any) -> int:
        """The config's."""
        return whole(ref, config, "scale_factor")

    def cut_to(self, processor: Any) -> int:
        """Square views."""
        return int(processor.max_image_size["longest_edge"])

    def tower(self, module: Any) -> nn.Module:
        """Called the vision model."""
        found: nn.Module = module.model.vision_model
        return found


class SmolVlm(Idefics3):
    """SmolVLM and SmolVLM2, one picture."""

    architecture = "SmolVLMForConditionalGeneration"


def _side(size: Any) -> int:
    return int(size if isinstance(size, int) else size[0])
