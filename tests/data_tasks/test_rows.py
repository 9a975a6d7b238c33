"""A user's data: formats, names of examples, and what is wrong with files, in one line."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from isoflop.core.errors import UserError
from isoflop.core.rows import chosen, named, read
from isoflop.tasks.base import task_of

ROWS = [{"q": f"question {n}", "a": f"{n}"} for n in range(7)]


def write(path: Path, rows: list[dict] = ROWS) -> Path:
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    match path.suffix:
        case ".gz":
            path.write_bytes(gzip.compress(lines.encode()))
        case ".jsonl" | ".ndjson":
            path.write_text(lines)
        case ".json":
            path.write_text(json.dumps(rows))
        case ".csv" | ".tsv":
            with path.open("w", newline="") as file:
                writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
                writer.writeheader()
                writer.writerows(rows)
        case ".parquet":
            pq.write_table(pa.Table.from_pylist(rows), path)
        case _:
            with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, pa.Table.from_pylist(rows).schema) as out:
                out.write_table(pa.Table.from_pylist(rows))
    return path


FORMS = ["a.jsonl", "a.ndjson", "a.json", "a.csv", "a.tsv", "a.parquet", "a.arrow", "a.feather", "a.jsonl.gz"]


@pytest.mark.parametrize("name", FORMS)
def test_every_form_gives_the_same_rows_numbers_and_content(tmp_path: Path, name: str) -> None:
    found, expected = read(str(write(tmp_path / name))), named(ROWS, "x")
    assert found.rows == expected.rows
    assert found.ids_N.tolist() == expected.ids_N.tolist()
    assert found.content == expected.content


def test_shards_order_and_names_of_files_change_nothing(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    (other / "deep").mkdir(parents=True)
    one.mkdir()
    write(one / "all.jsonl")
    write(other / "b.jsonl", ROWS[4:][::-1])
    write(other / "deep" / "a.parquet", ROWS[:4])
    (other / "README.md").write_text("not a table")
    assert read(str(one)).content == read(str(other)).content
    assert read(str(one)).rows == read(str(other)).rows


def test_a_folder_has_splits(tmp_path: Path) -> None:
    write(tmp_path / "train-00.jsonl", ROWS[:5])
    write(tmp_path / "test-00.jsonl", ROWS[5:])
    assert len(read(str(tmp_path), "train")) == 5
    assert len(read(str(tmp_path), "test")) == 2
    with pytest.raises(UserError, match=r"split = 'dev'.*test-00\.jsonl"):
        read(str(tmp_path), "dev")


@given(st.lists(st.dictionaries(st.sampled_from("abc"), st.integers(0, 2), min_size=1), min_size=1, max_size=12))
def test_numbers_are_different_stable_and_exact_as_floats(rows: list[dict]) -> None:
    found, back = named(rows, "x"), named(rows[::-1], "x")
    assert len(set(found.ids_N.tolist())) == len(rows)
    assert found.ids_N.tolist() == back.ids_N.tolist()
    assert found.content == back.content
    assert all(int(float(n)) == n for n in found.ids_N.tolist())


def test_a_changed_row_is_another_example(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl")
    before = read(str(path))
    write(path, [*ROWS[:6], {"q": "question 6", "a": "changed"}])
    after = read(str(path))
    assert before.content != after.content
    assert len(set(before.ids_N.tolist()) & set(after.ids_N.tolist())) == 6


def test_fewer_examples_are_a_subset_of_more() -> None:
    rows = named(ROWS, "x")
    for seed in (0, 1):
        every = chosen(len(rows), None, seed, rows.ids_N)
        assert sorted(every.tolist()) == list(range(7))
        for limit in range(1, 7):
            np.testing.assert_array_equal(chosen(len(rows), limit, seed, rows.ids_N), every[:limit])
    assert chosen(7, None, 0, rows.ids_N).tolist() != chosen(7, None, 1, rows.ids_N).tolist()


def test_a_data_set_of_the_hub_is_rows_like_any_other(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")  # an extra

    def load(name: str, config: str | None, split: str) -> list[dict]:
        if name != "owner/name":
            raise FileNotFoundError(f"no {name}")
        return ROWS if (config, split) == ("plain", "dev") else ROWS[:2]

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert read("hub:owner/name:plain", "dev").content == named(ROWS, "x").content
    assert len(read("hub:owner/name")) == 2
    with pytest.raises(UserError, match=r"data hub:owner/none: split 'test' cannot be loaded \(no owner/none\)"):
        read("hub:owner/none")


WRONG = {
    "broken.jsonl": (b'{"a": 1}\n{"a": \n', r"broken\.jsonl:2: is no JSON"),
    "number.jsonl": (b"3\n", r"line 1 is 3; allowed: an object"),
    "object.json": (b'{"a": 1}', r"holds dict, not a list of rows"),
    "latin.jsonl": ('{"a": "é"}'.encode("latin-1"), r"is not UTF-8 text \(byte 7\)"),
    "ragged.csv": (b"a,b\n1,2\n3\n", r"ragged\.csv:3: has another number of cells than the 2"),
    "quote.csv": (b'a,b\n"1"x,2\n', r"cannot be read"),
    "none.jsonl": (b"\n\n", r"holds no rows"),
    "header.csv": (b"a,b\n", r"holds no rows"),
    "no.parquet": (b"PAR1 is not", r"cannot be read"),
    "no.arrow": (b"nothing of the kind", r"cannot be read"),
    "no.jsonl.gz": (b"not gzip", r"cannot be read"),
    "cut.jsonl.gz": (gzip.compress(b'{"a": 1}\n' * 99)[:-20], r"cannot be read"),
    "deep.jsonl": (b"[" * 100_000 + b"]" * 100_000, r"deep\.jsonl:1: is no JSON"),
    "twice.csv": (b"q, q\n1,2\n", r"its header names 'q' twice"),
    "text.docx": (b"x", r"is no table file; allowed: \.jsonl"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_files_are_refused_in_one_line(tmp_path: Path, name: str) -> None:
    content, message = WRONG[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        read(str(tmp_path / name))
    assert "\n" not in str(caught.value)


OTHER = {
    "cells.jsonl": (b"q,a\n1,2\n", r"cells\.jsonl:1: is no JSON .*; it looks like csv: name it cells\.csv$"),
    "tabs.jsonl": (b"q\ta\n1\t2\n", r"it looks like tsv: name it tabs\.tsv$"),
    "list.jsonl": (b'[{"q": 1}]', r"it looks like json: name it list\.json$"),
    "wide.jsonl": (b'[\n {"q": 1}\n]', r"it looks like json: name it wide\.json$"),
    "lines.json": (b'{"q": 1}\n{"q": 2}\n', r"it looks like jsonl: name it lines\.jsonl$"),
    "lines.csv": (b'{"q": 1, "a": 2}\n{"q": 2, "a": 3}\n', r"it looks like jsonl: name it lines\.jsonl$"),
    "table.csv": (b"PAR1\x15\x00", r"it looks like parquet: name it table\.parquet$"),
    "table.jsonl": (b"ARROW1\x00\x00\xff", r"it looks like arrow: name it table\.arrow$"),
    "cells.parquet": (b"q,a\n1,2\n", r"it looks like csv: name it cells\.csv$"),
    "cells.jsonl.gz": (gzip.compress(b"q,a\n1,2\n"), r"it looks like csv: name it cells\.csv\.gz$"),
}


@pytest.mark.parametrize("name", OTHER)
def test_a_file_in_another_form_than_its_name_says_is_told_which(tmp_path: Path, name: str) -> None:
    content, message = OTHER[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        read(str(tmp_path / name))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", [name for name in WRONG if name.endswith(("l", "v"))])
def test_a_broken_file_of_its_own_form_is_not_told_another(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(WRONG[name][0])
    with pytest.raises(UserError) as caught:
        read(str(tmp_path / name))
    assert "looks like" not in str(caught.value)


@pytest.mark.parametrize("name", FORMS)
def test_rows_know_where_they_stand(tmp_path: Path, name: str) -> None:
    found = read(str(write(tmp_path / name)))
    for index, row in enumerate(found.rows):
        assert found.place(index) == f"row {ROWS.index(dict(row)) + 1} of {tmp_path / name}"


@pytest.mark.parametrize(
    ("task", "options"),
    [
        ("choice", {"context": "p", "question": "q", "options": "o", "answer": "gold"}),
        ("generate", {"prompt": "{p} {q}", "context": "p", "references": "gold"}),
    ],
)
def test_a_row_that_cannot_be_asked_says_where_it_stands(tmp_path: Path, task: str, options: dict) -> None:
    rows = [{"p": f"p{n}", "q": f"q{n}", "o": ["a", "b"], "gold": None if n == 3 else "a"} for n in range(6)]
    path = write(tmp_path / "rows.jsonl", rows)
    asked = task_of(task, {"data": str(path), **options})
    refused = []
    for example in asked.examples():  # type: ignore[attr-defined]
        try:
            asked.check_example(example)  # type: ignore[attr-defined]
        except UserError as error:
            refused.append(str(error))
    assert len(refused) == 1
    assert refused[0].startswith(f"task {task}: row 4 of {path}: ")
    assert "'gold'" in refused[0]


def test_a_missing_file_names_its_nearest_neighbour(tmp_path: Path) -> None:
    for number in range(40):
        (tmp_path / f"other{number}.bin").touch()
    with pytest.raises(UserError, match=r"no file or folder 'xyz\.jsonl' in .*; it holds 40 others$"):
        read(str(tmp_path / "xyz.jsonl"))
    write(tmp_path / "questions.jsonl")
    with pytest.raises(UserError, match=r"did you mean 'questions\.jsonl'") as caught:
        read(str(tmp_path / "question.jsonl"))
    assert "other1" not in str(caught.value)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no table file"):
        read(str(tmp_path / "empty"))
