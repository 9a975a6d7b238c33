"""How long the end of a session waits for MLflow: as long as something moves there, and no longer than it was asked for else."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from helpers import Lines
from test_mlflow_projection import row

from isoflop.ledger.schema import to_table
from isoflop.sweep import ending
from isoflop.sweep.ending import await_tracker
from isoflop.track import MlflowTracker, NullTracker


class Scripted(NullTracker):
    """An MLflow whose state is a function of the seconds that somebody has waited for it."""

    def __init__(
        self, ready: float = 1e9, moves: float = 1e9, problem: str = "", stuck: bool = False, refused: str = ""
    ) -> None:
        self.waited = 0.0
        self.ready, self.moves, self.told, self.gone, self.left_out = ready, moves, problem, stuck, refused

    def wait(self, seconds: float) -> bool:
        if self.gone or self.waited >= self.ready:
            return True
        self.waited += seconds
        return False

    def backlog(self) -> int:
        return 0 if self.waited >= self.ready and not self.gone else 9080

    def close(self, wait: float) -> int:
        return self.backlog()

    problem = property(lambda self: self.told if self.waited < self.ready else "")  # type: ignore[assignment]
    stuck = property(lambda self: self.gone)  # type: ignore[assignment]
    refused = property(lambda self: self.left_out)  # type: ignore[assignment]
    steps = property(lambda self: int(self.waited // self.moves))  # type: ignore[assignment]


@pytest.mark.parametrize(
    "tracker, waited, says",
    [
        (Scripted(ready=0), 0, ""),
        (Scripted(ready=4000, moves=59), 4000, ""),  # reads what it has, page by page, and shows no row meanwhile
        (
            Scripted(ready=400),
            400,
            "",
        ),  # makes its tables on a busy machine: no sign for minutes, but no refusal either
        (Scripted(moves=50, ready=3000, problem="refused"), 3000, ""),
        (
            Scripted(problem="MLflow at http://x: refused"),
            60,
            "(9080 rows; MLflow at http://x: refused); `isoflop resume` will",
        ),
        (Scripted(), 600, "nothing has moved for 600 s); `isoflop resume` will bring the rest"),
        (
            Scripted(stuck=True, problem="MLflow: mend it"),
            0,
            "MLflow does not show everything (9080 rows): MLflow: mend it",
        ),
        (Scripted(ready=0, refused="MLflow refuses 1 row"), 0, "MLflow refuses 1 row"),
    ],
)
def test_patience(tracker: Scripted, waited: float, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ending.time, "monotonic", lambda: tracker.waited)
    lines = Lines()
    lacking = await_tracker(tracker, 60.0, lines)  # type: ignore[arg-type]
    assert abs(tracker.waited - waited) <= 1
    assert says in lacking
    assert bool(lacking) == bool(says)
    assert not says or lines.lines[-1] == lacking
    assert "not done in" not in lacking


class Stub:
    """A projection that takes a moment per portion, and refuses some rows."""

    def __init__(self, refuses: Callable[[str], bool] = lambda job: False) -> None:
        self.refuses = refuses
        self.portions: list[int] = []

    def begin(self, *_: Any) -> None:
        """Nothing to begin."""

    def missing(self, table: pa.Table) -> list[int]:
        return list(range(10, table.num_rows))

    def show(self, batch: list[Any]) -> None:
        if any(self.refuses(data.job_id) for data in batch):
            raise ValueError("not this one")
        self.portions.append(len(batch))
        time.sleep(0.01)


def caught_up(stub: Stub, rows: int) -> tuple[MlflowTracker, list[tuple[int, int]]]:
    tracker = MlflowTracker("sqlite:///unused", "s")
    tracker._projection = stub
    tracker.start("spec", {})
    tracker.catch_up(to_table([row(f"j{n}", n + 1) for n in range(rows)]))
    seen: list[tuple[int, int]] = []
    while not tracker.wait(0.005):
        seen.append((tracker.steps, tracker.backlog()))
    return tracker, seen


def test_catching_up_shows_that_it_moves() -> None:
    tracker, seen = caught_up(Stub(), 1010)
    assert tracker.backlog() == 0
    assert len({steps for steps, _ in seen}) >= 5
    assert len({left for _, left in seen}) >= 5
    assert tracker.refused == ""


def test_a_server_that_is_away_shows_no_progress_however_often_it_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    import isoflop.track.projection as projection

    tries: list[int] = []

    def away(*_: Any, alive: Callable[[], None]) -> None:
        tries.append(1)
        alive()
        alive()
        raise OSError("refused")

    monkeypatch.setattr("isoflop.track.tracker._RETRY_SECONDS", (0.0,))
    monkeypatch.setattr(projection, "Projection", away)
    tracker = MlflowTracker("http://127.0.0.1:9", "s")
    tracker.start("spec", {})
    while len(tries) < 5:
        time.sleep(0.01)
    assert tracker.steps == 2
    tracker.close(0.0)
    assert "refused" in tracker.problem


def test_a_row_of_an_earlier_session_that_mlflow_refuses_costs_itself_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("isoflop.track.tracker._RETRY_SECONDS", (0.0,))
    stub = Stub(lambda job: job == "j77")
    tracker, _ = caught_up(stub, 210)
    assert tracker.backlog() == 0
    assert sum(stub.portions) == 199
    assert tracker.refused == "MLflow refuses 1 row, which the ledger has (not this one)"


def test_what_mlflow_has_is_read_alike_in_both_ways(tmp_path: Path, empty_mlflow: Path) -> None:
    """In one query where the tables are known, in pages else; half-written runs and foreign stamps are no rows."""
    import shutil

    from isoflop.track.projection import Projection
    from isoflop.track.run_data import RunData

    shutil.copy(empty_mlflow, tmp_path / "mlflow.db")
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    first = Projection(uri, "s", None)
    first.begin("spec", {})
    first.show([RunData.of(row(f"j{n}", n + 1, knobs=json.dumps({"k": n}))) for n in range(5)])
    runs = {job: run for job, (run, _) in first._runs.items()}
    first._client.delete_tag(runs["j0"], "isoflop.row")
    first._client.set_tag(runs["j1"], "isoflop.row", "of somebody else")
    first._client.delete_run(runs["j2"])
    beats: list[int] = []
    found = [Projection(uri, "s", None, bulk=bulk, alive=lambda: beats.append(1))._runs for bulk in (True, False)]
    assert found[0] == found[1]
    assert {job: stamp > 0 for job, (_, stamp) in found[0].items()} == {
        "j0": False,
        "j1": False,
        "j3": True,
        "j4": True,
    }
    assert len(beats) >= 6
