"""The README's sweep works as it stands there, and what the guides point to exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from isoflop.sweep.resolve import resolve

ROOT = Path(__file__).parents[2]


def test_the_sweep_of_the_readme_resolves(tmp_path: Path) -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)
    # that on a user's own data needs a checkpoint: tests/data_tasks runs it with a small one
    sweeps = [b for b in blocks if b.startswith("name:") and "hf:" not in b.split("\n")[1]]
    assert sweeps
    for number, block in enumerate(sweeps):
        path = tmp_path / f"sweep{number}.yaml"
        path.write_text(block, encoding="utf-8")
        assert resolve(path).space.branches


@pytest.mark.parametrize(
    "name",
    ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", *(f"{f}/README.md" for f in ("sweeps", "dashboards", "methods"))],
)
def test_what_the_guides_link_to_exists(name: str) -> None:
    """Files and folders, and the headings of pages."""
    page = ROOT / name
    links = re.findall(r"\]\(([^)]*)\)", re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S))
    for link in (link for link in links if not link.startswith("http")):
        path, _, heading = link.partition("#")
        target = (page.parent / path) if path else page
        assert target.exists(), link
        if heading:
            assert heading in _headings(target), link


def _headings(page: Path) -> set[str]:
    """The anchors of a page's headings."""
    lines = (line.lstrip("# ") for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("#"))
    return {re.sub(r"[^a-z0-9 -]", "", line.lower()).replace(" ", "-") for line in lines}
