"""A user's data in a sweep: where paths lead, what names jobs, several tasks of a kind, and what plan refuses."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

import isoflop
from isoflop.core.errors import UserError
from isoflop.core.yaml_source import load_yaml
from isoflop.jobs.job import Job, ResolvedJob
from isoflop.ledger.store import Store
from isoflop.sweep.api import RunOptions, run_resolved
from isoflop.sweep.progress import Quiet
from isoflop.sweep.resolve import resolve
from isoflop.sweep.stored import resolve_stored
from isoflop.testing.task_probes import own

MODEL = "hf:reader"
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama with a tokenizer, in ``save_pretrained`` form."""
    from transformers import LlamaForCausalLM

    from isoflop.testing.task_probes import reader_of_text

    folder = tmp_path_factory.mktemp("own") / "reader"
    model, _ = reader_of_text()
    assert isinstance(model.module, LlamaForCausalLM)
    model.module.config.max_position_embeddings = 2048
    model.module.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpoint: Path) -> Path:
    """A folder with data and a checkpoint, from which the process does not run; the model is named from where it runs."""
    shutil.copy(own("questions.jsonl"), tmp_path / "my.jsonl")
    monkeypatch.chdir(checkpoint.parent)
    return tmp_path


def jobs(folder: Path, *tasks: object) -> dict[str, Job]:
    sweep = {"name": "own", "models": [MODEL], "methods": ["full-cache"], "tasks": list(tasks)}
    path = folder / "sweep.yaml"
    path.write_text(json.dumps(sweep))
    resolved = resolve(path)
    (config,) = resolved.space.grid()
    return {job.task: job for job in resolved.jobs_of(config)}


def choice(**options: object) -> dict:
    return {"choice": {"data": "my.jsonl", "context": "passage", **options}}


def test_paths_are_relative_to_the_sweeps_file(folder: Path) -> None:
    job = jobs(folder, choice())["choice"]
    assert dict(job.task_paths) == {"data": str(folder / "my.jsonl")}
    assert "data" not in dict(job.task_options)
    assert Job.from_dict(json.loads(json.dumps(job.to_dict()))) == job
    assert ResolvedJob.of(job).task.data == str(folder / "my.jsonl")  # type: ignore[attr-defined]


def test_a_model_beside_the_sweeps_file_is_found_from_anywhere(
    folder: Path, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its job keeps the name of the one that was found where the process runs; what lies beside the YAML is taken."""
    first = jobs(folder, choice())["choice"]
    shutil.copytree(checkpoint, folder / "reader")
    nowhere = tmp_path_factory.mktemp("nowhere")
    monkeypatch.chdir(nowhere)
    found = jobs(folder, choice())["choice"]
    assert found.id == first.id
    assert ResolvedJob.of(found).model_key == ResolvedJob.of(first).model_key
    (nowhere / "reader").mkdir()
    (nowhere / "reader" / "config.json").write_text("no checkpoint")
    options = {"executor": "local", "tracking_uri": "none", "store": str(nowhere / "s"), "cache_dir": nowhere / "c"}
    sweep = resolve(folder / "sweep.yaml")
    resolve({"name": "other", "models": ["tiny-lm/text-d32"], "methods": ["full-cache"], "tasks": ["bits-per-byte"]})
    results = run_resolved(sweep, RunOptions.of(options), Quiet())
    assert results.results()["job_id"].to_pylist() == [first.id]
    shutil.rmtree(folder / "reader")
    shutil.rmtree(nowhere / "reader")
    (folder / "raeder").mkdir()
    with pytest.raises(UserError, match=r"model hf:reader: no such folder .did you mean 'raeder'"):
        jobs(folder, choice())


def test_content_names_jobs_and_places_do_not(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    first = jobs(folder, choice())["choice"]
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    lines = (folder / "my.jsonl").read_text().splitlines(keepends=True)
    (elsewhere / "parts").mkdir()
    (elsewhere / "parts" / "b.jsonl").write_text("".join(lines[:9][::-1]))
    (elsewhere / "parts" / "a.jsonl").write_text("".join(lines[9:]))
    assert jobs(elsewhere, choice(data="parts"))["choice"].id == first.id
    (folder / "my.jsonl").write_text("".join(lines[:-1]))
    assert jobs(folder, choice())["choice"].id != first.id


def test_a_label_tells_two_tasks_of_a_kind_apart(folder: Path) -> None:
    found = jobs(folder, choice(), {"choice:hard": {"data": "my.jsonl", "shots": 2}})
    assert sorted(found) == ["choice", "choice:hard"]
    assert found["choice"].id != found["choice:hard"].id
    assert ResolvedJob.of(found["choice:hard"]).task.name == "choice"


def test_the_readmes_example_is_the_packaged_one_and_runs(folder: Path, checkpoint: Path) -> None:
    """With another model and other lengths: the tokenizer of the small checkpoint knows bytes and little more."""
    blocks = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)
    (block,) = (b for b in blocks if b.startswith("name: own"))
    packaged = load_yaml(ROOT / "sweeps" / "own.yaml").data
    (folder / "readme.yaml").write_text(block)
    assert load_yaml(folder / "readme.yaml").data == packaged
    shutil.copytree(ROOT / "sweeps" / "own", folder / "own")
    choice, generate, text, needle = packaged["tasks"]
    choice["choice"]["limit"] = generate["generate"]["limit"] = 3
    text["text"].update(limit=2, tokens=64)
    needle["needle"].update(lengths=[1024], kinds=["single"], depths=[0.5], repeats=1)
    packaged.update(
        models=[MODEL], methods=["none", {"snapkv": {"keep": 0.5, "window": 4}}], store=str(folder / "store")
    )
    path = folder / "own.yaml"
    path.write_text(json.dumps(packaged))
    done = isoflop.run(path, executor="local", cache_dir=folder / "cache", tracking_uri="none")
    rows = done.results().to_pylist()
    assert [row["status"] for row in rows] == ["ok"] * 8
    assert {row["task"] for row in rows} == {"choice", "generate", "text", "needle"}
    assert {row["ratio"] for row in rows if row["method"] == "none"} == {1.0}
    assert all(row["ratio"] > 1.5 for row in rows if row["method"] == "snapkv")


def test_a_sweep_goes_on_from_any_folder(
    folder: Path, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Paths in the stored YAML lead whence they led when it was run."""
    sweep = {"name": "own", "models": [f"hf:{checkpoint}"], "methods": ["none"], "tasks": [choice(limit=2)]}
    (folder / "sweep.yaml").write_text(json.dumps(sweep))
    options: dict = {"store": str(folder / "store"), "executor": "local", "tracking_uri": "none"}
    monkeypatch.chdir(folder.parent)
    isoflop.run(Path(folder.name) / "sweep.yaml", cache_dir=folder / "cache", **options)
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    again = resolve_stored(Store.open(options["store"]), "own")
    (config,) = again.space.grid()
    (job,) = again.jobs_of(config)
    assert dict(job.task_paths) == {"data": str(folder / "my.jsonl")}
    assert isoflop.open("own", store=options["store"]).results()["job_id"].to_pylist() == [job.id]


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (choice(data="mine.jsonl"), r"tasks\[0\].*did you mean 'my\.jsonl'"),
        (choice(question="quesion"), r"tasks\[0\].*question.*'quesion' \(did you mean 'question'\?\)"),
        (choice(context="pasage"), r"'pasage' \(did you mean 'passage'\?\)"),
        ({"choice": {}}, "needs a value for data"),
        (choice(normalise="byte"), "did you mean 'bytes'"),
        ({"choise:x": {"data": "my.jsonl"}}, "did you mean 'choice'"),
        ({"generate": {"data": "my.jsonl", "prompt": "{question}", "references": "answers", "metric": "exat"}}, "did you mean 'exact'"),
        ({"text": {"data": "my.jsonl"}}, "'text'.*allowed: answer, answers"),
    ],
)  # fmt: skip
def test_wrong_tasks_are_refused_at_plan_in_one_line(folder: Path, task: dict, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        jobs(folder, task)
    assert "\n" not in str(caught.value)
    assert "sweep.yaml:1" in str(caught.value)
