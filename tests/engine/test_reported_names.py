"""Names that no part of a sweep reports are refused before anything runs, or, of parts of others, as soon as a job shows it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import yaml
from helpers import run_local, toy

from isoflop.cli import main
from isoflop.core.errors import UserError
from isoflop.costs.names import is_measured
from isoflop.methods.base import METHODS
from isoflop.sweep.resolve import resolve
from isoflop.tasks.base import TASKS
from isoflop.tasks.data.choice import Choice
from isoflop.tasks.harness.common import HarnessTask
from isoflop.tasks.language_task import SIZES

pytestmark = pytest.mark.usefixtures("toy_parts")
OWN = Path(__file__).parents[2] / "sweeps" / "own"


def spec(tasks: list[Any], **more: Any) -> dict[str, Any]:
    models = ["tiny-llava/d24"] if "reading" in tasks else ["tiny-lm/recall-d64"]
    return {"name": "s", "models": models, "methods": ["none"], "tasks": tasks, **more}


def refused(given: dict[str, Any], tmp_path: Path) -> str:
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump(given))
    with pytest.raises(UserError) as caught:
        resolve(path)
    assert "\n" not in str(caught.value)
    return str(caught.value).replace(str(path), "sweep.yaml")


def test_every_task_of_isoflop_says_what_it_reports() -> None:
    """Those of harnesses once their task is loaded; the suite of tasks compares it with what they do report."""
    silent = [n for n in TASKS.own() if TASKS.get(n).metrics is None and not issubclass(TASKS.get(n), HarnessTask)]
    assert silent == []


def test_every_method_of_isoflop_measures_costs_that_are_known() -> None:
    """So that a sweep of them can tell every name beforehand; the suite of methods compares it with what they measure."""
    strange = [n for n in METHODS.own() if not METHODS.get(n).footprint.__module__.startswith("isoflop.")]
    assert strange == []
    assert all(map(is_measured, ("ratio_kv_cache", "bits_weights", "modelled_ms_10gbit", "kv_bytes")))
    assert not any(map(is_measured, ("acuracy", "ratio_", "kv-bytes")))


def test_costs_that_only_some_models_or_methods_have_are_known_too() -> None:
    """Sizes of a model that laws ask for, and all that the recorded runs of every task and method hold."""
    recorded = [json.loads(path.read_text()) for path in (Path(__file__).parents[1] / "golden").glob("*.json")]
    methods = [key.partition(".")[2] for r in recorded if r["kind"] == "method" for key in r["numbers"]]
    costs = {name for name in methods if "outputs" not in name} - {"cost"}
    costs |= {key.removeprefix("costs.") for r in recorded for key in r["numbers"] if key.startswith("costs.")}
    assert len(costs) > 50
    assert [name for name in (*SIZES, *sorted(costs)) if not is_measured(name)] == []


@pytest.mark.parametrize(
    ("tasks", "objective", "parts"),
    [
        (["kv-recall"], {"metric": "nlll"}, ["no task of this sweep reports 'nlll'", "(did you mean 'nll'?)", "error, nll, "]),
        (["kv-recall"], {"metric": "accuracy"}, ["no task of this sweep reports 'accuracy'", "allowed: error, nll"]),
        (["kv-recall"], {"metric": "kv_bytez"}, ["'kv_bytez'", "(did you mean 'kv_bytes'?)"]),
        (["kv-recall"], {"metric": "visual_tokenz"}, ["(did you mean 'visual_tokens'?)"]),
        (["reading"], {"metric": "rank"}, ["no task of this sweep reports 'rank'"]),
        (["kv-recall", "generation-latency"], {"metric": "nll"}, ["task generation-latency reports no 'nll'", "a mean over all tasks", "task: kv-recall"]),
        (["kv-recall", "generation-latency"], {"metric": "nll", "task": "generation-latency"}, ["task generation-latency does not report 'nll'", "step_seconds"]),
        (["kv-recall", "generation-latency"], {"metric": "f1", "task": "kv-recall"}, ["task kv-recall does not report 'f1'"]),
    ],
)  # fmt: skip
def test_an_objective_that_no_row_can_have(
    tasks: list[Any], objective: dict[str, Any], parts: list[str], tmp_path: Path
) -> None:
    said = refused(spec(tasks, objectives=[objective]), tmp_path)
    assert said.startswith("sweep.yaml:")
    assert ": objectives[0].metric: " in said
    for part in parts:
        assert part in said


@pytest.mark.parametrize(
    ("block", "parts"),
    [
        ({"y": "metrics.nl"}, ["laws[0].y", "'metrics.nl'", "did you mean 'metrics.nll'?"]),
        ({"y": "error", "x": {"N": "N", "V": "footprint.visual_tokes"}}, ["laws[0].x.V", "did you mean 'footprint.visual_tokens'?"]),
        ({"y": "error", "weights": "1/metrics.margin"}, ["laws[0].weights", "'metrics.margin'"]),
    ],
)  # fmt: skip
def test_a_law_on_what_no_row_can_have(block: dict[str, Any], parts: list[str], tmp_path: Path) -> None:
    said = refused(spec(["kv-recall"], laws=[{"law": "product", **block}]), tmp_path)
    for part in parts:
        assert part in said


@pytest.mark.parametrize("metric", ["nll", "error", "flops", "kv_store_ratio", "bytes", "ratio_kv_cache", "seconds"])
def test_what_a_row_may_have_is_taken(metric: str) -> None:
    assert resolve(spec(["kv-recall"], objectives=[{"metric": metric}])).spec.objectives[0].metric == metric
    resolve(spec(["kv-recall", "generation-latency"], objectives=[{"metric": "nll", "task": "kv-recall"}]))
    resolve(spec(["kv-recall"], laws=[{"law": "product", "y": "metrics.nll", "x": {"V": "footprint.text_tokens"}}]))


def test_what_others_inherit_is_not_their_word() -> None:
    @dataclass(frozen=True)
    class More(Choice):
        """Of a user."""

    @dataclass(frozen=True)
    class Says(Choice):
        """Of a user, with metrics."""

        metrics: ClassVar[tuple[str, ...] | None] = ("nll", "margin", "mine")

    data = {"data": str(OWN / "questions.jsonl"), "question": "question", "options": "options", "answer": "answer"}
    assert Choice(**data).reported() == ("nll", "margin")  # type: ignore[arg-type]
    assert More(**data).reported() is None  # type: ignore[arg-type]
    assert Says(**data).reported() == ("nll", "margin", "mine")  # type: ignore[arg-type]


@pytest.mark.parametrize("sampler", ["grid", "random"])
def test_a_task_of_others_tells_it_with_its_first_jobs_and_its_rows_are_kept(sampler: str, tmp_path: Path) -> None:
    given = toy(objectives=[{"metric": "los"}], search={"sampler": sampler}, budget={"trials": 6})
    given["tasks"] = [{"toy-task": {"seconds": 0.05}}, {"toy-other": {"seconds": 0.05}}]
    for _ in range(2):  # the second time it is known from the rows
        with pytest.raises(UserError, match=r"no row of task toy-task so far has 'los'.*did you mean 'loss'.*are kept"):
            run_local(given, tmp_path)
    kept = run_local({**given, "objectives": [{"metric": "loss"}]}, tmp_path)
    assert 0 < kept.summary.cached < 12
    assert kept.summary.failed == 0


def test_the_command_ends_with_2(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump(toy(objectives=[{"metric": "los"}])))
    options = ["--executor", "local", "--tracking-uri", "none", "--no-report", "--cache-dir", str(tmp_path / "c")]
    monkeypatch.setattr("sys.argv", ["isoflop", "run", str(path), "--store", str(tmp_path / "s"), *options])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    said = capfd.readouterr().err.splitlines()
    assert "objectives[0].metric" in said[-1] or "objectives[0].metric" in " ".join(said[-3:])
    assert "Traceback" not in "\n".join(said)


def test_one_task_of_several_without_the_metric_is_told() -> None:
    """An objective is a mean over all tasks: where one of them has no value, no trial has one."""
    from isoflop.sweep.column_watch import ColumnWatch

    sweep = resolve(toy(objectives=[{"metric": "loss"}]))
    watch = ColumnWatch(sweep.spec, sweep.source, sweep.tasks)
    row = {"status": "ok", "method": "toy-tokens", "error": 0.5, "footprint": []}
    assert watch.see([{**row, "task": "toy-task", "metrics": [("loss", 1.0)]}]) == []
    assert not watch.aimless
    (line,) = watch.see([{**row, "task": "toy-other", "metrics": []}])
    assert "no row of task toy-other so far has 'loss'" in line
    assert watch.aimless == [line]
