"""The examples of methods/README.md are methods that keep the contract, word for word."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from isoflop.methods.base import METHODS
from isoflop.testing import check_method

GUIDE = Path(__file__).parents[2] / "methods" / "README.md"
TITLED = re.compile(r"^## ([^\n]*)\n(?:(?!^## ).)*?```python\n(.*?)```", re.S | re.M)
EXAMPLES = dict(TITLED.findall(GUIDE.read_text(encoding="utf-8")))


@pytest.fixture(autouse=True)
def own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Examples are registered for one test only."""
    METHODS.names()
    monkeypatch.setattr(METHODS, "_entries", dict(METHODS._entries))


def registered(code: str, folder: Path) -> str:
    """Import an example as a module of its own; the name it registers."""
    path = folder / "example.py"
    path.write_text(code, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("example", path)
    assert spec is not None
    assert spec.loader is not None
    before = set(METHODS.names())
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    (name,) = set(METHODS.names()) - before
    return name


def test_every_family_has_an_example_and_a_line_in_the_table(tmp_path: Path) -> None:
    methods = [METHODS.get(name) for name in METHODS.names()]  # other tests may have registered some of their own
    built_in = {cls.family for cls in methods if cls.__module__.startswith("isoflop.methods.")}
    shown = {METHODS.get(registered(code, tmp_path)).family for code in EXAMPLES.values()}
    assert shown == built_in | {"depth"}  # the family of one's own
    listed = set(re.findall(r"^\| ([a-z-]+) \| `", GUIDE.read_text(encoding="utf-8"), re.M))
    assert listed == built_in


@pytest.mark.parametrize("title", EXAMPLES)
def test_the_example_keeps_the_contract(title: str, tmp_path: Path) -> None:
    check_method(registered(EXAMPLES[title], tmp_path))
