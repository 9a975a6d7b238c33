"""The member that is trained on easy-VQA: on data of the same form, made here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageDraw

from isoflop.core.errors import UserError
from isoflop.core.folder_context import FolderContext
from isoflop.core.public import public_root
from isoflop.methods.base import build
from isoflop.models.base import Model, ModelInfo
from isoflop.models.family import family_of
from isoflop.models.features import vision_of
from isoflop.models.tiny.easy_vqa import easy_vqa_config
from isoflop.models.tiny.easy_vqa_tower import untrained_easy_vqa_tower
from isoflop.models.tiny.llava_training import untrained_of
from isoflop.models.vlm import VlmModel
from isoflop.models.vlm_info import VlmBatch
from isoflop.models.worlds import easy_vqa as world
from isoflop.sweep.resolve import resolve
from isoflop.tasks.data.vqa import Vqa
from isoflop.testing import ModelProbe, check_model

ROOT = Path(__file__).parents[2]
REF = "tiny-llava/easy-vqa-d64"
FEW = {"steps": 3, "batch": 4, "tower_steps": 2}
COLOURS = ("red", "blue", "green")


def put(rows: int = 12, order: int = 1, colours: tuple[str, ...] = COLOURS) -> None:
    """Images of one square each, with two questions of different lengths, in the cache."""
    folder = public_root() / "easy-vqa"
    for split in ("train", "test"):
        (folder / split).mkdir(parents=True, exist_ok=True)
        lines = []
        for number in range(rows)[::order]:
            colour = colours[number % len(colours)]
            picture = Image.new("RGB", (64, 64), "white")
            ImageDraw.Draw(picture).rectangle((number, number, number + 20, number + 20), fill=colour)
            picture.save(folder / split / f"{number}.png")
            for question, answer in (
                ("what color is the shape?", colour),
                (
                    f"is there a {COLOURS[number % 2]} shape in the image?",
                    "yes" if COLOURS[number % 2] == colour else "no",
                ),
            ):
                lines.append({"image": f"{split}/{number}.png", "question": question, "answers": answer})
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "SOURCE.json").write_text("{}")


@pytest.fixture
def data() -> None:
    put()


def jobs_of(spec: Any) -> list[Any]:
    sweep = resolve(spec)
    return [job for config in sweep.space.grid() for job in sweep.jobs_of(config)]


def untrained(info: ModelInfo) -> VlmModel:
    vision = vision_of(untrained_easy_vqa_tower().eval().requires_grad_(False), None)
    module = untrained_of(easy_vqa_config("easy-vqa-d64"), vision, 0).eval().requires_grad_(False)
    return VlmModel(info, module, vision)  # type: ignore[arg-type]


def outputs(model: Model) -> torch.Tensor:
    assert isinstance(model, VlmModel)
    images = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    questions = torch.tensor([[5, 6, 7, 2], [8, 9, 10, 2], [5, 9, 11, 2]])
    prompts = torch.cat((torch.full((3, 1), world.IMAGE), questions), dim=1)
    return model.answer_logits(VlmBatch(model.look(images), prompts, questions, torch.arange(3)))


@pytest.mark.usefixtures("data")
def test_the_member_keeps_the_contract_of_families() -> None:
    check_model("tiny-llava", ModelProbe(((REF, {}), (REF, {"steps": 7})), untrained, outputs))


def test_data_that_are_not_fetched_are_told_of_at_plan() -> None:
    """In one line that says how to get them; without them the member can still be described and listed."""
    family = family_of(REF)
    info = family.info(REF, {})
    assert info.geometry["visual_tokens"] == 64
    with pytest.raises(UserError, match=r"^data public:easy-vqa.*isoflop fetch easy-vqa$"):
        family.weights(info, (), 0)
    own = public_root().parent / "own.jsonl"
    own.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (64, 64)).save(own.parent / "a.png")
    own.write_text(json.dumps({"image": "a.png", "question": "what shape?", "answers": "circle"}) + "\n")
    spec = {"name": "x", "models": [REF], "methods": ["none"], "tasks": [{"vqa": {"data": str(own)}}]}
    with pytest.raises(UserError, match="isoflop fetch easy-vqa"):
        jobs_of(spec)


def test_what_is_trained_is_named_by_the_content_of_the_data() -> None:
    """Not by the order of rows; other images or answers are another model, and are not taken for those that were planned."""
    family = family_of(REF)

    def key() -> tuple[str, str]:
        info = family.info(REF, {})
        stage = family.weights(info, (), 0)
        assert stage is not None
        return info.version, stage.key

    put()
    first, planned = key(), world.questions().content
    put(order=-1)
    assert key() == first
    put(colours=("red", "blue", "gray"))
    second = key()
    assert second[0] != first[0]
    assert second[1] != first[1]
    with pytest.raises(UserError, match="was planned with"):
        world.questions(planned)


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"image": "a.png", "question": "what?"}, "no field 'answers'"),
        ({"image": "a.png", "question": "what?", "answers": "dark red"}, "has 2 words; allowed: one"),
        ({"image": "a.png", "question": "what?", "answers": ""}, "the answer '' has 0 words; allowed: one"),
        ({"image": "b.png", "question": "what?", "answers": "red"}, "b.png"),
        ({"image": "a.png", "question": " ".join(f"w{n}" for n in range(70)), "answers": "red"}, "allowed: up to 62"),
    ],
)
def test_data_of_another_form_are_refused_in_one_line(row: dict[str, str], problem: str) -> None:
    put(2)
    folder = public_root() / "easy-vqa"
    Image.new("RGB", (64, 64)).save(folder / "a.png")
    (folder / "train.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError, match=problem) as caught:
        _ = world.questions().words
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("data")
def test_lessons_are_the_training_questions() -> None:
    """Every row is an image with a question that was asked about it and the answer; all of a batch have one length."""
    found, lessons = world.questions(), world.EasyVqaLessons(world.content())
    asked = {(image, " ".join(question), answer) for image, question, answer in found.asked}
    lengths = set()
    for lesson in lessons.steps(20, 4, 0):
        lengths.add(lesson.questions_BQ.shape[1])
        for row, ids, answer in zip(lesson.rows_B, lesson.questions_BQ, lesson.answers_B, strict=True):
            words = " ".join(found.words[i] for i in ids.tolist())
            assert (int(row), words, found.words[int(answer)]) in asked
    assert lengths == {6, 9}


@pytest.mark.usefixtures("data")
@pytest.mark.parametrize(
    ("method", "visual"),
    [("none", 64), ({"avgpool": {"tokens": 4}}, 4), ({"quecc": {"k": 8}}, 1), ({"vtc-cls": {"keep": 3}}, 3)],
)
def test_it_is_trained_with_methods_in_place_and_asked_as_it_was_trained(
    method: str | dict[str, dict[str, int]], visual: int, tmp_path: Path
) -> None:
    """A few steps: weights with a tokenizer come out, and the task asks in the tokens of the lessons."""
    name, knobs = (method, {}) if isinstance(method, str) else next(iter(method.items()))
    family, chosen, ctx = family_of(REF), build(name, knobs), FolderContext(tmp_path)
    info = family.info(REF, FEW)
    stage = family.weights(info, (chosen,), 0)
    assert stage is not None
    assert (stage.key == getattr(family.weights(info, (), 0), "key", "")) == (name in ("none", "vtc-cls"))
    model = family.load(info, stage, ctx)
    assert isinstance(model, VlmModel)
    options: dict[str, Any] = {"prompt": "<image>{question}", "max_tokens": 1, "limit": 6}
    task = Vqa(data="public:easy-vqa/test.jsonl", **options)
    task.check(info)
    prepared = chosen.prepare(info, stage, 0)
    value = None if prepared is None else ctx.get(prepared)
    with chosen.apply(model, value):
        errors = [float(e) for shard in task.evaluate(model, ctx, 0) for e in shard.errors]
        assert chosen.axes(info).named()["V"] == visual
    assert len(errors) == 6
    asked = task.questions(model).prompt(0, None, "what color is the shape?")
    words = world.questions().words
    assert asked.before == ()
    assert [words[i] for i in asked.behind] == ["what", "color", "is", "the", "shape", "?"]
    assert model.tokenizer.convert_tokens_to_ids("<image>") == world.IMAGE == info.geometry["image_token"]


@pytest.mark.usefixtures("data")
def test_the_sweep_resolves() -> None:
    assert len(jobs_of(ROOT / "sweeps" / "easy-vqa.yaml")) == 1 + 3 * 3


@pytest.mark.slow
@pytest.mark.usefixtures("data")
def test_it_learns() -> None:
    """Twelve images by heart."""
    ctx = FolderContext.temporary()
    family = family_of(REF)
    info = family.info(REF, {"steps": 300, "batch": 24, "tower_steps": 100})
    stage = family.weights(info, (), 0)
    assert stage is not None
    assert ctx.get(stage).log["final_loss"] < 0.2
