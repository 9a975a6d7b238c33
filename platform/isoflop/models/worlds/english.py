"""Real English text that every Python installation carries: the language reference's topics and the library's docstrings.

The text depends on the Python release, whose number therefore names everything made of it. Documents are split into
training and test by name; paragraphs that the topics repeat in several places count as training text.
"""

from __future__ import annotations

import ast
import hashlib
import json
import platform
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from isoflop.core.stage import Stage, StageContext

SPLITS = ("train", "test")
TEST_SHARE = 0.1
SKIPPED = frozenset(
    {"test", "tests", "idlelib", "lib2to3", "turtledemo", "ensurepip", "site-packages", "dist-packages", "pydoc_data"}
)
"""Folders of the standard library without docstrings worth reading, or that are no part of it."""


def python_release() -> str:
    """What names the corpus: ``cpython-3.11.7``."""
    return f"{platform.python_implementation().lower()}-{platform.python_version()}"


@dataclass(frozen=True)
class TextSource(Stage):
    """A stage whose value holds texts by split and document name."""


@dataclass(frozen=True)
class EnglishStage(TextSource):
    """Documents by split: about 80 topics (0.4 million characters) and 500 modules (1.6 million).

    Args:
        release: Python release whose text it is; computing it needs that release.
    """

    kind: ClassVar[str] = "english"

    release: str

    @classmethod
    def here(cls) -> EnglishStage:
        """The corpus of the running Python."""
        return cls(python_release())

    def compute(self, ctx: StageContext, folder: Path) -> None:
        """Collect, split, drop from the test documents what occurs in training ones."""
        if self.release != python_release():
            raise RuntimeError(f"the English corpus of {self.release} cannot be made by {python_release()}")
        documents: dict[str, dict[str, str]] = {split: {} for split in SPLITS}
        for name, text in sorted([*topics(), *_docstrings()]):
            documents[split_of(name)][name] = text
        seen = {paragraph for text in documents["train"].values() for paragraph in text.split("\n\n")}
        kept = {name: _without(text, seen) for name, text in documents["test"].items()}
        documents["test"] = {name: text for name, text in kept.items() if text}
        (folder / "documents.json").write_text(json.dumps(documents))

    def load(self, ctx: StageContext, folder: Path) -> dict[str, dict[str, str]]:
        """Texts by split and document name."""
        loaded: dict[str, dict[str, str]] = json.loads((folder / "documents.json").read_text())
        return loaded


def split_of(document: str) -> str:
    """The split of a document, by a hash of its name."""
    digest = hashlib.sha256(document.encode()).digest()
    return "test" if int.from_bytes(digest[:4], "big") < TEST_SHARE * 2**32 else "train"


def _without(text: str, paragraphs: set[str]) -> str:
    return "\n\n".join(paragraph for paragraph in text.split("\n\n") if paragraph not in paragraphs)


def topics() -> Iterator[tuple[str, str]]:
    """Names and texts of the language reference's topics."""
    from pydoc_data.topics import topics as found

    for name, text in found.items():
        yield f"topic:{name}", text


def modules() -> Iterator[tuple[str, Path]]:
    """Names and source files of the standard library's modules."""
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(library.rglob("*.py")):
        module = path.relative_to(library)
        if SKIPPED.isdisjoint(module.parts):
            yield f"module:{module.as_posix()}", path


def _docstrings() -> Iterator[tuple[str, str]]:
    for name, path in modules():
        text = "\n\n".join(docstrings_of(path))
        if text:
            yield name, text


def docstrings_of(path: Path) -> Iterator[str]:
    """The docstrings of a source file, of its module, classes and functions."""
    try:
        tree: Any = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, OSError):  # a deliberately broken example file
        return
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node)
            if text:
                yield text
