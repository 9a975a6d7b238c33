"""``isoflop bench weights``: seconds per matrix of methods on weights, beside the code that their authors released, in one run.

Both sides get the same matrix and the same statistics of its inputs, which are correlated and have a few large channels, as those of
language models have. What is timed is the method alone, on one thread; behind it stands what the outputs lose, so that a faster side
that does less is seen. Ours also packs what is stored, which the released codes do not.

Shape suffixes: O outputs (rows), I inputs (columns), N tokens.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

from isoflop.bench.weights_released import RELEASED, Given, Peer, broken, find_peers
from isoflop.cli.common import console, emit, grid, json_option
from isoflop.core.errors import UserError
from isoflop.methods.base import build
from isoflop.methods.weights.base import MatrixCodecMethod
from isoflop.methods.weights.healing import HealedMethod
from isoflop.methods.weights.scaling import ScalingMethod
from isoflop.methods.weights.statistics import input_statistics
from isoflop.models.live_bytes import LiveBytes

TOKENS = 2048
LARGE_EVERY, LARGE = 37, 8.0
"""Channels of the inputs that are larger than the others, and how much."""


@dataclass(frozen=True)
class Case:
    """What is measured on both sides: a method with knobs, and the name of its peer."""

    label: str
    method: str
    knobs: dict[str, Any]
    peer: str


CASES = (
    Case("gptq 4 bits", "gptq", {"bits": 4, "group": 128}, "gptq"),
    Case("gptq, ordered", "gptq", {"bits": 4, "group": 128, "column_order": "activation", "static_groups": True}, "gptq-ordered"),
    Case("sparsegpt half", "sparsegpt", {"sparsity": 0.5}, "sparsegpt"),
    Case("sparsegpt 2:4", "sparsegpt", {"pattern": "2:4"}, "sparsegpt-2:4"),
    Case("hqq 4 bits", "hqq", {"bits": 4, "group": 64}, "hqq"),
    Case("nf4", "nf4", {"bits": 4, "block": 64}, "nf4"),
    Case("awq 4 bits", "awq", {"bits": 4, "group": 64}, "awq"),
    Case("aqlm 2 x 8", "aqlm", {"codebooks": 2, "code_bits": 8, "rounds": 1, "tolerance": 0.0, "heal_steps": 0}, "aqlm"),
)  # fmt: skip


def given(rows: int, cols: int, seed: int = 0) -> Given:
    """A matrix of normal weights, and inputs whose channels are correlated."""
    generator = torch.Generator().manual_seed(seed)
    mix_II = torch.eye(cols) + 0.5 * torch.randn(cols, cols, generator=generator) / cols**0.5
    x_NI = torch.randn(TOKENS, cols, generator=generator) @ mix_II
    x_NI[:, ::LARGE_EVERY] *= LARGE
    weight_OI = 0.03 * torch.randn(rows, cols, generator=generator)
    return Given(weight_OI, x_NI, input_statistics(x_NI))


def ours(case: Case, on: Given) -> Callable[[], Tensor]:
    """The method on one matrix, from its statistics to what is stored; gives the matrix as it is served."""
    method = build(case.method, case.knobs)

    def run() -> Tensor:
        stats = replace(on.stats, _curvatures={})  # nothing is known from the round before
        if isinstance(method, HealedMethod):
            return method.form(on.weight_OI.clone(), stats, 0).payload().decode()
        with torch.no_grad():
            if isinstance(method, ScalingMethod):
                scale_I = method.scales([on.weight_OI], stats)
                scaled = replace(stats, hessian_II=stats.hessian_II / scale_I / scale_I[:, None])
                return method.encode_scaled(on.weight_OI * scale_I, scaled).decode() / scale_I
            assert isinstance(method, MatrixCodecMethod)
            return method.encode(on.weight_OI.clone(), stats).decode()

    return run


def lost(weight_OI: Tensor, on: Given) -> float:
    """|(Ŵ - W)X|² / |WX|²."""
    change_OI = weight_OI.detach().float() - on.weight_OI
    return float(((change_OI @ on.stats.hessian_II) * change_OI).sum() / on.outputs)


def bench_weights(shapes: tuple[tuple[int, int], ...], released: Path | None, rounds: int) -> dict[str, Any]:
    """Both sides in turn; the least CPU seconds of some rounds.

    Raises:
        UserError: ``released`` is no folder, or what lies there fails.
    """
    if released is not None and not released.is_dir():
        raise UserError(f"--released {released}: no such folder; allowed: one with clones of {', '.join(RELEASED)}")
    peers, threads = find_peers(released), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rows = [_row(case, peers.get(case.peer), given(*shape), rounds) for shape in shapes for case in CASES]
    finally:
        torch.set_num_threads(threads)
    return {"rounds": rounds, "rows": rows}


def _row(case: Case, peer: Peer | None, on: Given, rounds: int) -> dict[str, Any]:
    sides = {"ours": ours(case, on)} | ({} if peer is None else {"released": lambda: _of_peer(peer, case, on)})
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    row: dict[str, Any] = {"case": case.label, "shape": "x".join(str(n) for n in on.weight_OI.shape)}
    for _ in range(rounds):
        for side, run in sides.items():
            started = time.process_time()
            served_OI = run()
            seconds[side].append(time.process_time() - started)
            row[f"{side}_lost"] = lost(served_OI, on)
    for side, run in sides.items():
        with LiveBytes() as live:
            run()
        row |= {f"{side}_seconds": min(seconds[side]), f"{side}_peak_mib": live.peak / 2**20}
    if peer is not None:
        row["ratio"] = row["ours_seconds"] / row["released_seconds"]
    return row


def _of_peer(peer: Peer, case: Case, on: Given) -> Tensor:
    try:
        return peer(on)
    except Exception as error:  # foreign code may fail in any way
        raise broken(f"the peer of {case.label}", error) from error


class _Shape(click.ParamType):
    name = "ROWSxCOLS"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[int, int]:
        if isinstance(value, tuple):
            return value
        sizes = value.split("x")
        if len(sizes) != 2 or not all(
            size.isdigit() and 64 <= int(size) <= 65536 and int(size) % 64 == 0 for size in sizes
        ):
            self.fail(f"{value} is no shape; allowed: ROWSxCOLS, multiples of 64, as in 576x1536", param, ctx)
        return int(sizes[0]), int(sizes[1])


COLUMNS = {
    "case": "method", "shape": "matrix", "ours_seconds": "CPU s", "released_seconds": "released", "ratio": "ratio",
    "ours_peak_mib": "MiB", "released_peak_mib": "released", "ours_lost": "lost", "released_lost": "released",
}  # fmt: skip


@click.command("weights")
@click.option("--shape", "shapes", multiple=True, type=_Shape(), default=((576, 576), (1536, 576)), help="Of a matrix; may be repeated.  [default: 576x576, 1536x576]")  # fmt: skip
@click.option("--released", type=click.Path(path_type=Path), help=f"Folder with clones of released code: {', '.join(RELEASED)}; what it lacks has no peer. Of bitsandbytes (nf4) what is installed is used.")  # fmt: skip
@click.option("--rounds", default=3, show_default=True, type=click.IntRange(1))
@json_option
def weights(shapes: tuple[tuple[int, int], ...], released: Path | None, rounds: int, as_json: bool) -> None:
    """Seconds per matrix of methods on weights, beside the code that their authors released."""
    found = bench_weights(shapes, released, rounds)

    def human() -> None:
        def cell(row: dict[str, Any], name: str) -> str:
            value = row.get(name, "-")
            digits = (
                ".4f"
                if name.endswith("lost")
                else ".0f"
                if name.endswith("mib")
                else ".2f"
                if name == "ratio"
                else ".3f"
            )
            return value if isinstance(value, str) else f"{value:{digits}}"

        console().print(grid(list(COLUMNS.values()), [[cell(row, name) for name in COLUMNS] for row in found["rows"]], right=list(COLUMNS.values())[2:]))  # fmt: skip
        console().print(f"CPU seconds on one thread, the least of {rounds}; MiB of tensors alive; lost: share of the outputs' squares, on {TOKENS} tokens. Groups of 128, of hqq, nf4 and awq 64; gptq ordered by activation, with static groups; aqlm for one round.")  # fmt: skip

    emit(found, as_json, human)
