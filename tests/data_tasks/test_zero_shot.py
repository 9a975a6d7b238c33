"""Images classified by the names of classes: the same as transformers' own comparison of images and texts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from isoflop.core.errors import UserError
from isoflop.core.folder_context import FolderContext
from isoflop.methods.base import build
from isoflop.models.family import family_of
from isoflop.models.zero_shot import ZeroShotModel
from isoflop.sweep.resolve import resolve
from isoflop.tasks.data.image_classes import ImageClasses
from isoflop.testing.architectures.vision import SIDE, save_classifier, small_classifier, small_tokenizer

FOLDERS = ("cat", "dog", "Ship")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for name in FOLDERS:
        (folder / name).mkdir()
        for number in range(3):
            Image.fromarray(rng.integers(0, 256, (SIDE, SIDE, 3)).astype("uint8")).save(folder / name / f"{number}.png")
    return folder


@pytest.fixture(scope="module", params=["CLIPModel", "SiglipModel"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dual") / "model"
    save_classifier(small_classifier(request.param), folder)
    return folder


def loaded(checkpoint: Path, tmp_path: Path) -> ZeroShotModel:
    ref = f"hf:{checkpoint}"
    model = family_of(ref).load(family_of(ref).info(ref, {}), None, FolderContext(tmp_path / "cache"))
    assert isinstance(model, ZeroShotModel)
    return model


def scores(task: ImageClasses, model: ZeroShotModel, tmp_path: Path) -> dict[int, tuple[float, float]]:
    found = {}
    for shard in task.evaluate(model, FolderContext(tmp_path), 0):
        found |= dict(zip(shard.ids.tolist(), zip(shard.errors, shard.metrics["nll"], strict=True), strict=True))
    return found


@pytest.mark.parametrize(
    "options", [{}, {"labels": ("dog", "ship", "cat", "a dog"), "prompt": "of {label} a photo"}, {"top": 2}]
)
def test_scores_are_those_of_transformers_own_model(
    options: dict[str, Any], photos: Path, checkpoint: Path, tmp_path: Path
) -> None:
    import transformers

    model, task = loaded(checkpoint, tmp_path), ImageClasses(data=str(photos), shard=4, **options)
    task.check(model.info)
    stock = getattr(transformers, json.loads((checkpoint / "config.json").read_text())["architectures"][0])
    stock = stock.from_pretrained(checkpoint).eval()
    siglip = "Siglip" in type(stock).__name__
    names = options.get("labels", ("Ship", "cat", "dog"))
    texts = [options.get("prompt", "a photo of a {label}").replace("{label}", name) for name in names]
    words = small_tokenizer(siglip)(texts, padding="max_length" if siglip else True, truncation=True, max_length=9, return_tensors="pt")  # fmt: skip
    mean, std = (torch.tensor(v)[:, None, None] for v in (model.info.pixel_mean, model.info.pixel_std))
    found = scores(task, model, tmp_path)
    assert len(found) == 9
    for example in task.examples():
        pixels = torch.from_numpy(np.asarray(Image.open(example.row["image"]), dtype=np.float32) / 255).permute(2, 0, 1)
        with torch.no_grad():
            logits_K = stock(pixel_values=((pixels - mean) / std)[None], **words).logits_per_image[0]
        right = [name.casefold() for name in names].index(example.row["label"].casefold())
        error, nll = found[example.id]
        assert error == float(right not in logits_K.topk(options.get("top", 1)).indices)
        assert nll == pytest.approx(float(-logits_K.log_softmax(-1)[right]), rel=1e-4, abs=1e-5)


def test_texts_are_embedded_once_and_cost_is_told_beside_that_of_an_image(
    photos: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, task = loaded(checkpoint, tmp_path), ImageClasses(data=str(photos), shard=2)
    calls = []
    named = type(model.module).named
    monkeypatch.setattr(type(model.module), "named", lambda self, inputs: calls.append(1) or named(self, inputs))
    scores(task, model, tmp_path)
    full = task.measure(model, FolderContext(tmp_path))
    assert len(calls) == 1
    assert full["flops_names"] > 0
    bare = model.dense_weight_bytes()
    projection = model.module.visual_projection
    width = projection.out_features if projection is not None else 24
    assert full["weight_bytes_dense"] == bare + 3 * width * model.info.dense_bits / 8
    assert model.resident_bytes() > 4 * sum(p.numel() for p in model.module.parameters())
    with build("tome", {"macs": 0.7}).apply(model, None):
        less = task.measure(model, FolderContext(tmp_path))
    assert less["flops"] < 0.75 * full["flops"]
    assert less["flops_names"] == full["flops_names"]
    with build("rtn", {"bits": 4, "group": 8}).apply(model, None):
        assert task.measure(model, FolderContext(tmp_path))["weight_bytes"] < 0.8 * full["weight_bytes"]
    assert model.module.classes_Kd is None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"labels": ("cat", "dgo", "ship")}, r"labels name no class 'dog' \(did you mean 'dgo'\?\); allowed: 0 … 2, cat, dgo, ship"),
        ({"prompt": "a photo"}, r"prompt = 'a photo' has no \{label\}"),
        ({"labels": ("cat",)}, "allowed: two classes or more"),
        ({"labels": ("cat", "dog", "Dog", "ship")}, "labels name 'dog' twice"),
        ({"labels": ("cat", "dog", " ")}, "names that are not empty"),
    ],
)  # fmt: skip
def test_wrong_names_are_refused(options: dict[str, Any], words: str, photos: Path, checkpoint: Path) -> None:
    info = family_of("hf:x").info(f"hf:{checkpoint}", {})
    with pytest.raises(UserError, match=words) as refused:
        ImageClasses(data=str(photos), **options).check(info)
    assert "\n" not in str(refused.value)


def test_a_model_without_a_tokenizer_and_one_without_a_head_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    small_classifier("CLIPModel").save_pretrained(tmp_path / "m")
    with pytest.raises(UserError, match=r"CLIPModel reads names of classes, and the checkpoint has no fast tokenizer"):
        family_of("hf:x").info(f"hf:{tmp_path / 'm'}", {})


def test_another_tokenizer_is_another_model(checkpoint: Path, tmp_path: Path) -> None:
    save_classifier(small_classifier("CLIPModel"), tmp_path / "m")
    before = family_of("hf:x").info(f"hf:{tmp_path / 'm'}", {}).version
    path = tmp_path / "m" / "tokenizer.json"
    path.write_text(path.read_text().replace('"cat"', '"cats"'))
    assert family_of("hf:x").info(f"hf:{tmp_path / 'm'}", {}).version != before


def test_options_that_came_later_leave_job_ids_as_they_were(photos: Path, checkpoint: Path, tmp_path: Path) -> None:
    def options(**given: Any) -> dict[str, Any]:
        entry = {"image-classes": {"data": str(photos), **given}}
        sweep = {"name": "x", "models": [f"hf:{checkpoint}"], "methods": ["none"], "tasks": [entry]}
        (tmp_path / "s.yaml").write_text(yaml.safe_dump(sweep))
        return dict(resolve(tmp_path / "s.yaml").task_options["image-classes"])

    assert not {"labels", "prompt"} & options().keys()
    assert options(prompt="a photo of a {label}") == options()
    assert options(labels=["cat", "dog", "ship"])["labels"] == ("cat", "dog", "ship")
