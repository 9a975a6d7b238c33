"""What a checkpoint's image processor does: ``preprocessor_config.json``, or the image part of ``processor_config.json``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from isoflop.core.errors import Infeasible
from isoflop.models.checkpoints.stored import read_json, value_of
from isoflop.models.resizing import Resizing

RESCALED = 1 / 255


def read_preprocessor(source: Path | None) -> dict[str, Any]:
    """The file, or what ``processor_config.json`` says of images in its place; nothing where there is neither."""
    if source is None:
        return {}
    path, within = source / "preprocessor_config.json", source / "processor_config.json"
    stored: dict[str, Any] = {}
    if path.exists():
        stored = read_json(path, dict)
    elif within.exists():
        stored = value_of(read_json(within, dict), "image_processor", dict, {}, within)
    return stored


def resizing_of(source: Path | None) -> Resizing:
    """As Hugging Face's processors read their ``size``."""
    stored = read_preprocessor(source)
    size, resample = stored.get("size"), stored.get("resample")
    resample = Resizing.resample if resample is None else int(resample)
    if isinstance(size, dict) and size.get("shortest_edge"):
        return Resizing(int(size["shortest_edge"]), True, resample)
    if isinstance(size, dict) and size.get("height"):
        return Resizing(int(size["height"]), False, resample)
    return Resizing(size if isinstance(size, int) else None, False, resample)


def side_of(stored: dict[str, Any]) -> int | None:
    """Side of the square images that a processor gives; None where it does not say."""
    cut = stored.get("crop_size") if stored.get("do_center_crop", "crop_size" in stored) else None
    size = cut or stored.get("size")
    if isinstance(size, dict):
        size = size.get("height") or size.get("shortest_edge")
    return int(size) if size is not None else None


def normalisation_of(
    stored: dict[str, Any], mean: tuple[float, ...], std: tuple[float, ...]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation by which values in [0, 1] are shifted and divided.

    Args:
        stored: of the processor.
        mean, std: where it does not say.
    """
    if not stored.get("do_normalize", True):
        return (0.0,) * len(mean), (1.0,) * len(std)
    return tuple(stored.get("image_mean") or mean), tuple(stored.get("image_std") or std)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _pixels(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _sides(value: Any) -> bool:
    sides = [side for side in value.values() if side is not None] if isinstance(value, dict) else [value]
    return bool(sides) and all(map(_pixels, sides))


def _channels(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_number, value))


_SETTINGS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "size": (_sides, "pixels of a side, or an object of them"),
    "crop_size": (_sides, "pixels of a side, or an object of them"),
    "rescale_factor": (_number, "a number"),
    "resample": (lambda value: value in range(6), "one of Pillow's filters, 0 to 5"),
    "image_mean": (_channels, "a list of a number for each channel"),
    "image_std": (
        lambda value: _channels(value) and 0 not in value,
        "a list of a number for each channel, none of them 0",
    ),
}
"""Settings that are computed with: what fits, and how it is told."""


def check_preprocessor(ref: str, stored: dict[str, Any]) -> None:
    """Refuse settings that images here do not go through.

    Raises:
        Infeasible: names the setting.
    """
    for key, (fits, allowed) in _SETTINGS.items():
        value = stored.get(key)
        if value is not None and not fits(value):
            raise Infeasible(f"model {ref}: its image processor has {key} = {value!r}; allowed: {allowed}")
    size = stored.get("size")
    for wrong, what in (
        (not stored.get("do_resize", True), "do_resize = false"),
        (not stored.get("do_rescale", True), "do_rescale = false"),
        (
            abs((stored.get("rescale_factor") or RESCALED) - RESCALED) > 1e-9,
            f"rescale_factor = {stored.get('rescale_factor')}",
        ),
        (bool(stored.get("do_pad")), "do_pad = true"),
        (isinstance(size, dict) and size.get("height") != size.get("width"), f"size = {size}"),
        (isinstance(size, dict) and bool(size.get("longest_edge")), f"size = {size}"),
        (
            isinstance(size, dict) and bool(size.get("shortest_edge")) and not stored.get("do_center_crop", True),
            "do_center_crop = false with a shortest_edge",
        ),
    ):
        if wrong:
            raise Infeasible(
                f"model {ref}: its image processor has {what}; allowed: images that are resized, cut to a square and divided by 255"
            )
