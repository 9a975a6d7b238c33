"""The sweeps of `make real` resolve, on stand-ins for what it fetches; weight methods stay off the grids that the weights lie on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from fetched_cases import stand_ins

from isoflop.core.public import public_root
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


@pytest.mark.parametrize(("name", "jobs"), [("weights-calibration", 60), ("weights-calibration-real", 32)])
@pytest.mark.usefixtures("fetched")
def test_sweeps_over_calibration_texts_resolve(name: str, jobs: int) -> None:
    """On texts that hold as much as they ask for; each job has the text that its point names."""
    documents = public_root() / "documents"
    words = " ".join(f"word{number % 97} of a text, number {number}." for number in range(9000))
    for package in ("scipy", "pandas"):
        (documents / "text" / f"{package}.txt").write_text(words)
    for kind, field in (("lookup", "functions"), ("choice", "passage")):
        row = {field: words, "options": ["a", "b"], "answer": 0}
        (documents / f"{kind}.jsonl").write_text(json.dumps(row) + "\n")
    sweep = resolve(ROOT / "sweeps" / f"{name}.yaml")
    found = [(config, job) for config in sweep.space.grid() for job in sweep.jobs_of(config)]
    assert len(found) == len({job.id for _, job in found}) == jobs
    for config, job in found:
        data = dict(job.calibration).get("data", "")
        assert bool(data) == (config["calibration"] not in ("own text", "4 windows"))
        assert dict(job.methods[0].knobs)["n_calib"] == {"4 windows": 4, "one window": 1}.get(
            str(config["calibration"]), 48 if "real" in name else 128
        )


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
