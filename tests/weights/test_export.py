"""``isoflop export``: every weight method as a checkpoint with the scores that were measured, and what is refused."""

from __future__ import annotations

import json
import re
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from transformers.utils import is_compressed_tensors_available

from isoflop.cli import cli
from isoflop.core.errors import UserError
from isoflop.core.knobs import knob_specs
from isoflop.methods.base import METHODS
from isoflop.methods.weights.base import WeightMethod
from isoflop.sweep.api import SweepResults, run
from isoflop.sweep.exporting import export

SMALL = {
    "n_calib": 4, "n_sort": 2, "n_search": 2, "generations": 1, "offspring": 2, "survivors": 1, "selections": 1, "examples": 1,
    "n_iter": 2, "group": 8, "heal_steps": 1, "pretrain_steps": 1,
}  # fmt: skip
"""Knobs that keep a method quick on a small model, wherever it has them."""
OWN: dict[str, dict[str, Any]] = {
    "bitstack": {"bits": 6.0, "k": 1},
    "evopress-drop": {"dropped": 0.5},
    "smoothquant": {"act_bits": 16},  # the activations that it rounds are no weights
}
BEYOND = ("slicegpt",)
"""Methods that put more into a running model than parameters: shortcuts between rotations."""
TEXT = "Words of a text that is measured, some of them more than once: words, text, measured. " * 2


def weight_methods() -> list[str]:
    """But those of mixtures of experts, which refuse a model without any."""
    found = [name for name in METHODS.own() if issubclass(METHODS.get(name), WeightMethod)]
    return [name for name in found if name != "mc-moe"]


def settings(name: str) -> dict[str, Any]:
    specs = knob_specs(METHODS.get(name))
    return {**{knob: value for knob, value in SMALL.items() if knob in specs}, **OWN.get(name, {})}


def swept(folder: Path, name: str, models: list[str], methods: list[Any], calibrated: bool = False) -> SweepResults:
    (folder / "text.txt").write_text(TEXT)
    more = {"calibration": {"data": str(folder / "text.txt"), "length": 16}} if calibrated else {}
    sweep = {
        "name": name, "models": models, "methods": methods,
        "tasks": [{"text": {"data": str(folder / "text.txt"), "tokens": 48, "prefix": 0.25}}], **more,
    }  # fmt: skip
    return run(sweep, executor="local", tracking_uri="none", cache_dir=folder / "cache", store=str(folder / "store"))


def rows_of(results: SweepResults) -> list[dict[str, Any]]:
    return results.results().to_pylist()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("exported")


@pytest.fixture(scope="module")
def checkpoint(folder: Path) -> str:
    from isoflop.testing.task_probes import reader_of_text

    model, _ = reader_of_text()
    model.module.save_pretrained(folder / "reader")
    model.tokenizer.save_pretrained(folder / "reader")
    return f"hf:{folder / 'reader'}"


@pytest.fixture(scope="module")
def all_methods(folder: Path, checkpoint: str) -> SweepResults:
    """Every weight method once."""
    methods: list[Any] = [
        "none",
        {"streaming-llm": {"keep": 0.5}},
        *({name: settings(name)} for name in weight_methods()),
    ]
    return swept(folder, "all", [checkpoint], methods, calibrated=True)


def test_every_weight_method_comes_back_with_its_scores(folder: Path, all_methods: SweepResults) -> None:
    rows = [row for row in rows_of(all_methods) if row["method"] in weight_methods()]
    assert {row["status"] for row in rows} == {"ok"}
    assert {row["method"] for row in rows} == set(weight_methods())
    for row in [row for row in rows if row["method"] in BEYOND]:
        with pytest.raises(UserError, match=f"{row['method']} does more while running than its weights say"):
            export(all_methods, row["job_id"], folder / "out" / row["method"], cache_dir=folder / "cache")
        assert not (folder / "out" / row["method"]).exists()
    rows = [row for row in rows if row["method"] not in BEYOND]
    for row in rows:
        done = export(all_methods, row["job_id"][:10], folder / "out" / row["method"], cache_dir=folder / "cache")
        assert done.difference == 0
        text = (folder / "out" / row["method"] / "README.md").read_text()
        assert row["job_id"] in text
        assert f"{row['error']:.6g}" in text
        assert ("calibrated on `text.txt`" in text) == METHODS.get(row["method"]).calibrates
        assert f"{dict(row['footprint'])['weight_bytes']:,.0f}" in text
    again = swept(folder, "again", [f"hf:{folder / 'out' / row['method']}" for row in rows], ["none"])
    found = {Path(row["model"].removeprefix("hf:")).name: row["error"] for row in rows_of(again)}
    assert found == {row["method"]: row["error"] for row in rows}


@pytest.fixture(scope="module")
def grids(folder: Path, checkpoint: str) -> SweepResults:
    static = {
        "gptq": {
            "bits": 3,
            "group": 8,
            "grid": "integer",
            "n_calib": 4,
            "column_order": "activation",
            "static_groups": [True, False],
        }
    }
    rtn = {"rtn": {"bits": [3, 4], "group": [8, 4096], "grid": ["integer", "symmetric"]}}
    return swept(folder, "grids", [checkpoint], [rtn, static], calibrated=True)


@pytest.mark.skipif(not is_compressed_tensors_available(), reason="compressed-tensors is not installed")
def test_integer_grids_as_compressed_tensors(folder: Path, grids: SweepResults) -> None:
    """Loaded by transformers, with packed layers that are as large as was counted, they give what was served."""
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM

    for row in rows_of(grids):
        knobs = {m["name"]: m["knobs"] for m in json.loads(row["spec"])["methods"]}[row["method"]]
        target = folder / "packed" / row["job_id"]
        if row["method"] == "gptq" and not knobs["static_groups"]:
            with pytest.raises(
                UserError, match=r"has groups of columns in another order .* allowed: jobs with static_groups: true"
            ):
                export(grids, row["job_id"], target, "compressed-tensors", cache_dir=folder / "cache")
            assert not target.exists()
            continue
        done = export(grids, row["job_id"], target, "compressed-tensors", cache_dir=folder / "cache")
        assert done.difference is not None
        assert done.difference < 1e-5
        with safe_open(target / "model.safetensors", framework="pt") as file:
            names = list(file.keys())
            packed = [name for name in names if name.endswith("weight_packed")]
            codes = sum(file.get_tensor(name).nbytes for name in packed)
            shapes = [file.get_tensor(name.replace("_packed", "_shape")).tolist() for name in packed]
        assert codes == sum(rows * -(-cols * knobs["bits"] // 32) * 4 for rows, cols in shapes)
        assert any(name.endswith("weight_zero_point") for name in names) == (knobs["grid"] == "integer")
        assert not any(name.replace("_packed", "") in names for name in packed)
        model: Any = AutoModelForCausalLM.from_pretrained(target, local_files_only=True)
        assert torch.isfinite(model(input_ids=torch.arange(8)[None]).logits).all()


def invoke(folder: Path, *arguments: str) -> tuple[int, str]:
    from isoflop.cli.failures import Shown, end_with

    common = ("--store", str(folder / "store"), "--cache-dir", str(folder / "cache"))
    result = CliRunner().invoke(cli, ["export", *arguments, *common], obj=Shown(), standalone_mode=False)
    if result.exception is None:
        return 0, result.stdout
    assert isinstance(result.exception, UserError), result.exception
    return end_with(result.exception, Shown()), str(result.exception)


def job_of(results: SweepResults, method: str) -> str:
    return str(next(row["job_id"] for row in rows_of(results) if row["method"] == method))


def test_what_cannot_be_exported_is_one_line(folder: Path, all_methods: SweepResults, checkpoint: str) -> None:
    from isoflop.methods.weights.rtn import RoundToNearest

    rtn, (full, file) = job_of(all_methods, "rtn"), (folder / "full", folder / "file")
    full.mkdir(exist_ok=True)
    (full / "mine.txt").write_text("mine")
    file.write_text("mine")
    both = swept(folder, "both", [checkpoint], [[{"streaming-llm": {"keep": 0.5}}, {"rtn": {"bits": 4, "group": 8}}]])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RoundToNearest, "encode", lambda *_: 1 / 0)
        broken = swept(folder, "broken", [checkpoint], [{"rtn": {"bits": 3, "group": 8}}])
    free = str(folder / "free")
    cases = [
        (("al", rtn, free), r"unknown sweep 'al'.*did you mean 'all'"),
        (("all", "zzz", free), r"no job of sweep all begins with 'zzz'; on weights there are: .*" + rtn[:6]),
        (("all", "", free), r"no job of sweep all begins with ''"),
        (("all", rtn, str(full)), r"full: holds mine.txt already; allowed: a new folder, or an empty one"),
        (("all", rtn, str(file)), r"file: is no folder"),
        (("all", rtn, free, "--format", "dens"), r"unknown format 'dens'.*did you mean 'dense'"),
        (("all", job_of(all_methods, "none"), free), r"compresses no weights: its method is none; allowed: jobs of .*gptq"),
        (("all", job_of(all_methods, "streaming-llm"), free), r"compresses no weights: its method is streaming-llm"),
        (("both", rows_of(both)[0]["job_id"], free), r"also runs streaming-llm, which no checkpoint holds"),
        (("broken", rows_of(broken)[0]["job_id"], free), r"did not finish: it is failed \(.*division.*\); allowed: jobs with the status ok"),
        (("all", rtn, free, "--format", "compressed-tensors"), r"is stored as 'grid', .* allowed: jobs with grid: integer or symmetric, or --format dense"),
        (("all", job_of(all_methods, "wanda"), free, "--format", "compressed-tensors"), r"is stored as '(bitmap|dense)'"),
    ]  # fmt: skip
    for arguments, message in cases:
        code, said = invoke(folder, *arguments)
        assert code == 2, said
        assert "\n" not in said
        assert re.search(message, said), said
    assert not Path(free).exists()
    assert (full / "mine.txt").read_text() == "mine"
    assert not list(folder.glob(".free-*"))


def test_an_empty_folder_will_do(folder: Path, all_methods: SweepResults) -> None:
    (folder / "empty").mkdir()
    code, said = invoke(folder, "all", job_of(all_methods, "rtn"), str(folder / "empty"), "--json")
    assert code == 0
    assert json.loads(said)["folder"] == str(folder / "empty")
    code, said = invoke(folder, "all", job_of(all_methods, "nf4"), str(folder / "new" / "nf4"))
    assert code == 0
    assert re.search(r"wrote .*new/nf4: hf:.* with nf4, dense, 0\.\d MB", said)
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= {
        p.name for p in (folder / "empty").iterdir()
    }


def test_what_acts_besides_the_weights_is_refused(
    folder: Path, all_methods: SweepResults, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A method that also changes what passes through the model would come back with other scores."""
    from isoflop.methods.weights.artefact import Serving

    work = Serving.at_work

    def meddling(self: Serving, model: Any) -> Any:
        @contextmanager
        def at_work() -> Any:
            handle = self.views[-1].module.register_forward_hook(lambda _m, _a, output: output * 1.01)
            with work(self, model):
                yield
            handle.remove()

        return at_work()

    monkeypatch.setattr(Serving, "at_work", meddling)
    with pytest.raises(UserError, match="rtn does more while running than its weights say"):
        export(all_methods, job_of(all_methods, "rtn"), folder / "meddled", cache_dir=folder / "cache")
    assert not (folder / "meddled").exists()


@pytest.fixture(scope="module")
def gpt2(folder: Path, checkpoint: str) -> str:
    """Matrices in ``Conv1D`` layers, which have biases other than 0."""
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    tokenizer = AutoTokenizer.from_pretrained(checkpoint.removeprefix("hf:"), local_files_only=True)
    tokens = {"bos_token_id": None, "eos_token_id": None}
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=4, n_positions=64, **tokens)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = GPT2LMHeadModel(config)
        for name, parameter in module.named_parameters():
            if name.endswith("bias"):
                parameter.data.normal_()
    module.save_pretrained(folder / "gpt2")
    tokenizer.save_pretrained(folder / "gpt2")
    return f"hf:{folder / 'gpt2'}"


def test_parts_left_out_add_no_bias(folder: Path, gpt2: str) -> None:
    """Zeros for the matrices of an attention or MLP alone would leave what its biases add."""
    drop = {"evopress-drop": {"dropped": 0.5, "allocation": "uniform", "n_search": 2}}
    gone = swept(folder, "gone", [gpt2], [drop, {"rtn": {"bits": 4, "group": 8, "grid": "integer"}}], calibrated=True)
    measured = {row["method"]: row["error"] for row in rows_of(gone)}
    assert export(gone, job_of(gone, "evopress-drop"), folder / "half", cache_dir=folder / "cache").difference == 0
    with pytest.raises(UserError, match=r"h.0.attn.c_attn is a Conv1D, and the format holds linear layers"):
        export(gone, job_of(gone, "rtn"), folder / "conv", "compressed-tensors", cache_dir=folder / "cache")
    again = swept(folder, "half", [f"hf:{folder / 'half'}"], ["none"])
    assert rows_of(again)[0]["error"] == measured["evopress-drop"]
