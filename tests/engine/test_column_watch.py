"""Metrics that no row has are named as soon as that can be known, in one line with the nearest right name."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from helpers import Lines, run_local, toy

from isoflop.core.errors import UserError

pytestmark = pytest.mark.usefixtures("toy_parts")


def told(tmp_path: Path, **changes: Any) -> tuple[list[str], list[str]]:
    """(lines about columns, all lines) of a run."""
    progress = Lines()
    with suppress(UserError):
        run_local(toy(**changes), tmp_path, progress)
    return [line for line in progress.lines if " so far has " in line], progress.lines


def test_a_law_on_a_metric_that_no_task_reports(tmp_path: Path) -> None:
    laws = [{"law": "product", "y": "metrics.los", "x": {"V": "footprint.visual_tokens"}, "bootstrap": 0}]
    slow = [{"toy-task": {"seconds": 0.1}}, {"toy-other": {"seconds": 0.1}}]  # rows are looked at a few times a second
    lines, everything = told(tmp_path, laws=laws, tasks=slow)
    assert len(lines) == 1
    assert "laws[0].y" in lines[0]
    assert "no row so far has 'metrics.los' (did you mean 'metrics.loss'?)" in lines[0]
    said = everything.index(lines[0])
    assert sum(" ok on " in line for line in everything[:said]) < 12  # not only at the end


def test_an_objective_that_no_row_has(tmp_path: Path) -> None:
    lines, _ = told(tmp_path, objectives=[{"metric": "flop"}])
    assert len(lines) == 1
    assert "objectives[0].metric" in lines[0]
    assert "'flop' (did you mean 'flops'?)" in lines[0]


def test_what_rows_have_is_not_spoken_of(tmp_path: Path) -> None:
    laws = [{"law": "product", "y": "metrics.loss/2", "x": {"V": "footprint.visual_tokens"}, "bootstrap": 0}]
    lines, _ = told(tmp_path, laws=laws, objectives=[{"metric": "loss"}, {"metric": "text_tokens"}])
    assert lines == []


def test_what_one_method_alone_reports_is_there(tmp_path: Path) -> None:
    """Nothing is said before every method and task has a row."""
    methods = ["toy-full", {"toy-tokens": {"tokens": [1, 4]}}]
    lines, everything = told(tmp_path, methods=methods, objectives=[{"metric": "nothing"}])
    assert len(lines) == 1
    before = everything[: everything.index(lines[0])]
    for method in ("toy-full", "toy-tokens"):
        for task in ("toy-task", "toy-other"):
            assert any(method in line and task in line for line in before)
