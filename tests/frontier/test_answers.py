"""Questions to rows: a sweep's and a plain table's, what is undecided, what is refused, and one definition for both."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

import isoflop
from isoflop.cli.frontier import frontier_command
from isoflop.core.errors import UserError
from isoflop.frontier.answers import Answer, Answers
from isoflop.sweep.outside import as_rows

sys.path.append(str(Path(__file__).parents[1] / "dashboards"))
from report_sweeps import methods_sweep

ERRORS = {"none": 0.20, "snap 0.5": 0.21, "snap 0.25": 0.30, "rand 0.5": 0.40, "rand 0.25": 0.60}


def table(examples: int = 200, **shift: float) -> dict[str, list[Any]]:
    """A plain table, a row per example: three methods, on one task of one model."""
    rng = np.random.default_rng(3)
    hard = rng.random(examples)
    out: dict[str, list[Any]] = {k: [] for k in ("method", "knob.keep", "kv_bytes", "flops", "example", "error")}
    for name, error in ERRORS.items():
        method, _, keep = name.partition(" ")
        share = float(keep or 1)
        mixed = np.where(rng.random(examples) < 0.9, hard, rng.random(examples))
        out["method"] += [method] * examples
        out["knob.keep"] += [share if keep else None] * examples
        out["kv_bytes"] += [1000 * share] * examples
        out["flops"] += [2e9 * (0.5 + share / 2)] * examples
        out["example"] += [f"q{i}" for i in range(examples)]
        out["error"] += (mixed < error + shift.get(method, 0)).astype(float).tolist()
    return out


def one(found: Answers) -> Answer:
    (answer,) = found
    return answer


def test_what_is_best_at_half_the_bytes() -> None:
    answer = one(isoflop.answers(table(), share=0.5, cost="kv_bytes"))
    assert answer.values["configuration"] == "snap keep 0.5"
    assert answer.values["probability"] > 0.95
    assert answer.values["cost"] == 0.5
    assert "at half the bytes of the KV cache: snap keep 0.5" in answer.sentence
    assert "over 200 paired examples" in answer.sentence
    assert [c["configuration"] for c in answer.candidates][:2] == ["snap keep 0.5", "snap keep 0.25"]


def test_shares_of_what_is_compressed_need_no_bytes() -> None:
    rows = {
        "method": ["none", "snap", "snap"],
        "ratio": [1.0, 2.0, 16.0],
        "error": [0.1, 0.2, 0.5],
        "knob.keep": [1.0, 0.5, 0.0625],
    }
    half, sixteenth = isoflop.answers(rows, share=[0.5, 0.0625], cost="1/ratio")
    assert "at half of what is compressed: snap keep 0.5, at 0.5 of it, error 0.2" in half.sentence
    assert "at a sixteenth of what is compressed: snap keep 0.0625, at 0.0625 of it" in sixteenth.sentence


def test_how_far_one_may_compress_and_what_that_saves() -> None:
    far, near = (one(isoflop.answers(table(1000), within=m, cost="kv_bytes")) for m in (0.2, 0.06))
    assert far.values["configuration"] == "snap keep 0.25"
    assert far.values["ratio"] == 4
    assert near.values["configuration"] == "snap keep 0.5"
    assert "largest ratio within 0.06 of the uncompressed error" in near.sentence
    assert "95 % sure" in near.sentence
    _, rand, snap = isoflop.answers(table(), within=0.05, speed_up=True, cost="kv_bytes")
    assert snap.values["low"] <= snap.values["speed_up"] <= snap.values["high"]
    assert snap.values["speed_up"] > 2 > rand.values["speed_up"] >= 1
    versus = one(isoflop.answers(table(), speed_up=True, versus="rand", cost="kv_bytes"))
    assert (versus.values["method"], versus.values["versus"]) == ("snap", "rand")


def test_costs_have_their_own_answers() -> None:
    """A share of FLOPs is another than one of bytes; an absolute budget names its unit."""
    flops = one(isoflop.answers(table(), share=0.7, cost="flops"))
    assert flops.values["configuration"] == "snap keep 0.25"
    budget = one(isoflop.answers(table(), budget=1.6e9))
    assert budget.values["configuration"] == "snap keep 0.5"
    assert "at 1.6 GFLOPs" in budget.sentence
    formula = one(isoflop.answers(table(), budget=600, cost="kv_bytes + 1"))
    assert formula.values["cost"] == 501


# what cannot be known


def test_one_row_each_is_an_answer_without_a_probability() -> None:
    rows = {"method": ["none", "a", "b"], "error": [0.1, 0.2, 0.3], "bytes": [100.0, 50, 50]}
    best, ratio, *speed = isoflop.answers(rows, share=0.5, within=0.15, speed_up=True)
    assert best.values["configuration"] == "a"
    assert best.values["probability"] is None
    assert "how sure is unknown: there is one row per configuration" in best.sentence
    assert ratio.values["ratio"] is None
    assert "how sure is unknown" in ratio.sentence
    for answer in speed:
        assert answer.values["low"] is answer.values["high"] is None
        assert "its interval is unknown" in answer.sentence


def test_without_an_uncompressed_run_what_needs_it_is_unknown() -> None:
    rows = {
        k: [v for v, m in zip(values, table()["method"], strict=True) if m != "none"] for k, values in table().items()
    }
    found = isoflop.answers(rows, share=0.5, within=0.1, speed_up=True, cost="kv_bytes")
    assert len(found) == 3
    assert all("no uncompressed run" in a.sentence and a.unknown for a in found)
    assert one(isoflop.answers(rows, budget=500, cost="kv_bytes")).values["configuration"] == "snap keep 0.5"
    own = {**table(), "method": [m.replace("none", "whole") for m in table()["method"]]}  # somebody's own word for it
    named = isoflop.answers(own, share=0.5, cost="kv_bytes", baseline="whole")
    assert one(named).values["method"] == "snap"


def test_a_single_configuration_and_a_tie() -> None:
    alone = one(isoflop.answers({"method": ["none"], "error": [0.1], "flops": [1.0]}, budget=2.0))
    assert "nothing else was measured" in alone.sentence
    assert alone.values["probability"] is None
    tied = table()
    scores = np.array(tied["error"]).reshape(5, -1)
    scores[3] = scores[1]
    answer = one(isoflop.answers({**tied, "error": scores.ravel().tolist()}, share=0.5, cost="kv_bytes"))
    assert answer.values["probability"] == pytest.approx(0.5, abs=0.05)
    assert any("its error is also that of" in note for note in answer.notes)


def test_nan_rows_are_left_out_and_counted() -> None:
    rows = {
        "method": ["none", "none", "a", "a"],
        "repeat": [0, 1, 0, 1],
        "error": [0.1, 0.2, float("nan"), 0.3],
        "bytes": [2.0, 2, 1, 1],
    }
    found = isoflop.answers(rows, share=0.5)
    assert "1 of 4 rows are left out" in found.notes[0]
    assert one(found).values["error"] == 0.3


def test_tasks_and_models_are_answered_apart_and_a_budget_by_all_models() -> None:
    first, second = table(), table(snap=0.3)
    rows = {k: first[k] + second[k] + first[k] for k in first}
    n = len(first["error"])
    rows["model"] = ["small"] * 2 * n + ["large"] * n
    rows["task"] = ["t"] * n + ["u"] * n + ["t"] * n
    rows["kv_bytes"] = rows["kv_bytes"][: 2 * n] + [4 * b for b in first["kv_bytes"]]
    shares = isoflop.answers(rows, share=0.5, cost="kv_bytes")
    assert [a.key for a in shares] == [
        {"task": "t", "model": "small"}, {"task": "t", "model": "large"}, {"task": "u", "model": "small"}
    ]  # fmt: skip
    assert shares[2].values["method"] == "rand"
    budgets = list(isoflop.answers(rows, budget=1000, cost="kv_bytes"))
    assert [a.key for a in budgets] == [{"task": "t"}, {"task": "u", "model": "small"}]
    assert "on small" in budgets[0].sentence or "on large" in budgets[0].sentence


def test_methods_that_compress_different_things_need_a_cost() -> None:
    rows = {"method": ["none", "snapkv", "rtn"], "ratio": [1.0, 2, 2], "error": [0.1, 0.2, 0.2], "bytes": [4.0, 3, 2]}
    with pytest.raises(UserError, match=r"compress different things .*name a cost that all have: bytes"):
        isoflop.answers(rows, share=0.5)
    assert one(isoflop.answers(rows, share=0.5, cost="bytes")).values["method"] == "rtn"


# what is refused


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"share": 0}, "share = 0; allowed: above 0, up to 1"),
        ({"share": float("nan")}, "share = nan"),
        ({"budget": -1.0}, "budget = -1; allowed"),
        ({"budget": 1.0, "cost": "kv_bytes"}, "budget = 1 is below the cheapest configuration, which costs 250"),
        ({"within": -0.1}, "within = -0.1; allowed"),
        ({"level": 1.0}, "level = 1; allowed"),
        ({"share": 0.5, "cost": "flps"}, "unknown cost 'flps' .did you mean 'flops'"),
        ({"share": 0.5}, "how much is compressed is not known; name a cost: flops, kv_bytes"),
        ({"versus": "snip", "cost": "flops"}, "unknown method to compare with 'snip' .did you mean 'snap'"),
        ({"share": 0.5, "baseline": "nane"}, "unknown baseline 'nane' .did you mean 'none'"),
        ({"share": 0.5, "map": {"methd": "x"}}, "unknown name in map 'methd' .did you mean 'method'"),
        ({"share": 0.5, "map": {"task": "tsk"}}, "unknown column 'tsk'"),
        ({"share": 0.5, "y": "eror"}, "unknown column 'eror'"),
        ({"share": 0.5, "where": "false"}, "no finished row has a finite error"),
    ],
)
def test_a_wrong_question_is_one_line(asked: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words) as error:
        isoflop.answers(table(), **asked)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ({"technique": ["a"], "error": [0.1]}, "no column 'method' among technique, error; .*--map method=technique"),
        ({"method": ["a", "a"], "repeat": [1, 1], "error": [0.1, 0.2]}, "rows 0 and 1 .* are both a .* one repeat"),
        ({"method": ["a", "a"], "example": [1, 1], "error": [0.1, 0.2]}, "example '1' stands twice in a"),
        ({"method": ["a", "a"], "example": ["x", None], "error": [0.1, 0.2]}, "a row has no example in a"),
        ({"method": ["a"], "error": ["x"]}, "y: column 'error' is of type string"),
    ],
)
def test_a_table_that_contradicts_itself_is_one_line(rows: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        as_rows(pa.table(rows))


# tables as rows


def test_examples_are_paired_by_their_names_and_only_those_that_all_have() -> None:
    rows, notes = as_rows(
        pa.table(
            {
                "method": ["none"] * 3 + ["a"] * 3,
                "example": ["x", "y", "z", "z", "w", "x"],
                "error": [0.0, 1.0, 0.5, 0.25, 1.0, 0.75],
            }
        )
    )
    assert rows["scores"].to_pylist() == [[0.0, 0.5], [0.75, 0.25]]
    assert rows["error"].to_pylist() == [0.25, 0.5]
    assert "1 examples that not every configuration has" in notes[0]
    assert rows["ratio"].to_pylist() == [1.0, None]


@settings(max_examples=25, deadline=None)
@given(st.randoms(use_true_random=False))
def test_the_order_of_rows_changes_nothing(random: Any) -> None:
    frame = pd.DataFrame(table(40))
    order = list(range(len(frame)))
    random.shuffle(order)
    asked = {"share": 0.5, "within": 0.1, "speed_up": True, "cost": "kv_bytes"}
    plain, shuffled = ({a.sentence for a in isoflop.answers(f, **asked)} for f in (frame, frame.iloc[order]))
    assert plain == shuffled


# sweeps and the command


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return methods_sweep(tmp_path_factory.mktemp("asked"))


def test_a_sweep_and_a_file_of_its_rows_answer_alike(sweep: Any, tmp_path: Path) -> None:
    asked = {"share": 0.5, "within": 0.05, "speed_up": True, "cost": "flops"}
    found = sweep.frontier(**asked)
    assert found.to_dict() == sweep.answers(**asked).to_dict() == isoflop.answers(sweep, **asked).to_dict()
    assert "1 of 30 rows are left out" in found.notes[0]
    rows = sweep.results()
    plain = pa.table(
        {
            "task": rows["task"], "model": rows["model"], "method": rows["method"], "repeat": rows["repeat"], "error": rows["error"],
            "flops": rows["flops"], "knob.tokens": [json.loads(k).get("tokens") for k in rows["knobs"].to_pylist()],
        }
    )  # fmt: skip
    path = tmp_path / "rows.csv"
    plain.to_pandas().to_csv(path, index=False)
    other = isoflop.answers(str(path), **asked)
    assert [a.values.get("configuration") for a in other] == [a.values.get("configuration") for a in found]
    assert [a.values.get("error") for a in other] == [a.values.get("error") for a in found]
    assert "2 repeats" in other[0].sentence  # one job of the third failed


def test_measured_alone_asks_everything(sweep: Any) -> None:
    questions = {a.question for a in sweep.frontier(measured=True, cost="flops")}
    assert questions == {"best", "largest ratio", "speed-up"}
    with pytest.raises(UserError, match="law is of laws"):
        sweep.frontier(law="product", share=0.5)


def ask(*arguments: str) -> Any:
    return CliRunner().invoke(frontier_command, list(arguments))


@pytest.mark.parametrize(
    "arguments", [["--share", "0.5"], ["--within", "0.05"], ["--speed-up"], ["--measured", "--budget", "3e6"]]
)
def test_each_question_is_one_command_within_80_columns(arguments: list[str], sweep: Any) -> None:
    result = ask("methods", "--store", str(sweep.store.local), "--cost", "flops", *arguments)
    assert result.exit_code == 0, result.output
    assert result.output.startswith("reading on tiny-llava/d24")
    assert max(map(len, result.output.splitlines())) <= 80
    as_json = ask("methods", "--store", str(sweep.store.local), "--cost", "flops", *arguments, "--json")
    assert json.loads(as_json.stdout)["answers"][0]["sentence"] in " ".join(result.output.split())


@pytest.mark.parametrize(
    "option", [["--law", "product"], ["--q", "3"], ["--sizes", "1"], ["--objective", "huber"], ["--by", "task"]]
)
def test_options_of_laws_are_refused_beside_a_question(option: list[str], sweep: Any) -> None:
    result = ask("methods", "--store", str(sweep.store.local), "--share", "0.5", *option)
    assert isinstance(result.exception, UserError)
    assert f"{option[0]} is of laws" in str(result.exception)
