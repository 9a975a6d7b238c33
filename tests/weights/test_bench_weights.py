"""``isoflop bench weights``: both sides get the same matrix, what they lose is worked out alike, and clones leave nothing behind."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from isoflop.bench.weights import CASES, bench_weights, given, lost, ours
from isoflop.bench.weights_released import find_peers
from isoflop.cli import main
from isoflop.core.errors import UserError
from isoflop.methods.base import build

SOLVER = """
from quant import Quantizer
import torch
class GPTQ:
    def __init__(self, layer): self.layer = layer
    def fasterquant(self, percdamp, groupsize, actorder, static_groups):
        torch.cuda.synchronize()
        print("said on the way")
        assert self.H.shape[0] == self.layer.weight.shape[1] and isinstance(self.quantizer, Quantizer)
        self.layer.weight.data = self.layer.weight.data * (0.5 if actorder else 0.0)
"""


def test_what_is_lost_is_the_share_of_the_outputs_squares() -> None:
    on = given(64, 128)
    changed_OI = on.weight_OI + 0.01
    wrong, right = on.x_NI @ changed_OI.T, on.x_NI @ on.weight_OI.T
    expected = float((wrong - right).square().sum() / right.square().sum())
    assert lost(changed_OI, on) == pytest.approx(expected, rel=1e-4)
    assert lost(on.weight_OI, on) == 0


@pytest.mark.parametrize("case", [case for case in CASES if case.method != "aqlm"], ids=lambda case: case.label)
def test_our_side_is_the_method(case) -> None:
    """As it serves a matrix with these inputs; half of the weights or 4 bits lose little, and something."""
    on = given(64, 128)
    served_OI = ours(case, on)()
    assert served_OI.shape == on.weight_OI.shape
    assert 0 < lost(served_OI, on) < 0.1
    if case.method in ("gptq", "sparsegpt", "hqq", "nf4"):
        assert torch.equal(served_OI, build(case.method, case.knobs).encode(on.weight_OI, on.stats).decode())  # type: ignore[attr-defined]


def test_released_code_is_called_from_its_clone_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clone = tmp_path / "gptq"
    clone.mkdir()
    (clone / "gptq.py").write_text(SOLVER)
    (clone / "quant.py").write_text("class Quantizer:\n    def configure(self, bits, **settings): assert bits == 4\n")
    before = set(sys.modules), list(sys.path), torch.cuda.synchronize
    peers = find_peers(tmp_path)
    assert set(peers) - {"nf4"} == {"gptq", "gptq-ordered"}
    found = bench_weights(((64, 128),), tmp_path, 1)["rows"]
    rows = {row["case"]: row for row in found}
    assert rows["gptq 4 bits"]["released_lost"] == pytest.approx(1.0)
    assert rows["gptq, ordered"]["released_lost"] == pytest.approx(0.25)
    assert "released_seconds" not in rows["hqq 4 bits"]
    assert capsys.readouterr().out == ""
    assert (list(sys.path), torch.cuda.synchronize) == before[1:]
    assert not {"gptq", "quant"} & (set(sys.modules) - before[0])


@pytest.mark.parametrize(
    ("given_args", "said"),
    [
        (["--shape", "100x64"], "100x64 is no shape; allowed: ROWSxCOLS, multiples of 64, as in 576x1536"),
        (
            ["--released", "nowhere"],
            "--released nowhere: no such folder; allowed: one with clones of gptq, sparsegpt, hqq, llm-awq, AQLM",
        ),
    ],
)
def test_bad_input_is_one_line(
    given_args: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["isoflop", "bench", "weights", *given_args])
    with pytest.raises(SystemExit) as ended:
        main()
    told = capsys.readouterr().err
    assert ended.value.code == 2
    assert said in " ".join(told.split())
    assert "Traceback" not in told


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import nowhere_to_be_found", "gptq fails with ModuleNotFoundError: No module named 'nowhere_to_be_found'"),
        (SOLVER.replace("fasterquant", "slowquant"), "the peer of gptq 4 bits fails with AttributeError"),
    ],
)
def test_a_clone_that_fails_is_told_in_a_line(code: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "gptq").mkdir()
    (tmp_path / "gptq" / "gptq.py").write_text(code)
    (tmp_path / "gptq" / "quant.py").write_text("class Quantizer:\n    def configure(self, bits, **settings): pass\n")
    with pytest.raises(UserError, match="allowed: a clone of its authors' repository") as told:
        bench_weights(((64, 128),), tmp_path, 1)
    assert said in str(told.value)
