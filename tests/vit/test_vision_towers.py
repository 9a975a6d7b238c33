"""Every image classifier of transformers is exact with everything that may sit in it, or refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from isoflop.core.errors import Infeasible
from isoflop.core.folder_context import FolderContext
from isoflop.methods.base import build
from isoflop.methods.vit_tokens.base import counted_macs
from isoflop.methods.vit_tokens.schedule import model_macs
from isoflop.models.checkpoints.vision_towers import TOWERS
from isoflop.models.family import family_of
from isoflop.models.hooks import vision_pooling
from isoflop.models.resizing import pixels_of
from isoflop.models.vit import VitModel
from isoflop.tasks.data.images import opened
from isoflop.testing.architectures.vision import (
    VISION_CHECKS,
    classes,
    examine_vision,
    save_classifier,
    small_classifier,
)


@pytest.fixture(autouse=True)
def _quiet() -> None:
    transformers.logging.set_verbosity_error()


def saved(folder: Path, architecture: str, processor: dict[str, Any] | None = None, **changes: Any) -> VitModel:
    save_classifier(small_classifier(architecture, **changes), folder)
    if processor is not None:
        (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    ref = f"hf:{folder}"
    model = family_of(ref).load(family_of(ref).info(ref, {}), None, FolderContext(folder.parent / "stages"))
    assert isinstance(model, VitModel)
    return model


@pytest.mark.parametrize("architecture", classes())
def test_a_class_is_exact_or_refused_by_name(architecture: str, tmp_path: Path) -> None:
    found = examine_vision(architecture, tmp_path)
    if architecture in TOWERS:
        assert {name: str(finding) for name, finding in found.items()} == dict.fromkeys(VISION_CHECKS, "exact")
    else:
        assert {finding.verdict for finding in found.values()} == {"refused"}
        assert {f"{architecture} is not taken: " in finding.why for finding in found.values()} == {True}


@pytest.mark.parametrize("architecture", [name for name, tower in TOWERS.items() if tower.averages])
def test_a_head_that_averages_and_sees_no_sizes_is_found(
    architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vision_pooling, "weighted_by_size", lambda x_BNC, size_BN1, prefix: x_BNC)
    found = examine_vision(architecture, tmp_path, {"vision_blocks": VISION_CHECKS["vision_blocks"]})
    assert str(found["vision_blocks"]).startswith("wrong: merging equal tokens is off by")


def test_the_weighted_mean_is_over_what_the_tokens_stand_for() -> None:
    x_BNC = torch.tensor([[[9.0], [1.0], [4.0]]])
    found_BNC = vision_pooling.weighted_by_size(x_BNC, torch.tensor([[[1.0], [3.0], [1.0]]]), 1)
    assert found_BNC[0, 0] == 9
    assert found_BNC[:, 1:].mean() == pytest.approx((3 * 1 + 4) / 4)


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [*((name, {}) for name in TOWERS), ("Dinov2ForImageClassification", {"use_swiglu_ffn": True})],
)
def test_multiply_adds_are_those_that_are_counted(architecture: str, changes: dict[str, Any], tmp_path: Path) -> None:
    model = saved(tmp_path / "m", architecture, **changes)
    side = model.info.geometry["image_side"]
    image_1CHW = torch.zeros(1, 3, side, side)
    assert counted_macs(model, image_1CHW) == model_macs(model.info.geometry, (0, 0))
    method = build("tome", {"r": 4})
    with method.apply(model, None):
        scoring = model_macs(
            model.info.geometry, (4, 4), lambda patches, _: method.scoring_macs(model.info.geometry, patches, 4)
        )
        assert counted_macs(model, image_1CHW) == scoring


def test_a_processor_for_images_of_another_size_is_refused(tmp_path: Path) -> None:
    """A head on learned positions takes one size; only DINOv2 stretches them."""
    processor = {"size": {"height": 24, "width": 24}}
    with pytest.raises(Infeasible, match="gives images of 24 pixels a side, and ViTForImageClassification takes 16"):
        saved(tmp_path / "m", "ViTForImageClassification", processor)
    assert saved(tmp_path / "d", "Dinov2ForImageClassification", processor).info.geometry["patches"] == 36


def test_what_ranks_by_a_class_token_is_refused_where_there_is_none(tmp_path: Path) -> None:
    model = saved(tmp_path / "m", "SiglipForImageClassification")
    with pytest.raises(Infeasible, match=r"keeps what the class token attends to, and model .* has none"):
        build("vit-cls-topk", {"macs": 0.8}).check(model.info)
    for name in ("tome", "pitome", "vit-random"):
        build(name, {"macs": 0.8}).check(model.info)


PROCESSORS = {
    "Dinov2ForImageClassification": (
        "BitImageProcessorPil",
        {"size": {"shortest_edge": 14}, "crop_size": {"height": 12, "width": 12}, "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]},
    ),
    "SiglipForImageClassification": ("SiglipImageProcessorPil", {"size": {"height": 16, "width": 16}}),
    "CLIPForImageClassification": (
        "CLIPImageProcessorPil",
        {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}, "image_mean": [0.4, 0.5, 0.3], "do_normalize": False},
    ),
    "ViTMSNForImageClassification": ("ViTImageProcessorPil", {"size": {"height": 16, "width": 16}, "resample": 2}),
}  # fmt: skip


@pytest.mark.parametrize("file", ["preprocessor_config.json", "processor_config.json"])
@pytest.mark.parametrize("architecture", PROCESSORS)
def test_images_become_what_the_checkpoints_processor_makes_of_them(
    architecture: str, file: str, tmp_path: Path
) -> None:
    """DINOv2's cuts out images of another size than the one that its positions were trained for."""
    kind, settings = PROCESSORS[architecture]
    theirs = getattr(transformers, kind)(**settings)
    model = saved(tmp_path / "m", architecture)
    before, content = model.info.version, theirs.to_dict()
    (tmp_path / "m" / file).write_text(
        json.dumps(content if file.startswith("pre") else {"image_processor": content}, default=str)
    )
    ref = f"hf:{tmp_path / 'm'}"
    info = family_of(ref).info(ref, {})
    assert info.version != before
    model = family_of(ref).load(info, None, FolderContext(tmp_path / "stages"))  # type: ignore[assignment]
    stock = getattr(transformers, architecture).from_pretrained(tmp_path / "m").eval()
    values = np.random.default_rng(0).integers(0, 256, (30, 41, 3)).astype("uint8")
    Image.fromarray(values).save(tmp_path / "x.png")
    given = theirs(Image.open(tmp_path / "x.png"), return_tensors="pt")["pixel_values"]
    ours = pixels_of(opened(str(tmp_path / "x.png")), model.info.geometry["image_side"], model.info.resizing)
    torch.testing.assert_close(model.logits(ours[None]), stock(given).logits, atol=1e-5, rtol=1e-5)
    with build("tome", {"macs": 1.0}).apply(model, None):
        torch.testing.assert_close(model.logits(ours[None]), stock(given).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"do_resize": False}, "do_resize = false"),
        ({"do_rescale": False}, "do_rescale = false"),
        ({"rescale_factor": 1 / 127.5}, "rescale_factor = 0.0078"),
        ({"size": {"height": 16, "width": 32}}, "size = "),
        ({"size": {"shortest_edge": 16}, "do_center_crop": False}, "do_center_crop = false"),
    ],
)
def test_processors_that_do_something_else_are_refused(settings: dict[str, Any], what: str, tmp_path: Path) -> None:
    with pytest.raises(Infeasible, match=f"its image processor has {what}"):
        saved(tmp_path / "m", "ViTForImageClassification", settings)
