"""Traces: from a method's inner steps through the ledger to MLflow, and ledgers from before there were any."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import ledger_row as row
from helpers import run_local, toy
from hypothesis import given
from hypothesis import strategies as st

from isoflop.core.errors import UserError
from isoflop.jobs.traces import POINTS, thinned, traces_of
from isoflop.ledger import SCHEMA, Ledger, Store, to_table
from isoflop.track.run_data import RunData

pytestmark = pytest.mark.usefixtures("toy_parts")
TRACES = [("kl", [{"step": 0, "value": 2.0}, {"step": 7, "value": 0.5}])]


@given(st.lists(st.floats(allow_nan=False), max_size=700), st.integers(2, 200))
def test_thinning_keeps_the_ends_and_an_even_selection_with_its_steps(values: list[float], points: int) -> None:
    kept = thinned(values, points)
    steps = [step for step, _ in kept]
    assert len(kept) == min(len(values), points)
    assert [value for _, value in kept] == [values[step] for step in steps]
    if values:
        assert (steps[0], steps[-1]) == (0, len(values) - 1)
        gaps = np.diff(steps)
        assert len(gaps) == 0 or gaps.max() - gaps.min() <= 1


def test_traces_of_a_composition_are_told_apart() -> None:
    from toy_parts import build_method

    prepared = build_method("toy-prepared")
    assert set(traces_of([(prepared, 2)])) == {"loss", "error"}
    both = traces_of([(prepared, 2), (build_method("toy-full"), None)])
    assert set(both) == {"toy-prepared.loss", "toy-prepared.error"}


def test_a_job_reports_the_trace_of_its_method_in_its_row_and_in_mlflow(tmp_path: Path, empty_mlflow: Path) -> None:
    from mlflow import MlflowClient

    shutil.copy(empty_mlflow, tmp_path / "mlflow.db")
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    methods = [{"toy-prepared": {"k": [4]}}, "toy-full"]
    given_sweep = toy(models=["toy/s"], methods=methods, tasks=["toy-task"])
    rows = {r["method"]: r for r in run_local(given_sweep, tmp_path, tracking_uri=uri).results().to_pylist()}
    assert rows["toy-full"]["traces"] is None
    traces = dict(rows["toy-prepared"]["traces"])
    assert set(traces) == {"loss", "error"}
    assert len(traces["loss"]) == POINTS
    assert all(point["value"] == 4 / (1 + point["step"]) for point in traces["loss"])
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("toy").experiment_id
    (run,) = client.search_runs([experiment], "params.method = 'toy-prepared'")
    shown = client.get_metric_history(run.info.run_id, "trace/loss")
    assert {m.step: m.value for m in shown} == {point["step"]: point["value"] for point in traces["loss"]}
    # a series of the same name as a column, with a value that MLflow cannot show
    assert {m.step: m.value for m in client.get_metric_history(run.info.run_id, "trace/error")} == {0: 0.5, 2: 0.25}
    assert run.data.metrics["error"] == rows["toy-prepared"]["error"]


def test_both_writers_of_mlflow_show_the_same_trace(tmp_path: Path, empty_mlflow: Path) -> None:
    from mlflow import MlflowClient

    from isoflop.track.projection import Projection

    filled = {**dict.fromkeys(SCHEMA.names), **row("a", knobs="{}", traces=TRACES, sequence=1, attempt=1, method="x")}
    found = []
    for bulk in (True, False):
        folder = tmp_path / str(bulk)
        folder.mkdir()
        shutil.copy(empty_mlflow, folder / "mlflow.db")
        uri = f"sqlite:///{folder / 'mlflow.db'}"
        projection = Projection(uri, "s", None, bulk=bulk)
        projection.begin("spec", {})
        projection.show([RunData.of(filled)])
        client = MlflowClient(uri)
        (run,) = client.search_runs([client.get_experiment_by_name("s").experiment_id], "tags.`isoflop.job_id` = 'a'")
        history = client.get_metric_history(run.info.run_id, "trace/kl")
        found.append(([(m.step, m.value) for m in history], run.data.metrics["trace/kl"]))
    assert found[0] == found[1] == ([(0, 2.0), (7, 0.5)], 0.5)


def test_a_series_cannot_take_the_name_of_a_metric() -> None:
    odd = [("shard_error", [{"step": 0, "value": 1.0}]), ("a@b", [{"step": 3, "value": math.inf}])]
    data = RunData.of(
        {**dict.fromkeys(SCHEMA.names), **row("a", knobs=json.dumps({}), traces=odd, scores=[0.5], shard_sizes=[1], sequence=1)}
    )  # fmt: skip
    assert data.steps == (("shard_error", 0, 0.5), ("running_error", 0, 0.5), ("trace/shard_error", 0, 1.0))


# ledgers


def older(folder: str, name: str, rows: list[dict[str, Any]]) -> None:
    """A file as it was written before there were traces."""
    table = to_table(rows).drop_columns(["traces"])
    pq.write_table(table.replace_schema_metadata(SCHEMA.metadata), Path(folder) / name)


def test_traces_come_back_as_they_were_written(tmp_path: Path) -> None:
    book = Ledger(Store.open(str(tmp_path)), "s").lock()
    book.append([row("a", traces=TRACES), row("b")])
    assert book.read()["traces"].to_pylist() == [TRACES, None]
    assert book.read().schema.equals(SCHEMA)


def test_a_ledger_from_before_there_were_traces_still_reads(tmp_path: Path) -> None:
    book = Ledger(Store.open(str(tmp_path)), "s").lock()
    Path(book.folder).mkdir(parents=True, exist_ok=True)
    older(book.folder, "000000000002-old.parquet", [row("a", sequence=1), row("b", sequence=2)])
    assert book.read()["traces"].to_pylist() == [None, None]
    book.unlock()
    book = Ledger(Store.open(str(tmp_path)), "s").lock()
    book.append([row("c", traces=TRACES), row("a", error=0.25)])
    for _ in range(2):
        table = book.read()
        assert table.schema.equals(SCHEMA)
        assert dict(zip(*(table[c].to_pylist() for c in ("job_id", "error")), strict=True)) == {"a": 0.25, "b": 0.5, "c": 0.5}  # fmt: skip
        assert book.read(["traces"]).to_pylist() == [{"traces": None}, {"traces": None}, {"traces": TRACES}]
        assert book.read(["error", "status"]).column_names == ["error", "status"]
        book.fold(at_least=1)
    assert len(list(Path(book.folder).glob("*.parquet"))) == 1


def test_a_column_of_the_future_is_an_error_and_stays_where_it_is(tmp_path: Path) -> None:
    book = Ledger(Store.open(str(tmp_path)), "s").lock()
    book.append([row("a")])
    table = to_table([row("b", sequence=2)]).append_column("more", pa.array([1]))
    path = Path(book.folder) / "000000000002-future.parquet"
    pq.write_table(table.replace_schema_metadata(SCHEMA.metadata), path)
    with pytest.raises(UserError, match="columns more were added by a later isoflop"):
        book.read()
    assert path.exists()


def test_a_trace_that_fails_costs_nothing_but_itself() -> None:
    from isoflop.jobs.traces import traces_of

    class Broken:
        name = "broken"

        def trace(self, prepared: object) -> dict[str, list[object]]:
            return {"loss": [1.0, None]}

    class Sound(Broken):
        name = "sound"

        def trace(self, prepared: object) -> dict[str, list[object]]:
            return {"loss": [1.0, 0.5]}

    assert traces_of([(Broken(), None), (Sound(), None)]) == {"sound.loss": [(0, 1.0), (1, 0.5)]}  # type: ignore[list-item]
