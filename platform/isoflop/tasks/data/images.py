"""Image files: what is read of them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from isoflop.core.errors import UserError
from isoflop.core.hashing import file_hash
from isoflop.core.public import local_path
from isoflop.core.rows import HUB, Rows, named, read, suffix_of

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")

_LYING = (5, 6, 7, 8)
"""Orientations in EXIF data by which height and width change places."""


def image_rows(data: str, split: str, image: str) -> Rows:
    """Rows with images: of a table with a field of paths (or of images, in Parquet and hub data), or of a folder per class.

    A row of a folder has the fields ``image`` (path) and ``label`` (the folder's name). Rows are named by the content of their
    images, so that files may be renamed and moved.

    Args:
        image: the field of a table that holds paths, relative to the table.

    Raises:
        UserError: no images, a table without the field, a path that leads nowhere.
    """
    path = local_path(data, f"data {data}")
    if not data.startswith(HUB) and path.is_dir() and (files := _pictures(path, split)):
        return _of_folder(tuple((f, f.stat().st_size, f.stat().st_mtime_ns) for f in files), data, path)
    rows = read(data, split)
    rows.require(image, "image", "on images")
    base = path if path.is_dir() else path.parent
    found, keys = [], []
    for row in rows.rows:
        value = row.get(image)
        placed = {**row, image: str(base / value)} if isinstance(value, str) else dict(row)
        rest = {name: field for name, field in row.items() if name != image}
        found.append(placed)
        keys.append(f"{digest(placed[image], data)}:{sorted(rest.items(), key=lambda kv: kv[0])!r}")
    return named(found, data, keys)


def opened(value: Any) -> Any:
    """A PIL image in RGB, upright, of a path, of bytes, of what Parquet and hubs hold, or of an image.

    As transformers' ``load_image`` does, it is turned as its EXIF data say that it was taken.

    Raises:
        UserError: it cannot be read as an image.
    """
    from PIL import ImageOps

    picture = _open(value)
    try:
        return ImageOps.exif_transpose(picture).convert("RGB")
    except (OSError, ValueError) as error:
        raise _unreadable(value, error) from None


def size_of(value: Any) -> tuple[int, int]:
    """Width and height of what ``opened`` gives, without decoding more than is needed.

    Raises:
        UserError: it cannot be read as an image.
    """
    from PIL import ExifTags

    picture = _open(value)
    try:
        # Pillow turns TIFF files by itself
        lies = picture.format != "TIFF" and picture.getexif().get(ExifTags.Base.Orientation) in _LYING
    except (OSError, ValueError) as error:
        raise _unreadable(value, error) from None
    width, height = reversed(picture.size) if lies else picture.size
    return int(width), int(height)


def _open(value: Any) -> Any:
    import io

    from PIL import Image, UnidentifiedImageError

    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    try:
        if isinstance(value, Image.Image):
            return value
        return Image.open(io.BytesIO(value) if isinstance(value, bytes) else value)
    except (OSError, UnidentifiedImageError, ValueError, AttributeError) as error:
        raise _unreadable(value, error) from None


def _unreadable(value: Any, error: Exception) -> UserError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return UserError(f"image {shown(value)}: cannot be read ({reason})")


def shown(value: Any) -> str:
    """An image in messages: its path, or its type."""
    path = value.get("path") if isinstance(value, Mapping) else value
    return path if isinstance(path, str) else type(value).__name__


def _pictures(folder: Path, split: str) -> list[Path]:
    root = folder / split if split and (folder / split).is_dir() else folder
    found = [
        p for p in sorted(root.glob("*/*")) if p.is_file() and suffix_of(p) in PICTURES and not p.name.startswith(".")
    ]
    return [p for p in found if not p.parent.name.startswith(".")]


@lru_cache(maxsize=8)  # by size and time of change
def _of_folder(files: tuple[tuple[Path, int, int], ...], name: str, root: Path) -> Rows:
    rows = [{"image": str(path), "label": path.parent.name} for path, _, _ in files]
    return named(rows, name, [f"{digest(row['image'], name)}:{row['label']}" for row in rows])


def digest(value: Any, data: str) -> str:
    """Names an image by its content: a path, bytes, what Parquet and hubs hold, or a PIL image.

    Args:
        data: for messages.
    """
    if isinstance(value, str):
        try:
            return file_hash(Path(value))
        except OSError as error:
            raise UserError(f"data {data}: image {value}: {error.strerror or error}") from None
    if isinstance(value, Mapping) and isinstance(value.get("bytes"), bytes):
        return hashlib.sha256(value["bytes"]).hexdigest()
    return hashlib.sha256(opened(value).tobytes()).hexdigest()
