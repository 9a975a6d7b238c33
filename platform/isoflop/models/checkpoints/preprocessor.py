"""What a checkpoint's ``preprocessor_config.json`` says of images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from isoflop.models.resizing import Resizing


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
