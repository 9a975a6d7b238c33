"""The tasks choice, generate and text on a user's own data, against brute force."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from isoflop.core.errors import Infeasible, UserError
from isoflop.methods.base import build
from isoflop.tasks.base import Task
from isoflop.tasks.data.choice import Choice
from isoflop.tasks.data.generate import Generate
from isoflop.tasks.data.metrics import METRICS
from isoflop.tasks.data.text import Text
from isoflop.testing.task_probes import own, reader_of_text

LM, CTX = reader_of_text()


def scores(task: Task, seed: int = 0) -> dict[int, tuple[float, dict[str, float]]]:
    found = {}
    for shard in task.evaluate(LM, CTX, seed):
        for row, number in enumerate(shard.ids.tolist()):
            found[number] = float(shard.errors[row]), {name: float(x[row]) for name, x in shard.metrics.items()}
    return found


def nll_of(prompt: str, answer: str) -> float:
    """Log-likelihood of an answer behind a prompt in one plain pass, in nats."""
    before = LM.tokenizer(prompt, add_special_tokens=False)["input_ids"]
    ids = LM.tokenizer(prompt + answer, add_special_tokens=False)["input_ids"]
    logits_TW = LM.module(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return -sum(float(logits_TW[p - 1, ids[p]]) for p in range(len(before), len(ids)))


QUESTIONS = own("questions.jsonl")


@pytest.mark.parametrize("normalise", ["none", "tokens", "bytes"])
def test_the_most_likely_option_is_chosen(normalise: str) -> None:
    task = Choice(data=QUESTIONS, context="passage", limit=6, normalise=normalise)
    found = scores(task)
    assert len(found) == 6
    for example in task.examples():
        row = example.row
        prompt = f"{row['passage']}\n\nQuestion: {row['question']}\nAnswer:"
        nll_O = np.array([nll_of(prompt, f" {option}") for option in row["options"]])
        sizes = {
            "none": [1] * 4,
            "tokens": [len(LM.tokenizer(f" {o}", add_special_tokens=False)["input_ids"]) for o in row["options"]],
            "bytes": [len(o.encode()) for o in row["options"]],
        }[normalise]
        likely = -nll_O / np.array(sizes)
        error, metrics = found[example.id]
        assert error == float(likely.argmax() != row["answer"])
        assert metrics["nll"] == pytest.approx(nll_O[row["answer"]], rel=1e-4)
        assert metrics["margin"] == pytest.approx(
            likely[row["answer"]] - max(np.delete(likely, row["answer"])), rel=1e-3, abs=1e-4
        )


def rewritten(tmp_path: Path, change: dict[str, object], count: int = 4) -> str:
    path = tmp_path / "changed.jsonl"
    rows = [json.loads(line) for line in Path(QUESTIONS).read_text().splitlines()[:count]]
    for row in rows:
        row.update({name: value(row) if callable(value) else value for name, value in change.items()})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize(
    "change",
    [
        {"answer": lambda row: row["options"][row["answer"]]},
        {"answer": lambda row: "ABCD"[row["answer"]]},
        {"answer": lambda row: str(row["answer"])},
        {"options": lambda row: json.dumps(row["options"])},
        {"options": lambda row: {"text": row["options"], "label": ["k", "l", "m", "n"]}, "answer": lambda row: "klmn"[row["answer"]]},
    ],
    ids=["text", "letter", "digits", "options as JSON", "labels"],
)  # fmt: skip
def test_answers_and_options_may_be_written_in_several_ways(tmp_path: Path, change: dict[str, object]) -> None:
    plain = scores(Choice(data=rewritten(tmp_path, {})))
    (tmp_path / "again").mkdir()
    other = scores(Choice(data=rewritten(tmp_path / "again", change)))
    assert sorted(m["nll"] for _, m in plain.values()) == pytest.approx(sorted(m["nll"] for _, m in other.values()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": 4}, r"holds 4, which is none of the options .*allowed: 0 … 3, a letter, or an option's text"),
        ({"answer": "Zagreb"}, "holds 'Zagreb'"),
        ({"options": ["one"], "answer": 0}, "a list of two texts or more"),
        ({"options": {"text": ["one"], "label": ["A"]}, "answer": "A"}, "a list of two texts or more"),
        ({"options": None}, "options = 'options' holds"),
        ({"question": None}, "'question'"),
    ],
)
def test_rows_that_cannot_be_asked_are_refused_in_one_line_before_anything_runs(
    tmp_path: Path, change: dict, message: str
) -> None:
    for ask in (scores, lambda task: task.check(LM.info)):
        with pytest.raises(UserError, match=message) as caught:
            ask(Choice(data=rewritten(tmp_path, change)))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value"), [("answers", None), ("answers", []), ("answers", ["", " "]), ("passage", None)]
)
def test_one_row_without_a_prompt_or_a_reference_is_told_at_plan(tmp_path: Path, field: str, value: object) -> None:
    rows = [json.loads(line) for line in Path(QUESTIONS).read_text().splitlines()]
    rows[7][field] = value
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = Generate(
        data=str(tmp_path / "rows.jsonl"), prompt="{passage} {question}", context="passage", references="answers"
    )
    with pytest.raises(UserError, match=f"'{field}'"):
        task.check(LM.info)
    Generate(data=QUESTIONS, prompt="{passage} {question}", context="passage", references="answers").check(LM.info)


def test_more_shots_than_rows_are_told_at_plan() -> None:
    with pytest.raises(UserError, match="shots = 40"):
        Choice(data=QUESTIONS, shots=40).check(LM.info)


def test_shots_stand_before_the_context_and_never_hold_the_question() -> None:
    task = Choice(data=QUESTIONS, context="passage", shots=3, limit=5)
    for example in task.examples():
        text = task.text_of(example)
        assert text.context == example.row["passage"]
        assert text.before.count("Answer: ") == 3
        assert example.row["passage"] not in text.before
    task = Choice(data=QUESTIONS, shots=40)
    with pytest.raises(UserError, match=r"shots = 40, but .* has 32 rows"):
        task.text_of(example)


def test_generation_is_compared_with_references(monkeypatch: pytest.MonkeyPatch) -> None:
    task = Generate(data=QUESTIONS, prompt="{passage} {question}", context="passage", references="answers", limit=3)
    example = task.examples()[0]
    right = example.row["answers"][0]
    said = iter([f"\n {right}.\nand more", f"It is {right}", "nothing"])
    monkeypatch.setattr("isoflop.tasks.data.prompts.PromptTokenizer.text", lambda self, ids: next(said))
    asked = task.asked(LM, example, task.tokens_of(LM))
    for error in (0.0, 1.0, 1.0):
        text = next(said)
        assert 1.0 - task.score(asked, text) == error


@pytest.mark.parametrize(
    ("metric", "answer", "references", "score"),
    [
        ("exact", "The  cat.", ["cat"], 1), ("exact", "", ["A"], 0), ("exact", "a", ["A"], 1), ("exact", "-5", ["5"], 0),
        ("exact", "3.5", ["35"], 0), ("exact", "3.5.", ["3.5"], 1), ("exact", "1,000", ["1000"], 1), ("exact", "$-5", ["-5"], 1),
        ("exact", "state-of-the-art", ["stateoftheart"], 1), ("contains", "x", ["", "y"], 0), ("contains", "A Cat", ["cat "], 1),
        ("rouge-l", "да", ["да"], 1), ("rouge-l", "a_b c", ["a b c"], 1), ("rouge-l", "x y", ["x z"], 0.5), ("f1", "é", ["é"], 1),
    ],
)  # fmt: skip
def test_metrics_on_what_is_easily_lost(metric: str, answer: str, references: list[str], score: float) -> None:
    assert METRICS.get(metric)(answer, references, "") == pytest.approx(score)


def test_empty_documents_are_told_before_anything_runs(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(" \n")
    with pytest.raises(UserError, match="every document is empty"):
        Text(data=str(tmp_path / "a.txt")).check(LM.info)


def test_windows_that_hold_the_rest_of_a_character_are_no_examples(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("🙂" * 20)
    found = scores(Text(data=str(tmp_path / "a.txt"), tokens=8))
    assert found
    assert all(np.isfinite(error) for error, _ in found.values())


def test_stop_texts_end_generation() -> None:
    options = {"data": QUESTIONS, "prompt": "{question}", "references": "answers", "max_tokens": 12, "limit": 4}
    longest = scores(Generate(**options, stop=()))
    assert {metrics["tokens"] for _, metrics in longest.values()} == {12.0}
    task = Generate(**options, stop=("e", "t", " "))
    assert min(metrics["tokens"] for _, metrics in scores(task).values()) < 12.0


@pytest.mark.parametrize("prefix", [0.0, 0.25, 0.5])
def test_windows_of_text_score_every_token_once(tmp_path: Path, prefix: float) -> None:
    words = " ".join(f"w{n}" for n in range(60))
    (tmp_path / "a.txt").write_text(words)
    (tmp_path / "b.txt").write_text("short one")
    task = Text(data=str(tmp_path), tokens=32, prefix=prefix, limit=0)
    tokens = task.tokens_of(LM)
    examples = task.examples_for(LM, tokens)
    scored = sum(len(e.row["ids"]) - e.row["given"] for e in examples)
    lengths = [len(tokens.with_ends(text)[0]) for text in (words, "short one")]
    first = [task.context_tokens(min(n, 32)) + bool(prefix) for n in lengths]
    assert scored == sum(lengths) - sum(first)
    if not prefix:
        skipped = sum(tokens.with_ends(text)[1][0] for text in (words, "short one"))
        assert sum(e.row["bytes"] for e in examples) == len(words) + len("short one") - skipped


def test_bits_per_byte_are_those_of_one_pass(tmp_path: Path) -> None:
    text = "the other weather whether they're there or where others"
    (tmp_path / "a.txt").write_text(text)
    ((error, metrics),) = scores(Text(data=str(tmp_path / "a.txt"), tokens=1000, prefix=0.0)).values()
    ids = LM.tokenizer(text, add_special_tokens=False)["input_ids"]
    logits_TW = LM.module(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    nll = -sum(float(logits_TW[p - 1, ids[p]]) for p in range(1, len(ids)))
    size = len(text) - len(LM.tokenizer.decode(ids[:1]))
    assert error == pytest.approx(nll / math.log(2) / size, rel=1e-4)
    assert metrics["nll"] == pytest.approx(nll / (len(ids) - 1), rel=1e-4)
    assert metrics["bytes"] == size


def test_text_may_be_a_field_of_rows(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("the other weather whether they're there")
    (tmp_path / "b.jsonl").write_text(json.dumps({"body": "the other weather whether they're there"}))
    texts = [Text(data=str(tmp_path / "a.txt")), Text(data=str(tmp_path / "b.jsonl"), field="body")]
    assert [v for v, _ in scores(texts[0]).values()] == [v for v, _ in scores(texts[1]).values()]
    with pytest.raises(UserError, match=r"unknown field of .*'text'.*allowed: body"):
        Text(data=str(tmp_path / "b.jsonl")).check(LM.info)


def test_a_folder_is_read_as_text_or_as_tables_and_never_as_what_is_about_them(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": "the other weather"}))
    (tmp_path / "README.md").write_text("about the data")
    assert [row["text"] for row in Text(data=str(tmp_path)).rows.rows] == ["the other weather"]
    (tmp_path / "more.txt").write_text("where others")
    with pytest.raises(UserError, match="holds text files and tables; name one of them"):
        _ = Text(data=str(tmp_path)).rows


def test_methods_without_anything_to_act_on_are_refused() -> None:
    snapkv, words = build("snapkv", {"keep": 0.5}), build("prompt-random", {})
    with pytest.raises(Infeasible, match="prefix = 0 leaves no context"):
        Text(data=own("notes.txt"), prefix=0.0).check_method(snapkv, LM.info)
    with pytest.raises(Infeasible, match="names none; name its field: context: FIELD"):
        Choice(data=QUESTIONS).check_method(words, LM.info)
    Choice(data=QUESTIONS, context="passage").check_method(words, LM.info)
    Choice(data=QUESTIONS).check_method(snapkv, LM.info)  # the whole prompt is its context


def test_a_method_on_the_cache_changes_what_is_scored_and_its_cost() -> None:
    task = Choice(data=QUESTIONS, context="passage", limit=4)
    full = task.measure(LM, CTX)
    before = scores(task)
    with build("streaming-llm", {"keep": 0.2}).apply(LM, None):
        after, costs = scores(task), task.measure(LM, CTX)
    assert any(before[n][1]["nll"] != pytest.approx(after[n][1]["nll"], rel=1e-3) for n in before)
    assert costs["kv_bytes"] < 0.6 * full["kv_bytes"]
    assert costs["text_tokens"] == full["text_tokens"]


def test_a_method_on_the_text_shortens_the_context_and_nothing_else() -> None:
    task = Choice(data=QUESTIONS, context="passage", limit=2)
    tokens, example = task.tokens_of(LM), task.examples()[0]
    whole = task.asked(LM, example, tokens)
    with build("prompt-random", {"rate": 0.3}).apply(LM, None):
        short = task.asked(LM, example, tokens)
        costs = task.measure(LM, CTX)
    assert len(short.text.context) < 0.6 * len(whole.text.context)
    assert short.text.behind == whole.text.behind
    assert short.prompt.tokens < whole.prompt.tokens
    assert costs["text_tokens"] < task.measure(LM, CTX)["text_tokens"]


def test_too_long_prompts_are_refused() -> None:
    small, _ = reader_of_text(positions=64)
    with pytest.raises(Infeasible, match=r"a prompt with its answer takes .* has room for 64"):
        list(Choice(data=QUESTIONS, context="passage").evaluate(small, CTX, 0))
