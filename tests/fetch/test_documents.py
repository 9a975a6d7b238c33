"""Documents out of installed packages: the same each time, with answers that are right and not given away."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from isoflop.fetch import documents
from isoflop.fetch.documents import OPTIONS, Paragraph, continuations, make, paragraphs


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Those of one package, which takes a second."""
    patch = pytest.MonkeyPatch()
    patch.setattr(documents, "PACKAGES", {"numpy": "numpy"})
    folder = tmp_path_factory.mktemp("documents")
    make(folder, folder, len)
    patch.undo()
    return folder


def rows(folder: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def test_choices_have_one_right_answer_that_the_passage_does_not_give_away(made: Path) -> None:
    text = (made / "text" / "numpy.txt").read_text()
    found = rows(made, "choice")
    assert len(found) > 10
    for row in found:
        assert len(set(row["options"])) == OPTIONS
        own = row["passage"].rpartition("\n\n")[2]
        assert f"{own} {row['options'][row['answer']]}" in text
        assert not any(option in row["passage"] for n, option in enumerate(row["options"]) if n != row["answer"])
    assert len({row["answer"] for row in found}) == OPTIONS


def test_lookups_ask_for_a_sentence_that_is_listed(made: Path) -> None:
    for row in rows(made, "lookup"):
        assert f"{row['function']}: {row['answers'][0]}" in row["functions"].split("\n")
        assert len(row["functions"].split("\n")) == documents.LISTED


def test_queries_are_first_sentences_of_what_they_have_to_find(made: Path) -> None:
    corpus, queries = rows(made, "corpus"), rows(made, "queries")
    texts = {row["id"]: row["text"] for row in corpus}
    assert len(texts) == len(set(texts.values())) == len(queries) == len({row["query"] for row in queries})
    assert len(queries) > 10
    for row in queries:
        assert row["query"] not in texts[row["relevant"]]
        assert documents.BODY[0] <= len(texts[row["relevant"]]) <= documents.BODY[1]


def test_they_are_the_same_again(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "PACKAGES", {"numpy": "numpy"})
    make(tmp_path, tmp_path, len)
    for path in made.rglob("*.*"):
        assert path.read_bytes() == (tmp_path / path.relative_to(made)).read_bytes()


def test_only_plain_paragraphs_are_taken(tmp_path: Path) -> None:
    plain = "This sentence is plain and long enough to be taken. Here is another one of quite the same length. And a third one ends what is said in it."
    source = tmp_path / "m.py"
    source.write_text(f'"""{plain}\n\nToo short. So is this.\n\n>>> print({plain!r})\n\n{plain}\n"""\n')
    assert [p.text for p in paragraphs([("m", source)])] == [plain]


def test_options_come_from_other_modules() -> None:
    found = [Paragraph(f"m{n % 2}", (f"First of {n}.", f"Middle of {n}.", f"Last one of {n}.")) for n in range(12)]
    made = list(continuations(found, "p"))
    assert made
    for row in made:
        own = next(p for p in found if p.sentences[-1] == row["options"][row["answer"]])
        others = {p.sentences[-1] for p in found if p.module != own.module}
        assert {o for n, o in enumerate(row["options"]) if n != row["answer"]} <= others
