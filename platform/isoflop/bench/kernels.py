"""``isoflop bench kernels``: each Triton kernel against the hardware's own rates and against stock torch, in one run.

The bandwidth of a copy and the rate of a matrix product are measured first. A kernel's time is then set against the least
bytes it must move (each input read once, each output written once) at that bandwidth, or against its matrix FLOPs at that
rate, and against its peer in stock torch on the same arguments. Each kernel is compared with its twin before it is timed.

Without a GPU the twins are timed on smaller shapes: that shows the harness and what the CPU path costs, not the kernels.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import click
import torch

from isoflop.cli.common import console, emit, grid, json_option
from isoflop.core.errors import UserError, unknown
from isoflop.kernels.cases import Case, Source
from isoflop.kernels.registry import KERNELS, TARGETS, Kernel, bytes_moved

_CPU_NOTE = "No GPU: these are the torch twins on small shapes. The kernels' own figures need one (--device cuda)."


@dataclass(frozen=True)
class Rates:
    """What the device does on its own, in one run with the kernels.

    Attributes:
        copy: bytes per second, read and written, of a large copy.
        matmul: FLOPs per second of a large matrix product (bfloat16 on a GPU, float32 on a CPU).
    """

    copy: float
    matmul: float


@dataclass(frozen=True)
class Row:
    """One kernel on one case.

    Attributes:
        implementation: ``triton``, or ``twin`` on a CPU.
        share: of the copy bandwidth, or of the matrix rate, whichever bounds the kernel.
        peer_seconds: of stock torch; None where the twin is its own peer.
        error: why there is no time.
    """

    kernel: str
    case: str
    implementation: str
    bound: str
    bytes: int = 0
    flops: float = 0.0
    seconds: float | None = None
    share: float | None = None
    target: float | None = None
    peer: str = ""
    peer_seconds: float | None = None
    speedup: float | None = None
    on_by_default: bool = False
    error: str = ""


def bench_kernels(device: torch.device, names: tuple[str, ...] = ()) -> dict[str, Any]:
    """Measure the kernels called ``names``, or all of them."""
    rates = measure_rates(device)
    rows = [
        row for name, kernel in KERNELS.items() if not names or name in names for row in _rows(kernel, device, rates)
    ]
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "note": "" if device.type == "cuda" else _CPU_NOTE,
        **asdict(rates),
        "rows": [asdict(row) for row in rows],
    }


def measure_rates(device: torch.device) -> Rates:
    """Copy bandwidth and matrix rate, measured now."""
    on_gpu = device.type == "cuda"
    source = torch.empty(2**31 if on_gpu else 2**26, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copied = timed(lambda: target.copy_(source), device)
    size = 8192 if on_gpu else 1024
    a = torch.ones(size, size, device=device, dtype=torch.bfloat16 if on_gpu else torch.float32)
    return Rates(2 * source.nbytes / copied, 2 * size**3 / timed(lambda: a @ a, device))


def timed(run: Callable[[], Any], device: torch.device, budget: float = 0.3) -> float:
    """Seconds of one call: on a GPU the median with a cold L2 cache, on a CPU the least of several.

    Args:
        budget: seconds to spend on a CPU, at least two calls.
    """
    if device.type == "cuda":
        from triton.testing import do_bench

        return float(do_bench(run, warmup=50, rep=200, return_mode="median")) / 1000
    run()
    best, end = float("inf"), time.perf_counter() + budget
    while best == float("inf") or time.perf_counter() < end:
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
    return best


def _rows(kernel: Kernel, device: torch.device, rates: Rates) -> Iterator[Row]:
    for case in kernel.large if device.type == "cuda" else kernel.medium:
        start = Row(
            kernel=kernel.name,
            case=case.name,
            implementation="triton" if device.type == "cuda" else "twin",
            bound=kernel.bound,
            target=TARGETS[kernel.bound],
            peer=kernel.peer_name,
            on_by_default=kernel.operation.measured,
        )
        try:
            yield _measure(kernel, case, device, rates, start)
        except Exception as error:  # one kernel that fails must not hide the figures of the others
            text = str(error).strip()
            yield replace(start, error=f"{type(error).__name__}: {text.splitlines()[0] if text else ''}")
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _measure(kernel: Kernel, case: Case, device: torch.device, rates: Rates, row: Row) -> Row:
    arguments = case.make(Source(device, portable=False))
    operation = kernel.operation
    run = operation.fused if device.type == "cuda" else operation.twin
    with torch.inference_mode():
        result = run(**arguments)
        if device.type == "cuda":
            kernel.compare(arguments, result, operation.twin(**arguments))
        moved = bytes_moved(arguments, result)
        del result
        seconds = timed(lambda: run(**arguments), device)
        same = device.type != "cuda" and kernel.peer_is_twin
        peer_seconds = None if same else timed(kernel.peer(arguments), device)
    ideal = case.flops / rates.matmul if kernel.bound == "flops" else moved / rates.copy
    return replace(
        row,
        bytes=moved,
        flops=case.flops,
        seconds=seconds,
        share=ideal / seconds,
        peer_seconds=peer_seconds,
        speedup=None if peer_seconds is None else peer_seconds / seconds,
    )


@click.command("kernels")
@click.option("--device", type=click.Choice(["cuda", "cpu"]), help="Default: cuda where there is one.")
@click.option("--kernel", "names", multiple=True, metavar="NAME", help="Only this kernel; may be repeated.")
@json_option
def kernels(device: str | None, names: tuple[str, ...], as_json: bool) -> None:
    """Time, bytes, share of the measured bandwidth or matrix rate, and stock torch at the same shape."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no CUDA device here; --device cpu measures the torch twins")
    for name in names:
        if name not in KERNELS:
            raise unknown("kernel", name, KERNELS, "--kernel")
    chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    found = bench_kernels(chosen, names)
    emit(found, as_json, lambda: _print(found))


def _print(found: dict[str, Any]) -> None:
    out = console()
    out.print(f"{found['device']}: copy {found['copy'] / 1e9:,.0f} GB/s, matmul {found['matmul'] / 1e12:,.3g} TFLOP/s")
    if found["note"]:
        out.print(found["note"])
    for name in dict.fromkeys(row["kernel"] for row in found["rows"]):
        rows = [row for row in found["rows"] if row["kernel"] == name]
        of = "matmul" if rows[0]["bound"] == "flops" else "copy"
        headers = ["case", "ms", "MB", "GFLOP", f"of {of}", "peer ms", "speed-up"]
        state = "on" if rows[0]["on_by_default"] else "off"
        out.print()
        out.print(grid(headers, [_line(row) for row in rows], headers[1:], f"{name} ({rows[0]['implementation']})"))
        out.print(f"peer: {rows[0]['peer']}")
        out.print(f"target: {rows[0]['target']:.0%} of {of}, faster than the peer; on CUDA {state} by default")
        for row in rows:
            if row["error"]:
                out.print(f"{row['case']}: {row['error']}", markup=False)


def _line(row: dict[str, Any]) -> list[Any]:
    share = None if row["share"] is None else f"{row['share']:.0%}"
    speedup = None if row["speedup"] is None else f"{row['speedup']:.2f}x"
    milliseconds = [None if s is None else f"{1e3 * s:.3g}" for s in (row["seconds"], row["peer_seconds"])]
    work = [f"{row['bytes'] / 1e6:.4g}", f"{row['flops'] / 1e9:.4g}" if row["flops"] else None]
    return [row["case"], milliseconds[0], *work, share, milliseconds[1], speedup]
