"""Facts in haystacks: every kind holds what it asks, at its length and depth."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from isoflop.core.errors import Infeasible, UserError
from isoflop.tasks.data.base import Example
from isoflop.tasks.data.needle import Needle
from isoflop.tasks.data.needles import KINDS, QUESTIONS
from isoflop.testing.task_probes import own, reader_of_text

LM, CTX = reader_of_text(positions=4096)
NOTES = own("notes.txt")
OPTIONS = {"haystack": NOTES, "lengths": (2500,), "repeats": 2}


def examples(**options: object) -> list[Example]:
    task = Needle(**{**OPTIONS, **options})  # type: ignore[arg-type]
    return task.examples_for(LM, task.tokens_of(LM))


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_fills_its_length_and_no_more(kind: str) -> None:
    task = Needle(**OPTIONS, kinds=(kind,), depths=(0.3,))  # type: ignore[arg-type]
    tokens = task.tokens_of(LM)
    for example in task.examples_for(LM, tokens):
        used = task.asked(LM, example, tokens).prompt.tokens + example.row["tokens"]
        assert 0.9 * 2500 < used <= 2500


@pytest.mark.parametrize("kind", ["single", "multi-key", "multi-value", "multi-query"])
def test_keys_and_numbers_stand_in_the_text_and_the_right_ones_are_asked(kind: str) -> None:
    for example in examples(kinds=(kind,), depths=(0.5,)):
        row = example.row
        facts = [s for s in row["context"].split(". ") if s.startswith("The secret number of")]
        assert len(facts) == (1 if kind == "single" else 4)
        held: dict[str, list[str]] = {}
        for fact in facts:
            key, _, number = fact.removeprefix("The secret number of ").partition(" is ")
            held.setdefault(key, []).append(number.rstrip("."))
        asked = [key for key in held if key in row["question"]]
        assert sorted(row["answers"]) == sorted(number for key in asked for number in held[key])
        assert len(asked) == {"multi-query": 4}.get(kind, 1)


def test_the_asked_fact_stands_at_its_depth() -> None:
    for example in examples(depths=(0.0, 0.25, 0.5, 0.75, 1.0), kinds=("single", "multi-key")):
        place = example.row["context"].index(example.row["answers"][0]) / len(example.row["context"])
        assert place == pytest.approx(example.row["depth"], abs=0.12)


def test_a_chain_of_variables_stands_in_order_and_names_all_that_hold_the_value() -> None:
    for example in examples(kinds=("variable-tracking",), depths=(0.0, 1.0)):
        context, held = example.row["context"], set()
        value = example.row["question"].split("value ")[1].split("?")[0]
        for name, source in re.findall(r"VAR (\w+) = ((?:VAR )?\w+)\.", context):
            assert source == value or source.removeprefix("VAR ") in held
            held.add(name)
        assert set(example.row["answers"]) == held
        places = [context.index(f"VAR {name} = ") for name in example.row["answers"]]
        assert places == sorted(places)


@pytest.mark.parametrize(("kind", "count"), [("common-words", 10), ("frequent-words", 3)])
def test_asked_words_are_more_frequent_than_all_others(kind: str, count: int) -> None:
    for example in examples(kinds=(kind,), depths=(0.0,)):
        words = Counter(w for w in example.row["context"].split() if not w.endswith("."))
        top = words.most_common(count + 1)
        assert {word for word, _ in top[:count]} == set(example.row["answers"])
        assert top[count - 1][1] > top[count][1]


def test_a_users_own_questions_stand_among_their_passages() -> None:
    found = examples(kinds=(QUESTIONS,), questions=own("questions.jsonl"), depths=(0.0, 1.0))
    rows = [json.loads(line) for line in Path(own("questions.jsonl")).read_text().splitlines()]
    for example in found:
        (row,) = [
            r for r in rows if r["question"] in example.row["question"] and r["passage"] in example.row["context"]
        ]
        at = example.row["context"].index(row["passage"])
        assert at == (0 if example.row["depth"] == 0.0 else len(example.row["context"]) - len(row["passage"]))
        assert sum(r["passage"] in example.row["context"] for r in rows) > 3


def test_examples_have_numbers_of_their_own_that_options_beside_them_do_not_change() -> None:
    few = examples(kinds=("single",), depths=(0.5,))
    many = examples(kinds=("multi-key", "single"), depths=(0.0, 0.5), repeats=3)
    ids = [example.id for example in many]
    assert len(set(ids)) == len(ids) == 12
    by_id = {example.id: example.row for example in many}
    assert all(by_id[example.id] == example.row for example in few)
    assert {e.id for e in examples(kinds=("single",), depths=(0.5,), seed=1)}.isdisjoint(e.id for e in few)


def test_the_share_of_answers_that_are_not_said_is_the_error() -> None:
    task = Needle(**OPTIONS, kinds=("multi-query",))  # type: ignore[arg-type]
    row = {"answers": ["12", "34", "56", "Ab"], "kind": "multi-query"}
    assert task._given(Example(0, row), "12 and 56, ab") == 0.75
    assert task._given(Example(0, {**row, "kind": QUESTIONS}), "only 34") == 1.0
    assert task._given(Example(0, row), "") == 0.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kinds": ("singel",)}, "did you mean 'single'"),
        ({"kinds": ("single", "single")}, "stands there 2 times"),
        ({"kinds": ()}, "kinds is an empty list"),
        ({"lengths": (5000,)}, "name 5000 tokens; model .* has room for 4096"),
        ({"kinds": (QUESTIONS,)}, "needs questions: FILE"),
        ({"questions": own("questions.jsonl")}, "needs questions: FILE, and only it does"),
        ({"haystack": "/nowhere/notes.txt"}, "no such file"),
    ],
)
def test_wrong_options_are_refused(options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Needle(**{**OPTIONS, **options}).check(LM.info)  # type: ignore[arg-type]


def test_a_length_without_room_for_the_question_is_refused() -> None:
    with pytest.raises(Infeasible, match="leaves no room for question and answer"):
        examples(lengths=(64,), kinds=("multi-query",))


def test_scores_are_finite_and_the_same_however_examples_are_batched() -> None:
    task = Needle(haystack=NOTES, lengths=(1024,), kinds=("single", "multi-key"), depths=(0.0, 1.0), repeats=1)
    found = [shard.errors for shard in task.evaluate(LM, CTX, 0)]
    assert np.isfinite(np.concatenate(found)).all()
