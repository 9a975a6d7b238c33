"""Which entries of a tensor are worth sending: exact top-k, and Deep Gradient Compression's sampled threshold.

Shape suffixes: n elements of the flattened tensor, K selected entries.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from isoflop.methods.selection import sortable

SAMPLE_SHARE = 0.01
UPPER, LOWER = 1.3, 0.8
ADAPTATIONS = 10
WARMUP_STAGES = 5
SAMPLERS = ("exact", "sampled")


def entries_at(density: float, numel: int) -> int:
    """k: ⌈density · numel⌉, at least 1; a product that only rounding put above a whole number does not count."""
    return max(1, min(numel, math.ceil(density * numel - 1e-9)))


def exact_top(magnitude_n: Tensor, k: int) -> Tensor:
    """Indices of the ``k`` largest, ascending."""
    return torch.topk(sortable(magnitude_n), k, sorted=False).indices.sort().values


def sampled_top(magnitude_n: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """Indices of at most ``k`` entries above a threshold estimated on a sample, ascending (arXiv 1712.01887, section 3).

    The threshold is the smallest of the top share of every ``stride``-th element from a random start. Where it lets
    through more than 1.3·k, the k largest of those are taken; while it lets through fewer than 0.8·k it is lowered by
    that factor, at most ten times. What then exceeds k is cut off at the end of the tensor, as in the released code.
    """
    return selected_above(magnitude_n, k, generator)[0]


def selected_above(magnitude_n: Tensor, k: int, generator: torch.Generator) -> tuple[Tensor, int, int]:
    """See ``sampled_top``; besides the indices, how many were selected before the cut, and the adaptations made."""
    numel = len(magnitude_n)
    stride = sample_stride(numel, k / numel)
    if stride == 1:
        return exact_top(magnitude_n, k), k, 0
    start = int(torch.randint(stride, (1,), generator=generator))
    sample = magnitude_n[start::stride]
    threshold = torch.topk(sample, entries_at(k / numel, len(sample)), sorted=False).values.min()
    indices_K = (magnitude_n >= threshold).nonzero().flatten()
    adaptations = 0
    while len(indices_K) < LOWER * k and adaptations < ADAPTATIONS:
        threshold = threshold * LOWER
        indices_K = (magnitude_n >= threshold).nonzero().flatten()
        adaptations += 1
    if len(indices_K) > UPPER * k:
        indices_K = indices_K[exact_top(magnitude_n[indices_K], k)]
    return indices_K[:k], len(indices_K), adaptations


def sample_stride(numel: int, density: float) -> int:
    """Distance between sampled elements: an odd number at which the sample has 1 % of them and 2 / density at least."""
    wanted = max(math.ceil(numel * SAMPLE_SHARE), math.ceil(2 / density))
    if numel <= wanted:
        return 1
    stride = math.ceil(numel / wanted / 32) * 32 + 1
    while stride > 1 and numel // stride < wanted:
        stride = max(1, stride - 8)
    return stride


def warmed_density(density: float, step: int, warmup_steps: int) -> float:
    """The density of a step: during the warm-up one of ``WARMUP_STAGES`` on an exponential way from 1 to ``density``.

    Stage e of W has density^((e+1)/(W+1)), as in the released code, where a stage is an epoch.
    """
    if step >= warmup_steps:
        return density
    stage = step * WARMUP_STAGES // warmup_steps
    return density ** ((stage + 1) / (WARMUP_STAGES + 1))
