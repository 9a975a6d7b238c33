"""Tasks of lm-evaluation-harness: the figures of the harness' own model class, and methods that change them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from isoflop.core.errors import UserError
from isoflop.methods.base import build
from isoflop.tasks.base import Shard
from isoflop.tasks.harness.lm_eval_task import LmEval, load
from isoflop.testing.task_probes import own, reader_of_text

lm_eval = pytest.importorskip("lm_eval")
LM, CTX = reader_of_text(positions=1024)

COMMON = """
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
metadata: {version: 2.0}
"""
TASKS = {
    "own_choice": """
output_type: multiple_choice
doc_to_text: "{{passage}}\\nQuestion: {{question}}\\nAnswer:"
doc_to_choice: "{{options}}"
doc_to_target: answer
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "own_answer": """
output_type: generate_until
doc_to_text: "{{passage}}\\nQuestion: {{question}}\\nAnswer:"
doc_to_target: "{{answers[0]}}"
generation_kwargs: {until: ["\\n", "."], max_gen_toks: 12, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
    "own_text": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{passage}}"
metric_list: [{metric: bits_per_byte}, {metric: word_perplexity}]
""",
    "own_sampled": """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answers[0]}}"
generation_kwargs: {until: ["\\n"], do_sample: true, temperature: 0.7}
metric_list: [{metric: exact_match}]
""",
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("harness")
    data = folder / "data.jsonl"
    data.write_text("".join(Path(own("questions.jsonl")).read_text().splitlines(keepends=True)[:6]))
    for name, text in TASKS.items():
        (folder / f"{name}.yaml").write_text(f"task: {name}\n{COMMON.replace('DATA', str(data))}{text}")
    return str(folder)


def shards(tasks: str, name: str, seed: int = 0, **options: object) -> list[Shard]:
    return list(LmEval(task=name, include_path=tasks, **options).evaluate(LM, CTX, seed))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def harness() -> object:
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=LM.module, tokenizer=LM.tokenizer, batch_size=1, device="cpu", max_length=1024)


@pytest.mark.parametrize("name", ["own_choice", "own_answer", "own_text"])
def test_scores_are_those_of_the_harness_own_model(tasks: str, harness: object, name: str) -> None:
    """With no method the compressed context is the whole one, so that answers and likelihoods are the harness'."""
    from lm_eval.evaluator import evaluate

    loaded = load(name, tasks, -1)
    expected = evaluate(harness, {name: loaded.task}, bootstrap_iters=0)["samples"][name]
    metric = loaded.metrics[0]
    by_number = {loaded.numbers[sample["doc_id"]]: sample for sample in expected}
    found = shards(tasks, name, shard=4)
    assert [len(shard.ids) for shard in found] == [4, 2]
    for shard in found:
        for number, error in zip(shard.ids.tolist(), shard.errors.tolist(), strict=True):
            value = by_number[number][metric]
            wanted = -value[0] / value[1] / np.log(2) if name == "own_text" else 1.0 - value
            assert error == pytest.approx(wanted, rel=1e-4)


def test_likelihoods_and_answers_are_those_of_the_harness_own_model(tasks: str, harness: object) -> None:
    from isoflop.tasks.data.prompts import PromptTokenizer
    from isoflop.tasks.harness._lm_eval_model import HarnessModel

    ours = HarnessModel(LM, PromptTokenizer(LM.tokenizer, False, "here"), "\nQuestion:", "here")
    for name, kind in (
        ("own_choice", "loglikelihood"),
        ("own_answer", "generate_until"),
        ("own_text", "loglikelihood_rolling"),
    ):
        task = load(name, tasks, -1).task
        task.build_all_requests()
        requests = list(task.instances)
        expected, found = getattr(harness, kind)(requests), getattr(ours, kind)(requests)
        if kind == "generate_until":
            assert found == expected
        else:
            np.testing.assert_allclose(
                np.array([np.atleast_1d(x)[0] for x in found]), [np.atleast_1d(x)[0] for x in expected], rtol=1e-4
            )


def test_a_method_sees_the_context_and_changes_the_outcome(tasks: str) -> None:
    plain = np.concatenate([s.metrics["acc_norm"] for s in shards(tasks, "own_choice")])
    task = LmEval(task="own_text", include_path=tasks)
    with build("streaming-llm", {"keep": 0.1}).apply(LM, None):
        short = np.concatenate([s.errors for s in shards(tasks, "own_choice", question="\nQuestion:")])
        costs = LmEval(task="own_choice", include_path=tasks, question="\nQuestion:").measure(LM, CTX)
    assert short.shape == plain.shape
    assert costs["kv_bytes"] < 0.5 * costs["kv_bytes_dense"]
    assert task.measure(LM, CTX)["text_tokens"] > 0


def test_data_beside_the_tasks_yaml_are_found_from_anywhere(
    tasks: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Relative paths lead from the task's YAML, as a sweep's do; where nothing lies there, from where the process runs."""
    first = LmEval(task="own_choice", include_path=tasks).content()
    here, elsewhere = tmp_path / "tasks", tmp_path / "elsewhere"
    (here / "inner").mkdir(parents=True)
    elsewhere.mkdir()
    text = Path(tasks, "own_choice.yaml").read_text().replace(str(Path(tasks, "data.jsonl")), "rows/data.jsonl")
    (here / "inner" / "own_choice.yaml").write_text(text)
    monkeypatch.chdir(elsewhere)
    with pytest.raises(UserError, match=r"own_choice cannot be loaded \(.*rows/data.jsonl"):
        LmEval(task="own_choice", include_path=str(here)).content()
    for folder in (elsewhere, here / "inner"):
        (folder / "rows").mkdir()
        (folder / "rows" / "data.jsonl").write_text(Path(tasks, "data.jsonl").read_text())
        load.cache_clear()
        assert LmEval(task="own_choice", include_path=str(here)).content() == first
        if folder == elsewhere:  # what lies beside the YAML is taken
            (folder / "rows" / "data.jsonl").write_text(
                '{"passage": "", "question": "", "options": ["a"], "answer": 0}\n'
            )
    assert Path.cwd() == elsewhere


def test_job_ids_hold_the_documents_and_not_their_place(tasks: str, tmp_path: Path) -> None:
    first = LmEval(task="own_choice", include_path=tasks).content()
    lines = Path(tasks, "data.jsonl").read_text().splitlines(keepends=True)
    for place, kept in (("same", lines), ("fewer", lines[:5])):
        folder = tmp_path / place
        folder.mkdir()
        (folder / "data.jsonl").write_text("".join(kept))
        text = Path(tasks, "own_choice.yaml").read_text().replace(str(Path(tasks)), str(folder))
        (folder / "own_choice.yaml").write_text(text)
        other = LmEval(task="own_choice", include_path=str(folder)).content()
        assert (other == first) == (place == "same")
    assert LmEval(task="own_choice", include_path=tasks, num_fewshot=2).content() != first


def test_job_ids_hold_helpers_and_the_documents_of_answered_examples(tmp_path: Path) -> None:
    lines = Path(own("questions.jsonl")).read_text().splitlines(keepends=True)
    ids = {}
    for name, helper, shots in (
        ("first", "Q: ", lines[6:9]), ("same", "Q: ", lines[6:9]), ("helper", "Q!! ", lines[6:9]), ("shots", "Q: ", lines[9:12]),
    ):  # fmt: skip
        folder = tmp_path / name
        folder.mkdir()
        (folder / "test.jsonl").write_text("".join(lines[:6]))
        (folder / "train.jsonl").write_text("".join(shots))
        (folder / "utils.py").write_text(
            f"def mark():\n    return {helper!r}\n\ndef text(doc):\n    return mark() + doc['question']\n"
        )
        (folder / "asked.yaml").write_text(
            f"task: asked\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {folder}/test.jsonl, train: {folder}/train.jsonl}}}}\n"
            "test_split: test\nfewshot_split: train\nnum_fewshot: 2\noutput_type: multiple_choice\ndoc_to_text: !function utils.text\n"
            'doc_to_choice: "{{options}}"\ndoc_to_target: answer\nmetric_list: [{metric: acc}]\n'
        )
        ids[name] = LmEval(task="asked", include_path=str(folder)).content()
    assert ids["first"] == ids["same"]
    assert len(set(ids.values())) == 3


def test_a_method_on_the_cache_has_nothing_to_compress_in_whole_texts(tasks: str) -> None:
    method = build("snapkv", {"keep": 0.5})
    with pytest.raises(UserError, match="own_text scores whole texts"):
        LmEval(task="own_text", include_path=tasks).check_method(method, LM.info)
    LmEval(task="own_choice", include_path=tasks).check_method(method, LM.info)


def test_a_prompt_of_an_answer_keeps_its_last_line_end(tasks: str, harness: object) -> None:
    from lm_eval.api.instance import Instance

    from isoflop.tasks.data.prompts import PromptTokenizer
    from isoflop.tasks.harness._lm_eval_model import HarnessModel

    ours = HarnessModel(LM, PromptTokenizer(LM.tokenizer, False, "here"), "", "here")
    options = {"until": [], "max_gen_toks": 8, "do_sample": False}
    requests = [
        Instance("generate_until", {}, (f"{text}\nAnswer:\n", options), 0) for text in ("odd", "even more", " a")
    ]
    assert ours.generate_until(requests) == harness.generate_until(requests)  # type: ignore[attr-defined]


def test_wrong_names_are_refused_in_one_line(tasks: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"did you mean 'own_choice'\?"):
        LmEval(task="own_choise", include_path=tasks).check(LM.info)
    with pytest.raises(UserError, match=r"unknown metric of own_choice 'ac' \(did you mean 'acc'\?\)"):
        LmEval(task="own_choice", include_path=tasks, metric="ac").check(LM.info)
    with pytest.raises(UserError, match=r"its answers are sampled"):
        shards(tasks, "own_sampled")
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    load.cache_clear()
    with pytest.raises(UserError, match=r"pip install 'isoflop\[lm-eval\]'"):
        LmEval(task="own_choice", include_path=tasks).check(LM.info)
    load.cache_clear()


@pytest.mark.parametrize(
    ("options", "sampled"),
    [
        ({"do_sample": True}, True), ({"temperature": 0.7}, True), ({"num_beams": 4}, True), ({}, False),
        ({"do_sample": False, "temperature": 0.7}, False), ({"temperature": 0.0}, False),
    ],
)  # fmt: skip
def test_only_answers_that_are_drawn_are_refused(options: dict, sampled: bool) -> None:
    from isoflop.tasks.harness.common import generation

    if sampled:
        with pytest.raises(UserError, match="its answers are sampled"):
            generation(options, "here")
    else:
        assert generation({**options, "until": "x", "max_gen_toks": 7}, "here") == (7, ("x",))


def test_a_group_names_its_tasks(tasks: str, tmp_path: Path) -> None:
    group = {"group": "both", "task": ["own_choice", "own_answer"]}
    for name in ("own_choice", "own_answer"):
        (tmp_path / f"{name}.yaml").write_text(Path(tasks, f"{name}.yaml").read_text())
    (tmp_path / "both.yaml").write_text(json.dumps(group))
    with pytest.raises(UserError, match=r"both is a group; name its tasks: .*own_choice"):
        LmEval(task="both", include_path=str(tmp_path)).check(LM.info)


def test_a_missing_folder_of_tasks_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"include_path = .*nowhere: no such folder"):
        LmEval(task="own_choice", include_path=str(tmp_path / "nowhere")).check(LM.info)
