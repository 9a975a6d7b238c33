"""The README's sweep works as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

from isoflop.sweep.resolve import resolve

ROOT = Path(__file__).parents[2]


def test_the_sweep_of_the_readme_resolves(tmp_path: Path) -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)
    sweeps = [b for b in blocks if b.startswith("name:")]
    assert sweeps
    for number, block in enumerate(sweeps):
        path = tmp_path / f"sweep{number}.yaml"
        path.write_text(block, encoding="utf-8")
        assert resolve(path).space.branches


def test_paths_that_the_readme_names_exist() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if not link.startswith("http")]
    assert links
    missing = [link for link in links if not (ROOT / link).exists()]
    assert not missing, missing
