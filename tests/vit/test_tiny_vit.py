"""The tiny family and its task: images, training as a stage, checkpoints through the same code, examples, footprint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from isoflop.core.errors import Infeasible, UserError
from isoflop.methods.base import build
from isoflop.methods.vit_tokens.probe import untrained_model
from isoflop.models.checkpoints import vit as vit_hf
from isoflop.models.checkpoints.vision_towers import TOWERS
from isoflop.models.family import family_of
from isoflop.models.tiny.vit_config import SIZES, vit_config
from isoflop.models.tiny.vit_training import BACKGROUND, Recipe, lessons, patch_labels, train
from isoflop.models.vit import VitModel
from isoflop.models.worlds import digit_world
from isoflop.models.worlds.sprite_world import DATA, ImageSet
from isoflop.tasks.base import TASKS
from isoflop.tasks.classification import DigitClassification
from isoflop.testing import FolderContext


def task(**options: Any) -> DigitClassification:
    return TASKS.get("digit-classification")(**options)  # type: ignore[return-value]


@pytest.mark.parametrize("data", DATA)
def test_images_are_reproducible_and_a_shorter_set_is_a_prefix(data: str) -> None:
    short, long = ImageSet(data, "test", 300, 0.25, 1), ImageSet(data, "test", 520, 0.25, 1)
    images = np.concatenate(list(long.images()))
    assert images.shape == (520, 3, 32, 32)
    assert np.array_equal(np.concatenate(list(short.images())), images[:300])
    assert np.array_equal(short.labels(), long.labels()[:300])
    assert np.array_equal(next(long.images(250, 260)), images[250:256])
    assert images.min() >= 0
    assert images.max() <= 1
    assert not np.array_equal(images[:256], next(ImageSet(data, "train", 256, 0.25, 1).images()))


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("share", [0.1, 0.25, 0.6])
def test_the_object_stays_in_a_box_of_the_given_share(data: str, share: float) -> None:
    _, _, opacity_NHW = ImageSet(data, "train", 256, share, 0).draw(0)
    for shown_HW in opacity_NHW > 0:
        rows, columns = np.flatnonzero(shown_HW.any(1)), np.flatnonzero(shown_HW.any(0))
        side = max(rows[-1] - rows[0], columns[-1] - columns[0]) + 1
        assert side <= 32 * share**0.5 * 9 / 8 + 2  # enlarged digits blur by half a pixel of theirs
    assert opacity_NHW.any(axis=(1, 2)).all()


def test_test_digits_are_handwritings_that_training_never_shows() -> None:
    _, train_rows = digit_world.writings("train")
    _, test_rows = digit_world.writings("test")
    assert not set(np.concatenate(train_rows)) & set(np.concatenate(test_rows))


def test_patch_labels_name_what_a_patch_shows() -> None:
    opacity = np.zeros((2, 32, 32), dtype=np.float32)
    opacity[0, 4:8, 8:10] = 1.0
    labels = patch_labels(np.array([7, 3]), opacity)
    assert labels.shape == (2, 64)
    assert labels[0, 8 + 2] == 7
    assert (np.delete(labels[0], 10) == BACKGROUND).all()
    assert (labels[1] == BACKGROUND).all()


def test_lessons_do_not_depend_on_the_size_and_drop_the_patches_in_time() -> None:
    recipe = Recipe(steps=20, batch=32, patch_until=0.5)
    steps = list(lessons(recipe, "digits", 0))
    assert len(steps) == 20
    assert [s.patch_weight > 0 for s in steps] == [True] * 10 + [False] * 10
    assert torch.equal(steps[7].pixels_BCHW, list(lessons(recipe, "digits", 0))[7].pixels_BCHW)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> VitModel:
    """The smallest member after a few steps."""
    family = family_of("tiny-vit/c48-sprites")
    info = family.info("tiny-vit/c48-sprites", {"steps": 30, "batch": 16})
    ctx = FolderContext(tmp_path_factory.mktemp("stages"))
    model = family.load(info, family.weights(info, (), 0), ctx)
    assert isinstance(model, VitModel)
    return model


def test_n_counts_the_blocks(trained: VitModel) -> None:
    width, layers, mlp = 48, 4, 96
    per_layer = 4 * (width**2 + width) + 2 * width * mlp + mlp + width + 4 * width
    assert trained.info.n_params == layers * per_layer
    assert sum(p.numel() for p in trained.module.vit.layers.parameters()) == trained.info.n_params


def test_training_is_a_cached_stage_that_leaves_the_global_state_alone(tmp_path: Path) -> None:
    family = family_of("tiny-vit/c48")
    info = family.info("tiny-vit/c48", {"steps": 2, "batch": 8})
    stage = family.weights(info, (), 3)
    assert stage is not None
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    ctx = FolderContext(tmp_path)
    weights = family.load(info, stage, ctx).module.state_dict()
    assert torch.equal(torch.random.get_rng_state(), before)
    again = family.load(info, stage, FolderContext(tmp_path / "other")).module.state_dict()
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    assert stage.key != family.weights(info, (), 4).key  # type: ignore[union-attr]
    assert stage.key != family.weights(family.info("tiny-vit/c48-sprites", dict(info.options)), (), 3).key  # type: ignore[union-attr]


def test_a_few_steps_lower_the_loss() -> None:
    from isoflop.models.tiny.vit_config import untrained

    recipe = Recipe(steps=120, batch=32, lr=3e-3, warmup=0.1, patch_loss=0.0)
    losses = train(untrained(SIZES["c48"], "sprites", 0), recipe, "sprites", 0)
    assert np.mean(losses[-20:]) < np.mean(losses[:20]) - 0.1


def test_unknown_members_and_options_are_refused() -> None:
    family = family_of("tiny-vit/c48")
    with pytest.raises(UserError, match="c48"):
        family.info("tiny-vit/c47", {})
    with pytest.raises(UserError, match="steps"):
        family.info("tiny-vit/c48", {"stepz": 3})


def test_supervised_and_calibration_use_training_images_only(trained: VitModel, tmp_path: Path) -> None:
    batches = list(trained.calibration(FolderContext(tmp_path), 300, seed=0))
    assert [len(b.labels_B) for b in batches] == [256, 44]
    logits, labels = trained.supervised(batches[1])
    assert logits.shape == (44, 10)
    assert torch.equal(labels, batches[1].labels_B)


def checkpoint(folder: Path, architecture: str) -> Path:
    import transformers

    config_class = transformers.ViTConfig if architecture.startswith("ViT") else transformers.DeiTConfig
    base = vit_config(SIZES["c48"], "sprites").to_dict()
    wanted = (
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
        "image_size",
        "patch_size",
    )
    config = config_class(**{k: base[k] for k in wanted}, num_labels=10, isoflop={"images": "sprites"})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        getattr(transformers, architecture)(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("architecture", [name for name in TOWERS if name.startswith(("ViTFor", "DeiT"))])
def test_saved_checkpoints_run_through_the_same_code(tmp_path: Path, architecture: str) -> None:
    from transformers import AutoConfig

    folder = checkpoint(tmp_path / "model", architecture)
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    info = vit_hf.describe(f"hf:{folder}", config, "hf", "1", source=folder)
    model = vit_hf.load(info, folder, "cpu")
    assert info.geometry["prefix"] == (1 if architecture.startswith("ViT") else 2)
    suite = task(examples=40, shard=40)
    suite.check(info)
    errors = {}
    for name in ("pitome", "tome", "vit-random", "vit-cls-topk"):
        method = build(name, {"macs": 0.6})
        with method.apply(model, None):
            errors[name] = next(suite.evaluate(model, FolderContext(tmp_path), 0)).metrics["nll"]
            assert 1.6 < method.footprint(model, FolderContext(tmp_path))["ratio"] < 1.75
    assert all(np.isfinite(nll).all() for nll in errors.values())


def test_other_architectures_and_pickled_weights_are_refused_in_one_line(tmp_path: Path) -> None:
    from transformers import CLIPVisionConfig

    with pytest.raises(
        Infeasible, match=r"neither a classifier nor a text encoder .*; allowed: ViTForImageClassification"
    ):
        vit_hf.describe("hf:x", CLIPVisionConfig(architectures=["CLIPVisionModel"]), "hf", "1")
    folder = checkpoint(tmp_path / "model", "ViTForImageClassification")
    next(folder.glob("*.safetensors")).rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"no .*safetensors"):
        vit_hf.read(folder, "ViTForImageClassification")


def test_normalisation_comes_from_the_checkpoint(tmp_path: Path) -> None:
    from transformers import AutoConfig

    folder = checkpoint(tmp_path / "model", "ViTForImageClassification")
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 2, 3]})
    )
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    info = vit_hf.describe("hf:x", config, "hf", "1", source=folder)
    assert info.pixel_mean == (0.1, 0.2, 0.3)
    assert info.pixel_std == (1, 2, 3)


def test_a_shorter_suite_is_a_prefix_and_the_seed_only_shuffles() -> None:
    info = untrained_model().info
    short, long = task(examples=20), task(examples=50)
    ids = np.arange(20)
    assert torch.equal(short.batch(info, ids, 0).images_BCHW, long.batch(info, ids, 0).images_BCHW)
    assert sorted(short.order(0)) == sorted(short.order(1)) == list(range(20))
    assert not np.array_equal(short.order(0), short.order(1))


def test_shards_score_every_example_once(trained: VitModel, tmp_path: Path) -> None:
    suite = task(examples=70, shard=30)
    shards = list(suite.evaluate(trained, FolderContext(tmp_path), 2))
    assert [len(s.ids) for s in shards] == [30, 30, 10]
    assert sorted(np.concatenate([s.ids for s in shards])) == list(range(70))
    batch = suite.batch(trained.info, shards[1].ids, 2)
    with torch.no_grad():
        logits, labels = trained.supervised(batch)
    assert np.array_equal(shards[1].errors, (logits.argmax(-1) != labels).double().numpy())
    expected = torch.nn.functional.cross_entropy(logits, labels, reduction="none").numpy()
    np.testing.assert_allclose(shards[1].metrics["nll"], expected, rtol=1e-4, atol=1e-5)


def test_the_footprint_is_that_of_the_live_model(trained: VitModel, tmp_path: Path) -> None:
    suite, ctx = task(examples=10), FolderContext(tmp_path)
    bare = suite.measure(trained, ctx)
    assert bare["flops"] == bare["flops_dense"]
    assert bare["tokens_left"] == bare["tokens_mean"] == 64
    method = build("pitome", {"ratio": 0.8})
    with method.apply(trained, None):
        reduced, report = suite.measure(trained, ctx), method.footprint(trained, ctx)
    removed = method.plan(trained.info)  # type: ignore[attr-defined]
    assert reduced["flops_dense"] == bare["flops"]
    assert reduced["tokens_left"] == 64 - sum(removed)
    assert reduced["tokens_mean"] == pytest.approx(64 - np.mean(np.cumsum((0, *removed[:-1]))))
    assert report["ratio"] == pytest.approx(bare["flops"] / reduced["flops"])
    assert report["scoring_macs"] == sum(n**2 * 16 for n in 64 - np.cumsum((0, *removed[:-1])))
    assert not set(report) & set(reduced)


@pytest.mark.parametrize(
    ("options", "word"), [({"data": "digits"}, "data = 'digits'"), ({"foreground": 0.01}, "foreground = 0.01")]
)
def test_impossible_options_are_refused(trained: VitModel, options: dict[str, Any], word: str) -> None:
    with pytest.raises(Infeasible, match=word):
        task(**options).check(trained.info)


@pytest.mark.slow
@pytest.mark.parametrize("member", ["c48", "c64", "c96", "c48-sprites", "c64-sprites", "c96-sprites"])
def test_the_full_recipe_learns_its_images(member: str, tmp_path: Path) -> None:
    """At most a third of the test images are wrong (chance: nine tenths)."""
    ref = f"tiny-vit/{member}"
    family, ctx = family_of(ref), FolderContext(tmp_path)
    info = family.info(ref, {})
    model = family.load(info, family.weights(info, (), 0), ctx)
    errors = np.concatenate([s.errors for s in task(examples=1000, foreground=0.5).evaluate(model, ctx, 0)])
    assert errors.mean() < 1 / 3
