"""Every option of ``fit``, ``frontier`` and ``compare`` does on a sweep what it does on a file with the sweep's rows."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click
import numpy as np
import pyarrow.parquet
import pytest
from click.testing import CliRunner

from isoflop.cli.frontier import frontier_command
from isoflop.cli.laws import compare_command, fit_command
from isoflop.sweep.asking import QUESTIONS

sys.path.append(str(Path(__file__).parents[1] / "dashboards"))
from report_sweeps import law_sweep

COMMANDS = {"fit": fit_command, "frontier": frontier_command, "compare": compare_command}
# an argument for every option; a new option needs one here
GIVEN: dict[str, list[str]] = {
    "y": ["--y", "error*2"],
    "mapping": ["--map", "N=N*2"],
    "objective": ["--objective", "huber"],
    "delta": ["--delta", "0.01", "--objective", "huber"],
    "weights": ["--weights", "N"],
    "where": ["--where", "V > 1"],
    "seed": ["--seed", "3"],
    "store": [],
    "separator": ["--separator", ","],
    "as_json": [],
    "law": ["--law", "semilog"],
    "by": ["--by", "task,method"],
    "cluster": ["--cluster", "model"],
    "bootstrap": ["--bootstrap", "60"],
    "scheme": ["--scheme", "wild"],
    "bounds": ["--bounds", "alpha=0:0.2"],
    "fix": ["--fix", "beta=0.1"],
    "level": ["--level", "0.8"],
    "cost": ["--cost", "N*V"],
    "q": ["--q", "7"],
    "budget": ["--budget", "1e6,2e6"],
    "sizes": ["--sizes", "20000,50000"],
    "tokens": ["--tokens", "2,8"],
    "limits": ["--limits", "V=2:8"],
    "hold": ["--hold", "V=9"],
    "measured": ["--measured"],
    "share": ["--share", "0.3"],
    "within": ["--within", "0.05"],
    "speed_up": ["--speed-up"],
    "forms": ["--forms", "product,c*N**-a*V**-b", "--map", "N=N,V=V"],
    "along": ["--along", "V"],
}
NO_MATTER = {"store", "as_json", "separator"}  # change nothing of a sweep's answer
ELSEWHERE = ("save", "baseline", "versus")  # tests/dashboards/test_files.py, tests/frontier/test_answers.py
CASES = [
    (name, option.name)
    for name, command in COMMANDS.items()
    for option in command.params
    if isinstance(option, click.Option) and option.name not in ELSEWHERE
]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("store")
    opened = law_sweep(folder)
    pyarrow.parquet.write_table(opened.results(), folder / "rows.parquet")
    return folder


def answer(command: str, source: str, store: Path, arguments: list[str]) -> Any:
    base = ["--store", str(store), "--json"]
    law = command != "compare" and not {f"--{q.replace('_', '-')}" for q in QUESTIONS} & set(arguments)
    fast = ["--bootstrap", "40"] if law and "--bootstrap" not in arguments else []
    result = CliRunner().invoke(COMMANDS[command], [source, *base, *fast, *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.mark.parametrize(("command", "option"), CASES)
def test_an_option_works_on_a_sweep(command: str, option: str, store: Path) -> None:
    plain, changed = (answer(command, "lawful", store, a) for a in ([], GIVEN[option]))
    assert (plain == changed) == (option in NO_MATTER)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_sweep_answers_as_its_rows_do(command: str, store: Path) -> None:
    """With everything named that the sweep's YAML would say."""
    named = (
        [] if command == "compare" else ["--by", "task", "--objective", "squared-log", "--fix", "E=0", "--seed", "0"]
    )
    found = [answer(command, source, store, named) for source in ("lawful", str(store / "rows.parquet"))]
    if command == "frontier":  # of one group, a sweep's is the frontier itself
        found[1] = found[1]["groups"][0]
    np.testing.assert_equal(*found)
