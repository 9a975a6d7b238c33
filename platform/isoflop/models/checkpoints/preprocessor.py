"""What a checkpoint's image processor does: ``preprocessor_config.json``, or the image part of ``processor_config.json``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from isoflop.core.errors import Infeasible
from isoflop.models.resizing import Resizing

RESCALED = 1 / 255


def read_preprocessor(source: Path | None) -> dict[str, Any]:
    """The file, or what ``processor_config.json`` says of images in its place; nothing where there is neither."""
    if source is None:
        return {}
    path, within = source / "preprocessor_config.json", source / "processor_config.json"
    stored: dict[str, Any] = {}
    if path.exists():
        stored = json.loads(path.read_text())
    elif within.exists():
        stored = json.loads(within.read_text()).get("image_processor") or {}
    return stored


def resizing_of(source: Path | None) -> Resizing:
    """As Hugging Face's processors read their ``size``."""
    stored = read_preprocessor(source)
    size, resample = stored.get("size"), int(stored.get("resample", Resizing.resample))
    if isinstance(size, dict) and "shortest_edge" in size:
        return Resizing(int(size["shortest_edge"]), True, resample)
    if isinstance(size, dict) and "height" in size:
        return Resizing(int(size["height"]), False, resample)
    return Resizing(size if isinstance(size, int) else None, False, resample)


def side_of(stored: dict[str, Any]) -> int | None:
    """Side of the square images that a processor gives; None where it does not say."""
    cut = stored.get("crop_size") if stored.get("do_center_crop", "crop_size" in stored) else None
    size = cut or stored.get("size")
    if isinstance(size, dict):
        size = size.get("height", size.get("shortest_edge"))
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
    return tuple(stored.get("image_mean", mean)), tuple(stored.get("image_std", std))


def check_preprocessor(ref: str, stored: dict[str, Any]) -> None:
    """Refuse settings that images here do not go through.

    Raises:
        Infeasible: names the setting.
    """
    size = stored.get("size")
    for wrong, what in (
        (not stored.get("do_resize", True), "do_resize = false"),
        (not stored.get("do_rescale", True), "do_rescale = false"),
        (
            abs(stored.get("rescale_factor", RESCALED) - RESCALED) > 1e-9,
            f"rescale_factor = {stored.get('rescale_factor')}",
        ),
        (bool(stored.get("do_pad")), "do_pad = true"),
        (isinstance(size, dict) and size.get("height") != size.get("width"), f"size = {size}"),
        (isinstance(size, dict) and "longest_edge" in size, f"size = {size}"),
        (
            isinstance(size, dict) and "shortest_edge" in size and not stored.get("do_center_crop", True),
            "do_center_crop = false with a shortest_edge",
        ),
    ):
        if wrong:
            raise Infeasible(
                f"model {ref}: its image processor has {what}; allowed: images that are resized, cut to a square and divided by 255"
            )
