"""MLflow shows the ledger: every row once, with its values, whatever happened in between."""

from __future__ import annotations

import datetime as dt
import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from helpers import one_bad, run_local, toy

from isoflop.ledger.schema import SCHEMA, to_table
from isoflop.track import MlflowTracker
from isoflop.track.run_data import RunData

pytestmark = pytest.mark.usefixtures("toy_parts")


@pytest.fixture
def uri(tmp_path: Path, empty_mlflow: Path) -> str:
    shutil.copy(empty_mlflow, tmp_path / "mlflow.db")
    return f"sqlite:///{tmp_path / 'mlflow.db'}"


def runs_of(uri: str, name: str) -> tuple[Any, list[Any], list[Any]]:
    """(client, parent runs, nested runs)."""
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    runs = list(client.search_runs([client.get_experiment_by_name(name).experiment_id], max_results=1000))
    return (
        client,
        [r for r in runs if "isoflop.parent" in r.data.tags],
        [r for r in runs if "isoflop.job_id" in r.data.tags],
    )


def row(job: str, sequence: int, **more: Any) -> dict[str, Any]:
    now = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
    values = {
        "job_id": job, "trial_id": "t", "trial_number": 0, "sweep": "s", "model": "m", "method": "x", "family": "f", "knobs": json.dumps({"k": 1}),
        "task": "t", "repeat": 0, "seed": 0, "status": "ok", "error": 0.5, "scores": [0.25, 0.75], "shard_sizes": [1, 1], "sequence": sequence,
        "started": now, "finished": now + dt.timedelta(seconds=2), "attempt": 1,
    }  # fmt: skip
    return {**dict.fromkeys(SCHEMA.names), **values, **more}


def test_one_nested_run_per_row_below_one_parent(tmp_path: Path, uri: str) -> None:
    opened = run_local(toy(laws=[{"law": "product", "bootstrap": 0}]), tmp_path, tracking_uri=uri)
    client, parents, nested = runs_of(uri, "toy")
    assert len(parents) == 1
    assert len(nested) == opened.results().num_rows == 12
    assert {r.info.status for r in [*parents, *nested]} == {"FINISHED"}
    assert {r.data.tags["mlflow.parentRunId"] for r in nested} == {parents[0].info.run_id}
    rows = {r["job_id"]: r for r in opened.results().to_pylist()}
    for run in nested:
        expected = rows[run.data.tags["isoflop.job_id"]]
        for name in ("error", "N", "V", "Q", "ratio", "flops", "wall_seconds"):
            assert run.data.metrics[name] == pytest.approx(expected[name], rel=1e-12)
        assert run.data.params["tokens"] == str(json.loads(expected["knobs"])["tokens"])
        assert run.data.tags["isoflop.status"] == "ok"
        steps = client.get_metric_history(run.info.run_id, "shard_error")
        assert [m.step for m in steps] == [0, 1]
    files = {f.path for f in client.list_artifacts(parents[0].info.run_id)}
    assert {"sweep.yaml", "laws.json"} <= files
    run_local(toy(), tmp_path, tracking_uri=uri)
    assert len(runs_of(uri, "toy")[2]) == 12


def test_failed_and_infeasible_rows_are_failed_runs_with_their_error(tmp_path: Path, uri: str) -> None:
    run_local(one_bad("raise", limits={"retries": 0}), tmp_path, tracking_uri=uri)
    _, parents, nested = runs_of(uri, "toy")
    assert parents[0].info.status == "FINISHED"
    assert sorted(r.info.status for r in nested) == ["FAILED", "FAILED", "FINISHED", "FINISHED"]
    assert all("toy failure" in r.data.tags["isoflop.error"] for r in nested if r.info.status == "FAILED")


def test_a_sweep_that_ran_without_mlflow_is_shown_later(tmp_path: Path, uri: str) -> None:
    run_local(toy(), tmp_path)
    run_local(toy(), tmp_path, tracking_uri=uri)
    assert len(runs_of(uri, "toy")[2]) == 12


def test_a_half_written_run_is_completed_and_a_double_deleted(uri: str) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    experiment = client.create_experiment("s")
    half = client.create_run(experiment, tags={"isoflop.job_id": "a"})  # killed between creating and filling it
    client.create_run(experiment, tags={"isoflop.job_id": "a"})  # by two drivers, even
    tracker = MlflowTracker(uri, "s")
    tracker.start("spec", {})
    tracker.catch_up(to_table([row("a", 1), row("b", 2)]))
    tracker.finish([], {}, "", "FINISHED")
    assert tracker.close(60) == 0
    _, parents, nested = runs_of(uri, "s")
    assert len(parents) == 1
    assert sorted(r.data.tags["isoflop.job_id"] for r in nested) == ["a", "b"]
    assert {r.info.status for r in nested} == {"FINISHED"}
    assert all(r.data.metrics["error"] == 0.5 for r in nested)
    assert half.info.run_id


def test_a_job_that_was_run_again_shows_its_last_row_only(uri: str) -> None:
    tracker = MlflowTracker(uri, "s")
    tracker.start("spec", {})
    tracker.push(
        [
            row(
                "a",
                1,
                status="failed",
                error=None,
                scores=None,
                shard_sizes=None,
                error_type="ValueError",
                error_text="no",
            )
        ]
    )
    assert wait_until_idle(tracker, 60)
    tracker.push([row("a", 2)])
    tracker.push([row("a", 2)])
    assert wait_until_idle(tracker, 60)
    tracker.close(10)
    _, _, nested = runs_of(uri, "s")
    assert len(nested) == 1
    assert (nested[0].info.status, nested[0].data.tags["isoflop.status"]) == ("FINISHED", "ok")
    assert "isoflop.error" not in nested[0].data.tags
    assert "isoflop.error_type" not in nested[0].data.tags


def test_odd_values_and_names_do_not_stop_the_projection(uri: str) -> None:
    tracker = MlflowTracker(uri, "s")
    tracker.start("spec", {})
    odd = row(
        "a", 1, knobs=json.dumps({"weird@name=": "x" * 9000, "empty": ""}), metrics=[("a@b", 1.0), ("inf", float("inf")), ("nan", float("nan"))],
        error_text="e" * 20_000, scores=[0.5], shard_sizes=[0, 1], footprint=[("bytes of scales (int8)", 3.0)],
    )  # fmt: skip
    tracker.push([odd, row("b", 2)])
    assert wait_until_idle(tracker, 60)
    tracker.close(10)
    _, _, nested = runs_of(uri, "s")
    found = {r.data.tags["isoflop.job_id"]: r for r in nested}
    assert set(found) == {"a", "b"}
    assert found["a"].data.metrics["a_at_b"] == 1.0
    assert "inf" not in found["a"].data.metrics
    assert len(found["a"].data.params["weird_at_name_eq_"]) == 6000


def test_a_row_that_cannot_be_shown_does_not_hold_up_the_others(uri: str) -> None:
    tracker = MlflowTracker(uri, "s")
    tracker.start("spec", {})
    tracker.push([row("a", 1), row("b", 2, knobs="no JSON"), row("c", 3)])
    assert wait_until_idle(tracker, 60)
    tracker.close(10)
    assert {r.data.tags["isoflop.job_id"] for r in runs_of(uri, "s")[2]} == {"a", "c"}


def test_a_server_that_does_not_answer_delays_nothing_but_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    opened = run_local(toy(), tmp_path, tracking_uri="http://127.0.0.1:9", track_wait=0.5)
    assert opened.summary.ok == 12
    log = (tmp_path / "store" / "sweeps" / "toy" / "log.txt").read_text()
    assert "MLflow does not show everything yet" in log
    assert "isoflop resume" in log


def test_rows_keep_within_mlflows_limits() -> None:
    data = RunData.of(row("a", 1, model="m" * 400, error_text="e" * 10_000))
    assert len(data.name) == 250
    assert max(map(len, data.tags.values())) <= 8000
    assert data.end_ms - data.start_ms == 2000
    assert data.steps == (
        ("shard_error", 0, 0.25),
        ("running_error", 0, 0.25),
        ("shard_error", 1, 0.75),
        ("running_error", 1, 0.5),
    )


def wait_until_idle(tracker: Any, seconds: float) -> bool:
    """Wait until MLflow shows everything that was pushed; False when time ran out."""
    deadline = time.monotonic() + seconds
    while tracker.backlog() and time.monotonic() < deadline:
        time.sleep(0.02)
    return tracker.backlog() == 0


@pytest.mark.parametrize("bulk", [True, False])
def test_the_examples_of_a_task_are_a_data_set_named_by_version_and_options(uri: str, bulk: bool) -> None:
    from mlflow import MlflowClient

    from isoflop.track.projection import Projection

    def data(job: str, sequence: int, **options: Any) -> RunData:
        spec = json.dumps({"task_options": options})
        return RunData.of(row(job, sequence, versions=[("task", "7")], spec=spec))

    projection = Projection(uri, "s", None, bulk=bulk)
    projection.begin("spec", {})
    projection.show([data("a", 1), data("b", 2), data("c", 3, pairs=4)])
    projection.show([data("a", 4)])  # run again: still one data set
    projection.show([RunData.of(row("d", 5, versions=None))])  # a row of which no version is known has none
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("s").experiment_id
    found = {r.data.tags["isoflop.job_id"]: r for r in client.search_runs([experiment], "tags.`isoflop.job_id` != ''")}
    sets = {job: [i.dataset for i in run.inputs.dataset_inputs] for job, run in found.items()}
    assert [(d.name, d.digest) for d in sets["a"]] == [(d.name, d.digest) for d in sets["b"]] == [("t", "7")]
    (other,) = sets["c"]
    assert other.digest.startswith("7-")
    assert json.loads(other.profile) == {"pairs": 4}
    assert sets["d"] == []
    (given,) = found["a"].inputs.dataset_inputs
    assert [(t.key, t.value) for t in given.tags] == [("mlflow.data.context", "eval")]
    chosen = client.search_runs([experiment], f"datasets.digest = '{other.digest}'")
    assert [r.data.tags["isoflop.job_id"] for r in chosen] == ["c"]


def test_both_ways_of_writing_read_back_alike(tmp_path: Path, empty_mlflow: Path) -> None:
    from mlflow import MlflowClient

    from isoflop.track.projection import Projection

    shown = []
    for bulk in (True, False):
        path = tmp_path / f"{bulk}.db"
        shutil.copy(empty_mlflow, path)
        projection = Projection(f"sqlite:///{path}", "s", None, bulk=bulk)
        projection.begin("spec", {})
        projection.show([RunData.of(row("a", 1, versions=[("task", "7")], metrics=[("nll", 1.5)], N=10, V=4.0))])
        client = MlflowClient(f"sqlite:///{path}")
        (run,) = client.search_runs([client.get_experiment_by_name("s").experiment_id], "tags.`isoflop.job_id` = 'a'")
        tags = {k: v for k, v in run.data.tags.items() if k != "mlflow.parentRunId"}
        inputs = [i.dataset.to_dictionary() for i in run.inputs.dataset_inputs]
        times = (run.info.start_time, run.info.end_time, run.info.status, run.info.run_name)
        shown.append((run.data.metrics, run.data.params, tags, inputs, times))
    assert shown[0] == shown[1]


def test_the_filters_of_the_readme_find_runs(uri: str) -> None:
    from mlflow import MlflowClient

    from isoflop.track.projection import Projection

    text = (Path(__file__).parents[2] / "dashboards" / "README.md").read_text(encoding="utf-8")
    section = text.partition("## In MLflow")[2].partition("\n## ")[0]
    filters = section.partition("```text\n")[2].partition("```")[0].splitlines()
    assert len(filters) >= 5
    projection = Projection(uri, "s", None)
    projection.begin("spec", {})
    common = {"model": "tiny-llava/d24", "versions": [("task", "7")], "task": "reading", "trial_id": "0c5a"}
    good = row("a", 1, method="quecc", V=4.0, flops=1e6, **common | {"error": 0.05})
    bad = row(
        "b", 2, method="zipcache", family="visual-tokens+kv-cache", **common | {"status": "failed", "error": None}
    )
    projection.show([RunData.of(good), RunData.of(bad), RunData.of(row("c", 3))])
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("s").experiment_id
    for text in filters:
        found = {r.data.tags["isoflop.job_id"] for r in client.search_runs([experiment], text)}
        assert found, text
        assert "c" not in found, text


def test_long_versions_do_not_make_two_data_sets_one() -> None:
    version = "2026-01-01-a-long-version-of-a-plugin"

    def digest(**options: Any) -> str:
        data = RunData.of(row("a", 1, versions=[("task", version)], spec=json.dumps({"task_options": options})))
        assert data.dataset is not None
        return data.dataset.digest

    assert len({digest(x=1), digest(x=2), digest()}) == 3
    assert max(len(digest(x=1)), len(digest())) <= 36


def test_rows_with_long_traces_are_written_in_portions(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient

    from isoflop.track import bulk
    from isoflop.track.projection import Projection

    monkeypatch.setattr(bulk, "_VALUES", 50)
    series = [("loss", [{"step": i, "value": float(i)} for i in range(40)])]
    projection = Projection(uri, "s", None)
    projection.begin("spec", {})
    projection.show([RunData.of(row(f"j{i}", i + 1, traces=series)) for i in range(5)])
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("s").experiment_id
    runs = client.search_runs([experiment], "tags.`isoflop.job_id` != ''")
    assert len(runs) == 5
    assert {len(client.get_metric_history(r.info.run_id, "trace/loss")) for r in runs} == {40}
