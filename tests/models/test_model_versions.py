"""What names a model: the content of a checkpoint's files, and options without those that only repeat a default."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from isoflop.core.errors import UserError
from isoflop.methods.visual_tokens.probe import untrained_model
from isoflop.models.family import family_of
from isoflop.sweep.resolve import resolve


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint")
    untrained_model().module.save_pretrained(path)
    (path / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5], "image_std": [0.5]}))
    return path


def test_a_checkpoint_whose_weights_change_in_place_is_another_version(folder: Path) -> None:
    family, ref = family_of("hf:x"), f"hf:{folder}"
    before = family.info(ref, {})
    assert family.info(ref, {}) is before
    model = untrained_model()
    with torch.no_grad():
        model.module.lm_head.weight.add_(1.0)
    model.module.save_pretrained(folder)
    after = family.info(ref, {})
    assert after.version != before.version
    assert after.tower != before.tower  # features of the old tower are not taken for those of the new


def _job_id(model: Any) -> str:
    sweep = resolve({"name": "x", "models": [model], "methods": [{"avgpool": {"tokens": [4]}}], "tasks": ["reading"]})
    return sweep.jobs_of(next(iter(sweep.space.grid())))[0].id


@pytest.mark.parametrize(
    ("plain", "defaults", "other"),
    [
        ("tiny-llava/d24", [{"steps": 900}, {"lr": 0.0015, "steps": 900.0}], {"steps": 901}),
        ("hf:", [{"dtype": "float32"}, {"trust_remote_code": False, "revision": "main"}], {"dtype": "bfloat16"}),
    ],
)
def test_a_default_that_is_written_down_is_the_same_job(
    folder: Path, plain: str, defaults: list[dict[str, Any]], other: dict[str, Any]
) -> None:
    ref = f"hf:{folder}" if plain == "hf:" else plain
    assert {_job_id({ref: options}) for options in defaults} == {_job_id(ref)}
    assert _job_id({ref: other}) != _job_id(ref)


def test_equal_options_of_other_types_are_the_same_job() -> None:
    assert _job_id({"tiny-llava/d24": {"lr": 1}}) == _job_id({"tiny-llava/d24": {"lr": 1.0}})
    assert family_of("tiny-llava/d24").canonical_options("tiny-llava/d24", {"batch": 64.0, "steps": 900}) == {
        "batch": 64
    }


def test_wrong_options_are_told() -> None:
    with pytest.raises(UserError, match=r"stepz.*did you mean 'steps'"):
        _job_id({"tiny-llava/d24": {"stepz": 9}})
