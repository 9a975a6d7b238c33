"""Which implementation runs, and that the Triton half is never needed without a GPU."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from isoflop.kernels import dispatch
from isoflop.kernels.quant import quant_pack


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


def test_kernels_work_without_triton_and_without_the_rest_of_isoflop() -> None:
    """Every module but the Triton halves imports and computes where triton cannot be imported, and imports no room above."""
    done = python(
        "import sys; sys.modules['triton'] = None\n"
        "import torch, isoflop.kernels.registry\n"
        "from isoflop.kernels.quant import quant_pack, unpack\n"
        "rooms = {'.'.join(m.split('.')[:2]) for m in sys.modules if m.startswith('isoflop.')}\n"
        "halves = [m for m in sys.modules if m.endswith('_triton') and m.startswith('isoflop.')]\n"
        "print(unpack(quant_pack(torch.arange(4.0), 2)).tolist(), halves, sorted(rooms))"
    )
    assert done.stdout.strip() == "[0.0, 1.0, 2.0, 3.0] [] ['isoflop.core', 'isoflop.kernels']", done.stderr


def test_cpu_tensors_never_reach_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(dispatch.VARIABLE, "all")
    monkeypatch.setattr(type(quant_pack), "fused", property(lambda self: pytest.fail("the kernel ran on a CPU tensor")))
    assert torch.equal(quant_pack(torch.arange(4.0), 2).codes, quant_pack.twin(torch.arange(4.0), 2).codes)


def test_a_kernel_that_no_gpu_has_measured_is_off_until_someone_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(dispatch.VARIABLE, raising=False)
    monkeypatch.setattr(quant_pack, "measured", False)
    assert not quant_pack.switched_on()
    monkeypatch.setenv(dispatch.VARIABLE, "quant_pack")
    assert quant_pack.switched_on()
    monkeypatch.setenv(dispatch.VARIABLE, "all,-quant_pack")
    assert not quant_pack.switched_on()
    dispatch.use("quant_pack")
    try:
        assert quant_pack.switched_on()
    finally:
        dispatch.use("quant_pack", None)
    monkeypatch.setenv(dispatch.VARIABLE, "none")
    monkeypatch.setattr(quant_pack, "measured", True)
    assert not quant_pack.switched_on()


def test_unknown_names_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="unknown kernel 'quantpack'; allowed: bipartite_match, column_scores"):
        dispatch.use("quantpack")
    monkeypatch.setenv(dispatch.VARIABLE, "all,-merge")
    with pytest.raises(ValueError, match="ISOFLOP_KERNELS=all,-merge: unknown kernel 'merge'"):
        quant_pack.switched_on()


def test_leaves_finds_tensors_in_dataclasses() -> None:
    packed = quant_pack(torch.arange(8.0), 4)
    found = list(dispatch.leaves({"a": [packed, 3], "b": (torch.ones(2),)}))
    assert [t.dtype for t in found] == [torch.uint8, torch.float16, torch.float16, torch.float32]
