"""Every kernel with its cases, what it must move and compute, and its peer in stock torch: for tests and benchmarks alike.

    from isoflop.kernels.registry import KERNELS

    for kernel in KERNELS.values():
        for case in kernel.small:
            kernel.check(case, torch.device("cuda"))

Adding a kernel: write the twin with its decorator (``dispatch.operation``), the Triton half in a module ending in
``_triton``, cases in ``cases``, and an entry here. Tests and ``isoflop bench kernels`` pick it up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from isoflop.kernels import cases
from isoflop.kernels.cases import Arguments, Case, Source
from isoflop.kernels.column_scores import column_scores
from isoflop.kernels.decode_segments import Part, RaggedPart, decode_segments
from isoflop.kernels.dispatch import Operation, leaves
from isoflop.kernels.merge import bipartite_match, merge_tokens
from isoflop.kernels.quant import Packed, quant_pack, unpack

Bound = Literal["bytes", "gather", "flops"]
TARGETS: dict[Bound, float] = {"bytes": 0.7, "gather": 0.5, "flops": 0.5}
"""The share of the copy bandwidth, or of the matrix rate, that a kernel should reach."""

_TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def compare_all(arguments: Arguments, found: Any, expected: Any) -> None:
    """Equal integers, and floats within what their type can hold of the result's own size (so that zeros never pass)."""
    pairs = list(zip(leaves(found), leaves(expected), strict=True))
    inputs = min((t.dtype for t in leaves(arguments) if t.is_floating_point()), key=lambda d: torch.finfo(d).bits)
    for mine, theirs in pairs:
        if mine.is_floating_point():
            loose = max(_TOLERANCE[mine.dtype], _TOLERANCE[inputs] if mine.dtype == torch.float32 else 0.0)
            finite = theirs[theirs.isfinite()].float()
            size = float(finite.square().mean().sqrt()) if finite.numel() else 0.0
            torch.testing.assert_close(mine, theirs, rtol=loose, atol=loose * size)
        else:
            torch.testing.assert_close(mine, theirs, rtol=0, atol=0)


def compare_packed(arguments: Arguments, found: Packed, expected: Packed) -> None:
    """The same codes on the same grid, bit by bit."""
    assert (found.bits, found.shape, found.axis, found.group) == (
        expected.bits,
        expected.shape,
        expected.axis,
        expected.group,
    )
    for mine, theirs in zip(found.tensors(), expected.tensors(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)


def compare_matches(arguments: Arguments, found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    """The same best similarities, and indices that have them (of near ties, rounding decides)."""
    compare_all(arguments, found[0], expected[0])
    only_BNM = torch.zeros(*found[1].shape, arguments["b_BMD"].shape[1], dtype=torch.bool, device=found[1].device)
    only_BNM.scatter_(2, found[1][..., None], True)
    a, b = (F.normalize(arguments[name].float(), dim=-1) for name in ("a_BND", "b_BMD"))
    cosine_BNM = a @ b.transpose(-1, -2)
    if arguments["valid_BM"] is not None:
        cosine_BNM = cosine_BNM.masked_fill(~arguments["valid_BM"][:, None], float("-inf"))
    compare_all(arguments, cosine_BNM[only_BNM].reshape(found[0].shape), expected[0])


@dataclass(frozen=True)
class Kernel:
    """One entry of the registry.

    Attributes:
        operation: its twin and its Triton half.
        bound: what limits it on a GPU: contiguous bytes, gathered bytes, or matrix FLOPs.
        stock: for arguments, a call that does the job with stock torch; what it prepares beforehand is not timed. None
            where torch has no operation for the job: the twin, run eagerly.
        peer_name: what stock torch does there.
        small: cases for the interpreter.
        large: cases for a GPU.
        medium: the same with fewer tokens, for a CPU.
        compare: raises AssertionError where a result differs from the twin's.
    """

    operation: Operation[Any, Any]
    bound: Bound
    stock: Callable[[Arguments], Callable[[], Any]] | None
    peer_name: str
    small: tuple[Case, ...]
    large: tuple[Case, ...]
    medium: tuple[Case, ...]
    compare: Callable[[Arguments, Any, Any], None] = field(default=compare_all)

    @property
    def name(self) -> str:
        """The operation's."""
        return self.operation.name

    @property
    def peer_is_twin(self) -> bool:
        """Whether stock torch has nothing better than the twin."""
        return self.stock is None

    def peer(self, arguments: Arguments) -> Callable[[], Any]:
        """The call that a benchmark times against the kernel."""
        return (lambda: self.operation.twin(**arguments)) if self.stock is None else self.stock(arguments)

    def check(self, case: Case, device: torch.device) -> None:
        """Run the Triton half on a case and compare it with the twin.

        Raises:
            AssertionError: they differ, or the case is not one that the Triton half covers.
        """
        arguments = case.make(Source(device))
        assert self.operation.supports(**arguments), f"{self.name} does not cover {case.name!r}"
        self.compare(arguments, self.operation.fused(**arguments), self.operation.twin(**arguments))


def bytes_moved(arguments: Arguments, result: Any) -> int:
    """The least that any implementation moves: each input read once, each result written once."""
    storages = {(t.data_ptr(), t.nbytes): t.nbytes for t in leaves([arguments, result])}
    return sum(storages.values())


# peers in stock torch


def _scores_peer(arguments: Arguments) -> Callable[[], Any]:
    """Blocks of rows: product in the model's type, softmax, weighted sums."""
    q_BHTD, k_BGSD, weight_BWT = arguments["q_BHTD"], arguments["k_BGSD"], arguments["weight_BWT"]
    batch, heads, queries, width = q_BHTD.shape
    groups, keys = k_BGSD.shape[1:3]
    block = max(1, (1 << 28) // (batch * heads * keys))
    q_BGRTD = q_BHTD.reshape(batch, groups, heads // groups, queries, width) * arguments["softmax"].scaling
    positions_BT, positions_BS = arguments["q_positions_BT"], arguments["k_positions_BS"]

    def run() -> Tensor:
        scores_BGWS = q_BHTD.new_zeros(batch, groups, weight_BWT.shape[1], keys, dtype=torch.float32)
        for start in range(0, queries, block):
            rows = slice(start, start + block)
            logits_BGRTS = q_BGRTD[:, :, :, rows] @ k_BGSD.transpose(-1, -2).unsqueeze(2)
            later_BTS = positions_BS[:, None, :] > positions_BT[:, rows, None]
            p_BGRTS = logits_BGRTS.masked_fill_(later_BTS[:, None, None], float("-inf")).softmax(
                -1, dtype=torch.float32
            )
            scores_BGWS += weight_BWT[:, None, :, rows] @ p_BGRTS.sum(2)
        return scores_BGWS

    return run


def _attention_peer(arguments: Arguments) -> Callable[[], Any]:
    """``scaled_dot_product_attention`` over the same tokens in a dense cache of the queries' type; ragged heads padded, with a mask."""
    q_BHTD, scaling = arguments["q_BHTD"], arguments["softmax"].scaling
    given: Sequence[Part] = arguments["segments"]
    parts = [part.padded() if isinstance(part, RaggedPart) else part for part in given]
    k_BGND = torch.cat([part.keys().to(q_BHTD.dtype) for part in parts], dim=2)
    v_BGND = torch.cat([part.values().to(q_BHTD.dtype) for part in parts], dim=2)
    mask_BHTN = None
    if any(part.log_bias_BGN is not None for part in parts):
        each = (
            k_BGND.new_zeros(*k_BGND.shape[:2], p.tokens) if p.log_bias_BGN is None else p.log_bias_BGN for p in parts
        )
        bias_BGN = torch.cat([bias.to(q_BHTD.dtype) for bias in each], dim=2)
        mask_BHTN = bias_BGN.repeat_interleave(q_BHTD.shape[1] // k_BGND.shape[1], 1)[:, :, None]
    return lambda: F.scaled_dot_product_attention(q_BHTD, k_BGND, v_BGND, mask_BHTN, scale=scaling, enable_gqa=True)


def _match_peer(arguments: Arguments) -> Callable[[], Any]:
    """Normalise, one batched product in the metric's type, maximum."""
    a_BND, b_BMD = arguments["a_BND"], arguments["b_BMD"]
    return lambda: (F.normalize(a_BND, dim=-1) @ F.normalize(b_BMD, dim=-1).transpose(-1, -2)).max(-1)


def _entry(kernel: Kernel) -> tuple[str, Kernel]:
    return kernel.name, kernel


_QUANT_LARGE, _QUANT_MEDIUM = cases.quant_large(8, 32768), cases.quant_large(1, 1024)

KERNELS: dict[str, Kernel] = dict(
    _entry(kernel)
    for kernel in (
        Kernel(
            quant_pack,
            "bytes",
            None,
            "eager torch (the twin)",
            cases.quant_small(),
            _QUANT_LARGE,
            _QUANT_MEDIUM,
            compare_packed,
        ),
        Kernel(
            unpack,
            "bytes",
            None,
            "eager torch (the twin)",
            cases.unpacked(cases.quant_small(), torch.float32, torch.bfloat16, torch.float16),
            cases.unpacked(_QUANT_LARGE, torch.bfloat16),
            cases.unpacked(_QUANT_MEDIUM, torch.bfloat16),
        ),
        Kernel(
            column_scores,
            "flops",
            _scores_peer,
            "matmul, softmax, sum by blocks of rows",
            cases.scores_small(),
            cases.scores_large(1, 8192, 32768),
            cases.scores_large(1, 512, 1024),
        ),
        Kernel(
            decode_segments,
            "bytes",
            _attention_peer,
            "scaled_dot_product_attention, dense cache",
            cases.decode_small(),
            cases.decode_large(8, 32768),
            cases.decode_large(1, 2048),
        ),
        Kernel(
            bipartite_match,
            "flops",
            _match_peer,
            "normalize, matmul, max",
            cases.match_small(),
            cases.match_large(8, 16),
            cases.match_large(1, 2),
            compare_matches,
        ),
        Kernel(
            merge_tokens,
            "gather",
            None,
            "eager torch (gather, scatter_add)",
            cases.merge_small(),
            cases.merge_large(8, 16),
            cases.merge_large(1, 2),
        ),
    )
)
