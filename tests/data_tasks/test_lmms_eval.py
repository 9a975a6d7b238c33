"""Tasks of lmms-eval: the harness' own evaluation of the same answers, and methods that change them."""

from __future__ import annotations

import json
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from isoflop.core.errors import Infeasible, UserError
from isoflop.core.folder_context import FolderContext
from isoflop.methods.base import build
from isoflop.models.family import family_of
from isoflop.models.vlm import VlmModel
from isoflop.tasks.base import Shard
from isoflop.tasks.harness.lmms_eval_task import LmmsEval, load
from isoflop.testing.architectures.vision_language import vision_language_subject
from isoflop.testing.small_llava import PATCHES, save_small_llava
from isoflop.testing.small_vision_language import MOST, SMALL
from isoflop.testing.task_probes import reader_of_text

pytest.importorskip("lmms_eval")

COMMON = """
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
doc_to_visual: !function helpers.pictures
doc_to_text: "{{question}}"
metadata: {version: 3.0}
"""
TASKS = {
    "own_words": """
output_type: generate_until
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\\n"], max_new_tokens: 5, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
    "own_choices": """
output_type: multiple_choice
doc_to_choice: "{{options}}"
doc_to_target: "{{label}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
""",
    "own_scores": """
output_type: generate_until
doc_to_target: "{{answer}}"
generation_kwargs: {max_new_tokens: 4, do_sample: false}
process_results: !function helpers.judged
metric_list:
  - {metric: length, aggregation: !function helpers.mean_score, higher_is_better: false}
  - {metric: together, aggregation: !function helpers.distinct, higher_is_better: true}
""",
    "own_parts": """
output_type: generate_until
doc_to_target: "{{answer}}"
generation_kwargs: {max_new_tokens: 4, do_sample: false}
process_results: !function helpers.of_some
metric_list:
  - {metric: words, aggregation: !function helpers.mean_score, higher_is_better: false}
  - {metric: colours, aggregation: !function helpers.mean_score, higher_is_better: false}
  - {metric: nobody, aggregation: !function helpers.mean_score, higher_is_better: false}
""",
    "own_pairs": """
output_type: generate_until
doc_to_target: "{{answer}}"
doc_to_visual: !function helpers.twice
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
    "own_rounds": """
output_type: generate_until_multi_round
doc_to_target: "{{answer}}"
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
}
HELPERS = """
from PIL import Image

def pictures(doc):
    return [Image.open(doc["image"]).convert("RGB")]

def twice(doc):
    return pictures(doc) * 2

def of_some(doc, results):
    return {"words" if doc["question"].startswith("what") else "colours": {"score": float(len(results[0]))}}

def judged(doc, results):
    return {"length": {"id": doc["question"], "score": len(results[0])}, "together": {"said": results[0]}}

def mean_score(values):
    return sum(v["score"] for v in values) / len(values)

def distinct(values):
    return len({v["said"] for v in values}) / len(values)
"""


def write_tasks(folder: Path, documents: int = 6) -> str:
    rng = np.random.default_rng(5)
    rows = []
    for number in range(6):
        picture = folder / f"{number}.png"
        Image.fromarray(rng.integers(0, 256, (40, 40, 3)).astype("uint8")).save(picture)
        question = ("what is it", "which colour is it")[number % 2]
        rows.append(
            {"image": str(picture), "question": question, "answer": "red", "options": ["red", "a blue box", "no"], "label": number % 3}
        )  # fmt: skip
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:documents]))
    (folder / "helpers.py").write_text(HELPERS)
    for name, text in TASKS.items():
        common = COMMON.replace("DATA", str(folder / "data.jsonl"))
        if "doc_to_visual" in text:
            common = common.replace("doc_to_visual: !function helpers.pictures\n", "")
        (folder / f"{name}.yaml").write_text(f"task: {name}\n{common}{text}")
    return str(folder)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_tasks(tmp_path_factory.mktemp("lmms"))


def test_data_beside_the_tasks_yaml_are_found_from_anywhere(
    tasks: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = LmmsEval(task="own_words", include_path=tasks).content()
    folder = tmp_path / "tasks"
    folder.mkdir()
    for file in ("data.jsonl", "helpers.py"):
        (folder / file).write_text(Path(tasks, file).read_text())
    text = Path(tasks, "own_words.yaml").read_text().replace(str(Path(tasks, "data.jsonl")), "data.jsonl")
    (folder / "own_words.yaml").write_text(text)
    monkeypatch.chdir(tmp_path)
    assert LmmsEval(task="own_words", include_path=str(folder)).content() == first


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> VlmModel:
    folder = tmp_path_factory.mktemp("llava") / "llava"
    save_small_llava(folder, reader_of_text()[0].tokenizer)
    ref = f"hf:{folder}"
    found = family_of(ref).load(family_of(ref).info(ref, {}), None, FolderContext(tmp_path_factory.mktemp("cache")))
    assert isinstance(found, VlmModel)
    return found


def shards(tasks: str, name: str, model: VlmModel, seed: int = 0, **options: object) -> list[Shard]:
    task = LmmsEval(task=name, include_path=tasks, **options)  # type: ignore[arg-type]
    task.check(model.info)
    return list(task.evaluate(model, None, seed))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["own_words", "own_scores"])
def test_values_are_those_of_the_harness_own_evaluation(tasks: str, model: VlmModel, name: str) -> None:
    """The harness runs our model over all documents itself; documents and figures agree."""
    from lmms_eval.evaluator import evaluate

    task = LmmsEval(task=name, include_path=tasks)
    loaded = load(name, tasks, 0)
    with redirect_stderr(StringIO()):
        results = evaluate(lm=task._asked(model), task_dict={name: loaded.task}, bootstrap_iters=0)
    metric = loaded.metrics[0]
    value = results["results"][name][f"{metric},none"]
    found = shards(tasks, name, model, shard=4, seed=3)
    assert [len(shard.ids) for shard in found] == [4, 2]
    errors = np.concatenate([shard.errors for shard in found])
    assert errors.mean() == pytest.approx(value if name == "own_scores" else 1 - value)
    assert set(np.concatenate([shard.ids for shard in found]).tolist()) == set(loaded.numbers)


def errors_by_hand(tasks: str, model: VlmModel) -> dict[int, float]:
    """Of every document, whether another option than the right one has the least mean loss."""
    task, loaded = LmmsEval(task="own_choices", include_path=tasks), load("own_choices", tasks, 0)
    questions, expected = task._questions(model), {}
    for number, document in zip(loaded.numbers, loaded.task.eval_docs, strict=True):
        prompt = questions.prompt(number, document["image"], document["question"])
        found = questions.losses([prompt] * 3, [f" {option}" for option in document["options"]])
        expected[number] = float(np.argmin([loss for loss, _ in found]) != document["label"])
    return expected


def test_a_choice_is_the_option_of_least_mean_loss(tasks: str, model: VlmModel) -> None:
    """By hand: the evaluation of lmms-eval 0.7.3 itself turns losses into text, and fails."""
    expected = errors_by_hand(tasks, model)
    for shard in shards(tasks, "own_choices", model, shard=4):
        assert [expected[number] for number in shard.ids.tolist()] == shard.errors.tolist()


def test_a_metric_of_all_documents_together_is_one_example(tasks: str, model: VlmModel) -> None:
    whole = shards(tasks, "own_scores", model, metric="together", shard=2)
    assert len(whole) == 1
    assert len(whole[0].ids) == 1
    assert whole[0].metrics["documents"] == [6.0]
    assert 0.0 <= whole[0].errors[0] < 1.0  # 1 − distinct answers among six


@pytest.mark.parametrize("shard", [1, 2, 6])
def test_documents_without_a_value_of_the_metric_are_left_out_however_they_are_sharded(
    tasks: str, model: VlmModel, shard: int
) -> None:
    """Half of them have one metric, half the other, as in MME."""
    whole = {name: shards(tasks, "own_parts", model, metric=name) for name in ("words", "colours")}
    ids = {name: {number for s in found for number in s.ids.tolist()} for name, found in whole.items()}
    assert len(ids["words"]) == len(ids["colours"]) == 3
    assert not ids["words"] & ids["colours"]
    for name, found in whole.items():
        parts = shards(tasks, "own_parts", model, metric=name, shard=shard)
        assert {n: e for s in parts for n, e in zip(s.ids.tolist(), s.errors.tolist(), strict=True)} == {
            n: e for s in found for n, e in zip(s.ids.tolist(), s.errors.tolist(), strict=True)
        }
    with pytest.raises(Infeasible, match="no document of own_parts has a value of nobody"):
        shards(tasks, "own_parts", model, metric="nobody")


def test_losses_are_those_of_one_pass(tasks: str, model: VlmModel) -> None:
    """Token by token over the cache, as one pass over prompt and answer."""
    import torch

    questions = LmmsEval(task="own_words", include_path=tasks)._questions(model)
    picture = Image.new("RGB", (40, 40), (200, 30, 90))
    prompts = [questions.prompt(n, picture, "what is it") for n in (1, 2)]
    found = questions.losses(prompts, ["a blue box", "no"])
    for prompt, answer, (loss, greedy) in zip(prompts, ("a blue box", "no"), found, strict=True):
        ids = questions.tokens.plain(answer)
        longer = questions.prompt(prompt.id, picture, "what is it")
        batch = questions._batch(model.look(model.side.pixels([picture])), [longer])
        whole = type(batch)(
            batch.hidden,
            torch.cat((batch.prompt_BT, torch.tensor([ids])), dim=1),
            batch.question_BQ,
            batch.ids_B,
        )
        segmented = model.prompt_of(whole)
        asked = torch.zeros_like(segmented.positions_BL, dtype=torch.bool)
        asked[:, -len(ids) - 1 : -1] = True
        logits = model.run(segmented, asked).float().log_softmax(-1)
        assert loss == pytest.approx(-logits[range(len(ids)), ids].mean().item(), rel=1e-4)
        assert greedy == (logits.argmax(-1).tolist() == ids)


def test_methods_change_what_is_said(tasks: str, model: VlmModel) -> None:
    task = LmmsEval(task="own_choices", include_path=tasks)
    picture = Image.new("RGB", (40, 40), (200, 30, 90))

    def losses() -> list[tuple[float, bool]]:
        questions = task._questions(model)
        return questions.losses([questions.prompt(1, picture, "what is it")], ["red"])

    plain, costs = losses(), task.measure(model, None)  # type: ignore[arg-type]
    assert costs["visual_tokens"] == PATCHES
    for method, options in (("avgpool", {"tokens": 1}), ("snapkv", {"keep": 0.25, "window": 2})):
        with build(method, options).apply(model, None):
            assert losses() != plain
            assert len(shards(tasks, "own_choices", model)) == 1
            cheaper = task.measure(model, None)  # type: ignore[arg-type]
            assert cheaper["kv_bytes"] < costs["kv_bytes"]


def test_job_ids_hold_documents_and_images_and_not_their_place(tasks: str, tmp_path: Path) -> None:
    first = LmmsEval(task="own_choices", include_path=tasks).content()
    for place in ("same", "fewer", "other-image", "other-helper"):
        (tmp_path / place).mkdir()
        folder = write_tasks(tmp_path / place, 5 if place == "fewer" else 6)
        if place == "other-image":
            Image.new("RGB", (40, 40)).save(Path(folder, "3.png"))
        if place == "other-helper":
            Path(folder, "helpers.py").write_text(HELPERS.replace('.convert("RGB")', '.convert("L").convert("RGB")'))
        assert (LmmsEval(task="own_choices", include_path=folder).content() == first) == (place == "same"), place
    assert LmmsEval(task="own_choices", include_path=tasks, limit=3).content() != first


def test_what_cannot_be_asked_is_refused_in_one_line(
    tasks: str, model: VlmModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"unknown task 'own_word' \(did you mean 'own_words'\?\)"):
        LmmsEval(task="own_word", include_path=tasks).check(model.info)
    with pytest.raises(UserError, match=r"unknown metric of own_choices 'ac'"):
        LmmsEval(task="own_choices", include_path=tasks, metric="ac").check(model.info)
    with pytest.raises(UserError, match=r"unknown filter of own_choices 'first'"):
        LmmsEval(task="own_choices", include_path=tasks, filter="first").check(model.info)
    with pytest.raises(UserError, match=r"has <image> 0 times"):
        LmmsEval(task="own_choices", include_path=tasks, prompt="{question}").check(model.info)
    with pytest.raises(Infeasible, match=r"document 0 of own_pairs has 2 images; allowed: one image"):
        LmmsEval(task="own_pairs", include_path=tasks).check(model.info)
    with pytest.raises(Infeasible, match=r"own_rounds asks generate_until_multi_round requests"):
        LmmsEval(task="own_rounds", include_path=tasks).check(model.info)
    with pytest.raises(Infeasible, match=r"needs a vision-language model with a tokenizer"):
        LmmsEval(task="own_choices", include_path=tasks).check(reader_of_text()[0].info)
    Path(tasks, "data.jsonl").touch()
    broken = Path(tasks, "broken.yaml")
    broken.write_text(
        Path(tasks, "own_words.yaml").read_text().replace("data.jsonl", "nothing.jsonl").replace("own_words", "broken")
    )
    with pytest.raises(UserError, match=r"broken cannot be loaded \("):
        LmmsEval(task="broken", include_path=tasks).check(model.info)
    monkeypatch.setitem(__import__("sys").modules, "lmms_eval", None)
    load.cache_clear()
    with pytest.raises(UserError, match=r"pip install 'isoflop\[lmms-eval\]'"):
        LmmsEval(task="own_choices", include_path=tasks).check(model.info)
    load.cache_clear()


@pytest.mark.parametrize(
    "name", [*MOST[::3], *(pytest.param(n, marks=pytest.mark.slow) for n in SMALL if n not in MOST[::3])]
)
def test_every_class_answers_the_harness_as_it_answers_by_itself(name: str, tasks: str, tmp_path: Path) -> None:
    """Likelihoods and greedy answers, and a method on visual tokens that changes them."""
    model = vision_language_subject(name, tmp_path).model
    task, expected = LmmsEval(task="own_choices", include_path=tasks), errors_by_hand(tasks, model)
    (shard,) = shards(tasks, "own_choices", model)
    assert dict(zip(shard.ids.tolist(), shard.errors.tolist(), strict=True)) == expected
    (words,) = shards(tasks, "own_words", model)
    assert set(words.ids.tolist()) == set(load("own_words", tasks, 0).numbers)
    costs = task.measure(model, None)  # type: ignore[arg-type]
    with build("random", {"tokens": 1}).apply(model, None):
        assert task.measure(model, None)["visual_tokens"] < costs["visual_tokens"]  # type: ignore[arg-type]
        assert len(shards(tasks, "own_choices", model)) == 1
