"""A user's own images: what a checkpoint's processor makes of them, classes by name, and costs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from isoflop.core.errors import UserError
from isoflop.core.folder_context import FolderContext
from isoflop.methods.base import build
from isoflop.models.family import family_of
from isoflop.models.resizing import Resizing, pixels_of
from isoflop.models.vit import VitModel
from isoflop.tasks.data.image_classes import ImageClasses
from isoflop.tasks.data.images import opened

CLASSES = ["tabby, tabby cat", "goldfish", "pirate ship", "Tea Pot"]
RNG = np.random.default_rng(3)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder per class, images of different shapes and forms."""
    folder = tmp_path_factory.mktemp("photos")
    for number, name in enumerate(["tabby cat", "goldfish", "2", "tea pot"]):
        (folder / name).mkdir()
        for place, kind in enumerate(("png", "jpg", "bmp")):
            shape = (int(RNG.integers(20, 70)), int(RNG.integers(20, 70)), 3)
            values = RNG.integers(0, 256, shape).astype("uint8")
            Image.fromarray(values).save(folder / name / f"{number}-{place}.{kind}")
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import ViTConfig, ViTForImageClassification

    folder = tmp_path_factory.mktemp("vit") / "vit"
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=8,
        id2label=dict(enumerate(CLASSES)), label2id={name: n for n, name in enumerate(CLASSES)}, initializer_range=0.3,
    )  # fmt: skip
    ViTForImageClassification(config).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.25], "size": {"height": 32, "width": 32}, "resample": 2})
    )  # fmt: skip
    return folder


def model_of(checkpoint: Path, tmp_path: Path) -> VitModel:
    ref = f"hf:{checkpoint}"
    model = family_of(ref).load(family_of(ref).info(ref, {}), None, FolderContext(tmp_path / "cache"))
    assert isinstance(model, VitModel)
    return model


@pytest.mark.parametrize(
    ("processor", "settings", "resizing"),
    [
        ("ViTImageProcessorPil", {"size": {"height": 32, "width": 32}}, Resizing(32, False, 2)),
        ("DeiTImageProcessorPil", {"size": {"height": 40, "width": 40}, "crop_size": {"height": 32, "width": 32}}, Resizing(40)),
        ("CLIPImageProcessorPil", {"size": {"shortest_edge": 36}, "crop_size": {"height": 32, "width": 32}}, Resizing(36, True)),
    ],
)  # fmt: skip
def test_pixels_are_those_of_hugging_faces_processors(
    photos: Path, processor: str, settings: dict, resizing: Resizing
) -> None:
    import transformers

    theirs = getattr(transformers, processor)(**settings, image_mean=[0, 0, 0], image_std=[1, 1, 1], do_normalize=False)
    for path in sorted(photos.glob("*/*.png")):
        expected = theirs(Image.open(path).convert("RGB"), return_tensors="pt")["pixel_values"][0]
        np.testing.assert_allclose(pixels_of(opened(str(path)), 32, resizing).numpy(), expected.numpy(), atol=1e-6)


def test_scores_are_those_of_the_hugging_face_model(photos: Path, checkpoint: Path, tmp_path: Path) -> None:
    from transformers import ViTForImageClassification, ViTImageProcessorPil

    model = model_of(checkpoint, tmp_path)
    processor = ViTImageProcessorPil.from_pretrained(checkpoint)
    stock = ViTForImageClassification.from_pretrained(checkpoint).eval()
    for top in (1, 2):
        task = ImageClasses(data=str(photos), top=top, shard=5)
        task.check(model.info)
        rows = {e.id: e.row for e in task.examples()}
        assert len(rows) == 12
        for shard in task.evaluate(model, FolderContext(tmp_path), 0):
            for n, number in enumerate(shard.ids.tolist()):
                row = rows[number]
                with torch.no_grad():
                    pixels = processor(Image.open(row["image"]).convert("RGB"), return_tensors="pt")["pixel_values"]
                    logits = stock(pixels).logits[0]
                label = {"tabby cat": 0, "goldfish": 1, "2": 2, "tea pot": 3}[row["label"]]
                assert shard.errors[n] == float(label not in logits.topk(top).indices)
                nll = float(-logits.log_softmax(-1)[label])
                assert shard.metrics["nll"][n] == pytest.approx(nll, rel=1e-3, abs=1e-4)


def test_a_table_with_paths_is_the_same_as_a_folder(photos: Path, tmp_path: Path) -> None:
    shutil.copytree(photos, tmp_path / "moved")
    rows = [
        {"file": str(p.relative_to(tmp_path)), "kind": p.parent.name} for p in sorted((tmp_path / "moved").glob("*/*"))
    ]
    (tmp_path / "table.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = ImageClasses(data=str(tmp_path / "table.jsonl"), image="file", label="kind")
    assert len(table.examples()) == 12
    assert {Path(e.row["file"]).exists() for e in table.examples()} == {True}


def test_images_are_named_by_content_and_class(photos: Path, tmp_path: Path) -> None:
    first = ImageClasses(data=str(photos)).content()
    shutil.copytree(photos, tmp_path / "b")
    for number, path in enumerate(sorted((tmp_path / "b").glob("*/*"))):
        path.rename(path.with_name(f"renamed{number}{path.suffix}"))
    assert ImageClasses(data=str(tmp_path / "b")).content() == first
    (tmp_path / "b" / "2").rename(tmp_path / "b" / "goldfish2")
    assert ImageClasses(data=str(tmp_path / "b")).content() != first


def test_wrong_classes_and_files_are_refused(photos: Path, checkpoint: Path, tmp_path: Path) -> None:
    info = family_of("hf:x").info(f"hf:{checkpoint}", {})
    shutil.copytree(photos, tmp_path / "b")
    (tmp_path / "b" / "goldfish").rename(tmp_path / "b" / "golfish")
    with pytest.raises(UserError, match=r"has no class 'golfish' \(did you mean 'goldfish'\?\); allowed: 0 … 3, tabby"):
        ImageClasses(data=str(tmp_path / "b")).check(info)
    bad = tmp_path / "c" / "goldfish"
    bad.mkdir(parents=True)
    (bad / "x.png").write_bytes(b"no image")
    task = ImageClasses(data=str(tmp_path / "c"))
    task.check(info)
    with pytest.raises(UserError, match=r"x\.png: cannot be read"):
        list(task.evaluate(model_of(checkpoint, tmp_path), FolderContext(tmp_path), 0))
    (tmp_path / "t.csv").write_text("image,label\nnowhere.png,goldfish\n")
    with pytest.raises(UserError, match=r"nowhere\.png: No such file"):
        ImageClasses(data=str(tmp_path / "t.csv")).check(info)


def test_token_methods_and_codecs_act_on_a_users_images(photos: Path, checkpoint: Path, tmp_path: Path) -> None:
    model = model_of(checkpoint, tmp_path)
    task, ctx = ImageClasses(data=str(photos)), FolderContext(tmp_path)
    full = task.measure(model, ctx)
    with build("tome", {}).apply(model, None):
        assert task.measure(model, ctx)["flops"] < full["flops"]
        assert len(list(task.evaluate(model, ctx, 0))) == 1
    codec = build("jpeg", {"quality": 20})
    with codec.apply(model, None):
        (shard,) = task.evaluate(model, ctx, 0)
        assert set(shard.metrics) == {"nll", "mse", "psnr", "ssim"}
        task.measure(model, ctx)
        found = codec.footprint(model, ctx)
    assert found["raw_bytes"] == 3 * 32 * 32
    assert found["ratio"] == found["raw_bytes"] / found["codec_bytes"] > 1
