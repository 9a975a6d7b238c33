"""The registry of strategies: one that somebody else wrote runs a sweep, and options are checked before anything runs."""

from __future__ import annotations

import inspect
import json
import pickle
import sys
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from helpers import run_local, toy

from isoflop.cli.catalog import samplers_command
from isoflop.cli.show import show_command
from isoflop.core.errors import UserError
from isoflop.core.knobs import knob_specs
from isoflop.core.registry import Registry
from isoflop.search import STRATEGIES, Problem, SearchSpace, Strategy
from isoflop.search.pruners import PRUNERS
from isoflop.search.space import Branch, Param
from isoflop.search.strategies import OptunaStrategy
from isoflop.sweep.resolve import resolve

pytestmark = pytest.mark.usefixtures("toy_parts")

SOURCE = '''
"""A strategy of somebody else."""

import json
from dataclasses import dataclass
from typing import Annotated

from isoflop.core.errors import UserError
from isoflop.core.knobs import Knob
from isoflop.search import STRATEGIES, Proposal, Proposer, Strategy, values_key


class Backwards(Proposer):
    def __init__(self, space, stride):
        self.points = list(space.grid())[::-stride]
        self.known, self.number, self.told = set(), 0, 0

    def ask(self, count):
        fresh = [p for p in self.points if values_key(p) not in self.known][:count]
        out = []
        for config in fresh:
            self.known.add(values_key(config))
            out.append(Proposal(self.number, config))
            self.number += 1
        return out

    def tell(self, result):
        self.told += 1
        self.measured = result.attributes
        self.reserve(result.number, result.config)

    def reserve(self, number, config):
        self.known.add(values_key(config))
        self.number = max(self.number, number + 1)


@STRATEGIES.register("toy-backwards")
@dataclass(frozen=True)
class ToyBackwards(Strategy):
    """The grid, last point first."""

    eager = True
    measures = True
    stride: Annotated[int, Knob(low=1, high=9, doc="every how many")] = 1

    def check(self, problem):
        if len(problem.space.models) > 2:
            raise UserError(f"{problem.where('sampler')}: toy-backwards cannot count to {len(problem.space.models)}")

    def make(self, problem):
        return Backwards(problem.space, self.stride)

    def keep(self, proposer, shelf):
        sessions = json.loads(shelf.read("toy_sessions.json") or b"0") + 1
        shelf.write("toy_sessions.json", json.dumps(sessions).encode())
        proposer.sessions = sessions

    def findings(self, proposer, problem):
        return {"told": proposer.told, "sessions": proposer.sessions, "flops": proposer.measured["flops"]}
'''


@pytest.fixture
def toy_strategy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of a module that registers ``toy-backwards``; forgotten afterwards."""
    STRATEGIES.names()
    (tmp_path / "toy_strategy.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "toy_strategy"
    sys.modules.pop("toy_strategy", None)
    STRATEGIES._entries.pop("toy-backwards", None)


def backwards(module: str, **options: Any) -> dict[str, Any]:
    return toy(**{"import": ["toy_parts", module], "search": {"sampler": "toy-backwards", "options": options}})


def test_a_strategy_of_somebody_else_runs_a_sweep(toy_strategy: str, tmp_path: Path) -> None:
    opened = run_local(backwards(toy_strategy, stride=2), tmp_path)
    assert opened.summary.ok == 3 * 2  # every other point of six, on two tasks
    table = opened.results(["trial_number", "model", "V"]).to_pylist()
    proposed = {r["trial_number"]: (r["model"], r["V"]) for r in table}
    assert [proposed[n] for n in range(3)] == [("toy/m", 16.0), ("toy/m", 1.0), ("toy/s", 4.0)]

    again = run_local(backwards(toy_strategy, stride=1), tmp_path)
    assert (again.summary.cached, again.summary.ok) == (6, 6)
    found = again.search_findings()
    assert (found["told"], found["sessions"]) == (6, 2)
    assert found["flops"] > 0
    shown = CliRunner().invoke(show_command, ["toy", "--store", str(tmp_path / "store")]).output
    assert "told: 6" in shown
    asked = ["toy", "--store", str(tmp_path / "store"), "--json"]
    assert json.loads(CliRunner().invoke(show_command, asked).output)["toy-backwards_search"]["told"] == 6


def test_what_it_found_is_shown_where_it_is_not_registered(toy_strategy: str, tmp_path: Path) -> None:
    run_local(backwards(toy_strategy), tmp_path)
    STRATEGIES._entries.pop("toy-backwards")
    shown = CliRunner().invoke(show_command, ["toy", "--store", str(tmp_path / "store")])
    assert "told: 6" in shown.output


def test_its_options_and_its_own_check_are_heard_before_anything_runs(toy_strategy: str) -> None:
    with pytest.raises(UserError, match=r"search\.options\.stride: stride = 10 is out of range; allowed: 1 … 9"):
        resolve(backwards(toy_strategy, stride=10))
    with pytest.raises(UserError, match=r"search\.sampler: toy-backwards cannot count to 3"):
        resolve({**backwards(toy_strategy), "models": ["toy/s", "toy/m", "toy/l"]})


def test_a_package_declares_one_by_an_entry_point(toy_strategy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    point = EntryPoint("toy-backwards", "toy_strategy:ToyBackwards", "isoflop.strategies")
    monkeypatch.setattr("isoflop.core.registry.entry_points", lambda group: [point] if group == point.group else [])
    fresh: Registry[type[Strategy]] = Registry("sampler", (), "isoflop.strategies")
    assert fresh.get("toy-backwards").name == "toy-backwards"


@pytest.mark.parametrize(
    "search, words",
    [
        ({"sampler": "tpe", "options": {"gamma": 0.25}}, ["search.options.gamma", "0.25", "n_startup_trials"]),
        ({"sampler": "tpe", "options": {"n_startup_trials": "many"}}, ["n_startup_trials = 'many'", "whole number"]),
        ({"sampler": "tpe", "options": {"n_startup_trials": 2.5}}, ["n_startup_trials = 2.5", "whole number"]),
        ({"sampler": "tpe", "options": {"n_ei_candidates": 0}}, ["n_ei_candidates = 0", "1 … ∞"]),
        ({"sampler": "tpe", "options": {"multivariate": False, "group": True}}, ["search.options: tpe", "group"]),
        ({"sampler": "gp", "options": {"deterministic_objective": 1}}, ["= 1", "true or false"]),
        ({"sampler": "qmc", "options": {"qmc_type": "soboll"}}, ["'soboll'", "did you mean 'sobol'", "halton"]),
        ({"sampler": "nsga2", "options": {"crossover_prob": 1.5}}, ["crossover_prob = 1.5", "0 … 1"]),
        ({"sampler": "nsga2", "options": {"mutation": "uniform"}}, ["search.options.mutation", "'uniform'"]),
        ({"sampler": "cmaes", "options": {"popsiz": 4}}, ["'popsiz'", "did you mean 'popsize'"]),
        ({"sampler": "random", "options": {"seed": 3}}, ["random takes no options", "seed"]),
        ({"sampler": "tpe", "options": {"seed": 3}}, ["search.options.seed", "n_startup_trials"]),
        ({"pruner": "hyperband", "pruner_options": {"reduction_factor": 1}}, ["reduction_factor = 1", "2 … ∞"]),
        ({"pruner": "wilcoxon", "pruner_options": {"p_threshold": "low"}}, ["search.pruner_options.p_threshold", "'low'"]),
        ({"pruner_options": {"p_threshold": 0.1}}, ["search.pruner_options", "none takes no options", "p_threshold"]),
        ({"sampler": "tpe", "share": "exponents"}, ["search.share: only 'sampler: law' takes it", "'tpe'"]),
    ],
)  # fmt: skip
def test_wrong_options_are_refused_in_one_line(search: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        resolve(toy(search=search))
    for word in words:
        assert word in str(caught.value), str(caught.value)
    assert "\n" not in str(caught.value)


def test_one_objective_for_cmaes() -> None:
    with pytest.raises(UserError, match=r"search\.sampler: cmaes takes a single objective; use .*nsga2"):
        resolve(toy(search={"sampler": "cmaes"}, objectives=[{"metric": "error"}, {"metric": "flops"}]))


def test_options_reach_optuna_and_what_it_takes_anyway_may_be_said() -> None:
    sampler = STRATEGIES.get("tpe").of({"n_startup_trials": 3, "multivariate": None, "constant_liar": True}).build(0)
    assert sampler._n_startup_trials == 3
    assert sampler._n_ei_candidates == 24
    resolve(toy(search={"pruner": "hyperband", "pruner_options": {"max_resource": "auto", "min_resource": 2}}))


OPTUNA = [n for n in STRATEGIES if issubclass(STRATEGIES.get(n), OptunaStrategy)]


@pytest.mark.parametrize("owner", [*OPTUNA, *(p for p in PRUNERS if p != "none")])
def test_options_are_those_of_the_installed_optuna(owner: str) -> None:
    """Name by name, with the same default."""
    cls: Any = STRATEGIES.get(owner) if owner in OPTUNA else PRUNERS[owner]
    engine = cls.sampler if owner in OPTUNA else cls.pruner
    parameters = inspect.signature(engine).parameters
    optional = {
        "prior_weight",
        "consider_magic_clip",
        "consider_endpoints",
    }  # None: deprecated, with these defaults inside
    for name, spec in knob_specs(cls).items():
        default = parameters[name].default
        assert spec.default == default or name in optional or default == "auto"
        assert spec.knob.doc


@pytest.mark.parametrize("name", STRATEGIES.names())
def test_a_strategy_survives_a_pickle_and_documents_itself(name: str) -> None:
    strategy = STRATEGIES.get(name).of({})
    assert pickle.loads(pickle.dumps(strategy)) == strategy
    told = json.loads(CliRunner().invoke(samplers_command, [name, "--json"]).output)
    assert told["doc"]
    listed = json.loads(CliRunner().invoke(samplers_command, ["--json"]).output)
    assert next(e for e in listed if e["name"] == name)["eager"] == strategy.eager


@pytest.mark.parametrize("name", OPTUNA)
def test_only_a_dear_one_thinks_in_a_process_of_its_own(name: str) -> None:
    from isoflop.search.process import ProposerProcess

    space = SearchSpace(("a",), (Branch("m", (Param("m.x", low=0.0, high=1.0),)),))
    strategy = STRATEGIES.get(name).of({})
    apart = isinstance(strategy.make(Problem(space, apart=True)), ProposerProcess)
    assert apart == strategy.dear
    assert not isinstance(strategy.make(Problem(space, apart=True, pruner="median")), ProposerProcess)
