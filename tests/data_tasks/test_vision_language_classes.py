"""Questions about pictures of all shapes to every class of vision-language models: answers, losses and costs are transformers' own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from torch import Tensor

import isoflop
from isoflop.core.errors import UserError
from isoflop.core.folder_context import FolderContext
from isoflop.methods.base import build
from isoflop.models.counting import flops_of
from isoflop.models.hooks.attention import ATTENTION
from isoflop.models.worlds.lm_text import read_tokenizer
from isoflop.tasks.data.vqa import Vqa
from isoflop.testing.architectures.vision_language import VisionLanguageSubject, vision_language_subject
from isoflop.testing.small_vision_language import MOST, SMALL, save_small

PROMPT = "a: <image> {question} b:"
SHAPES = [(40, 52), (52, 40), (24, 24), (30, 90)]
IN_A_SWEEP = ["Idefics3ForConditionalGeneration", "Qwen2_5_VLForConditionalGeneration"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(4)
    rows = []
    for number, (height, width) in enumerate([*SHAPES, *SHAPES]):
        Image.fromarray(rng.integers(0, 256, (height, width, 3)).astype("uint8")).save(folder / f"{number}.png")
        question = ("what is it", "which colour")[number % 2]
        rows.append({"image": f"{number}.png", "question": question, "answers": ["x"] * 10})
    (folder / "vqa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / "vqa.jsonl")


@pytest.fixture(
    scope="module", params=[*MOST, *(pytest.param(name, marks=pytest.mark.slow) for name in SMALL if name not in MOST)]
)
def subject(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> VisionLanguageSubject:
    transformers.logging.set_verbosity_error()
    return vision_language_subject(request.param, tmp_path_factory.mktemp("small"))


def stock_inputs(subject: VisionLanguageSubject, picture: Any, question: str, answer: str = "") -> dict[str, Tensor]:
    """What transformers takes of a question as the task asks it, and of its answer."""
    side, tokenizer = subject.model.side, subject.model.tokenizer
    start, end = side.marks
    before, behind, said = (
        torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=torch.long)
        for text in (f"a: {start}", f"{end} {question} b:", answer)
    )
    layout = side.layout(picture.height, picture.width)
    ids = torch.cat((before, side.ids(layout, side.tokens(layout)), behind, said))
    return subject.taken(picture, ids, len(said))


def test_answers_and_losses_are_those_of_transformers(subject: VisionLanguageSubject, data: str) -> None:
    """In batches: pictures of one shape share one, and each answer is that of its prompt alone."""
    model, task = subject.model, Vqa(data=data, max_tokens=4, prompt=PROMPT)
    task.check(model.info)
    questions = task.questions(model)
    prompts = [task.prompted(questions, example) for example in task.examples()]
    assert len(questions._batches(prompts)) < len(prompts)
    answers, losses = questions.answers(prompts, 4), questions.losses(prompts, [" no"] * len(prompts))
    for prompt, example, said, (loss, _) in zip(prompts, task.examples(), answers, losses, strict=True):
        picture = Image.open(prompt.image).convert("RGB")
        inputs = stock_inputs(subject, picture, example.row["question"])
        stock = subject.stock.generate(**inputs, max_new_tokens=4, do_sample=False, eos_token_id=None)
        assert said == stock[0, inputs["input_ids"].shape[1] :].tolist()[: len(said)]
        scored = stock_inputs(subject, picture, example.row["question"], " no")
        ids = scored["input_ids"][0, -3:]
        logits_SW = subject.stock(**scored, use_cache=False).logits[0, -4:-1]
        assert loss == pytest.approx(torch.nn.functional.cross_entropy(logits_SW, ids).item(), rel=1e-4)


def test_a_picture_of_a_shape_that_a_class_does_not_take_is_named(
    subject: VisionLanguageSubject, data: str, tmp_path: Path
) -> None:
    questions, path = Vqa(data=data, prompt=PROMPT).questions(subject.model), tmp_path / "line.png"
    Image.new("RGB", (300, 1)).save(path)
    if not type(subject.stock).__name__.startswith("Qwen"):
        questions.prompt(0, str(path), "what")
        return
    with pytest.raises(UserError, match=r"image .*line\.png: a picture of 300 x 1 pixels: .* aspect ratio"):
        questions.prompt(0, str(path), "what")


def test_an_answer_costs_what_transformers_pays_for_it(
    subject: VisionLanguageSubject, data: str, tmp_path: Path
) -> None:
    """FLOPs of its own forward pass, counted by the same meter; fewer visual tokens cost less."""
    model, task, ctx = subject.model, Vqa(data=data, prompt=PROMPT), FolderContext(tmp_path)
    shown = [(example, Image.open(example.row["image"]).convert("RGB")) for example in task.examples()]
    tokens = [model.side.tokens(model.side.layout(picture.height, picture.width)) for _, picture in shown]
    median = int(np.argsort(tokens, kind="stable")[(len(tokens) - 1) // 2])
    example, picture = shown[median if model.side.sized else 0]
    inputs = stock_inputs(subject, picture, example.row["question"])
    expected, _ = flops_of(lambda: subject.stock(**inputs, logits_to_keep=1, use_cache=False))
    found = task.measure(model, ctx)
    layout = model.side.layout(picture.height, picture.width)
    assert found["flops"] == expected
    assert found["visual_tokens"] == model.side.tokens(layout)
    assert found["visual_tokens"] + found["text_tokens"] == inputs["input_ids"].shape[1]
    assert found["kv_bytes"] == found["kv_bytes_dense"]
    assert found["kv_bytes"] == model.dense_cache_bytes(inputs["input_ids"].shape[1])
    with build("random", {"tokens": 2}).apply(model, None):
        fewer = task.measure(model, ctx)
    assert fewer["visual_tokens"] == model.side.layout(picture.height, picture.width).views * 2 + model.info.newlines
    assert fewer["flops"] < found["flops"]
    assert fewer["kv_bytes"] < fewer["kv_bytes_dense"] == found["kv_bytes"]
    if ATTENTION in model.info.hooks:
        with build("snapkv", {"keep": 0.25, "window": 2}).apply(model, None):
            assert task.measure(model, ctx)["kv_bytes"] < found["kv_bytes"]


def test_a_chat_template_places_the_image_by_the_class_own_token(subject: VisionLanguageSubject, data: str) -> None:
    model, task = subject.model, Vqa(data=data, chat=True)
    tokenizer, image = model.tokenizer, SMALL[type(subject.stock).__name__].image
    tokenizer.chat_template = (
        "{% for m in messages %}U:{% for c in m.content %}{% if c.type == 'image' %}IMAGE{% else %}{{ c.text }}{% endif %}"
        "{% endfor %} A:{% endfor %}".replace("IMAGE", image)
    )
    try:
        prompt = task.prompted(task.questions(model), task.examples()[0])
    finally:
        tokenizer.chat_template = None
    for name in ("chat_template.json", "processor_config.json"):  # where processors keep theirs
        path = subject.folder / name
        path.write_text(json.dumps({"chat_template": "of the processor"}))
        try:
            assert read_tokenizer(subject.folder).chat_template == "of the processor"
        finally:
            path.unlink()
    assert tokenizer.decode(prompt.before) == "U:"
    assert tokenizer.decode(prompt.behind) == f"{task.examples()[0].row['question']} A:"


def test_classes_in_one_sweep(data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows hold what was measured; a method that a class cannot have is refused before anything runs."""
    monkeypatch.chdir(tmp_path)
    for name in IN_A_SWEEP:
        save_small(name, tmp_path / name)
    sweep = {
        "name": "classes", "models": [f"hf:{name}" for name in IN_A_SWEEP],
        "methods": ["none", {"random": {"tokens": 2}}, {"avgpool": {"tokens": 1}}],
        "tasks": [{"vqa": {"data": data, "prompt": PROMPT, "max_tokens": 2}}],
    }  # fmt: skip
    options = {"executor": "local", "tracking_uri": "none", "store": str(tmp_path / "s"), "cache_dir": tmp_path / "c"}
    with pytest.raises(UserError, match=r"avgpool needs images with a square grid of patches, and hf:Qwen2_5_VL"):
        isoflop.run(sweep, **options)
    sweep["exclude"] = [{"model": f"hf:{IN_A_SWEEP[1]}", "avgpool.tokens": 1}]
    rows = isoflop.run(sweep, **options).results().to_pylist()
    found = {(row["model"].removeprefix("hf:"), row["method"]): row for row in rows}
    assert len(found) == 5
    assert {row["status"] for row in rows} == {"ok"}, [row["error_text"] for row in rows]
    for name in IN_A_SWEEP:
        whole, fewer = found[name, "none"], found[name, "random"]
        assert whole["V"] > fewer["V"]
        assert whole["ratio"] == 1
        assert fewer["ratio"] == pytest.approx(whole["V"] / fewer["V"])
