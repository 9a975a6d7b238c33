"""One small trained cell: what its stage keeps, and the same scores through every way of loading it."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from isoflop.core.errors import Infeasible, UserError
from isoflop.methods.base import Method, build
from isoflop.models.base import Checkpoint
from isoflop.models.checkpoints.hf import locate
from isoflop.models.family import family_of
from isoflop.models.hooks.vision_blocks import VISION_BLOCKS, BlockRun, TokenReduction
from isoflop.models.tiny.llava_training import CellStage, Recipe
from isoflop.models.training.frozen import CompressorStage
from isoflop.models.training.loop import schedule
from isoflop.models.vlm import VlmModel
from isoflop.models.vlm_info import VlmInfo
from isoflop.models.worlds import digit_world as world
from isoflop.tasks.base import TASKS, Task
from isoflop.testing import FolderContext

OPTIONS = {"steps": 40, "batch": 16, "reading_scenes": 256, "coarse_scenes": 128, "tower_steps": 8}


def task(name: str, examples: int = 60) -> Task:
    return TASKS.get(name)(examples=examples, shard=25)  # type: ignore[call-arg]


def scores(model: VlmModel, ctx: FolderContext, method: Method, prepared: object, name: str = "reading") -> np.ndarray:
    with method.apply(model, prepared):
        return np.concatenate([s.metrics["nll"] for s in task(name).evaluate(model, ctx, 0)])


@pytest.fixture(scope="module")
def ctx(tmp_path_factory: pytest.TempPathFactory) -> FolderContext:
    return FolderContext(tmp_path_factory.mktemp("stages"))


def cell(method: Method, seed: int = 0) -> tuple[VlmInfo, CellStage]:
    family = family_of("tiny-llava/d24")
    info = family.info("tiny-llava/d24", OPTIONS)
    stage = family.weights(info, (method,), seed)
    assert isinstance(stage, CellStage)
    assert isinstance(info, VlmInfo)
    return info, stage


def load(ctx: FolderContext, method: Method) -> VlmModel:
    info, stage = cell(method)
    model = family_of("tiny-llava/d24").load(info, stage, ctx)
    assert isinstance(model, VlmModel)
    return model


@pytest.mark.parametrize("knobs", [("avgpool", {"tokens": 4}), ("quecc", {"k": 6})])
def test_training_depends_on_the_fields_only(
    ctx: FolderContext, tmp_path: Path, knobs: tuple[str, dict[str, int]]
) -> None:
    method = build(*knobs)
    _, stage = cell(method)
    first: Checkpoint = ctx.get(stage)
    torch.manual_seed(77)
    stage.compute(ctx, tmp_path)
    for name in ("model", "compressor"):
        one, two = first.state(name), Checkpoint(tmp_path).state(name)
        assert (one is None) == (two is None) == (name == "compressor" and knobs[0] == "avgpool")
        if one is not None and two is not None:
            assert all(torch.equal(one[key], two[key]) for key in one)
    log = json.loads((first.folder / "training.json").read_text())
    assert log["steps"] == 40
    assert log["final_loss"] < 4.5  # a uniform guess over the 187 tokens costs 5.2


def test_the_saved_model_takes_raw_features(ctx: FolderContext) -> None:
    """The standardisation of the features is folded into the projector: live pixels give the scores of training's view."""
    method = build("avgpool", {"tokens": 4})
    model = load(ctx, method)
    cached = scores(model, ctx, method, None)
    with model.occupy(
        VISION_BLOCKS, BlockRun(TokenReduction(), prefix=1)
    ):  # does nothing, but keeps features from the stage away
        live = scores(model, ctx, method, None)
    np.testing.assert_allclose(live, cached, atol=1e-4)


def test_tower_is_the_trained_one(ctx: FolderContext) -> None:
    method = build("avgpool", {"tokens": 4})
    info, _ = cell(method)
    own = load(ctx, method).module.model.vision_tower.state_dict()
    tower = ctx.get(info.tower).tower.state_dict()
    assert all(torch.equal(own[key], tower[key]) for key in tower)


def test_loading_needs_the_stage(ctx: FolderContext) -> None:
    info, _ = cell(build("none", {}))
    with pytest.raises(ValueError, match="pass the stage"):
        family_of("tiny-llava/d24").load(info, None, ctx)


@pytest.mark.parametrize("name", ["reading", "visual-reasoning"])
def test_the_same_folder_through_hf_gives_the_same_scores(ctx: FolderContext, name: str) -> None:
    method = build("avgpool", {"tokens": 4})
    expected = scores(load(ctx, method), ctx, method, None, name)
    checkpoint: Checkpoint = ctx.get(cell(method)[1])
    family = family_of("hf:x")
    info = family.info(f"hf:{checkpoint.folder}", {})
    tiny = cell(method)[0]
    assert (info.n_params, dict(info.geometry), info.hooks) == (tiny.n_params, dict(tiny.geometry), tiny.hooks)
    assert family.weights(info, (method,), 0) is None
    assert method.prepare(info, None, 0) is None
    task(name).check(info)
    model = family.load(info, None, ctx)
    assert isinstance(model, VlmModel)
    np.testing.assert_array_equal(scores(model, ctx, method, None, name), expected)


def test_trained_compressor_comes_from_the_cell(ctx: FolderContext) -> None:
    method = build("quecc", {"k": 3})
    info, stage = cell(method)
    prepare = method.prepare(info, stage, 0)
    assert prepare is stage
    model = load(ctx, method)
    trained = scores(model, ctx, method, ctx.get(prepare))
    assert not np.allclose(trained, scores(model, ctx, method, method.untrained(info, 0)))  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="has weights"), method.apply(model, None):
        pass


def test_a_compressor_is_trained_for_a_checkpoint_with_the_decoder_frozen(
    ctx: FolderContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint: Checkpoint = ctx.get(cell(build("none", {}))[1])
    family, method = family_of("hf:x"), build("quecc", {"k": 6})
    info = family.info(f"hf:{checkpoint.folder}", {})
    stage = method.prepare(info, None, 0)
    assert isinstance(stage, CompressorStage)
    assert isinstance(info, VlmInfo)
    lessons = Recipe(reading_scenes=128, coarse_scenes=128).lessons
    tables = tuple(t for n in (1, 0) for t in lessons.tables(info.tower, n))
    short = dataclasses.replace(stage, lessons=lessons.fields(), features=tables, steps=120, batch=16)
    assert short.key != stage.key
    prepared: Checkpoint = ctx.get(short)
    assert prepared.state("projector") is not None
    model = family.load(info, None, ctx)
    assert isinstance(model, VlmModel)
    before = {name: p.clone() for name, p in model.module.named_parameters()}
    plain = build("avgpool", {"tokens": 1})
    bare = scores(model, ctx, plain, None)
    untrained = scores(model, ctx, method, method.untrained(info, 0))  # type: ignore[attr-defined]
    assert scores(model, ctx, method, prepared).mean() < untrained.mean() - 0.005  # .015 to .031 over five seeds
    assert all(torch.equal(p, before[name]) for name, p in model.module.named_parameters())
    np.testing.assert_array_equal(scores(model, ctx, plain, None), bare)


def test_calibration_examples_are_training_scenes_through_the_model_as_it_is(ctx: FolderContext) -> None:
    method = build("quecc", {"k": 3})
    info, stage = cell(method)
    model = load(ctx, method)
    with method.apply(model, ctx.get(stage)):
        batches = list(model.calibration(ctx, 40, seed=3))
        logits, answers = model.supervised(batches[0])
        with torch.no_grad():
            torch.testing.assert_close(logits, model.answer_logits(batches[0]))
    assert [len(b.ids_B) for b in batches] == [32, 8]
    assert logits.shape == (32, info.geometry["vocab_size"])
    assert set(batches[0].hidden) == {0, 1}
    assert answers.tolist() == batches[0].answers_B.tolist()  # type: ignore[union-attr]
    for batch in batches:  # every kind of question, also in a cut batch
        assert {int(q) for q in batch.question_BQ[:, 0]} == {world.READ, world.PAD}  # type: ignore[index]
    stages = family_of(info.ref).calibration_stages(info, (method,))
    assert info.lessons is not None
    rows = batches[1].ids_B
    for layer in (0, 1):
        table = np.concatenate([ctx.get(s) for s in stages if s.layer == layer])  # type: ignore[attr-defined]
        np.testing.assert_array_equal(batches[1].hidden[layer], table[rows])
    classes = np.concatenate([s.classes() for s in info.lessons.scenes()])
    for row, question, answer in zip(rows, batches[1].question_BQ, batches[1].answers_B, strict=True):  # type: ignore[arg-type]
        if int(question[0]) == world.READ:
            assert int(answer) == world.FIRST_DIGIT + classes[row, int(question[1]) - world.FIRST_PLACE]
    again = list(model.calibration(ctx, 40, seed=3))
    assert torch.equal(again[0].prompt_BT, batches[0].prompt_BT)
    assert not torch.equal(next(model.calibration(ctx, 40, seed=4)).prompt_BT, batches[0].prompt_BT)


def test_gradients_reach_the_decoder_through_supervised(ctx: FolderContext) -> None:
    model = load(ctx, build("none", {}))
    weight = model.decoder.layers[0].mlp.down_proj.weight.requires_grad_(True)
    logits, answers = model.supervised(next(model.calibration(ctx, 8, seed=0)))
    torch.nn.functional.cross_entropy(logits, answers).backward()
    assert float(weight.grad.abs().sum()) > 0


def broken(ctx: FolderContext, tmp_path: Path) -> Path:
    checkpoint: Checkpoint = ctx.get(cell(build("avgpool", {"tokens": 4}))[1])
    return Path(shutil.copytree(checkpoint.folder, tmp_path / "copy"))


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_checkpoints_that_cannot_work_are_refused_in_one_line(ctx: FolderContext, tmp_path: Path) -> None:
    family = family_of("hf:x")
    folder = broken(ctx, tmp_path)
    ref = f"hf:{folder}"
    version = family.info(ref, {}).version
    assert family.info(ref, {"dtype": "bfloat16"}).version != version
    with pytest.raises(UserError, match=r"dtype = 'float8' is not allowed.*float32 \| bfloat16 \| float16"):
        family.info(ref, {"dtype": "float8"})
    with pytest.raises(UserError, match="no such folder"):
        family.info(f"hf:{tmp_path}/nothing/here", {})

    copies = 0

    def variant(**changes: object) -> str:
        nonlocal copies
        copies += 1
        target = tmp_path / f"variant{copies}"
        shutil.copytree(folder, target)
        edit_config(target, **changes)
        return f"hf:{target}"

    with pytest.raises(
        Infeasible,
        match="architecture T5ForConditionalGeneration is not supported; allowed: LlavaForConditionalGeneration",
    ):
        family.info(variant(architectures=["T5ForConditionalGeneration"]), {})
    with pytest.raises(Infeasible, match="of the type 'llava', is not that of a causal language model"):
        family.info(variant(architectures=["FalconForCausalLM"]), {})
    with pytest.raises(Infeasible, match="several vision layers"):
        family.info(variant(vision_feature_layer=[0, 1]), {})
    with pytest.raises(Infeasible, match="vision_feature_select_strategy"):
        family.info(variant(vision_feature_select_strategy="full"), {})
    foreign = family.info(variant(isoflop=None), {})
    assert foreign.version != version
    for name in ("reading", "visual-reasoning"):
        with pytest.raises(
            Infeasible, match=rf"task {name} needs vocabulary:digit-scenes-1, which model hf:.* does not offer"
        ):
            task(name).check(foreign)
    with pytest.raises(Infeasible, match="declare the vocabulary digit-scenes-1"):
        build("quecc", {}).prepare(foreign, None, 0)
    other = variant()
    (Path(other[3:]) / "model.safetensors").rename(Path(other[3:]) / "pytorch_model.bin")
    with pytest.raises(UserError, match="pickled weights are not loaded"):
        family.load(family.info(other, {}), None, ctx)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UserError, match=r"no config\.json"):
        family.info(f"hf:{empty}", {})


def test_a_repository_that_cannot_be_reached_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    asked: list[bool] = []

    def nothing(name: str, local_files_only: bool = False, **rest: object) -> str:
        asked.append(local_files_only)
        raise LocalEntryNotFoundError("cannot be reached\nand more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", nothing)
    with pytest.raises(UserError, match=r"model hf:some/repo: .*cannot be reached") as caught:
        locate("hf:some/repo", "main", weights=False)
    assert "\n" not in str(caught.value)
    assert asked == [True, False]  # the local cache first


def test_a_cached_repository_needs_no_network(
    monkeypatch: pytest.MonkeyPatch, ctx: FolderContext, tmp_path: Path
) -> None:
    import huggingface_hub

    snapshot = tmp_path / "snapshots" / "abc123"
    shutil.copytree(broken(ctx, tmp_path), snapshot)

    def cached(name: str, local_files_only: bool = False, **rest: object) -> str:
        assert local_files_only
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", cached)
    info = family_of("hf:x").info("hf:some/cached-repo", {})
    model = family_of("hf:x").load(info, None, ctx)
    assert isinstance(model, VlmModel)
    assert info.n_params == 13_920


def test_schedule_rises_and_falls() -> None:
    recipe = Recipe(steps=100)
    values = [schedule(step, recipe) for step in range(100)]
    assert values[9] == 1.0
    assert values[:10] == sorted(values[:10])
    assert values[10:] == sorted(values[10:], reverse=True)
    assert values[-1] == pytest.approx(0.02, abs=0.02)
