"""What is known of a class of vision-language models: how its config is read, and its visual side."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from isoflop.core.errors import Infeasible, UserError
from isoflop.core.hook import Hook
from isoflop.models.checkpoints.preprocessor import check_preprocessor, read_preprocessor, resizing_of, side_of
from isoflop.models.checkpoints.source import brief
from isoflop.models.features import PREFIX_TOKENS, Vision, vision_of
from isoflop.models.hooks.pixels import PIXELS
from isoflop.models.hooks.vision_blocks import VISION_BLOCKS
from isoflop.models.resizing import SQUEEZED, Resizing
from isoflop.models.visual_side import VisualSide
from isoflop.models.vlm_info import HOOKS, VlmInfo


@dataclass(frozen=True)
class Seen:
    """What a config says of the visual side.

    Attributes:
        grid: tokens per side of a view as they enter the projector.
        width: of these tokens.
        layers: of the tower.
        feature_layer: the hidden state that feeds the projector, from 0 (the embedding).
        views, newlines, image_tokens, square, resizing: see ``VlmInfo``.
    """

    grid: int
    width: int
    layers: int
    feature_layer: int
    views: int = 1
    newlines: int = 0
    image_tokens: int | None = None
    square: bool = True
    resizing: Resizing = SQUEEZED


LACKS = {PIXELS.name: "images reach it through its own processor, and codecs are tried on image classifiers"}
"""What no class offers."""


class VisionLanguageKind(ABC):
    """A class of vision-language models.

    Attributes:
        architecture: its name.
        hooks: what its models offer.
        lacks: why not other places, by their names.
        lessons: images in [0, 1] of the built-in worlds can be shown to it, so that methods can be trained for it.
    """

    architecture: ClassVar[str]
    hooks: ClassVar[frozenset[Hook[Any]]] = HOOKS
    lacks: ClassVar[dict[str, str]] = LACKS
    lessons: ClassVar[bool] = False

    @abstractmethod
    def seen(self, ref: str, config: Any, source: Path) -> Seen:
        """What a config says. Raises Infeasible for one that cannot be followed."""

    @abstractmethod
    def side(self, module: Any, info: VlmInfo, source: Path, tokenizer: Callable[[], Any] | None) -> VisualSide:
        """The visual side of a loaded model."""


MERGED = HOOKS - {VISION_BLOCKS}
"""Hooks of a class whose connector merges neighbouring patches."""
MERGED_LACKS = {**LACKS, VISION_BLOCKS.name: "its connector merges neighbouring patches, which must all be there"}


def single_layer(ref: str, config: Any, layers: int) -> int:
    """Number of the hidden state that feeds the projector. Raises Infeasible where it reads several."""
    if not isinstance(getattr(config, "vision_feature_layer", -1), int):
        raise Infeasible(
            f"model {ref}: its projector reads several vision layers ({config.vision_feature_layer}); allowed: one layer"
        )
    layer: int = getattr(config, "vision_feature_layer", -1)
    if not -layers - 1 <= layer <= layers:
        raise Infeasible(
            f"model {ref}: vision_feature_layer = {layer}, and its tower has {layers} layers; allowed: {-layers - 1} to {layers}"
        )
    return layer % (layers + 1)


def whole(ref: str, config: Any, key: str) -> int:
    """A size that a config holds, or the same size twice, for height and width. Raises Infeasible for anything else."""
    value = given = getattr(config, key, None)
    if isinstance(value, list | tuple) and value and all(side == value[0] for side in value):
        value = value[0]
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise Infeasible(f"model {ref}: {key} = {given!r} in its config; allowed: a whole number from 1")
    return value


def check_tower(ref: str, config: Any) -> None:
    """Raise Infeasible for a tower of an unknown type, and where the projector does not read the tower's patches."""
    vision = config.vision_config
    patches_of(ref, vision)
    # stock code cuts one token with 'default', whatever it is
    strategy = "default" if PREFIX_TOKENS[vision.model_type] else "full"
    if config.vision_feature_select_strategy != strategy:
        raise Infeasible(
            f"model {ref}: vision_feature_select_strategy = {config.vision_feature_select_strategy!r} does not give the patches of a "
            f"tower of the type {vision.model_type}; allowed: {strategy!r}"
        )


def patches_of(ref: str, vision: Any) -> int:
    """Tokens before the patches of a tower. Raises Infeasible where its type is unknown."""
    if vision.model_type not in PREFIX_TOKENS:
        raise Infeasible(
            f"model {ref}: nothing is known of vision towers of the type {vision.model_type}; allowed: {', '.join(PREFIX_TOKENS)}"
        )
    return PREFIX_TOKENS[vision.model_type]


def check_processor(ref: str, source: Path, architecture: str) -> None:
    """Raise Infeasible where a folder does not say how images are processed."""
    if not read_preprocessor(source):
        raise Infeasible(
            f"model {ref}: {architecture} takes images as its processor makes them, and the folder holds no preprocessor_config.json; "
            "allowed: a checkpoint saved with its processor"
        )


def square_views(ref: str, source: Path, architecture: str, side: int) -> Resizing:
    """How pictures become the one view of a class, pixels a side.

    Raises:
        Infeasible: the folder does not say, its processor does something else with pictures, or gives them another size.
    """
    check_processor(ref, source, architecture)
    stored = read_preprocessor(source)
    check_preprocessor(ref, stored)
    given = side_of(stored) or side
    if given != side:
        raise Infeasible(f"model {ref}: its processor gives views of {given} pixels, and its tower takes {side}")
    return resizing_of(source)


def image_processor(source: Path) -> Any:
    """Transformers' own image processor of a checkpoint, on PIL and numpy: the same numbers wherever it runs.

    Raises:
        UserError: transformers knows no such processor, or refuses its values.
    """
    from transformers import AutoImageProcessor

    try:
        return AutoImageProcessor.from_pretrained(source, local_files_only=True, backend="pil")
    except Exception as error:  # each processor checks its values in a way of its own
        raise UserError(
            f"{source / 'preprocessor_config.json'}: transformers makes no image processor of it ({brief(error)})"
        ) from error


class Llava(VisionLanguageKind):
    """LLaVA-1.5: one square view, an MLP on each patch."""

    architecture = "LlavaForConditionalGeneration"
    lessons = True

    def seen(self, ref: str, config: Any, source: Path) -> Seen:
        """A CLIP or SigLIP tower."""
        vision = config.vision_config
        layers, side = whole(ref, vision, "num_hidden_layers"), whole(ref, vision, "image_size")
        layer = single_layer(ref, config, layers)
        check_tower(ref, config)
        resizing = square_views(ref, source, self.architecture, side)
        grid = side // whole(ref, vision, "patch_size")
        return Seen(grid, int(vision.hidden_size), layers, layer, resizing=resizing)

    def side(self, module: Any, info: VlmInfo, source: Path, tokenizer: Callable[[], Any] | None) -> VisualSide:
        """The plain one."""
        vision: Vision = vision_of(module.model.vision_tower, source)
        return VisualSide(module, vision, info.geometry, info.resizing)
