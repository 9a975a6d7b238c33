"""TPE that remembers proposes what Optuna's proposes; a search process may die at any time; its driver, too."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import optuna
import pytest
from helpers import run_local, toy
from test_proposers import CONDITIONAL, ENDLESS, error

from isoflop.search import Proposer, SearchSpace, Tell, make_proposer, values_key
from isoflop.search.process import ProposerProcess
from isoflop.search.tpe import RememberingTPESampler, UnconstrainedStorage

pytestmark = pytest.mark.usefixtures("toy_parts")


def proposals(sampler: optuna.samplers.BaseSampler, storage: Any, objectives: int) -> list[dict[str, Any]]:
    """A search over a conditional space with running, failed and pruned trials."""
    study = optuna.create_study(sampler=sampler, storage=storage, directions=["minimize"] * objectives)
    found, running = [], []
    for index in range(80):
        trial = study.ask()
        kind = trial.suggest_categorical("kind", ["a", "b", "c"])
        x = trial.suggest_float("x", 1e-3, 1.0, log=True)
        n = trial.suggest_int("n", 1, 9) if kind == "a" else 0
        found.append(trial.params)
        running.append((trial, index, x + n + len(kind)))
        if len(running) < 4:
            continue
        done, number, value = running.pop(0)
        if number % 7 == 3:
            study.tell(done, state=optuna.trial.TrialState.FAIL)
        elif number % 7 == 5 and objectives == 1:
            done.report(value, 1)
            study.tell(done, state=optuna.trial.TrialState.PRUNED)
        else:
            study.tell(done, [value, -value][:objectives])
    return found


@pytest.mark.parametrize("objectives", [1, 2])
@pytest.mark.parametrize("options", [{}, {"multivariate": True, "group": True}, {"multivariate": False}])
def test_tpe_that_remembers_proposes_what_optunas_own_proposes(objectives: int, options: dict[str, Any]) -> None:
    own = proposals(optuna.samplers.TPESampler(seed=4, **options), None, objectives)
    assert proposals(RememberingTPESampler(seed=4, **options), UnconstrainedStorage(), objectives) == own


def test_random_search_without_a_study_draws_the_same_points() -> None:
    with_study = make_proposer(CONDITIONAL, "random", "median", seed=5).ask(12)
    assert make_proposer(CONDITIONAL, "random", seed=5).ask(12) == with_study


def make(space: SearchSpace, sampler: str = "tpe") -> ProposerProcess:
    made = make_proposer(space, sampler, seed=2, apart=True)
    assert isinstance(made, ProposerProcess)
    return made


def play(proposer: Proposer, count: int, seconds: float = 120) -> list[tuple[int, str]]:
    """Ask and tell until ``count`` trials or the end."""
    out: list[tuple[int, str]] = []
    deadline = time.monotonic() + seconds
    while len(out) < count:
        assert time.monotonic() < deadline
        found = proposer.ask(min(4, count - len(out)))
        if not found and not proposer.pending:
            return out
        if not found:
            proposer.wait(1.0)
        for p in found:
            out.append((p.number, values_key(p.config)))
            proposer.tell(Tell(p.number, p.config, "complete", (error(p.config),)))
    return out


def test_a_search_process_uses_a_space_up_without_doubles() -> None:
    proposer = make(CONDITIONAL)
    assert proposer.pid is None  # nothing is started for a sweep that is finished
    proposer.reserve(0, next(CONDITIONAL.grid()))
    found = play(proposer, 1000)
    proposer.close()
    size = CONDITIONAL.size()
    assert size is not None
    assert sorted(n for n, _ in found) == list(range(1, size))
    assert len({key for _, key in found}) == size - 1


def test_what_a_search_process_was_told_it_learns() -> None:
    """TPE is random until it has seen some trials; told of a clear optimum it goes there."""
    proposer = make(ENDLESS)
    for number, proposal in enumerate(make_proposer(ENDLESS, "random", seed=7).ask(60)):
        value = abs(float(proposal.config["m.x"]) - 0.2)
        proposer.tell(Tell(number, proposal.config, "complete", (value,)))
    found = []
    while len(found) < 10:
        proposer.wait(5.0)
        found += proposer.ask(10 - len(found))
    proposer.close()
    assert sum(float(p.config["m.x"]) < 0.6 for p in found) >= 8


@pytest.mark.parametrize("kills", [1, 3])
def test_when_the_search_process_dies_the_driver_goes_on(kills: int) -> None:
    proposer = make(CONDITIONAL)
    first = play(proposer, 3 * kills)
    assert proposer.pid is not None
    os.kill(proposer.pid, signal.SIGKILL)
    rest = play(proposer, 1000)
    proposer.close()
    size = CONDITIONAL.size()
    assert size is not None
    assert sorted(n for n, _ in first + rest) == list(range(size))
    assert len({key for _, key in first + rest}) == size


def test_when_the_driver_dies_the_search_process_ends() -> None:
    code = """
import os, time
from isoflop.search import Branch, Param, SearchSpace, make_proposer
proposer = make_proposer(SearchSpace(("a",), (Branch("m", (Param("m.x", low=0.0, high=1.0),)),)), "tpe", apart=True)
while not proposer.ask(1):
    proposer.wait(1.0)
print(proposer.pid, flush=True)
os.kill(os.getpid(), 9)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    pid = int(done.stdout)
    deadline = time.monotonic() + 60
    while _runs(pid):
        assert time.monotonic() < deadline, "the search process outlives its driver"
        time.sleep(0.1)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("sampler", ["tpe", "nsga2"])
def test_a_sweep_with_its_search_in_a_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sampler: str) -> None:
    from isoflop.sweep import api

    original = api.make_proposer_for
    monkeypatch.setattr(api, "make_proposer_for", lambda sweep, apart=False: original(sweep, apart=True))
    spec = toy(search={"sampler": sampler})
    opened = run_local(spec, tmp_path)
    rows = opened.results().to_pylist()
    assert opened.summary.ok == len(rows) == len({r["job_id"] for r in rows}) == 12
    assert run_local(spec, tmp_path).summary.ran == 0
