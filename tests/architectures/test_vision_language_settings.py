"""Settings of vision-language checkpoints: what a class computes with is followed, or refused in one line."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from isoflop.core.errors import UserError
from isoflop.models.family import family_of
from isoflop.testing import small_vision_language
from isoflop.testing.architectures.vision_language import one_pass, step_by_step, vision_language_subject
from isoflop.testing.small_vision_language import SMALL, TEXT, byte_tokenizer, save_small

PLAIN = ("LlavaForConditionalGeneration", "PaliGemmaForConditionalGeneration")
"""Classes whose pictures become one view, without transformers' processor."""
NEXT, ONE, INTERN = (f"{name}ForConditionalGeneration" for name in ("LlavaNext", "LlavaOnevision", "InternVL"))
IDEFICS, QWEN = "Idefics3ForConditionalGeneration", "Qwen2VLForConditionalGeneration"


@pytest.fixture(autouse=True)
def _quiet() -> None:
    transformers.logging.set_verbosity_error()


@pytest.fixture(scope="module")
def described(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A folder with everything of a small checkpoint except weights."""
    root = tmp_path_factory.mktemp("described")

    def folder(architecture: str) -> Path:
        found = root / architecture
        if not found.exists():
            small, tokenizer = SMALL[architecture], byte_tokenizer()
            config = small.config(tokenizer)
            config.architectures = [architecture]
            config.save_pretrained(found)
            tokenizer.save_pretrained(found)
            getattr(transformers, small.processor)(**small.settings).save_pretrained(found)
        return found

    return folder


def refusal(folder: Path) -> str:
    """The one line with which a checkpoint is refused."""
    with pytest.raises(UserError) as refused:
        family_of("hf:").info(f"hf:{folder}", {})
    assert "\n" not in str(refused.value)
    return str(refused.value)


def changed(source: Path, folder: Path, file: str, **values: Any) -> Path:
    """The same checkpoint with other values in one of its files."""
    shutil.copytree(source, folder)
    stored = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**stored, **values}))
    return folder


@pytest.mark.parametrize("architecture", SMALL)
def test_a_processor_that_is_missing_or_broken(
    architecture: str, described: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = tmp_path / "m"
    shutil.copytree(described(architecture), folder)
    family_of("hf:").info(f"hf:{folder}", {})
    file = folder / "preprocessor_config.json"
    for content, told in (
        ("{", f"{file} is no valid JSON"),
        ("[1]", f"{file} holds a JSON value of the type list; allowed: an object"),
        ("{}", "the folder holds no preprocessor_config.json; allowed: a checkpoint saved with its processor"),
    ):
        file.write_text(content)
        assert told in refusal(folder)
    file.unlink()
    assert told in refusal(folder)


@pytest.mark.parametrize("architecture", PLAIN)
@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"do_resize": False}, "do_resize = false"),
        ({"do_rescale": False}, "do_rescale = false"),
        ({"rescale_factor": 1 / 127.5}, "rescale_factor = 0.00784"),
        ({"rescale_factor": "a"}, "rescale_factor = 'a'; allowed: a number"),
        ({"do_center_crop": False, "size": {"shortest_edge": 24}}, "do_center_crop = false with a shortest_edge"),
        ({"size": {"height": 24, "width": 48}}, "size = {'height': 24, 'width': 48}"),
        ({"size": "24"}, "size = '24'; allowed: pixels of a side"),
        ({"do_center_crop": True, "crop_size": {"height": 20, "width": 20}}, "gives views of 20 pixels, and its tower takes 24"),
        ({"image_std": [0.5, 0, 0.5]}, "image_std = [0.5, 0, 0.5]; allowed: a list of a number for each channel"),
        ({"resample": "cubic"}, "resample = 'cubic'; allowed: one of Pillow's filters"),
    ],
)  # fmt: skip
def test_what_images_do_not_go_through_is_refused(
    architecture: str, values: dict[str, Any], told: str, described: Callable[[str], Path], tmp_path: Path
) -> None:
    assert told in refusal(changed(described(architecture), tmp_path / "m", "preprocessor_config.json", **values))


@pytest.mark.parametrize("architecture", PLAIN)
@pytest.mark.parametrize("values", [{"do_normalize": False}, {"image_mean": [0.1, 0.2, 0.3]}])
def test_normalisation_is_that_of_transformers(architecture: str, values: dict[str, Any], tmp_path: Path) -> None:
    def save(name: str, folder: Path) -> Any:
        stock = save_small(name, folder)
        file = folder / "preprocessor_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **values}))
        return stock

    subject = vision_language_subject(architecture, tmp_path, save)
    side = subject.model.side
    processor = transformers.AutoImageProcessor.from_pretrained(subject.folder, backend="pil")
    expected = processor(images=subject.pictures, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(side.vision.preprocess(side.pixels(subject.pictures)), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("architecture", "values", "told"),
    [
        (INTERN, {"vision_feature_layer": [-2, -1]}, "reads several vision layers ([-2, -1]); allowed: one layer"),
        (INTERN, {"vision_feature_layer": 9}, "vision_feature_layer = 9, and its tower has 3 layers; allowed: -4 to 3"),
        (INTERN, {"downsample_ratio": 0.0}, "downsample_ratio = 0.0 in its config; allowed: one divided by a whole"),
        (INTERN, {"downsample_ratio": 0.4}, "downsample_ratio = 0.4 in its config; allowed: one divided by a whole"),
        (IDEFICS, {"scale_factor": 0}, "scale_factor = 0 in its config; allowed: a whole number from 1"),
        (ONE, {"vision_aspect_ratio": "anyres"}, "vision_aspect_ratio = 'anyres' in its config; allowed: anyres_max_"),
        (ONE, {"image_grid_pinpoints": []}, "image_grid_pinpoints = [] in its config; allowed: a list of heights and"),
        (NEXT, {"image_grid_pinpoints": []}, "image_grid_pinpoints = [] in its config; allowed: a list of heights and"),
        (NEXT, {"image_grid_pinpoints": [[24]]}, "image_grid_pinpoints = [[24]] in its config"),
        (NEXT, {"image_grid_pinpoints": [[30, 50]]}, "allowed: a list of heights and widths that are multiples of 24"),
        (NEXT, {"vision_feature_layer": -9}, "vision_feature_layer = -9, and its tower has 3 layers"),
    ],
)
def test_values_that_a_class_computes_with(
    architecture: str, values: dict[str, Any], told: str, described: Callable[[str], Path], tmp_path: Path
) -> None:
    assert told in refusal(changed(described(architecture), tmp_path / "m", "config.json", **values))


@pytest.mark.parametrize("architecture", SMALL)
@pytest.mark.parametrize("key", ["image_size", "patch_size", "spatial_merge_size", "num_hidden_layers", "depth"])
def test_sizes_of_no_pixels(architecture: str, key: str, described: Callable[[str], Path], tmp_path: Path) -> None:
    source = described(architecture)
    vision = json.loads((source / "config.json").read_text())["vision_config"]
    if key not in vision:
        return
    folder = changed(source, tmp_path / "m", "config.json", vision_config={**vision, key: 0})
    told = refusal(folder)
    assert key in told or "transformers cannot read it" in told


def test_settings_of_processors_that_classes_compute_with(described: Callable[[str], Path], tmp_path: Path) -> None:
    file = "preprocessor_config.json"
    for number, (architecture, values) in enumerate(
        [
            (INTERN, {"size": {"shortest_edge": 24}}),
            (IDEFICS, {"max_image_size": {"height": 24, "width": 24}}),
            (NEXT, {"image_grid_pinpoints": [24]}),
            (QWEN, {"merge_size": 0}),
            (QWEN, {"patch_size": 14}),
            (QWEN, {"size": {"shortest_edge": "a"}}),
        ]
    ):
        assert refusal(changed(described(architecture), tmp_path / str(number), file, **values))


def test_both_caps_of_a_second_paligemma(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its text model is Gemma 2, which caps the logits of its attention; PaliGemma caps those of the head."""
    name = "PaliGemmaForConditionalGeneration"

    def config(tokenizer: Any) -> Any:
        first = SMALL[name].config(tokenizer)
        text = transformers.Gemma2Config(
            **{**TEXT, "vocab_size": len(tokenizer), "head_dim": 8, "query_pre_attn_scalar": 8},
            attn_logit_softcapping=2.0,
            final_logit_softcapping=2.0,
        )
        vision, own = first.vision_config.to_dict(), {"projection_dim": 32, "hidden_size": 32}
        image = first.image_token_id
        return transformers.PaliGemmaConfig(
            text_config=text.to_dict(), vision_config=vision, image_token_id=image, **own
        )

    small = {**SMALL, name: dataclasses.replace(SMALL[name], config=config)}

    def save(architecture: str, folder: Path) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(small_vision_language, "SMALL", small)
            return save_small(architecture, folder)

    subject = vision_language_subject(name, tmp_path, save)
    assert max(float(logits.abs().max()) for logits in subject.alone) <= 2
    one_pass(subject)
    step_by_step(subject)
