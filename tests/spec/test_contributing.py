"""The examples of CONTRIBUTING.md work word for word, and the files of the front door agree with each other."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import yaml

import isoflop
from isoflop.core.errors import Infeasible
from isoflop.core.registry import Registry
from isoflop.laws import fit
from isoflop.laws.base import LAWS
from isoflop.methods.kv_cache.probe import untrained_decoder
from isoflop.models.family import FAMILIES
from isoflop.models.lm import NOT_SCORED, LmBatch
from isoflop.models.worlds import digit_world as world
from isoflop.tasks.base import TASKS
from isoflop.testing import FolderContext, ModelProbe, TaskProbe, check_model, check_task, reader_of_text

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
TITLED = re.compile(r"^## ([^\n]*)\n(?:(?!^## ).)*?```python\n(.*?)```", re.S | re.M)
EXAMPLES = dict(TITLED.findall(GUIDE))


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], ModuleType]:
    """A function that imports an example; what it registers is forgotten after the test."""
    registries: tuple[Registry[object], ...] = (LAWS, TASKS, FAMILIES)  # type: ignore[assignment]
    for registry in registries:
        registry.names()
        monkeypatch.setattr(registry, "_entries", dict(registry._entries))

    def load(title: str) -> ModuleType:
        path = tmp_path / "contributed.py"
        path.write_text(EXAMPLES[title], encoding="utf-8")
        spec = importlib.util.spec_from_file_location("contributed", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, "contributed", module)
        spec.loader.exec_module(module)
        return module

    return load


def test_every_example_is_tried_here() -> None:
    titles = (
        "Add a hook",
        "Add a law",
        "Add a model family",
        "Add a task",
        "Add a task on your own data",
        "Add a data stage",
    )
    assert set(EXAMPLES) == set(titles)
    assert EXAMPLES["Add a task on your own data"].count("\n") <= 41  # a line of it says where the file lies


def test_the_law_finds_the_numbers_that_the_data_were_made_with(example) -> None:
    example("Add a law")
    size = np.geomspace(1e6, 1e10, 30)
    found = fit(
        {"N": size, "error": 0.2 + 0.7 / (1 + size / 3e8)}, "saturating", y="error", map={"N": "N"}, bootstrap=0
    )
    assert [found["E"], found["A"], found["N_half"]] == pytest.approx([0.2, 0.7, 3e8], rel=1e-4)


@torch.no_grad()
def test_the_hook_changes_what_a_model_scores_and_leaves_nothing_behind(example) -> None:
    module = example("Add a hook")

    class Doubled(module.LogitPolicy):  # type: ignore[name-defined, misc]
        def changed(self, logits_BTW: torch.Tensor) -> torch.Tensor:
            return 2 * logits_BTW

    model = untrained_decoder()
    ids_BT = torch.arange(12).view(2, 6)
    batch = LmBatch(ids_BT, torch.full_like(ids_BT, NOT_SCORED))
    stock_BTW = model.logits(batch)
    model.info = replace(model.info, hooks=model.info.hooks | {module.LOGITS})
    with model.occupy(module.LOGITS, Doubled()):
        assert torch.equal(model.logits(batch), 2 * stock_BTW)
        with pytest.raises(Infeasible, match="logits is taken already"), model.occupy(module.LOGITS, Doubled()):
            pass
    assert torch.equal(model.logits(batch), stock_BTW)


def test_the_tasks_answers_are_what_stands_in_the_corner(example) -> None:
    example("Add a task")
    task = TASKS.get("corner")(examples=300)
    classes = world.SceneSet("test", 300, task.mix, task.scenes_seed).classes()
    suite, shorter = task.suite(), TASKS.get("corner")(examples=100).suite()
    assert set(map(tuple, suite.questions_NQ.tolist())) == {(world.READ, world.FIRST_PLACE)}
    assert np.array_equal(suite.answers_N, world.FIRST_DIGIT + classes[:, 0])
    assert np.array_equal(shorter.answers_N, suite.answers_N[:100])


def test_the_task_on_rows_of_ones_own_keeps_its_promises(example, tmp_path: Path) -> None:
    words = ("loved", "hated")
    rows = [{"review": f"Film {n}. I {words[n % 2]} it.", "verdict": ("good", "bad")[n % 2]} for n in range(7)]
    (tmp_path / "reviews.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    example("Add a task on your own data")
    check_task("polarity", TaskProbe(*reader_of_text(), {"data": str(tmp_path / "reviews.jsonl"), "shard": 3}))


def test_the_model_family_keeps_its_promises(example, tmp_path: Path) -> None:
    family = example("Add a model family").FAMILIES.get("shapes")
    probe = ModelProbe((("shapes/d64", {}),), lambda info: family.load(info, None, FolderContext(tmp_path)))
    check_model("shapes", probe)
    assert [family.info(ref, {}).geometry["heads"] for ref in family.members()] == [2, 4, 8]


def test_the_stage_is_computed_once_and_named_by_its_fields(example, tmp_path: Path) -> None:
    stage = example("Add a data stage").WalksStage
    ctx = FolderContext(tmp_path / "stages")
    walks = ctx.get(stage(10, 100))
    assert walks.shape == (10, 100)
    assert set(np.unique(np.diff(walks, axis=1))) == {-1, 1}
    assert np.array_equal(walks, FolderContext(tmp_path / "other").get(stage(10, 100)))
    assert [p.name for p in (tmp_path / "stages").iterdir()] == [stage(10, 100).key]
    assert stage(10, 100, 1).key != stage(10, 100).key


def test_every_room_is_in_the_table() -> None:
    table = GUIDE.split("## Set up")[0]
    rooms = {p.name for p in (ROOT / "platform" / "isoflop").iterdir() if p.is_dir() and p.name != "__pycache__"}
    assert {room for room in rooms if f"{room}]" not in table} == set()


def test_help_names_every_target() -> None:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = re.search(r"^\.PHONY: (.*)$", text, re.M)
    assert targets
    told = re.findall(
        r"make ([\w-]+)", subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True).stdout
    )
    assert set(told) == set(targets.group(1).split()) - {"help"}


def test_versions_are_the_same_everywhere() -> None:
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split())
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    assert {d for hook in hooks for d in hook["additional_dependencies"]} == {f"ruff=={pinned['ruff']}"}
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == isoflop.__version__


def test_the_workflow_runs_what_everybody_runs() -> None:
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"]
    commands = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    assert commands == ["make lint", ".ci/run"]
    own = (ROOT / ".ci" / "run").read_text().split("\n")
    assert own.index("make lint") < own.index("make test")
