"""Rate curves of rows: what is averaged, what is told apart, what is compared with what."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

import isoflop
from isoflop.core.errors import UserError
from isoflop.frontier import rate_curves
from isoflop.ledger import Store
from isoflop.sweep.api import SweepResults


def rows(*entries: tuple[str, str, str, float | None, float | None], task: str = "t", model: str = "m") -> pa.Table:
    """Rows of (method, knobs, status, bytes, error); half the bytes are payload."""
    columns: list[Any] = [list(column) for column in zip(*entries, strict=True)]
    method, knobs, status, size, error = columns
    maps = [[] if s is None else [("codec_bytes", s), ("codec_payload_bytes", s / 2)] for s in size]
    return pa.table(
        {
            "task": [task] * len(method),
            "model": [model] * len(method),
            "method": method,
            "knobs": knobs,
            "status": status,
            "footprint": pa.array(maps, pa.map_(pa.string(), pa.float64())),
            "error": pa.array(error, pa.float64()),
        }
    )


TABLE = rows(
    ("jpeg", '{"quality": 1}', "ok", 10.0, 0.4),
    ("jpeg", '{"quality": 1}', "ok", 12.0, 0.2),
    ("jpeg", '{"quality": 9}', "ok", 40.0, 0.1),
    ("jpeg", '{"quality": 50}', "failed", 90.0, None),
    ("tokens", '{"keep": 4, "drop": "none"}', "ok", 5.0, 0.9),
    ("tokens", '{"keep": 4, "drop": "uniform"}', "ok", 5.0, 0.6),
    ("tokens", '{"keep": 32, "drop": "none"}', "ok", 40.0, 0.05),
    ("none", "{}", "ok", None, 0.0),
)


def test_repeats_are_averaged_and_what_failed_or_has_no_rate_is_left_out() -> None:
    found = rate_curves(TABLE)
    assert [*found.curves] == [("t", "m", "jpeg"), ("t", "m", "tokens")]
    jpeg = found.curves["t", "m", "jpeg"]
    assert jpeg.rates.tolist() == [11, 40]
    assert jpeg.errors.tolist() == pytest.approx([0.3, 0.1])
    halves = rate_curves(TABLE, rate="footprint['codec_payload_bytes']").curves["t", "m", "jpeg"]
    assert halves.rates.tolist() == [5.5, 20]


def test_settings_share_a_curve_unless_told_apart() -> None:
    assert rate_curves(TABLE).curves["t", "m", "tokens"].errors.tolist() == pytest.approx([0.6, 0.05])
    apart = rate_curves(TABLE, by=("method", "knobs->>'drop'")).curves
    assert apart["t", "m", "tokens", "none"].errors.tolist() == pytest.approx([0.9, 0.05])
    assert apart["t", "m", "tokens", "uniform"].errors.tolist() == [0.6]
    assert ("t", "m", "jpeg", None) in apart


def test_only_curves_of_one_task_and_model_are_compared() -> None:
    """jpeg falls from .3 at 11 to .1 at 40, tokens from .6 at 5 to .05 at 40: they meet once in between."""
    parts = [TABLE, rows(("webp", "{}", "ok", 20.0, 0.2), task="t2"), rows(("webp", "{}", "ok", 20.0, 0.2), model="m2")]
    found = rate_curves(pa.concat_tables(parts))
    (entry,) = found.compare()
    assert (entry["task"], entry["model"], entry["a"], entry["b"]) == ("t", "m", "jpeg", "tokens")
    (crossing,) = entry["crossings"]
    curves = found.curves
    assert curves["t", "m", "jpeg"].at(crossing) == pytest.approx(curves["t", "m", "tokens"].at(crossing))
    assert entry["extra_rate"] == pytest.approx(curves["t", "m", "jpeg"].extra_rate(curves["t", "m", "tokens"]))
    shown = str(found)
    assert f"jpeg takes {entry['extra_rate']:+.0%} rate for the errors of tokens; they cross at {crossing:.3g}" in shown
    assert "t2, m: error over footprint['codec_bytes']" in shown
    assert [trace.name for trace in isoflop.plot(found).data] == [
        "jpeg · t · m",
        "tokens · t · m",
        "webp · t · m2",
        "webp · t2 · m",
    ]


def test_curves_without_a_common_error_say_so() -> None:
    found = rate_curves(rows(("a", "{}", "ok", 3.0, 0.9), ("b", "{}", "ok", 4.0, 0.1)))
    assert found.compare()[0]["extra_rate"] is None
    assert "a reaches no error in common with b" in str(found)


def test_points_as_a_table_tell_which_lie_on_the_hull() -> None:
    table = rate_curves(
        rows(("a", '{"q": 1}', "ok", 1.0, 1.0), ("a", '{"q": 2}', "ok", 10.0, 0.7), ("a", '{"q": 3}', "ok", 100.0, 0.0))
    ).to_arrow()
    assert table["rate"].to_pylist() == [1, 10, 100]
    assert table["on_hull"].to_pylist() == [True, False, True]
    assert set(table["curve"].to_pylist()) == {"a"}


def test_no_rows_and_wrong_expressions_are_said() -> None:
    with pytest.raises(UserError, match="no finished row has both footprint"):
        rate_curves(TABLE.filter([False] * len(TABLE)))
    with pytest.raises(UserError, match="no finished row has both footprint"):
        rate_curves(TABLE, rate="footprint['no_such']")
    with pytest.raises(UserError, match="no_such"):
        rate_curves(TABLE, error="no_such")


def test_an_opened_sweep_has_the_curves_of_its_finished_rows(tmp_path: Path) -> None:
    class Opened(SweepResults):
        def results(self, columns: Any = None, everything: bool = False) -> pa.Table:
            return TABLE

    opened = Opened(Store.open(str(tmp_path)), "codecs")
    assert (
        opened.rate_curves(rate="footprint['codec_payload_bytes']")
        .to_arrow()
        .equals(rate_curves(TABLE, rate="footprint['codec_payload_bytes']").to_arrow())
    )
