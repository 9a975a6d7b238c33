"""Documents that are at hand wherever isoflop is installed: prose out of the docstrings of packages that it needs.

Four forms of them, for tasks on language models and text encoders:

- ``text/PACKAGE.txt``: paragraphs of plain sentences;
- ``choice.jsonl``: some paragraphs, the last without its last sentence; that sentence among three last ones of other paragraphs;
- ``lookup.jsonl``: a list of functions with a sentence on each, and one of the functions, whose sentence is asked for;
- ``corpus.jsonl`` and ``queries.jsonl``: what the documentation of functions and classes says behind its first sentence, and that
  sentence, which has to find the rest.

What is written depends on the packages' releases only, which constraints.txt pins; the data enter job ids by their content.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from isoflop.core.errors import UserError
from isoflop.core.hashing import derive_seed
from isoflop.fetch.base import Say, Source
from isoflop.models.worlds.english import docstrings_of

PACKAGES = {"scipy": "scipy", "sklearn": "scikit-learn", "numpy": "numpy", "pandas": "pandas"}
"""Modules whose docstrings are read, and the distributions that they belong to."""
OPTIONS = 4
LISTED = 10
"""Functions of one list."""
BODY = (150, 600)
"""Characters of a text that is to be found: fewest, and where it is cut."""
BEFORE = 300
"""Characters of the paragraphs before the one that is to be continued."""

_SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")
_PLAIN = re.compile(r"[A-Z][\w ,.'()/-]{38,298}[.!?]")
_SUMMARY = re.compile(r"[A-Z][\w ,'/-]{28,98}\.")
_SECTION = re.compile(r"^\S.*\n-{3,}$", re.MULTILINE)
"""A heading of numpy's kind."""
_PROSE = re.compile(r"[A-Z][a-z]*[ ,]")
_NAME = re.compile(r"[a-z][a-z0-9_]{3,}")


@dataclass(frozen=True)
class Paragraph:
    """Plain sentences, and the module that they are of."""

    module: str
    sentences: tuple[str, ...]

    @property
    def text(self) -> str:
        """In one line."""
        return " ".join(self.sentences)


def make(folder: Path, downloads: Path, say: Say) -> Mapping[str, Any]:
    """Write all forms.

    Raises:
        UserError: a package is not installed as files.
    """
    say(f"reading the documentation of {', '.join(PACKAGES)}")
    (folder / "text").mkdir()
    choices: list[dict[str, Any]] = []
    lookups: list[dict[str, Any]] = []
    texts: dict[str, str] = {}
    for package in PACKAGES:
        files = list(_modules(package))
        found = list(paragraphs(files))
        (folder / "text" / f"{package}.txt").write_text("\n\n".join(p.text for p in found) + "\n", encoding="utf-8")
        choices += continuations(found, package)
        lookups += lists(files, package)
        for summary, text in described(files):
            if text not in texts.values():
                texts.setdefault(summary, text)
    corpus = [{"id": f"d{number}", "text": texts[summary]} for number, summary in enumerate(sorted(texts))]
    queries = [{"query": summary, "relevant": f"d{number}"} for number, summary in enumerate(sorted(texts))]
    for name, rows in (("choice", choices), ("lookup", lookups), ("corpus", corpus), ("queries", queries)):
        (folder / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    releases = {name: version(name) for name in PACKAGES.values()}
    return {
        "from": "installed packages",
        "releases": releases,
        "choice": len(choices),
        "lookup": len(lookups),
        "queries": len(queries),
    }


def paragraphs(files: Sequence[tuple[str, Path]]) -> Iterator[Paragraph]:
    """Paragraphs of at least three plain sentences, each once."""
    seen: set[str] = set()
    for module, path in files:
        for text in docstrings_of(path):
            for part in text.split("\n\n"):
                sentences = tuple(_SENTENCE.split(" ".join(part.split())))
                if len(sentences) < 3 or not all(map(_PLAIN.fullmatch, sentences)) or sentences[0] in seen:
                    continue
                seen.add(sentences[0])
                yield Paragraph(module, sentences)


def continuations(found: Sequence[Paragraph], package: str) -> Iterator[dict[str, Any]]:
    """What comes next? Options are last sentences of paragraphs of other modules, none much longer than another."""
    rng = np.random.default_rng(derive_seed("continuations", package))
    for place, paragraph in enumerate(found):
        right = paragraph.sentences[-1]
        before: list[str] = []
        for other in reversed(found[:place]):
            if sum(map(len, before)) + len(other.text) > BEFORE:
                break
            before.insert(0, other.text)
        passage = "\n\n".join([*before, " ".join(paragraph.sentences[:-1])])
        others = sorted(
            {p.sentences[-1] for p in found if p.module != paragraph.module and p.sentences[-1] not in passage}
            - {right},
            key=lambda text: (abs(len(text) - len(right)), text),
        )[: 4 * OPTIONS]
        if len(others) < OPTIONS - 1:
            continue
        wrong = [others[n] for n in rng.permutation(len(others))[: OPTIONS - 1]]
        answer = int(rng.integers(OPTIONS))
        yield {
            "passage": passage,
            "options": [*wrong[:answer], right, *wrong[answer:]],
            "answer": answer,
        }


def lists(files: Sequence[tuple[str, Path]], package: str) -> Iterator[dict[str, Any]]:
    """Lists of functions with what each does, and a question about one of them."""
    rng = np.random.default_rng(derive_seed("lists", package))
    said: dict[str, str] = {}
    for _, path in files:
        for name, summary in _summaries(path):
            if name not in said and summary not in said.values():
                said[name] = summary
    names = list(said)
    order = rng.permutation(len(names)).tolist()
    for start in range(0, len(order) - LISTED + 1, LISTED):
        group = [names[n] for n in order[start : start + LISTED]]
        asked = group[int(rng.integers(LISTED))]
        yield {
            "functions": "\n".join(f"{name}: {said[name]}" for name in group),
            "function": asked,
            "answers": [said[asked]],
        }


def described(files: Sequence[tuple[str, Path]]) -> Iterator[tuple[str, str]]:
    """First sentences of the documentation of functions and classes, each once, and what follows up to the lists of parameters."""
    import ast

    seen: set[str] = set()
    for _, path in files:
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):  # a deliberately broken example file
            continue
        for node in tree.body:
            if not isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                continue
            first, _, rest = (ast.get_docstring(node) or "").partition("\n\n")
            summary = " ".join(first.split())
            body = " ".join(_SECTION.split(rest)[0].split())[: BODY[1]]
            prose = len(body) >= BODY[0] and _PROSE.match(body)
            if prose and _SUMMARY.fullmatch(summary) and not {summary, body} & seen:
                seen |= {summary, body}
                yield summary, body


def _summaries(path: Path) -> Iterator[tuple[str, str]]:
    """Functions of a module with the first line of their docstrings, where that is a short plain sentence."""
    import ast

    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # a deliberately broken example file
        return
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and _NAME.fullmatch(node.name):
            first = (ast.get_docstring(node) or "").partition("\n\n")[0].strip()
            if _SUMMARY.fullmatch(first):
                yield node.name, first


def _modules(package: str) -> Iterator[tuple[str, Path]]:
    """Names and source files of a package's modules, without its tests."""
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"fetch documents: the package {package} is not installed as files")
    root = Path(next(iter(spec.submodule_search_locations)))
    for path in sorted(root.rglob("*.py"), key=lambda p: p.relative_to(root).as_posix()):
        place = path.relative_to(root)
        if "tests" not in place.parts:
            yield f"{package}/{place.as_posix()}", path


SOURCE = Source(
    "documents",
    "prose, choices and lookups out of the documentation of installed packages (BSD licences)",
    "2:" + ",".join(f"{name}-{version(name)}" for name in PACKAGES.values()),
    {"installed packages": make},
)
