"""Run the Triton halves without a GPU, in a process of its own: ``python offline_kernels.py interpret|compile|compile-all``.

Both ways change Triton for the whole process (its interpreter must be chosen before kernels are defined, and a compiler
target without a device must be put in place of the driver), so tests start this as a program and read one JSON object:
for each ``kernel/case`` an empty string, or why it failed.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from typing import Any

os.environ.update(OMP_NUM_THREADS="1")
if sys.argv[1] == "interpret":
    os.environ["TRITON_INTERPRET"] = "1"
else:
    os.environ.pop("TRITON_INTERPRET", None)

import torch

from isoflop.kernels.cases import Case, Source
from isoflop.kernels.registry import KERNELS, Kernel

SHARED_MEMORY = 232_448
"""Bytes that a program may use on an H200 (compute capability 9.0)."""


def interpret(kernel: Kernel, case: Case) -> None:
    """The kernel's result in Triton's interpreter equals the twin's."""
    kernel.check(case, torch.device("cpu"))


class Cuda90:
    """A driver that names a target and has no device."""

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


compiled: list[Any] = []


def compile_only() -> None:
    """Every launch compiles to machine code for an H200 and runs nothing."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    driver.set_active(Cuda90())
    launch = JITFunction.run

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        made = launch(self, *args, grid=grid, warmup=True, **kwargs)
        compiled.append(made)
        return made

    JITFunction.run = run


def compiles(kernel: Kernel, case: Case) -> None:
    """The kernel's launches compile for compute capability 9.0 and fit its shared memory."""
    compiled.clear()
    arguments = case.make(Source(torch.device("cpu")))
    kernel.operation.fused(**arguments)
    assert compiled, "nothing was launched"
    for made in compiled:
        assert made.asm["cubin"][:4] == b"\x7fELF"
        assert made.metadata.shared <= SHARED_MEMORY, f"{made.metadata.shared} bytes of shared memory"


def chosen(kernel: Kernel, mode: str) -> tuple[Case, ...]:
    """Small cases to interpret; to compile, the shapes and types of hardware, and one in float32."""
    if mode == "interpret":
        return kernel.small
    if mode == "compile":
        return kernel.medium[:1]
    return (*kernel.medium, kernel.small[0], *(case for case in kernel.small if case.name.startswith("cap")))


def main() -> None:
    """Print what became of every case."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    mode = sys.argv[1]
    if mode != "interpret":
        compile_only()
    found = {}
    for kernel in KERNELS.values():
        for case in chosen(kernel, mode):
            try:
                (interpret if mode == "interpret" else compiles)(kernel, case)
                found[f"{kernel.name}/{case.name}"] = ""
            except Exception as error:
                found[f"{kernel.name}/{case.name}"] = f"{type(error).__name__}: {error}"
    print(json.dumps(found))


main()
