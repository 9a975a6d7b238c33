"""``isoflop bench prefill`` on a small checkpoint: our side's numbers are the model's own, failures are said in a line."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from isoflop.bench.prefill import METHODS, SCORED, _best, _same, bench_prefill
from isoflop.bench.prefill_ours import loaded
from isoflop.core.errors import UserError
from isoflop.testing.task_probes import reader_of_text


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("own") / "reader"
    model, _ = reader_of_text()
    model.module.config.max_position_embeddings = 2048
    model.module.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    (folder.parent / "text.txt").write_text("the cat sat on the mat and looked at the dog . " * 100)
    return folder


def test_every_method_is_measured_and_keeping_less_changes_the_score(checkpoint: Path) -> None:
    found = bench_prefill(f"hf:{checkpoint}", "", str(checkpoint.parent / "text.txt"), (128,), 1, 1)
    rows = {row["method"]: row for row in found["rows"]}
    assert list(rows) == [name for name, _ in METHODS]
    assert all(np.isfinite(row["nll"]) and row["prefill_seconds"] > 0 for row in rows.values())
    assert rows["none"]["prefill_over_stock"] == 1
    assert len({round(row["nll"], 6) for row in rows.values()}) > 3


def test_our_side_computes_in_float32_as_the_other_does(tmp_path: Path) -> None:
    half = tmp_path / "half"
    model, _ = reader_of_text()
    model.module.to(torch.bfloat16).save_pretrained(half)
    model.tokenizer.save_pretrained(half)
    assert loaded(f"hf:{half}", str(tmp_path)).module.dtype == torch.float32


def test_bad_input_is_said_in_a_line(checkpoint: Path) -> None:
    short = checkpoint.parent / "short.txt"
    short.write_text("the cat")
    with pytest.raises(UserError, match=f"at least {4096 + SCORED}"):
        bench_prefill(f"hf:{checkpoint}", "", str(short), (4096,), 1, 1)
    for model, what in {
        "nonsense": "is no checkpoint; allowed: hf:<folder>",
        f"hf:{checkpoint}s": f"no such folder .did you mean '{checkpoint}'",
    }.items():
        with pytest.raises(UserError, match=f"model {model}: {what}"):
            bench_prefill(model, "", str(short), (128,), 1, 1)
    with pytest.raises(UserError, match=r"--peer \./no-python: no such program"):
        bench_prefill(f"hf:{checkpoint}", "./no-python", str(short), (128,), 1, 1)
    bare = checkpoint.parent / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(checkpoint / name, bare)
    with pytest.raises(UserError, match=f"model hf:{bare}: has no tokenizer that can be read"):
        bench_prefill(f"hf:{bare}", "", str(short), (128,), 1, 1)
    with pytest.raises(
        UserError, match=r"--peer .*: ModuleNotFoundError: No module named 'kvpress'; allowed: a Python"
    ):
        bench_prefill(f"hf:{checkpoint}", sys.executable, str(checkpoint.parent / "text.txt"), (128,), 1, 1)


def test_shares_and_least_values_by_hand() -> None:
    assert _same([[[1, 2, 3], [4, 5, 6]]], [[[1, 2, 9], [4, 5, 6]]]) == pytest.approx(5 / 6)
    assert _same(None, [[[1]]]) is None
    row = {"method": "x", "tokens": 1, "nll": 2.0, "prefill": {"seconds": 3.0}, "scoring": {"seconds": 1.0}}
    other = json.loads(json.dumps(row)) | {"prefill": {"seconds": 2.0}, "scoring": {"seconds": 5.0}}
    best = _best([[row], [other]])["x", 1]
    assert (best["prefill"], best["scoring"]) == ({"seconds": 2.0}, {"seconds": 1.0})
