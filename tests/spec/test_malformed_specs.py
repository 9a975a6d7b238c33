"""Wrong input: one line on standard error that says where, what and what is allowed; exit code 2; nothing written."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from isoflop.cli import main
from isoflop.core.errors import UserError

pytestmark = pytest.mark.usefixtures("toy_parts")

GOOD: dict[str, Any] = {
    "name": "s",
    "import": ["toy_parts"],
    "models": ["toy/s", "toy/m"],
    "methods": [{"toy-tokens": {"tokens": [1, 4]}}, "toy-full"],
    "tasks": ["toy-task"],
}


def tokens(value: Any, **more: Any) -> dict[str, Any]:
    return {"methods": [{"toy-tokens": {"tokens": value, **more}}]}


def boundless(**knobs: Any) -> dict[str, Any]:
    return {"methods": [{"toy-boundless": knobs}]}


RANDOM = {"search": {"sampler": "random"}, "budget": {"trials": 2}}

# (what is put into the good spec, the parts of the message, beside the file's name)
WRONG: dict[str, tuple[dict[str, Any], list[str]]] = {
    "name missing": ({"name": None}, ["name"]),
    "name of another type": ({"name": 12}, ["name", "12"]),
    "name with a slash": ({"name": "../../etc"}, ["name", "../../etc", "letters"]),
    "name with a line break": ({"name": "abc\n"}, ["name", "letters"]),
    "unknown key": ({"modles": ["toy/s"]}, ["modles", "did you mean 'models'"]),
    "unknown key below search": ({"search": {"samplr": "tpe"}}, ["search.samplr", "did you mean 'sampler'", "pruner"]),
    "models is text": ({"models": "toy/s"}, ["models"]),
    "models is empty": ({"models": []}, ["models"]),
    "methods is a mapping": ({"methods": {"toy-full": {}}}, ["methods"]),
    "unknown model": ({"models": ["toy/x"]}, ["models[0]", "toy/x", "did you mean 'toy/", "toy/m"]),
    "unknown family": ({"models": ["tyo/s"]}, ["models[0]", "tyo", "did you mean 'toy'"]),
    "unknown method": ({"methods": ["toy-tokns"]}, ["methods[0]", "toy-tokns", "did you mean 'toy-tokens'", "avgpool"]),
    "unknown task": ({"tasks": ["toy-tusk"]}, ["tasks[0]", "toy-tusk", "did you mean 'toy-task'"]),
    "unknown task option": ({"tasks": [{"toy-task": {"shard": 2}}]}, ["tasks[0]", "shard", "did you mean 'shards'"]),
    "task option out of range": ({"tasks": [{"toy-task": {"shards": 0}}]}, ["tasks[0]", "shards = 0", "1 … 1000"]),
    "misspelt knob": ({"methods": [{"toy-tokens": {"tokns": 4}}]}, ["tokns", "did you mean 'tokens'", "mode"]),
    "knob out of range": (tokens(65), ["toy-tokens.tokens", "tokens = 65", "1 … 64"]),
    "knob in a list out of range": (tokens([1, 0]), ["tokens = 0", "1 … 64"]),
    "knob of another type": (tokens("many"), ["tokens = 'many'", "whole number"]),
    "a fraction for a whole number": (tokens(1.5), ["tokens = 1.5", "whole number"]),
    "true for a number": (tokens(True), ["tokens = True", "whole number"]),
    "unknown choice": (tokens(4, mode="plane"), ["mode = 'plane'", "did you mean 'plain'", "plain | scaled"]),
    "empty list": (tokens([]), ["tokens", "empty"]),
    "value twice": (tokens([4, 4]), ["tokens", "twice"]),
    "low above high": (tokens({"low": 9, "high": 3}), ["tokens", "low 9", "high 3"]),
    "empty range within the method's": (tokens({"low": 70}), ["tokens", "1 … 64"]),
    "log from zero": (tokens({"low": 0, "high": 3, "log": True}), ["tokens", "log"]),
    "log from the method's own zero": (
        {"methods": [{"toy-required": {"strength": {"log": True}}}], **RANDOM},
        ["toy-required.strength", "log", "the method's own low of strength is 0", "give low"],
    ),
    "a whole number beyond 64 bits": (boundless(wide=2**63), ["toy-boundless.wide", "does not fit into 64 bits"]),
    "a range beyond 64 bits": (
        {**boundless(wide={"low": 0, "high": 10**20}), **RANDOM},
        ["toy-boundless.wide", "does not fit into 64 bits"],
    ),
    "a range beyond what samplers tell apart": (
        {**boundless(wide={"low": 0, "high": 2**60}), **RANDOM},
        ["toy-boundless.wide", "2^53", "narrower"],
    ),
    "a whole number beyond a double": (boundless(free=10**400), ["toy-boundless.free", "finite"]),
    "a range whose end is no double": (boundless(free={"low": 0, "high": 10**400}), ["toy-boundless.free"]),
    "a number of 5,000 digits": (boundless(wide=10**4200), ["toy-boundless.wide", "does not fit"]),
    "a range wider than a double": (
        {**boundless(free={"low": -1e308, "high": 1e308}), **RANDOM},
        ["toy-boundless.free", "too wide"],
    ),
    "more steps than a double counts": (
        boundless(free={"low": 0, "high": 1e300, "step": 1e-300}),
        ["free", "too wide"],
    ),
    "a sampler's option of another type": (
        {"search": {"sampler": "tpe", "options": {"n_startup_trials": "many"}}, "budget": {"trials": 2}},
        ["search.options.n_startup_trials", "'many'", "whole number"],
    ),
    "a sampler's option beyond a double": (
        {"search": {"sampler": "tpe", "options": {"prior_weight": 10**400}}, "budget": {"trials": 2}},
        ["search.options.prior_weight", "finite"],
    ),
    "a sampler's option that takes code": (
        {"search": {"sampler": "tpe", "options": {"gamma": 0.25}}, "budget": {"trials": 5}},
        ["search.options.gamma", "gamma = 0.25", "n_startup_trials"],
    ),
    "log and step": (tokens({"low": 1, "high": 9, "log": True, "step": 2}), ["tokens", "log or step"]),
    "value and range": (tokens({"value": 3, "low": 1}), ["tokens", "a value or a range"]),
    "step that is no whole number": (tokens({"low": 1, "high": 9, "step": 0.5}), ["tokens", "step", "0.5"]),
    "negative step": (tokens({"low": 1, "high": 9, "step": -1}), ["tokens", "step"]),
    "a list within a list": (tokens([[1, 2]]), ["tokens", "list"]),
    "nothing for a required knob": (
        {"methods": ["toy-required"]},
        ["methods[0]", "needs a value for strength", "0 … 1"],
    ),
    "grid over real numbers": (
        {"methods": [{"toy-tokens": {"scale": {"low": 0.5, "high": 2}}}]},
        ["scale", "0.5 to 2", "a list or a step"],
    ),
    "grid without end": (
        {"methods": [{"toy-tokens": {"tokens": {}, "scale": {"low": 0.5, "high": 2, "step": 1e-9}}}]},
        ["scale", "1,000,000"],
    ),
    "condition on an unknown knob": (
        tokens(4, scale={"value": 1.0, "when": {"mood": "plain"}}),
        ["mood", "did you mean 'mode'"],
    ),
    "condition with an unknown value": (
        tokens(4, scale={"value": 1.0, "when": {"mode": "no"}}),
        ["mode = 'no'", "plain | scaled"],
    ),
    "conditions in a circle": (
        tokens({"values": [4], "when": {"late": 1}}, late={"values": [1], "when": {"tokens": 4}}),
        ["tokens", "late", "refer to each other"],
    ),
    "models twice": ({"models": ["toy/s", "toy/s"]}, ["models", "'toy/s'", "twice"]),
    "tasks twice": ({"tasks": ["toy-task", "toy-task"]}, ["tasks", "twice"]),
    "methods twice": ({"methods": ["toy-full", {"toy-full": {}}]}, ["methods", "twice"]),
    "two methods in one entry": (
        {"methods": [{"toy-full": {}, "toy-tokens": {}}]},
        ["methods[0]", "one name", "toy-full, toy-tokens"],
    ),
    "unknown sampler": ({"search": {"sampler": "tpee"}}, ["search.sampler", "'tpee'", "did you mean 'tpe'", "nsga2"]),
    "unknown pruner": ({"search": {"pruner": "meridian"}}, ["search.pruner", "'meridian'", "did you mean 'median'"]),
    "unknown sampler option": (
        {"search": {"sampler": "tpe", "options": {"n_startup_trial": 3}}},
        ["search.options", "did you mean 'n_startup_trials'"],
    ),
    "unknown pruner option": (
        {"search": {"pruner": "median", "pruner_options": {"n_warmup": 3}}},
        ["search.pruner_options", "did you mean 'n_warmup_steps'"],
    ),
    "impossible pruner option": (
        {"search": {"pruner": "median", "pruner_options": {"n_warmup_steps": -3}}},
        ["search.pruner_options", "-3"],
    ),
    "options of a grid": (
        {"search": {"sampler": "grid", "options": {"n_startup_trials": 3}}},
        ["search.options", "grid takes no options"],
    ),
    "pruner with two objectives": (
        {"objectives": [{"metric": "error"}, {"metric": "flops"}], "search": {"pruner": "median"}},
        ["pruner", "single objective"],
    ),
    "unknown direction": (
        {"objectives": [{"direction": "minimise"}]},
        ["objectives[0].direction", "did you mean 'minimize'"],
    ),
    "objective of another task": (
        {"objectives": [{"task": "toy-tsk"}]},
        ["objectives[0].task", "did you mean 'toy-task'"],
    ),
    "negative budget": ({"budget": {"trials": -1}}, ["budget.trials", "-1", "greater than 0"]),
    "budget of no time": ({"budget": {"hours": 0}}, ["budget.hours", "greater than 0"]),
    "budget in words": ({"budget": {"jobs": "ten"}}, ["budget.jobs", "'ten'", "number"]),
    "unknown unit of time": ({"limits": {"timeout": "10 parsecs"}}, ["limits.timeout", "'10 parsecs'", "10m"]),
    "unknown unit of size": ({"resources": {"memory": "4 elephants"}}, ["resources.memory", "'4 elephants'", "4GiB"]),
    "negative retries": ({"limits": {"retries": -1}}, ["limits.retries", "-1"]),
    "one and a half GPUs": ({"resources": {"gpus": 1.5}}, ["resources.gpus", "1.5", "whole number"]),
    "no CPUs": ({"resources": {"cpus": 0}}, ["resources.cpus", "greater than 0"]),
    "no repeats": ({"repeats": 0}, ["repeats"]),
    "negative seed": ({"seed": -1}, ["seed", "-1"]),
    "unknown law": ({"laws": [{"law": "produkt"}]}, ["laws[0].law", "did you mean 'product'"]),
    "unknown law of a frontier": (
        {"frontiers": [{"law": "chinchila"}]},
        ["frontiers[0].law", "did you mean 'chinchilla'"],
    ),
    "unknown variable of a law": ({"laws": [{"law": "product", "x": {"W": "N"}}]}, ["laws[0]", "'W'"]),
    "a cost that is no expression": ({"frontiers": [{"cost": "2*N*("}]}, ["frontiers[0].cost", "2*N*("]),
    "a cost that calls something": ({"frontiers": [{"cost": "__import__('os')"}]}, ["frontiers[0].cost", "__import__"]),
    "objective on a text": ({"objectives": [{"metric": "model"}]}, ["objectives[0].metric", "'model'", "no number"]),
    "objective with its column": (
        {"objectives": [{"metric": "metrics.loss"}]},
        ["objectives[0].metric", "'metrics.loss'", "here: loss"],
    ),
    "law on a column that is not there": (
        {"laws": [{"law": "product", "y": "eror"}]},
        ["laws[0].y", "'eror'", "did you mean 'error'", "flops"],
    ),
    "law on a text": ({"laws": [{"law": "product", "y": "1-method"}]}, ["laws[0].y", "'method'", "no number"]),
    "law on a whole map": ({"laws": [{"law": "product", "y": "metrics"}]}, ["laws[0].y", "'metrics'", "metrics.NAME"]),
    "law on an entry of what is no map": (
        {"laws": [{"law": "product", "y": "metric.loss"}]},
        ["laws[0].y", "'metric.loss'"],
    ),
    "law's variable from a column that is not there": (
        {"laws": [{"law": "product", "x": {"V": "visual"}}]},
        ["laws[0].x.V", "'visual'", "V"],
    ),
    "weights of a column that is not there": (
        {"laws": [{"law": "product", "weights": "1/eror_se**2"}]},
        ["laws[0].weights", "did you mean 'error_se'"],
    ),
    "groups by a list": ({"laws": [{"law": "product", "by": ["scores"]}]}, ["laws[0].by[0]", "'scores'"]),
    "condition on a column that is not there": (
        {"laws": [{"law": "product", "where": "mdel = 'toy/s'"}]},
        ["laws[0].where", "'mdel'", "did you mean 'model'"],
    ),
    "condition that is no SQL": (
        {"laws": [{"law": "product", "where": "model = "}]},
        ["laws[0].where", "model = "],
    ),
    "condition that is two statements": (
        {"laws": [{"law": "product", "where": "true; select 1"}]},
        ["laws[0].where"],
    ),
    "cost of a column that a law does not have": (
        {"frontiers": [{"law": "product", "cost": "2*N*(q+V)"}]},
        ["frontiers[0].cost", "'q'", "N, Q, V"],
    ),
    "cost without a variable of the law": (
        {"frontiers": [{"law": "product", "cost": "2*Q"}]},
        ["frontiers[0].cost", "2*Q", "N, V"],
    ),
    "zip of one": ({"zip": {"toy-tokens.tokens": [1, 2]}}, ["zip"]),
    "zip of different lengths": (
        {"methods": ["toy-tokens"], "zip": {"model": ["toy/s", "toy/m"], "toy-tokens.tokens": [1, 2, 4]}},
        ["zip", "equally long", "3"],
    ),
    "zip of an unknown knob": (
        {"methods": ["toy-tokens"], "zip": {"model": ["toy/s", "toy/m"], "toy-tokens.tokn": [1, 2]}},
        ["zip", "toy-tokens.tokn"],
    ),
    "zip with a value out of range": (
        {"methods": ["toy-tokens"], "zip": {"model": ["toy/s", "toy/m"], "toy-tokens.tokens": [1, 99]}},
        ["zip", "tokens = 99", "1 … 64"],
    ),
    "zip that forgets a model": (
        {"methods": ["toy-tokens"], "zip": {"model": ["toy/s"], "toy-tokens.tokens": [1]}},
        ["zip", "'toy/m'", "never run"],
    ),
    "zip beside a list": ({"zip": {"model": ["toy/s", "toy/m"], "toy-tokens.tokens": [1, 4]}}, ["tokens", "zip"]),
    "exclude of an unknown knob": (
        {"exclude": {"toy-tokens.tokn": 4}},
        ["exclude", "toy-tokens.tokn", "did you mean 'toy-tokens.tokens'"],
    ),
    "exclude of a value that never comes": (
        {"exclude": [{"toy-tokens.tokens": 7}]},
        ["exclude[0].toy-tokens.tokens", "never takes the value 7"],
    ),
    "exclude of an unknown model": ({"exclude": {"model": "toy/z"}}, ["exclude", "toy/z"]),
    "exclude of nothing": ({"exclude": [{}]}, ["exclude[0]", "everything"]),
    "exclude of everything": ({"exclude": [{"model": ["toy/s", "toy/m"]}]}, ["exclude", "nothing is left"]),
    "import of a missing module": ({"import": ["no_such_module_here"]}, ["import[0]", "no_such_module_here"]),
    "import of a path": ({"import": ["/etc/passwd"]}, ["import[0]", "/etc/passwd", "module name"]),
    "import that raises": (
        {"import": ["raises_on_import"]},
        ["import[0]", "raises_on_import", "ValueError: I never work"],
    ),
    "import that exits": ({"import": ["exits_on_import"]}, ["import[0]", "exits_on_import", "SystemExit"]),
    "impossible point": ({"models": ["toy/s"], **tokens([13])}, ["methods[0]", "tokens = 13 is unlucky", "exclude"]),
    "impossible fixed point of a search": (
        {"models": ["toy/s"], **tokens(13), **RANDOM},
        ["methods[0]", "tokens = 13 is unlucky"],
    ),
    "method on a model without the hook": (
        {"methods": ["avgpool"], "models": ["toy/s"]},
        ["methods[0]", "avgpool", "toy/s"],
    ),
}

TEXTS: dict[str, tuple[bytes, list[str]]] = {
    "unparseable": (b"name: [\nmodels: x", ["sweep.yaml:2", "not valid YAML"]),
    "a tab": (b"name: s\n\tmodels: []", ["sweep.yaml:2", "not valid YAML"]),
    "duplicate key": (b"name: s\nseed: 1\nseed: 2\n", ["sweep.yaml:3", "seed", "twice"]),
    "duplicate key deep down": (
        b"name: s\nsearch:\n  sampler: grid\n  sampler: tpe\n",
        ["sweep.yaml:4", "search.sampler", "twice"],
    ),
    "Python object": (
        b"name: s\nmodels: !!python/object/apply:os.system ['touch owned']\n",
        ["sweep.yaml:2", "!!python/object/apply:os.system", "not allowed"],
    ),
    "Python name as a key": (b"!!python/name:os.system : 1\n", ["sweep.yaml:1", "not allowed"]),
    "alias bomb": (
        b"a: &a [x,x,x,x,x,x,x,x,x]\n"
        + b"".join(b"%c: &%c [%s]\n" % (98 + i, 98 + i, b",".join([b"*%c" % (97 + i)] * 9)) for i in range(8)),
        ["sweep.yaml", "expands to more than 200,000"],
    ),
    "alias of itself": (b"name: &a [*a]\n", ["sweep.yaml", "nested too deeply"]),
    "too deep": (b"[" * 5000, ["sweep.yaml"]),
    "binary": (bytes(range(256)) * 4, ["sweep.yaml", "not UTF-8"]),
    "control characters": (b"name: \x00\x01", ["sweep.yaml", "not valid YAML"]),
    "empty": (b"", ["sweep.yaml", "is empty"]),
    "only a comment": (b"# nothing\n", ["sweep.yaml", "is empty"]),
    "a list": (b"- name\n- models\n", ["sweep.yaml:1", "a block of keys", "list"]),
    "a text": (b"quickstart", ["sweep.yaml:1", "a block of keys"]),
    "two documents": (b"name: a\n---\nname: b\n", ["sweep.yaml", "not valid YAML"]),
    "a key that is a list": (b"? [a, b]\n: 1\n", ["sweep.yaml:1", "a key must be"]),
    "a date tag": (b"name: !!timestamp soon\n", ["sweep.yaml:1", "!!timestamp", "not allowed"]),
    "an impossible tag": (b"name: s\nseed: !!int many\n", ["sweep.yaml:2", "seed", "'many'", "int"]),
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "raises_on_import.py").write_text("raise ValueError('I never work')\n")
    (tmp_path / "exits_on_import.py").write_text("import sys\nsys.exit(0)\n")
    return tmp_path


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> str:
    """Run the command line in this process; it must refuse with one line."""
    monkeypatch.setattr(sys, "argv", ["isoflop", *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    out, err = capsys.readouterr()
    assert caught.value.code == 2, (out, err)
    assert out == ""
    assert err.endswith("\n")
    assert err.count("\n") == 1, err
    assert err.startswith("isoflop: ")
    assert "Traceback" not in err
    assert len(err) < 1500
    return err


def untouched(folder: Path) -> bool:
    return (
        not (folder / "store").exists() and not (folder / "default-store").exists() and not (folder / "owned").exists()
    )


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_spec_is_refused_in_one_line(
    case: str, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    change, parts = WRONG[case]
    spec = {k: v for k, v in {**GOOD, **change}.items() if v is not None}
    if "import" in change:
        spec["import"] = ["toy_parts", *change["import"]]
        parts = [p.replace("import[0]", "import[1]") for p in parts]
    (folder / "sweep.yaml").write_text(yaml.safe_dump(spec, sort_keys=False))
    err = refused(["run", "sweep.yaml", "--store", str(folder / "store"), "--executor", "local"], capsys, monkeypatch)
    assert "sweep.yaml" in err
    for part in parts:
        assert part in err, err
    assert untouched(folder)


@pytest.mark.parametrize("case", TEXTS)
def test_a_wrong_text_is_refused_in_one_line(
    case: str, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    content, parts = TEXTS[case]
    (folder / "sweep.yaml").write_bytes(content)
    err = refused(["plan", "sweep.yaml", "--store", str(folder / "store")], capsys, monkeypatch)
    for part in parts:
        assert part in err, err
    assert untouched(folder)


COMMANDS: dict[str, tuple[list[str], list[str]]] = {
    "missing file": (["run", "sweeep.yaml"], ["sweeep.yaml: no such file", "did you mean 'sweep.yaml'"]),
    "missing folder": (["run", "nowhere/sweep.yaml"], ["nowhere/sweep.yaml: no such file", "no such folder: nowhere"]),
    "a folder": (["run", "."], ["is a folder"]),
    "unknown command": (["rnu", "sweep.yaml"], ["unknown command 'rnu'", "did you mean 'run'", "resume"]),
    "unknown option": (["run", "sweep.yaml", "--retry"], ["--retry", "--retry-failed"]),
    "unknown executor": (["run", "sweep.yaml", "--executor", "slurm"], ["slurm", "ray", "local"]),
    "no workers": (["run", "sweep.yaml", "--workers", "0"], ["--workers", "0"]),
    "no file": (["run"], ["SWEEP.yaml"]),
    "unknown store": (["run", "sweep.yaml", "--store", "nosuch://x"], ["nosuch", "unknown scheme"]),
    "a store that is a file": (["run", "sweep.yaml", "--store", "sweep.yaml", "--executor", "local"], ["sweep.yaml"]),
    "unknown sweep to resume": (["resume", "nothing"], ["nothing"]),
    "unknown sweep to show": (["show", "nothing"], ["nothing"]),
    "unknown sweep to fit": (["fit", "nothing"], ["nothing"]),
    "unknown method to document": (["methods", "avgpol"], ["avgpol", "did you mean 'avgpool'"]),
    "unknown task to document": (["tasks", "readin"], ["readin", "did you mean 'reading'"]),
    "a file whose name is too long": (["run", "s" * 300], ["sss", "too long"]),
    "a sweep whose name is too long": (["show", "s" * 300], ["unknown sweep"]),
    "a table whose name is too long": (["fit", "s" * 300 + ".csv"], ["sss", "too long"]),
    "a name that is too long to fit": (["fit", "s" * 300], ["unknown sweep"]),
    "a name that is too long to submit": (["submit", "s" * 300, "--address", "http://127.0.0.1:1"], ["sss"]),
    "a name that is too long to simulate": (["simulate", "s" * 300], ["sss", "too long"]),
    "a seed below zero": (["fit", "x.csv", "--seed", "-1"], ["--seed", "-1"]),
    "a seed below zero to compare with": (["compare", "x.csv", "--seed", "-1"], ["--seed", "-1"]),
    "a level that is none": (["fit", "x.csv", "--level", "95"], ["--level", "95"]),
    "impossible port": (["ui", "--port", "99999"], ["--port", "99999"]),
}


@pytest.mark.parametrize("case", COMMANDS)
def test_a_wrong_command_is_refused_in_one_line(
    case: str, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "sweep.yaml").write_text(yaml.safe_dump(GOOD))
    arguments, parts = COMMANDS[case]
    err = refused(arguments, capsys, monkeypatch)
    for part in parts:
        assert part in err, err
    assert untouched(folder)


@pytest.mark.parametrize("case", ["unknown method", "import that raises", "Python object", "missing file"])
def test_the_same_from_a_real_process(case: str, folder: Path, toy_parts: ModuleType) -> None:
    content = TEXTS[case][0] if case in TEXTS else yaml.safe_dump({**GOOD, **WRONG.get(case, ({}, []))[0]}).encode()
    if case != "missing file":
        (folder / "sweep.yaml").write_bytes(content)
    done = subprocess.run(
        [sys.executable, "-m", "isoflop", "run", "sweep.yaml", "--store", "store", "--json"],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(Path(toy_parts.__file__ or "").parent)},
        timeout=120,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1, done.stderr
    assert "sweep.yaml" in done.stderr
    assert untouched(folder)


def test_the_good_spec_is_good(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "sweep.yaml").write_text(yaml.safe_dump(GOOD))
    monkeypatch.setattr(sys, "argv", ["isoflop", "plan", "sweep.yaml", "--store", str(folder / "store"), "--json"])
    with pytest.raises(SystemExit) as caught:
        main()
    out, err = capsys.readouterr()
    assert (caught.value.code, err) == (0, "")
    assert '"trials": 6' in out
    assert untouched(folder)  # a plan writes nothing


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("tiny-lm/text-d64?act=relu&layers=2", "tiny-lm/text-d64?layers=2&act=relu"),
        ("tiny-lm/text-d64", "tiny-lm/text-d64?at=0"),
        ("tiny-lm/text-d64?steps=500", "tiny-lm/text-d64"),
        ("tiny-lm/text-d64?lr=0.004", "tiny-lm/text-d64?lr=4e-3"),
    ],
)
def test_a_model_under_two_spellings_is_told(first: str, second: str) -> None:
    from isoflop.sweep.resolve import resolve

    spec = {"name": "s", "models": [first, second], "methods": ["rtn"], "tasks": ["bits-per-byte"]}
    with pytest.raises(UserError, match=r"models\[1\].* is the same model as"):
        resolve(spec)
    assert resolve(spec | {"models": [first, "tiny-lm/text-d64?lr=0.005"]})


def test_a_task_that_a_model_cannot_do_is_blamed_itself() -> None:
    from isoflop.sweep.resolve import resolve

    spec = {"name": "s", "models": ["tiny-llava/d24"], "methods": ["none"], "tasks": ["reading", "kv-recall"]}
    with pytest.raises(UserError, match=r"tasks\[1\]: task kv-recall needs .*; every task runs on every model"):
        resolve(spec)


def test_a_list_of_nothing_is_called_empty() -> None:
    from isoflop.sweep.spec import load_spec

    with pytest.raises(UserError, match=r"tasks: is empty; at least one entry is needed"):
        load_spec({"name": "s", "models": ["tiny-llava/d24"], "methods": ["none"], "tasks": []})


def test_an_option_in_a_reference_that_is_no_number_is_refused_in_one_line() -> None:
    from isoflop.models.family import family_of

    with pytest.raises(UserError, match="lr"):
        family_of("tiny-lm/text-d64?lr=nan").info("tiny-lm/text-d64?lr=nan", {})


def test_the_order_of_a_composition_makes_no_other_method() -> None:
    from isoflop.sweep.spec import load_spec

    spec = {"name": "s", "models": ["tiny-llava/d24"], "methods": [["mqt", "zipcache"], ["zipcache", "mqt"]], "tasks": ["reading"]}  # fmt: skip
    with pytest.raises(UserError, match=r"'mqt\+zipcache' is named twice"):
        load_spec(spec)


def test_a_task_that_is_asked_twice_is_told_how_to_name_both() -> None:
    from isoflop.sweep.spec import load_spec

    spec = {"name": "s", "models": ["tiny-lm/text-d32"], "methods": ["none"], "tasks": ["generate", {"generate": {}}]}
    with pytest.raises(UserError, match="'generate' is named twice; give one a label, as in generate:mine"):
        load_spec(spec)
    with pytest.raises(UserError, match="'generate:mine' is named twice; give one a label, as in generate:mine"):
        load_spec({**spec, "tasks": ["generate:mine", {"generate:mine": {}}]})
