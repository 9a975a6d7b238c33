"""Text from outside: whatever an error, a name or a file holds, rows are kept, files can be read, and no terminal obeys it."""

from __future__ import annotations

import datetime as dt
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pytest
from helpers import Lines, run_local, toy
from hypothesis import given
from hypothesis import strategies as st
from outside_texts import TEXTS

from isoflop.cli import cli
from isoflop.core import text as text_module
from isoflop.core.errors import UserError
from isoflop.core.text import safe_line, safe_name, safe_text, safe_tree
from isoflop.ledger import Ledger, Store, to_table
from isoflop.sweep.outbox import Outbox
from isoflop.sweep.state import read_state

pytestmark = pytest.mark.usefixtures("toy_parts")
OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069]")
NOW = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
NAMED = {"trial_id": "t", "model": "m", "method": "none", "task": "t"}
ANY = st.text(st.characters(exclude_categories=[]))


@given(ANY, st.integers(60, 5000))
def test_safe_text_can_be_kept_and_shown_and_stays_what_it_is(text: str, most: int) -> None:
    for made in (safe_text(text, most), safe_line(text, most), safe_name(text, most)):
        assert not OBEYED.search(made)
        assert made.encode().decode() == made
        assert len(made) <= most
        assert safe_text(made, most) == made
    if text.isascii() and text.isprintable() and len(text) <= most:
        assert safe_text(text, most) == text


@given(st.text(min_size=300), st.text(min_size=300))
def test_long_names_that_differ_stay_two(one: str, other: str) -> None:
    assert (safe_name(one) == safe_name(other)) == (safe_line(one, None) == safe_line(other, None))


def test_halves_that_came_one_by_one_are_a_character_and_structures_are_walked() -> None:
    assert safe_text("\ud83d\ude00 \ud83d") == "\U0001f600 \\ud83d"
    assert safe_tree({"a\0": ["\x07", ("\x1b", 1, None)]}) == {"a\\x00": ["\\x07", ["\\x1b", 1, None]]}


def test_columns_are_looked_through_for_the_same_characters() -> None:
    characters = [chr(n) for n in range(0x10000) if not 0xD800 <= n < 0xE000]
    found = pc.match_substring_regex(pa.array(characters), text_module.STORED).to_pylist()
    assert found == [bool(text_module._UNSAFE.search(c)) for c in characters]


# a sweep whose jobs, stages and names say everything

SPEC = toy(
    methods=[
        {"toy-tokens": {"tokens": [4]}},
        {"toy-bad": {"how": [f"{verb} {name}" for verb in ("says", "names") for name in TEXTS]}},
    ],
    models=["toy/s"],
    tasks=["toy-task"],
    limits={"retries": 0},
)


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory, empty_mlflow: Path, toy_parts: Any) -> tuple[Path, Any, Lines]:
    folder = tmp_path_factory.mktemp("told")
    shutil.copy(empty_mlflow, folder / "mlflow.db")
    lines = Lines()
    return folder, run_local(SPEC, folder, lines, tracking_uri=f"sqlite:///{folder / 'mlflow.db'}"), lines


def test_no_row_is_lost_to_what_its_neighbours_say(told: tuple[Path, Any, Lines]) -> None:
    _, opened, _ = told
    assert (opened.summary.ok, opened.summary.failed) == (1 + len(TEXTS), len(TEXTS))
    assert opened.summary.untracked == ""
    rows = {json.loads(r["knobs"]).get("how", "fine"): r for r in opened.results().to_pylist()}
    for name, text in TEXTS.items():
        row = rows[f"says {name}"]
        assert safe_text(text, 3000)[:2000] in row["error_text"]
        assert " in misbehave" in row["error_text"]  # where it happened, however long it is
        assert len(row["error_text"]) <= 4000
        assert len(dict(rows[f"names {name}"]["metrics"])) == 3


def test_nothing_that_is_written_or_told_holds_what_a_terminal_obeys(told: tuple[Path, Any, Lines]) -> None:
    folder, opened, lines = told
    assert not [line for line in lines.lines if OBEYED.search(line)]
    assert not OBEYED.search((folder / "store" / "sweeps" / "toy" / "log.txt").read_text(encoding="utf-8"))
    state = read_state(opened.store, "toy")
    assert state is not None
    assert not OBEYED.search(repr(state))
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    runs = client.search_runs([client.get_experiment_by_name("toy").experiment_id], max_results=100)
    assert len(runs) == 2 + 2 * len(TEXTS)
    for run in runs:
        texts = [run.info.run_name, *run.data.tags.values(), *run.data.params.values(), *run.data.metrics]
        assert not [t for t in texts if OBEYED.search(t)]


@pytest.mark.parametrize(
    "command", [["show", "toy"], ["show", "toy", "--failed"], ["show", "toy", "--rows"], ["watch", "toy", "--once"]]
)
def test_terminals_are_shown_escapes(
    told: tuple[Path, Any, Lines], command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _, _ = told
    for more in ([], ["--json"]):
        cli.main([*command, *more, "--store", str(folder / "store")], standalone_mode=False)
        assert not OBEYED.search(capsys.readouterr().out)


def test_a_report_is_written_of_it(told: tuple[Path, Any, Lines]) -> None:
    from isoflop.dashboards.session import conclude

    page = conclude(told[1]).artifacts[0].content
    assert isinstance(page, str)
    assert not OBEYED.search(page)


@pytest.mark.parametrize("name", TEXTS)
def test_a_stage_may_say_it_too(tmp_path: Path, name: str) -> None:
    spec = toy(models=[{"toy/s": {"fail": f"says {name}"}}, "toy/m"], limits={"retries": 1})
    lines = Lines()
    opened = run_local(spec, tmp_path, lines)
    assert (opened.summary.ok, opened.summary.failed) == (6, 6)
    assert not [line for line in lines.lines if OBEYED.search(line)]
    assert any("will be tried again" in line for line in lines.lines)


def test_a_ledger_that_somebody_else_wrote_is_read_safely(tmp_path: Path) -> None:
    book = Ledger(Store.open(str(tmp_path)), "s").lock()
    stored = {k: t.encode("utf-8", "replace").decode() for k, t in TEXTS.items()}
    book.append(
        {"job_id": k, **NAMED, "status": "failed", "started": NOW, "finished": NOW, "error_text": t, "host": t, "metrics": [(t, 1.0)]}
        for k, t in stored.items()
    )  # fmt: skip
    for row in book.read().to_pylist():
        text = safe_text(stored[row["job_id"]], None)
        assert (row["error_text"], row["host"], row["metrics"]) == (text, text, [(text, 1.0)])
    assert book.read(["job_id", "error_text"])["job_id"].to_pylist() == list(TEXTS)


@pytest.mark.parametrize(
    "spoilt", [{"seed": 2**70}, {"metrics": [("x", "text")]}, {"scores": ["a"]}, {"shard_sizes": 5}, {"host": b"\xff"}]
)
def test_a_result_that_no_ledger_takes_costs_its_own_job_only(tmp_path: Path, spoilt: dict[str, Any]) -> None:
    book = Ledger(Store.open(str(tmp_path)), "s").lock()
    told: list[tuple[Any, Any]] = []
    outbox = Outbox(book, lambda was, kept: told.append((was["status"], kept["status"])))
    for job in ("a", "b", "c"):
        row = {"job_id": job, **NAMED, "status": "ok", "error": 0.5, "scores": [0.5], "started": NOW, "finished": NOW}
        outbox.add(row | (spoilt if job == "b" else {}))
    assert [r["job_id"] for r in outbox.commit()] == ["a", "b", "c"]
    rows = {r["job_id"]: r for r in book.read().to_pylist()}
    assert {job: (r["status"], r["error"]) for job, r in rows.items()} == {
        "a": ("ok", 0.5), "b": ("failed", None), "c": ("ok", 0.5),
    }  # fmt: skip
    assert next(iter(spoilt)) in rows["b"]["error_text"]
    assert told == [("ok", "failed")]
    assert to_table([rows["b"]]).num_rows == 1


@pytest.mark.parametrize(
    "change",
    [
        {"description": "\ud83d"},
        {"models": ["toy/\udcff"]},
        {"methods": [{"toy-bad": {"how": "\ud83d"}}]},
        {"\ud83d": 1},
    ],
)
def test_a_spec_from_python_is_text_or_refused_in_a_line(tmp_path: Path, change: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="half of a surrogate pair") as caught:
        run_local(toy(**change), tmp_path)
    assert str(caught.value).isprintable()
