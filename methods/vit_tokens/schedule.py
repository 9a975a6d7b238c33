"""How many tokens each block removes, what a forward pass with them costs, and the schedule that meets a budget.

Costs are multiply-adds (MACs). A block with N_in tokens before and N_out after a reduction between attention and MLP
costs 4 N_in C² + 2 N_in² C + 2 N_out C M for width C and MLP width M (3 N_out C M where the MLP is gated). Added are the patch
embedding, what pools tokens, the classifier and what a method spends on scoring. Norms, softmax, activations, sums and look-ups are left out, as
``torch.utils.flop_counter`` does, against which a test holds these formulas.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

SHAPES = ("ratio", "fixed", "decreasing")
STEPS = 2048
"""Evenly spaced amounts that are tried for a budget: enough to meet every schedule of up to 48 patches and 12 blocks."""

Scoring = Callable[[int, int], int]
"""MACs that a method spends on scoring in one block: (patches before, tokens removed) → MACs."""
Most = Callable[[int], int]
"""The most tokens that a block may remove from so many patches."""


def removals(shape: str, amount: float, patches: int, layers: int, most: Most) -> tuple[int, ...]:
    """Tokens removed in each block.

    Args:
        shape: ``ratio``: every block keeps the same share of its patches, floor(T - T·share) go; ``fixed``: every block
            removes ``amount`` (a fraction is spread over the blocks); ``decreasing``: from twice that linearly to none.
        amount: tokens removed in the first block for ``ratio``, per block for ``fixed``, on average for ``decreasing``.
        patches: at the input of the first block.
        most: caps what a block may remove.
    """
    left, removed = patches, []
    for block in range(layers):
        if shape == "ratio":
            wanted = _floor(left * amount / patches)
        elif shape == "fixed":
            wanted = _floor((block + 1) * amount) - _floor(block * amount)
        else:
            wanted = _floor(2 * amount * (1 - block / max(1, layers - 1)))
        removed.append(min(wanted, most(left)))
        left -= removed[-1]
    return tuple(removed)


def largest_amount(shape: str, patches: int, most: Most) -> float:
    """The largest ``amount`` whose first block removes no more than it may."""
    return most(patches) / 2 if shape == "decreasing" else float(most(patches))


def model_macs(
    geometry: Mapping[str, Any], removed: Sequence[int], scoring: Scoring | None = None, after_block: bool = False
) -> int:
    """MACs of one image, from pixels to logits.

    Args:
        geometry: of a ``VitInfo``.
        removed: tokens removed in each block.
        scoring: of the method; asked only for blocks that remove something.
        after_block: tokens go after the MLP instead of before it.
    """
    width, patches, prefix = geometry["width"], geometry["patches"], geometry["prefix"]
    total = patches * geometry["patch_inputs"] * width + geometry["heads_out"] * width * geometry["classes"]
    matrices = geometry.get("mlp_matrices", 2)
    for count in removed:
        left = patches if after_block else patches - count
        total += block_macs(prefix + patches, prefix + left, width, geometry["mlp"], matrices)
        if count and scoring is not None:
            total += scoring(patches, count)
        patches -= count
    fixed, per_token = geometry.get("pool_macs", (0, 0))
    return int(total + fixed + per_token * (prefix + patches))


def block_macs(tokens_in: int, tokens_out: int, width: int, mlp: int, matrices: int = 2) -> int:
    """MACs of one block whose attention sees ``tokens_in`` tokens and whose MLP, of so many matrices, sees ``tokens_out``."""
    return 4 * tokens_in * width**2 + 2 * tokens_in**2 * width + matrices * tokens_out * width * mlp


def within_budget(
    geometry: Mapping[str, Any], shape: str, share: float, most: Most, scoring: Scoring, after_block: bool = False
) -> tuple[tuple[int, ...] | None, float]:
    """The dearest schedule of a shape, of those at ``STEPS`` amounts, that costs at most ``share`` of the dense model.

    Costs include scoring.

    Returns:
        Tokens removed in each block (None when even the strongest schedule costs more), and the least share that the
        shape reaches.
    """
    layers, patches = geometry["layers"], geometry["patches"]
    dense = model_macs(geometry, (0,) * layers)
    largest = largest_amount(shape, patches, most)
    best: tuple[int, tuple[int, ...]] | None = None
    least = dense
    # Costs jump where a block removes its first token and pays for scoring, so a bisection could stop at the wrong end.
    for step in range(STEPS + 1):
        removed = removals(shape, largest * step / STEPS, patches, layers, most)
        macs = model_macs(geometry, removed, scoring, after_block)
        least = min(least, macs)
        if macs <= share * dense and (best is None or macs > best[0]):
            best = (macs, removed)
    return (None if best is None else best[1]), least / dense


def _floor(value: float) -> int:
    # Forgives rounding: 100 tokens less 93 percent are 7, not 6.999….
    return math.floor(value + 1e-9)
