"""Every registered kernel against its twin: in Triton's interpreter, through the compiler, and on a GPU where there is one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from isoflop.kernels.dispatch import operations
from isoflop.kernels.registry import KERNELS

pytest.importorskip("triton")

SCRIPT = Path(__file__).with_name("offline_kernels.py")
SMALL = [f"{kernel.name}/{case.name}" for kernel in KERNELS.values() for case in kernel.small]
ON_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def offline(mode: str, folder: Path) -> dict[str, str]:
    """What a run without a GPU found; see offline_kernels.py."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(folder)}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), mode], capture_output=True, text=True, timeout=900, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return offline("interpret", tmp_path_factory.mktemp("triton"))


@pytest.mark.parametrize("name", SMALL)
def test_the_interpreted_kernel_equals_its_twin(name: str, interpreted: dict[str, str]) -> None:
    assert interpreted[name] == ""


def test_every_kernel_compiles_for_an_h200_without_a_gpu(tmp_path: Path) -> None:
    found = offline("compile", tmp_path)
    assert {name.split("/")[0] for name in found} == set(KERNELS)
    assert not {name: error for name, error in found.items() if error}


@pytest.mark.slow
def test_every_shape_of_the_benchmark_compiles_for_an_h200(tmp_path: Path) -> None:
    found = offline("compile-all", tmp_path)
    assert not {name: error for name, error in found.items() if error}


@ON_GPU
@pytest.mark.parametrize("name", SMALL if torch.cuda.is_available() else SMALL[:1])
def test_the_kernel_on_a_gpu_equals_its_twin(name: str) -> None:
    kernel, _, case_name = name.partition("/")
    (case,) = (case for case in KERNELS[kernel].small if case.name == case_name)
    KERNELS[kernel].check(case, torch.device("cuda"))


def test_the_registry_holds_every_operation() -> None:
    assert set(KERNELS) == set(operations())


@pytest.mark.parametrize("kernel", KERNELS.values(), ids=lambda k: k.name)
def test_cases_have_names_of_their_own(kernel: object) -> None:
    for cases in (kernel.small, kernel.medium, kernel.large):  # type: ignore[attr-defined]
        names = [case.name for case in cases]
        assert names
        assert len(set(names)) == len(names)
