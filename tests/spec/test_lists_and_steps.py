"""Knobs that are lists, and knobs with a step: in YAML, spaces, Optuna, job ids, rows, MLflow, the schema and the docs."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import jsonschema
import pytest
import yaml
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

import isoflop
from isoflop.cli.catalog import methods_command
from isoflop.core.errors import UserError
from isoflop.core.hashing import canonical
from isoflop.core.knobs import Knob, KnobSpec, frozen, grid_value
from isoflop.core.yaml_source import parse_yaml
from isoflop.jobs import Job, MethodSpec
from isoflop.methods.base import METHODS
from isoflop.search import STRATEGIES, make_proposer, values_key
from isoflop.search.distributions import chosen, stored
from isoflop.search.proposer import Tell
from isoflop.search.space import Branch, Param, SearchSpace
from isoflop.sweep.resolve import resolve
from isoflop.sweep.resolved import Sweep
from isoflop.sweep.rows import make_row
from isoflop.sweep.schema import sweep_schema
from isoflop.sweep.searching import make_proposer_for
from isoflop.sweep.titles import job_title
from isoflop.track.run_data import _params

OPTUNA = [n for n in STRATEGIES if n not in ("grid", "law")]
SCHEDULES = ((1.0,), (1.0, 0.5), (1.0, 0.5, 0.25))


@pytest.fixture(autouse=True)
def toy_knobs(toy_parts: ModuleType) -> Iterator[None]:
    importlib.import_module("toy_knobs")
    yield
    for name in ("toy-lists", "toy-steps"):
        METHODS._entries.pop(name, None)
    sys.modules.pop("toy_knobs", None)


def spec(method: dict[str, Any] | str, **rest: Any) -> dict[str, Any]:
    methods = [method if isinstance(method, str) else {"toy-lists": method}]
    return {"name": "lists", "models": ["toy/s"], "methods": methods, "tasks": ["toy-task"], **rest}


def steps(method: dict[str, Any], **rest: Any) -> dict[str, Any]:
    return spec("none") | {"methods": [{"toy-steps": method}]} | rest


def points(given_: dict[str, Any], knob: str) -> list[Any]:
    return [config[knob] for config in resolve(given_).space.grid()]


def jobs(sweep: Sweep) -> list[Job]:
    return [job for config in sweep.space.grid() for job in sweep.jobs_of(config)]


# lists in YAML


@pytest.mark.parametrize(
    "written, values",
    [
        ("[1, 2, 2]", [(1, 2, 2)]),
        ("[[1, 2], [3]]", [(1, 2), (3,)]),
        ("{value: [5, 6]}", [(5, 6)]),
        ("{value: []}", [()]),
        ("{values: [[5], [6, 7]]}", [(5,), (6, 7)]),
        ("[[8]]", [(8,)]),
    ],
)
def test_a_list_is_one_value_and_a_list_of_lists_several(written: str, values: list[Any]) -> None:
    widths = parse_yaml(f"widths: {written}").data["widths"]
    assert points(spec({"widths": widths}), "toy-lists.widths") == values


def test_choices_that_are_lists() -> None:
    assert points(spec({"schedule": {}}), "toy-lists.schedule") == list(SCHEDULES)
    assert points(spec({"schedule": [[1, 0.5], [1]]}), "toy-lists.schedule") == [(1.0, 0.5), (1.0,)]
    assert points(spec({"schedule": [1, 0.5]}), "toy-lists.schedule") == [(1.0, 0.5)]


def test_lists_in_zip_exclude_and_when() -> None:
    models, rows = ["toy/s", "toy/m"], [[1, 2], [4]]
    zipped = spec({"schedule": {}}, models=models, zip={"model": models, "toy-lists.widths": rows})
    found = {(c["model"], c["toy-lists.widths"]) for c in resolve(zipped).space.grid()}
    assert found == {("toy/s", (1, 2)), ("toy/m", (4,))}
    one = spec(
        {"widths": rows, "schedule": {}}, exclude={"toy-lists.widths": [1, 2], "toy-lists.schedule": [[1], [1, 0.5]]}
    )
    assert len(points(one, "toy-lists.widths")) == 6 - 2
    when = {"widths": {"values": rows, "when": {"schedule": [1.0, 0.5]}}, "schedule": {}}
    found = {(c["toy-lists.schedule"], c["toy-lists.widths"]) for c in resolve(spec(when)).space.grid()}
    assert found == {((1.0,), (4, 8)), ((1.0, 0.5), (1, 2)), ((1.0, 0.5), (4,)), ((1.0, 0.5, 0.25), (4, 8))}


@pytest.mark.parametrize(
    "knobs, words",
    [
        ({"widths": 4}, ["toy-lists.widths", "widths = 4 must be a list", "list of 1 … 64"]),
        ({"widths": [1, 99]}, ["widths = [1, 99]: 99 is out of range", "list of 1 … 64"]),
        ({"widths": [1, 2.5]}, ["widths = [1, 2.5]: 2.5 must be a whole number"]),
        ({"widths": [[1, 2], 3]}, ["widths = 3 must be a list"]),
        ({"widths": [[1], [1]]}, ["widths", "twice"]),
        ({"widths": {"low": 1, "high": 8}}, ["toy-lists.widths", "widths is a list and has no range"]),
        ({"widths": {}}, ["widths is a list and has no range"]),
        ({"schedule": {"low": 1}}, ["schedule is a list and has no bounds", "[1.0] | [1.0, 0.5]"]),
        ({"schedule": [1.0, 0.4]}, ["schedule = [1.0, 0.4] is not allowed", "did you mean [1.0, 0.5]?", "[1.0, 0.5, 0.25]"]),
        ({"words": [1]}, ["words = [1]: 1 must be text", "list of texts"]),
        ({"widths": [[[1]]]}, ["widths", "list"]),
    ],
)  # fmt: skip
def test_wrong_lists_are_refused_in_one_line(knobs: dict[str, Any], words: list[str], tmp_path: Path) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump(spec(knobs)))
    with pytest.raises(UserError) as caught:
        resolve(path)
    for word in ["sweep.yaml:", *words]:
        assert word in str(caught.value), str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_class_cannot_declare_what_yaml_cannot_hold() -> None:
    from dataclasses import make_dataclass

    from isoflop.core.knobs import knob_specs

    odd = make_dataclass("Odd", [("x", Annotated[tuple[int, str], Knob()], (1, "a"))])
    with pytest.raises(TypeError, match=r"Odd\.x: a knob that is a list is a tuple\[T, \.\.\.\]"):
        knob_specs(odd)


# lists on their way: ids, rows, Optuna

ITEMS = st.one_of(*(st.lists(kind, max_size=4) for kind in (st.integers(-9, 9), st.floats(-1, 1), st.text(max_size=3))))


@given(ITEMS)
def test_a_list_survives_job_row_and_json(value: list[Any]) -> None:
    job = Job("m", (MethodSpec.of("x", {"k": tuple(value), "n": 1}),), "t", 0, 0)
    back = Job.from_dict(json.loads(json.dumps(job.to_dict())))
    assert back == job
    assert hash(back) == hash(job)
    assert back.id == job.id == Job("m", (MethodSpec.of("x", {"k": value, "n": 1}),), "t", 0, 0).id  # type: ignore[dict-item]
    assert canonical(job.to_dict())["methods"][0]["knobs"]["k"] == canonical(value)
    assert job.knobs()["k"] == tuple(value)


@given(st.lists(ITEMS.map(tuple), min_size=1, max_size=5, unique_by=json.dumps))
def test_a_list_survives_optuna(values: list[Any]) -> None:
    param = Param("k", tuple(values))
    for value in values:
        assert isinstance(stored(value), str)
        assert json.dumps(chosen(param, stored(value))) == json.dumps(value)


@pytest.mark.parametrize("sampler", OPTUNA)
def test_every_sampler_proposes_lists_and_learns_of_them_again(sampler: str) -> None:
    space = SearchSpace(("a",), (Branch("m", (Param("m.s", SCHEDULES), Param("m.n", low=1, high=3, integer=True))),))
    first, second = make_proposer(space, sampler, seed=1), make_proposer(space, sampler, seed=1)
    played = []
    for number in range(9):
        (p,) = first.ask(1)
        assert p.config["m.s"] in SCHEDULES
        played.append(p)
        for proposer in (first, second):
            proposer.tell(Tell(p.number, p.config, "complete", (float(number),)))
    assert len({values_key(p.config) for p in played}) == 9
    assert first.ask(1) == second.ask(1) == []


def test_a_sweep_over_lists_runs_is_found_again_and_is_shown(tmp_path: Path) -> None:
    given_ = spec({"widths": [[1, 3], [16, 16]], "schedule": {}}, search={"sampler": "tpe"}, budget={"trials": 6})
    options: dict[str, Any] = {
        "executor": "local",
        "tracking_uri": "none",
        "store": str(tmp_path / "s"),
        "cache_dir": tmp_path / "c",
    }
    opened = isoflop.run(given_, **options)
    assert (opened.summary.ok, opened.summary.failed) == (6, 0)
    knobs = [json.loads(text) for text in opened.results(["knobs"])["knobs"].to_pylist()]
    assert {json.dumps(k["widths"]) for k in knobs} == {"[1, 3]", "[16, 16]"}
    assert isoflop.run(given_, **options).summary.ran == 0
    assert set(opened.results(["V"])["V"].to_pylist()) == {2.0, 16.0}


def test_lists_in_rows_and_mlflow_are_json_text() -> None:
    from isoflop.jobs import Outcome

    (job,) = jobs(resolve(spec({"widths": [1, 2], "words": ["a", "b"]})))
    row = make_row("lists", 0, job, Outcome("ok", started=1.0), 1)
    assert json.loads(row["knobs"]) == {"schedule": [1.0], "widths": [1, 2], "words": ["a", "b"]}
    params = _params(row)
    assert (params["widths"], params["words"]) == ("[1, 2]", '["a", "b"]')
    assert "widths=[1, 2]" in job_title(job)


def test_law_search_over_a_space_with_lists() -> None:
    given_ = spec(
        {"widths": [[1, 1], [8, 8], [64, 64]], "schedule": {}},
        models=["toy/s", "toy/m", "toy/l", "toy/xl"],
        search={"sampler": "law", "target": {"kind": "exponents"}, "axes": {"N": "N"}, "laws": ["E + A*N**-alpha"]},
        budget={"trials": 12},
    )
    sweep = resolve(given_)
    proposer = make_proposer_for(sweep)
    proposals = []
    for number in range(8):
        (p,) = proposer.ask(1)
        assert sweep.space.contains(p.config)
        proposals.append(p)
        proposer.tell(Tell(p.number, p.config, "complete", (0.5 - 0.01 * number,), attributes={"flops": 1.0}))
    heir = make_proposer_for(sweep)
    for number, p in enumerate(proposals):
        heir.tell(Tell(p.number, p.config, "complete", (0.5 - 0.01 * number,), attributes={"flops": 1.0}))
    assert heir.ask(1)


# schema and docs


def test_the_schema_takes_lists_as_the_plan_does() -> None:
    schema = sweep_schema()
    for good in ([1, 2], [[1, 2], [3]], {"value": [4]}, {"values": [[4], [5]]}):
        jsonschema.validate(spec({"widths": good}), schema)
    for wrong in (4, [1, 99], {"low": 1}, [["a"]]):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(spec({"widths": wrong}), schema)
    jsonschema.validate(spec({"schedule": [1.0, 0.5]}), schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(spec({"schedule": [1.0, 0.4]}), schema)


def test_the_docs_say_what_a_list_may_hold() -> None:
    told = json.loads(CliRunner().invoke(methods_command, ["toy-lists", "--json"]).output)
    found = {k["name"]: (k["type"], k["default"], k["allowed"]) for k in told["knobs"]}
    assert found["widths"] == ("list of int", [4, 8], "list of 1 … 64")
    assert found["schedule"][2] == "[1.0] | [1.0, 0.5] | [1.0, 0.5, 0.25]"
    assert found["words"] == ("list of str", [], "list of texts")
    assert "toy-lists" in CliRunner().invoke(methods_command, ["--knobs"]).output


# steps


@pytest.mark.parametrize(
    "knobs, words",
    [
        ({"heads": 5}, ["toy-steps.heads", "heads = 5 lies between the steps", "2 … 14 (step 4)", "nearest: 2 and 6"]),
        ({"heads": [2, 7]}, ["heads = 7", "nearest: 6 and 10"]),
        ({"heads": 15}, ["heads = 15 is out of range", "2 … 14 (step 4)"]),
        ({"rate": 0.25}, ["rate = 0.25 lies between the steps", "nearest: 0.2 and 0.3"]),
        ({"gains": [0.25, 0.3]}, ["gains = [0.25, 0.3]: 0.3 lies between the steps", "nearest: 0.25 and 0.5"]),
        ({"heads": {"low": 3, "high": 10}}, ["toy-steps.heads", "heads = 3", "nearest: 2 and 6"]),
        ({"heads": {"low": 2, "high": 10, "step": 6}}, ["step 6 of heads is no multiple", "nearest: 8"]),
        ({"rate": {"step": 0.05}}, ["step 0.05 of rate is no multiple", "nearest: 0.1"]),
        ({"heads": {"log": True}}, ["heads has steps of 4", "cannot be log"]),
        ({"heads": {"low": 6, "high": 99}}, ["heads", "6 to 99", "2 … 14"]),
        ({"heads": {"low": 10, "high": 9}}, ["heads", "low 10 is above high 9"]),
    ],
)
def test_what_lies_off_the_grid_is_refused_with_the_nearest(
    knobs: dict[str, Any], words: list[str], tmp_path: Path
) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump(steps(knobs)))
    with pytest.raises(UserError) as caught:
        resolve(path)
    for word in ["sweep.yaml:", *words]:
        assert word in str(caught.value), str(caught.value)


@pytest.mark.parametrize(
    "knobs, knob, values",
    [
        ({"heads": {}}, "heads", [2, 6, 10, 14]),
        ({"heads": {"low": 6, "high": 13}}, "heads", [6, 10]),
        ({"heads": {"step": 8}}, "heads", [2, 10]),
        ({"rate": {"low": 0.2, "high": 0.7, "step": 0.2}}, "rate", [0.2, 0.4, 0.6]),
        ({"rate": {}}, "rate", [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]),
        ({"rate": 0.30000000000000004}, "rate", [0.3]),
        ({"gains": [0, 0.25, 1]}, "gains", [(0.0, 0.25, 1.0)]),
    ],
)
def test_ranges_over_steps_hold_values_of_the_grid(knobs: dict[str, Any], knob: str, values: list[Any]) -> None:
    assert points(steps(knobs), f"toy-steps.{knob}") == values


@pytest.mark.parametrize("sampler", [*OPTUNA, "grid"])
def test_what_a_sampler_proposes_is_what_the_job_says(sampler: str) -> None:
    """One spelling of .3, whoever draws it: else a resumed sweep would take its own trials for others."""
    budget = {} if sampler == "grid" else {"budget": {"trials": 30}}
    sweep = resolve(steps({"heads": {}, "rate": {}}, search={"sampler": sampler}, **budget))
    proposer = make_proposer_for(sweep)
    count = 12 if sampler == "gp" else 30
    for number in range(count):
        (p,) = proposer.ask(1)
        assert p.config["toy-steps.rate"] in [n / 10 for n in range(1, 10)]
        assert p.config["toy-steps.heads"] in (2, 6, 10, 14)
        (job,) = sweep.jobs_of(p.config)
        assert sweep.config_of(job) == p.config
        assert sweep.job_now(job) == job
        proposer.tell(Tell(p.number, p.config, "complete", (float(number),)))


GRIDS = st.tuples(st.integers(-50, 50), st.integers(1, 400), st.integers(0, 3), st.integers(0, 60))


@given(GRIDS, st.integers(-70, 70))
def test_values_on_a_grid_pass_in_their_decimals_and_others_do_not(
    grid: tuple[int, int, int, int], steps_: int
) -> None:
    """Low end and step of up to three decimals; however a value is summed up, it is taken for the decimal that it means."""
    start, width, decimals, count = grid
    low, step = start / 10**decimals, width / 10**decimals
    high = grid_value(low, step, count, False)
    one = KnobSpec("k", float, 0.0, Knob(low=low, high=high, step=step))
    n = max(0, min(count, steps_))
    written = float(f"{(start + n * width) / 10**decimals:.{decimals}f}")
    for value in (written, low + n * step, sum([step] * n, low), high - (count - n) * step):
        if low <= value <= high:
            assert one.check(value) == written
    assert one.check(one.check(written)) == written
    between = low + (n + 0.5) * step
    if between < high:
        with pytest.raises(UserError, match="lies between the steps") as caught:
            one.check(between)
        nearest = [float(v) for v in str(caught.value).rsplit("nearest: ", 1)[1].split(" and ")]
        assert nearest == [one.grid_value(n), one.grid_value(n + 1)]
        assert all(one.check(v) == v for v in nearest)


@given(st.integers(-20, 20), st.integers(1, 9), st.integers(0, 200))
def test_whole_numbers_stay_whole(low: int, step: int, value: int) -> None:
    one = KnobSpec("k", int, 0, Knob(low=low, high=300, step=step))
    if (value - low) % step == 0 and value >= low:
        assert one.check(value) == value
        assert type(one.check(float(value))) is int
    else:
        with pytest.raises(UserError):
            one.check(value)


@given(st.recursive(st.integers(), lambda inner: st.lists(inner, max_size=3), max_leaves=6))
def test_frozen_values_can_be_hashed_and_are_the_same_json(value: Any) -> None:
    hash(frozen(value))
    assert json.dumps(frozen(value)) == json.dumps(value)


def test_words_have_no_bounds(tmp_path: Path) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text(
        "name: words\nmodels: [tiny-llava/d24]\nmethods:\n  - quecc: {text_source: {low: 1, high: 2}}\ntasks: [reading]\n"
    )
    with pytest.raises(
        UserError, match=r"sweep.yaml:4: .*text_source is one of several words and has no bounds; allowed"
    ):
        resolve(path)
