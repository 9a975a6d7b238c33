"""Three kinds of text that every Python installation carries, cut and split for the selection of training data.

The domains are prose (the language reference's topics), docstrings and code (standard library sources). A module gives
either its docstrings or its source, never both, so that no text occurs in two domains by construction. Documents go to
splits by a hash of their name: a pool to select from, target examples that say what is wanted, test text of the target
domain, and text of all domains for a first training. What repeats earlier text is left out.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import ClassVar

from isoflop.core.stage import StageContext
from isoflop.models.worlds.english import TextSource, docstrings_of, modules, python_release, topics

DOMAINS = ("code", "docstrings", "prose")
SHARES = (("test", 0.12), ("target", 0.12), ("train", 0.26), ("pool", 0.5))
"""Splits and their shares of the documents, in the order in which they take text; later ones repeat nothing of earlier ones."""
SECTION = 4800
"""Characters of a section: a topic is split by section, because few topics hold most of the prose."""
TEST_CHARACTERS, TRAIN_CHARACTERS = 120_000, 200_000
"""Most text of a domain in the test and the first training."""
SHINGLE = 8
"""Words of the overlapping runs by which repeated text is recognised."""
REPEATED = 0.5
"""Share of known shingles above which a piece counts as repeated."""


@dataclass(frozen=True)
class Piece:
    """A piece of text, and the section that it is cut from."""

    section: str
    name: str
    text: str


@dataclass(frozen=True)
class DomainsStage(TextSource):
    """Texts by split and name: ``train``, ``pool``, and ``target-<domain>`` and ``test-<domain>`` for each domain.

    Documents of the pool and of the targets are pieces; their names begin with a hash, so that sorting them shuffles
    them, and tell the domain (see :func:`domain_of`).

    Args:
        release: Python release whose text it is; computing it needs that release.
        pieces: pieces of each domain in the pool.
        targets: target pieces of each domain.
        length: characters of a piece.
        spread: pieces are between ``1 - spread`` and ``1 + spread`` times as long; 0 cuts all to one length.
    """

    kind: ClassVar[str] = "text-domains"

    release: str
    pieces: int
    targets: int
    length: int
    spread: float

    @classmethod
    def here(cls, pieces: int, targets: int, length: int, spread: float) -> DomainsStage:
        """The corpus of the running Python."""
        return cls(python_release(), pieces, targets, length, spread)

    def compute(self, ctx: StageContext, folder: Path) -> None:
        """Collect, cut, split, leave out what is repeated.

        Raises:
            RuntimeError: the running Python is another release, or has too little text of a domain.
        """
        if self.release != python_release():
            raise RuntimeError(f"the text domains of {self.release} cannot be made by {python_release()}")
        documents: dict[str, dict[str, str]] = {"train": {}, "pool": {}}
        for domain in DOMAINS:
            pieces: dict[str, list[Piece]] = {split: [] for split, _ in SHARES}
            for unit, section, text in _sections(domain):
                pieces[_split_of(unit)] += self._cut(section, text)
            seen: set[str] = set()
            for split, _ in SHARES:
                place = f"{split}-{domain}" if split in ("test", "target") else split
                documents.setdefault(place, {}).update(self._taken(split, domain, pieces[split], seen))
        (folder / "documents.json").write_text(json.dumps(documents))

    def load(self, ctx: StageContext, folder: Path) -> dict[str, dict[str, str]]:
        """Texts by split and document name."""
        loaded: dict[str, dict[str, str]] = json.loads((folder / "documents.json").read_text())
        return loaded

    def _cut(self, section: str, text: str) -> Iterator[Piece]:
        start = 0
        for number in count():
            name = f"{section}.{number}"
            length = round(self.length * (1 + self.spread * (2 * _fraction(name) - 1)))
            if start + length > len(text):
                return
            yield Piece(section, name, text[start : start + length])
            start += length

    def _taken(self, split: str, domain: str, pieces: list[Piece], seen: set[str]) -> dict[str, str]:
        if split in ("test", "train"):
            in_order = sorted(pieces, key=lambda piece: _hash(piece.section))
            return _joined(domain, _fresh(in_order, seen), TEST_CHARACTERS if split == "test" else TRAIN_CHARACTERS)
        wanted = self.pieces if split == "pool" else self.targets
        shuffled = sorted(pieces, key=lambda piece: _hash(piece.name))
        found = list(islice(_fresh(shuffled, seen), wanted))
        if len(found) < wanted:
            raise RuntimeError(
                f"{self.release} has {len(found)} {split} pieces of {self.length} characters of {domain}, not {wanted}; "
                "ask for fewer or shorter ones"
            )
        return {f"{_hash(piece.name)[:12]} {domain} {piece.name}": piece.text for piece in found}


def domain_of(name: str) -> str:
    """The domain of a document of the pool or of the targets."""
    return name.split(" ", 2)[1]


def _fresh(pieces: Iterable[Piece], seen: set[str]) -> Iterator[Piece]:
    """The pieces that repeat nothing in ``seen``, which grows."""
    for piece in pieces:
        shingles = set(_shingles(piece.text))
        if len(shingles & seen) <= REPEATED * len(shingles):
            yield piece
        seen |= shingles


def _joined(domain: str, pieces: Iterator[Piece], most: int) -> dict[str, str]:
    """Sections put together again from their pieces, up to ``most`` characters in all."""
    found: dict[str, str] = {}
    total = 0
    for piece in pieces:
        if total >= most:
            break
        name = f"{domain} {piece.section}"
        found[name] = found.get(name, "") + piece.text
        total += len(piece.text)
    return found


def _sections(domain: str) -> Iterator[tuple[str, str, str]]:
    """What is split as one, name, and text, of every section of a domain: topics are split by section, modules whole."""
    for document, text in _documents(domain):
        for number, start in enumerate(range(0, len(text), SECTION)):
            name = f"{document}#{number}"
            yield name if domain == "prose" else document, name, text[start : start + SECTION]


def _documents(domain: str) -> Iterator[tuple[str, str]]:
    if domain == "prose":
        yield from topics()
        return
    for name, path in modules():
        if (_fraction(f"kind of {name}") < 0.5) == (domain == "code"):
            text = path.read_text("utf-8", "replace") if domain == "code" else "\n\n".join(docstrings_of(path))
            if text:
                yield name, text


def _split_of(unit: str) -> str:
    u = _fraction(f"split of {unit}")
    for split, share in SHARES:
        if u < share:
            return split
        u -= share
    return SHARES[-1][0]


def _shingles(text: str) -> Iterator[str]:
    words = text.split()
    for start in range(max(1, len(words) - SHINGLE + 1)):
        yield " ".join(words[start : start + SHINGLE])


def _hash(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def _fraction(name: str) -> float:
    """A number in [0, 1) that depends on a name."""
    return int(_hash(name)[:8], 16) / 2**32
