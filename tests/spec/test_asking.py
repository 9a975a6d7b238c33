"""What people are answered: a mistake counts once, at its own line; names that exist are documented; folders go again."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from click.testing import CliRunner

import isoflop
from isoflop.cli import cli, main
from isoflop.core.errors import UserError, nearest
from isoflop.core.folder_context import FolderContext
from isoflop.jobs import Job, MethodSpec
from isoflop.models.family import FAMILIES
from isoflop.sweep.resolve import resolve
from isoflop.sweep.titles import job_title
from isoflop.testing.given import GivenContext

pytestmark = pytest.mark.usefixtures("toy_parts")

GOOD = """\
name: s
models: [toy/s]
methods:
  - toy-tokens: {tokens: 4}
tasks: [toy-task]
"""


def answer(text: str, tmp_path: Path) -> str:
    path = tmp_path / "sweep.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        resolve(path)
    assert "\n" not in str(caught.value)
    return str(caught.value).replace(str(path), "sweep.yaml")


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("models:", "modles:", "sweep.yaml:2: modles: unknown key"),
        ("{tokens: 4}", "{tokens: }", "sweep.yaml:4: methods[0].toy-tokens.tokens: has no value"),
        ("{tokens: 4}", "{tokens: {low: }}", "sweep.yaml:4: methods[0].toy-tokens.tokens: low has no value"),
        ("{tokens: 4}", "{tokens: {value: }}", "sweep.yaml:4: methods[0].toy-tokens.tokens: has no value"),
        ("tasks: [toy-task]", "tasks: [toy-task]\nsearch: {sampler: law, laws: [{laww: x}]}", "sweep.yaml:6: search.laws[0].laww: unknown key 'laww' (did you mean 'law'?); allowed: law, x"),
        ("tasks: [toy-task]", "tasks: [toy-task]\nsearch:\n  sampler: law\n  target: {kind: allocation, budget: much}", "sweep.yaml:8: search.target.budget: 'much' must be a number"),
        ("tasks: [toy-task]", "tasks: [toy-task]\nlimits: {timeout: soon}", "sweep.yaml:6: limits.timeout: 'soon' must be a time"),
        ("tasks: [toy-task]", "tasks: [toy-task]\nbudget: {trials: x}", "sweep.yaml:6: budget.trials: 'x' must be a number"),
        ("models: [toy/s]", "models: [{toy/s: 3}]", "sweep.yaml:2: models[0]"),
        ("tasks: [toy-task]", "tasks: [toy-task]\nsearch:", "sweep.yaml:6: search: has no value; must be a block of keys"),
        ("tasks: [toy-task]", "tasks: [toy-task]\nlaws: 3", "sweep.yaml:6: laws: 3 must be a list"),
        ("tasks: [toy-task]", "tasks: [toy-task]\nsearch: {sampler: 3}", "sweep.yaml:6: search.sampler: 3 must be text"),
        ("tasks: [toy-task]", "tasks: [toy-task]\nrepeats: 1.5", "sweep.yaml:6: repeats: 1.5 must be a whole number"),
    ],
)  # fmt: skip
def test_one_mistake_counts_once(old: str, new: str, said: str, tmp_path: Path) -> None:
    text = answer(GOOD.replace(old, new), tmp_path)
    assert text.startswith(said), text
    assert "more)" not in text


def test_two_mistakes_count_twice(tmp_path: Path) -> None:
    text = answer(
        GOOD.replace("models:", "modles:").replace("tasks: [toy-task]", "tasks: [toy-task]\nrepeats: x"), tmp_path
    )
    assert text.endswith("(and 1 more)")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("search: {pruner: median}\nobjectives: [{metric: error}, {metric: flops}]", "sweep.yaml:6: search.pruner: pruning needs a single"),
        ("search:\n  sampler: random\n  target: {kind: allocation}", "sweep.yaml:8: search.target: only 'sampler: law' takes it"),
        ("search: {sampler: rnadom}", "sweep.yaml:6: search.sampler: unknown sampler"),
        ("search:\n  options: {seeds: 3}", "sweep.yaml:7: search.options"),
        ("search: {sampler: law}", "sweep.yaml:6: search"),
        ("objectives:\n  - {metric: eror}", "sweep.yaml:7: objectives[0].metric: no row has 'eror' (did you mean 'error'?)"),
        ("objectives: [{metric: flosp}]", "sweep.yaml:6: objectives[0].metric: no row has 'flosp' (did you mean 'flops'?)"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_block_is_said_at_its_line(more: str, said: str, tmp_path: Path) -> None:
    assert answer(GOOD + more + "\n", tmp_path).startswith(said)


@pytest.mark.parametrize("what", ["models", "methods", "tasks"])
def test_what_is_named_twice_is_said_at_its_second_line(what: str, tmp_path: Path) -> None:
    data = yaml.safe_load(GOOD)
    data[what] = [data[what][0], data[what][0]]
    assert answer(yaml.safe_dump(data, sort_keys=False, default_flow_style=False), tmp_path).startswith("sweep.yaml:")
    assert f"{what}[1]: " in answer(yaml.safe_dump(data), tmp_path)


@pytest.mark.parametrize("metric", ["nll", "weight_bytes_dense", "kv_store_ratio", "anything", "error"])
def test_metrics_that_tasks_and_methods_may_report_are_taken(metric: str) -> None:
    assert resolve(yaml.safe_load(GOOD) | {"objectives": [{"metric": metric}]}).spec.objectives[0].metric == metric


def test_an_objective_that_no_row_has_ends_a_search(tmp_path: Path) -> None:
    spec = yaml.safe_load(GOOD) | {
        "import": ["toy_parts"],
        "methods": [{"toy-tokens": {"tokens": {"low": 1, "high": 64}}}],
    }
    spec |= {"search": {"sampler": "random"}, "budget": {"trials": 40}, "objectives": [{"metric": "lost"}]}
    options: dict[str, Any] = {"executor": "local", "tracking_uri": "none", "cache_dir": tmp_path / "c"}
    with pytest.raises(UserError, match="no row so far has 'lost'"):
        isoflop.run(spec, store=str(tmp_path / "s"), **options)
    assert isoflop.open("s", store=str(tmp_path / "s")).results().num_rows < 40
    known = isoflop.run(spec | {"objectives": [{"metric": "loss"}]}, store=str(tmp_path / "t"), **options)
    assert known.summary.ran == 40


def test_names_that_are_far_are_not_suggested() -> None:
    options = ["quecc", "mqt", "avgpool", "zipcache", "h2o", "tova", "toy-tokens"]
    for far in ("nosuch", "foo", "lora", "zzz", "pruning"):
        assert nearest(far, options) is None
    for near, right in (
        ("quec", "quecc"),
        ("avg-pool", "avgpool"),
        ("zip-cache", "zipcache"),
        ("toy-tokns", "toy-tokens"),
    ):
        assert nearest(near, options) == right


def refused(arguments: list[str], capsys: Any) -> str:
    """What the command line says, in one line, to what it refuses."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["isoflop", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
    assert ended.value.code == 2
    return str(capsys.readouterr().err)


@pytest.mark.parametrize("command", [["show"], ["resume"], ["watch"], ["report"], ["fit"], ["frontier"]])
def test_an_unknown_sweep_is_named_before_its_store(command: list[str], tmp_path: Path, capsys: Any) -> None:
    isoflop.run(
        yaml.safe_load(GOOD) | {"import": ["toy_parts"]},
        store=str(tmp_path),
        executor="local",
        tracking_uri="none",
        cache_dir=tmp_path / "c",
    )
    said = refused([*command, "t", "--store", str(tmp_path)], capsys)
    assert f"unknown sweep 't' in store {tmp_path}" in said or command[0] in ("fit", "frontier"), said
    assert said.count("\n") == 1


@pytest.mark.parametrize("ref", ["tiny-lm/text-d64", "tiny-lm/text-d64?act=relu", "tiny-llava/d24", "tiny-vit", "hf"])
def test_models_are_documented_by_name(ref: str) -> None:
    text = CliRunner().invoke(cli, ["models", ref]).output
    assert text.startswith(ref)
    told = json.loads(CliRunner().invoke(cli, ["models", ref, "--json"]).output)
    assert told["family"] in FAMILIES
    assert told["doc"]
    assert ("N" in told) == ("/" in ref)


def test_an_unknown_model_is_refused_with_the_nearest(capsys: Any) -> None:
    assert "did you mean" in refused(["models", "tiny-lm/txt-d64"], capsys)


def test_knobs_of_one_name_are_told_apart() -> None:
    methods = (MethodSpec.of("rtn", {"bits": 4, "group": 8}), MethodSpec.of("kv-rtn", {"bits": 2}))
    assert job_title(Job("m", methods, "t", 0, 0)) == "m rtn+kv-rtn rtn.bits=4 group=8 kv-rtn.bits=2 t"
    assert job_title(Job("m", methods[:1], "t", 0, 0)) == "m rtn bits=4 group=8 t"


def test_probes_leave_no_folders() -> None:
    for make in (FolderContext.temporary, lambda: GivenContext({"kind": np.zeros(1)})):
        context = make()
        folder = context.root
        assert folder.is_dir()
        del context
        gc.collect()
        assert not folder.exists()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({}, "toy/s toy-tokens tokens=4"),
        ({"repeats": 2}, "toy/s toy-tokens tokens=4 (mean over 2 repeats)"),
        ({"repeats": 2, "tasks": ["toy-task", "toy-other"]}, "toy/s toy-tokens tokens=4 (mean over 2 tasks and 2 repeats)"),
        ({"tasks": ["toy-task", "toy-other"], "objectives": [{"metric": "error", "task": "toy-other"}]}, "toy/s toy-tokens tokens=4"),
    ],
)  # fmt: skip
def test_the_best_so_far_says_what_it_is_a_mean_of(more: dict[str, Any], said: str, tmp_path: Path) -> None:
    seen: list[Any] = []

    class Told:
        line = staticmethod(lambda text: None)
        update = staticmethod(lambda snapshot: seen.append(snapshot.best))

    spec = yaml.safe_load(GOOD) | {"import": ["toy_parts"], "methods": [{"toy-tokens": {"tokens": [4]}}], **more}
    isoflop.run(spec, Told(), store=str(tmp_path), executor="local", tracking_uri="none", cache_dir=tmp_path / "c")
    assert seen[-1][1] == said
