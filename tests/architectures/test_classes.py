"""The page's parts on other classes than language models are what a walk gives."""

from __future__ import annotations

import pytest
import transformers

from isoflop.testing.architectures.classes import WALKS, ClassWalk, section, walked
from isoflop.testing.architectures.page import PAGE


@pytest.fixture(autouse=True)
def _quiet() -> None:
    transformers.logging.set_verbosity_error()


@pytest.mark.parametrize("walk", WALKS, ids=lambda walk: walk.title)
def test_every_class_is_on_the_page(walk: ClassWalk) -> None:
    lines = PAGE.read_text().splitlines()
    start = lines.index(f"## {walk.title}")
    stop = next((n for n in range(start + 1, len(lines)) if lines[n].startswith("## ")), len(lines))
    named = [line.split(" | ")[0].removeprefix("| ") for line in lines[start:stop] if line.startswith("| ")]
    assert [name for name in named if name != "class"] == sorted(walk.names(), key=named.index)


@pytest.mark.slow
@pytest.mark.parametrize("walk", WALKS, ids=lambda walk: walk.title)
def test_a_walk_gives_the_page(walk: ClassWalk) -> None:
    found = walked(walk)
    assert [name for name, findings in found.items() if not all(f.fine for f in findings.values())] == []
    if f"transformers {transformers.__version__} knows" in PAGE.read_text().replace("\n", " "):
        assert "\n".join(section(walk, found)) in PAGE.read_text()
