"""A user's own questions about images: answers are those of the Hugging Face model, and methods act on them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from isoflop.core.errors import Infeasible, UserError
from isoflop.core.folder_context import FolderContext
from isoflop.methods.base import build
from isoflop.models.family import family_of
from isoflop.models.vlm import VlmModel
from isoflop.tasks.data.metrics import METRICS
from isoflop.tasks.data.vqa import Vqa
from isoflop.testing.small_llava import PATCHES, save_small_llava
from isoflop.testing.task_probes import reader_of_text

RNG = np.random.default_rng(4)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("vqa")
    rows = []
    for number in range(6):
        values = RNG.integers(0, 256, (int(RNG.integers(30, 60)), int(RNG.integers(30, 60)), 3)).astype("uint8")
        Image.fromarray(values).save(folder / f"{number}.png")
        rows.append(
            {"image": f"{number}.png", "question": ("what is it", "which colour")[number % 2], "answers": ["x"] * 10}
        )
    (folder / "vqa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / "vqa.jsonl")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small LLaVA with a tokenizer and a CLIP processor, random weights."""
    folder = tmp_path_factory.mktemp("llava") / "llava"
    save_small_llava(folder, reader_of_text()[0].tokenizer)
    return folder


@pytest.fixture(scope="module")
def model(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> VlmModel:
    ref = f"hf:{checkpoint}"
    found = family_of(ref).load(family_of(ref).info(ref, {}), None, FolderContext(tmp_path_factory.mktemp("cache")))
    assert isinstance(found, VlmModel)
    return found


def answers(task: Vqa, model: VlmModel) -> dict[int, list[int]]:
    questions = task.questions(model)
    prompts = [task.prompted(questions, example) for example in task.examples()]
    said = [questions.answers([p], task.max_tokens, lambda text: "\n" in text.strip())[0] for p in prompts]
    return {prompt.id: ids for prompt, ids in zip(prompts, said, strict=True)}


def test_answers_are_those_of_the_hugging_face_model(data: str, checkpoint: Path, model: VlmModel) -> None:
    from transformers import CLIPImageProcessorPil, LlavaForConditionalGeneration

    stock = LlavaForConditionalGeneration.from_pretrained(checkpoint).eval()
    processor = CLIPImageProcessorPil.from_pretrained(checkpoint)
    task = Vqa(data=data, max_tokens=6, prompt="a: <image> {question} b:")
    found = answers(task, model)
    assert len(found) == 6
    for example in task.examples():
        pixels = processor(Image.open(example.row["image"]).convert("RGB"), return_tensors="pt")["pixel_values"]
        text = f"a: {'<image>' * PATCHES} {example.row['question']} b:"
        ids = model.tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
        said = stock.generate(input_ids=ids, pixel_values=pixels, max_new_tokens=6, do_sample=False, eos_token_id=None)
        expected = said[0, ids.shape[1] :].tolist()
        cut = len(found[example.id])
        assert found[example.id] == expected[:cut]
        assert (
            cut == 6
            or "\n" in model.tokenizer.decode(expected[:cut]).strip()
            or expected[cut] in {model.tokenizer.eos_token_id}
        )


def test_scores_do_not_depend_on_batches_and_methods_act(data: str, model: VlmModel, tmp_path: Path) -> None:
    task, ctx = Vqa(data=data, max_tokens=4), FolderContext(tmp_path)
    task.check(model.info)
    one = {
        n: e
        for shard in Vqa(data=data, max_tokens=4, shard=1).evaluate(model, ctx, 0)
        for n, e in zip(shard.ids, shard.errors, strict=True)
    }
    many = {n: e for shard in task.evaluate(model, ctx, 1) for n, e in zip(shard.ids, shard.errors, strict=True)}
    assert one == many
    full = task.measure(model, ctx)
    assert full["visual_tokens"] == PATCHES
    plain = answers(task, model)
    with build("avgpool", {"tokens": 1}).apply(model, None):
        assert task.measure(model, ctx)["visual_tokens"] == 1
        assert answers(task, model) != plain
    with build("snapkv", {"keep": 0.25, "window": 2}).apply(model, None):
        assert task.measure(model, ctx)["kv_bytes"] < full["kv_bytes"]
        assert len(list(task.evaluate(model, ctx, 0))) == 1


def test_a_chat_template_places_the_image(data: str, model: VlmModel) -> None:
    task = Vqa(data=data, chat=True)
    tokenizer = model.tokenizer
    tokenizer.chat_template = (
        "{% for m in messages %}U:{% for c in m.content %}{% if c.type == 'image' %}<image>{% else %}{{ c.text }}{% endif %}"
        "{% endfor %} A:{% endfor %}"
    )
    try:
        prompt = task.prompted(task.questions(model), task.examples()[0])
        assert tokenizer.decode(prompt.before) == "U:"
        assert tokenizer.decode(prompt.behind) == f"{task.examples()[0].row['question']} A:"
        tokenizer.chat_template = "{% for m in messages %}U:{% endfor %}"
        with pytest.raises(UserError, match="does not place <image>"):
            task.prompted(task.questions(model), task.examples()[0])
    finally:
        tokenizer.chat_template = None


def test_vqa_accuracy() -> None:
    score = METRICS.get("vqa")
    assert score("Yes.", ["yes"] * 10, "") == 1.0
    assert score("no", ["yes"] * 8 + ["no"] * 2, "") == pytest.approx((8 * 2 / 3 + 2 * 1 / 3) / 10)
    assert score("no", ["yes"] * 7 + ["no"] * 3, "") == pytest.approx((7 * 1.0 + 3 * 2 / 3) / 10)
    assert score("the cat", ["cat", "dog"], "") == 1.0


def test_wrong_prompts_and_models_are_refused(data: str, model: VlmModel) -> None:
    with pytest.raises(UserError, match="has <image> 0 times; allowed: once"):
        Vqa(data=data, prompt="{question}").check(model.info)
    with pytest.raises(UserError, match=r"has {question} 2 times"):
        Vqa(data=data, prompt="<image> {question} {question}").check(model.info)
    table = Path(data).with_name("lacking.jsonl")
    rows = [json.loads(line) for line in Path(data).read_text().splitlines()]
    for field in ("question", "answers"):
        table.write_text(
            "".join(json.dumps({**row, field: None if n == 3 else row[field]}) + "\n" for n, row in enumerate(rows))
        )
        with pytest.raises(UserError, match=f"{field} = '{field}' holds nothing"):
            Vqa(data=str(table)).check(model.info)
    with pytest.raises(Infeasible, match="needs a vision-language model with a tokenizer"):
        Vqa(data=data).check(reader_of_text()[0].info)
