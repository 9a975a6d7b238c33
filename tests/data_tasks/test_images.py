"""Image files as transformers opens them, whichever way the camera was held."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image
from transformers.image_utils import load_image

from isoflop.tasks.data.images import digest, opened, size_of

KINDS = ("jpg", "png", "webp", "tif", "bmp")
VALUES = np.random.default_rng(5).integers(0, 256, (6, 10, 3)).astype("uint8")


def saved(path: Path, orientation: int | None) -> Path:
    picture, exif = Image.fromarray(VALUES), Image.Exif()
    if orientation is None:
        picture.save(path)
        return path
    exif[ExifTags.Base.Orientation] = orientation
    picture.save(path, exif=exif)
    return path


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("orientation", [None, *range(1, 9)])
def test_pictures_stand_as_they_were_taken(kind: str, orientation: int | None, tmp_path: Path) -> None:
    if kind == "bmp" and orientation is not None:
        return  # holds no EXIF data
    path = saved(tmp_path / f"a.{kind}", orientation)
    expected = np.asarray(load_image(str(path)))
    assert expected.shape == ((10, 6, 3) if (orientation or 1) > 4 else (6, 10, 3))
    for value in (str(path), path.read_bytes(), {"bytes": path.read_bytes()}, {"path": str(path)}, Image.open(path)):
        np.testing.assert_array_equal(np.asarray(opened(value)), expected)
        assert size_of(value) == opened(value).size


def test_an_image_that_is_not_turned_keeps_its_name(tmp_path: Path) -> None:
    plain, turned = saved(tmp_path / "a.png", None), saved(tmp_path / "b.png", 6)
    assert digest(Image.open(plain), "d") == digest(Image.fromarray(VALUES), "d")
    assert digest(Image.open(turned), "d") != digest(Image.fromarray(VALUES), "d")
