"""``isoflop bench kernels`` runs without a GPU, says what it measured, and counts bytes on live tensors."""

from __future__ import annotations

import json

import pytest
import torch
from click.testing import CliRunner

from isoflop.cli.bench import bench_group
from isoflop.kernels.cases import Source
from isoflop.kernels.registry import KERNELS, bytes_moved


def test_json_has_a_row_for_each_case() -> None:
    done = CliRunner().invoke(bench_group, ["kernels", "--device", "cpu", "--kernel", "bipartite_match", "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.output)
    assert found["device"] == "cpu"
    assert "need one" in found["note"]
    assert found["copy"] > 0
    assert [row["case"] for row in found["rows"]] == [case.name for case in KERNELS["bipartite_match"].medium]
    for row in found["rows"]:
        assert row["implementation"] == "twin"
        assert row["error"] == ""
        assert row["speedup"] == pytest.approx(row["peer_seconds"] / row["seconds"])
        assert row["share"] == pytest.approx(row["flops"] / found["matmul"] / row["seconds"])


def test_the_table_fits_eighty_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    done = CliRunner().invoke(bench_group, ["kernels", "--device", "cpu", "--kernel", "merge_tokens"])
    assert done.exit_code == 0, done.output
    assert max(map(len, done.output.splitlines())) <= 80
    assert "No GPU" in done.output
    assert "of copy" in done.output


def test_an_unknown_kernel_is_refused() -> None:
    done = CliRunner().invoke(bench_group, ["kernels", "--kernel", "quantpack"])
    assert "did you mean 'quant_pack'?" in str(done.exception)


def test_bytes_of_a_packing_are_what_goes_in_and_what_comes_out() -> None:
    kernel = KERNELS["quant_pack"]
    case = next(case for case in kernel.small if case.name == "3 bits, groups of 8")
    arguments = case.make(Source(torch.device("cpu")))
    packed = kernel.operation.twin(**arguments)
    assert bytes_moved(arguments, packed) == 3 * 5 * 20 * 4 + packed.nbytes
    assert packed.nbytes == 3 * 5 * (9 + 3 * 4)
