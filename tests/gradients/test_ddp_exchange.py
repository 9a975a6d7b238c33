"""The exchange over real processes: the same bits as in the simulation, and the bytes that sockets really carry."""

from __future__ import annotations

import json
from pathlib import Path

import gradient_processes as processes
import pytest
import torch
from gradient_cases import Recipe, simulated

from isoflop.core.local_processes import run_local_processes
from isoflop.models.hooks.gradients import ExchangeReport
from isoflop.models.training.distributed import ReplicasDiffer, gather_records


@pytest.fixture(scope="module", params=[2, 3, 4])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, here: None) -> tuple[int, Path]:
    """All methods trained by processes."""
    folder = tmp_path_factory.mktemp("trained")
    run_local_processes("gradient_processes:train_all", folder, request.param)
    return request.param, folder


def test_processes_and_simulation_give_the_same_bits(trained: tuple[int, Path]) -> None:
    workers, folder = trained
    for name, method in processes.methods(workers, "simulated").items():
        network, expected = simulated(method, Recipe(steps=processes.STEPS))
        weights = torch.load(folder / name / "weights-0.pt", weights_only=True)
        for parameter, value in network.named_parameters():
            assert torch.equal(weights[parameter], value), f"{name}: {parameter}"
        report = gather_records(folder / name, workers)
        assert report.wire_bytes == pytest.approx(expected.wire_bytes, rel=1e-12), name
        assert report.payload_bytes == pytest.approx(expected.payload_bytes, rel=1e-12), name
        assert report.loss == pytest.approx(expected.loss, rel=1e-12), name


def test_replicas_are_bit_identical_after_all_steps(trained: tuple[int, Path]) -> None:
    workers, folder = trained
    for name in processes.methods(workers, "ddp"):
        weights = [torch.load(folder / name / f"weights-{rank}.pt", weights_only=True) for rank in range(workers)]
        for parameter, value in weights[0].items():
            assert all(torch.equal(value, other[parameter]) for other in weights[1:]), f"{name}: {parameter}"


def test_replicas_that_differ_are_an_error(trained: tuple[int, Path], tmp_path: Path) -> None:
    workers, folder = trained
    for rank in range(workers):
        text = (folder / "dense" / f"record-{rank}.json").read_text()
        (tmp_path / f"record-{rank}.json").write_text(text.replace('"20": "', '"20": "x') if rank else text)
    with pytest.raises(ReplicasDiffer, match="before step 20"):
        gather_records(tmp_path, workers)


@pytest.mark.parametrize("workers", [2, 3, 4])
def test_counted_bytes_are_those_of_the_sockets(tmp_path: Path, here: None, workers: int) -> None:
    """On every rank. With two workers a sum of b bytes sends what a gathering does, b; with more they differ, so that a
    wrong formula for either shows from three on."""
    run_local_processes("gradient_processes:train_wide", tmp_path, workers)
    for name, method in processes.wide(workers, "simulated").items():
        reports = [rank_report(tmp_path / name, rank) for rank in range(workers)]
        if any(report.socket_bytes is None for report in reports):
            pytest.skip("this system does not count what sockets send")
        for rank, report in enumerate(reports):
            assert report.payload_bytes[0] > 1e6  # headers do not matter at that size
            assert report.socket_bytes == pytest.approx(sum(report.wire_bytes), rel=0.01), f"{name}, rank {rank}"
        assert gather_records(tmp_path / name, workers).socket_bytes == pytest.approx(
            sum(report.socket_bytes or 0.0 for report in reports) / workers
        )
        network, _ = simulated(method, Recipe(steps=3), processes.WIDE)  # whose gradients fill several buckets
        weights = torch.load(tmp_path / name / "weights-0.pt", weights_only=True)
        assert all(torch.equal(weights[n], value) for n, value in network.named_parameters()), name


def rank_report(folder: Path, rank: int) -> ExchangeReport:
    """One worker's own record."""
    return ExchangeReport(**json.loads((folder / f"record-{rank}.json").read_text())["report"])
