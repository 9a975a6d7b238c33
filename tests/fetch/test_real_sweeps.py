"""The sweeps of `make real` resolve, on stand-ins for what it fetches; weight methods stay off the grids that the weights lie on."""

from __future__ import annotations

from pathlib import Path

import pytest
from fetched_cases import stand_ins

from isoflop.core.yaml_source import load_yaml
from isoflop.sweep.resolve import resolve

ROOT = Path(__file__).parents[2]
NAMES = ("real", "real-prompts", "real-retrieval")
GROUPS = (64, 128)


@pytest.fixture
def fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ISOFLOP_CACHE", str(tmp_path))
    stand_ins()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.usefixtures("fetched")
def test_they_resolve(name: str) -> None:
    sweep = resolve(ROOT / "sweeps" / f"{name}.yaml")
    tasks = {job.task for config in sweep.space.grid() for job in sweep.jobs_of(config)}
    if name == "real-retrieval":
        assert tasks == {"retrieval"}
    else:
        assert tasks == {"choice", "generate", "needle"} | ({"text"} if name == "real" else set())


def test_weights_are_grouped_otherwise_than_the_file_groups_them() -> None:
    """In groups of 32, 4 bits lose nothing of weights that lie on such grids already, which would show nothing."""
    groups = {}
    for name in NAMES:
        for method in load_yaml(ROOT / "sweeps" / f"{name}.yaml").data["methods"]:
            if isinstance(method, dict) and next(iter(method)) in ("rtn", "gptq"):
                ((method_name, knobs),) = method.items()
                groups[method_name] = knobs["group"] if isinstance(knobs["group"], list) else [knobs["group"]]
    assert set(groups) == {"rtn", "gptq"}
    assert all(group in GROUPS for listed in groups.values() for group in listed)


def test_the_makefile_fetches_what_the_sweeps_name() -> None:
    lines = (ROOT / "Makefile").read_text().partition("\nreal:")[2].partition("\n\n")[0]
    for name in NAMES:
        text = (ROOT / "sweeps" / f"{name}.yaml").read_text()
        assert f"sweeps/{name}.yaml" in lines
        for part in text.split("public:")[1:]:
            assert part.split('"')[0].split("/")[0] in lines
