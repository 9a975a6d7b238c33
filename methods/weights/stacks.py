"""BitStack's decomposition into residual blocks, and the order in which the blocks are loaded (arXiv 2410.23918).

Shape suffixes: O outputs (rows), I inputs (columns), K rank.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from isoflop.core.hashing import derive_seed
from isoflop.methods.weights.artefact import Artefact, in_place
from isoflop.methods.weights.level_bank import LevelBank, calibration_loss
from isoflop.methods.weights.payloads import StackPayload, pack_signs
from isoflop.methods.weights.views import LinearView
from isoflop.models.base import Model

PERPLEXITY, RANDOM, WEIGHT_ERROR = "perplexity", "random", "weight-error"
SORTS = (PERPLEXITY, RANDOM, WEIGHT_ERROR)
_ORDER, _ERRORS = "order.json", "errors.json"


def low_rank(x_OI: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors (O, K) and (K, I) of the best rank-K approximation, the singular values split evenly between them.

    A rank far below that of the matrix comes from the leading eigenvectors of its smaller Gram matrix in float64, whose squares
    lose nothing that float32 holds: about a fifth of a whole decomposition's time at widths of a few hundred, less above.
    """
    if 4 * rank > min(x_OI.shape):
        left_OK, values_K, right_KI = torch.linalg.svd(x_OI, full_matrices=False)
        root_K = values_K[:rank].sqrt()
        return left_OK[:, :rank] * root_K, root_K[:, None] * right_KI[:rank]
    if x_OI.shape[0] < x_OI.shape[1]:
        right_IK, left_KO = low_rank(x_OI.T, rank)
        return left_KO.T, right_IK.T
    precise_OI = x_OI.double()
    vectors_IK = _leading_eigenvectors(precise_OI.T @ precise_OI, rank)
    scaled_OK = precise_OI @ vectors_IK  # left singular vectors times singular values
    root_K = scaled_OK.norm(dim=0).sqrt()
    left_OK = scaled_OK / root_K.clamp(min=torch.finfo(torch.float64).tiny)
    return left_OK.to(x_OI.dtype), (root_K[:, None] * vectors_IK.T).to(x_OI.dtype)


def _leading_eigenvectors(gram_II: Tensor, rank: int) -> Tensor:
    """Those of the ``rank`` largest eigenvalues of a symmetric matrix, (I, K), the largest first.

    LAPACK's driver for a range of eigenvalues, which torch does not reach, spares most of the work on the CPU.
    """
    if gram_II.device.type != "cpu":
        return torch.linalg.eigh(gram_II).eigenvectors[:, -rank:].flip(1)
    from scipy.linalg import eigh

    size = gram_II.shape[0]
    _, vectors_IK = eigh(gram_II.numpy(), subset_by_index=[size - rank, size - 1])
    return torch.from_numpy(vectors_IK[:, ::-1].copy())


def absolute_value_block(residual_OI: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Signs (±1, zero counts as +1) and the factors of |R|: one step of the absolute value decomposition (section 2.2)."""
    signs_OI = torch.where(residual_OI >= 0, 1.0, -1.0).to(residual_OI.dtype)
    return signs_OI, *low_rank(residual_OI.abs(), rank)


def block_bytes(rows: int, cols: int, k: int, avd: bool = True) -> int:
    """Bytes of one block: ⌈O·I/8⌉ + 2·k·(O + I). Without signs the same bytes hold a higher rank, rounded down."""
    size = math.ceil(rows * cols / 8) + 2 * k * (rows + cols)
    return size if avd else plain_rank(rows, cols, k) * 2 * (rows + cols)


def plain_rank(rows: int, cols: int, k: int) -> int:
    """Rank of a block without signs that takes at most the bytes of a block with signs."""
    return min((math.ceil(rows * cols / 8) + 2 * k * (rows + cols)) // (2 * (rows + cols)), rows, cols)


@torch.no_grad()
def decompose(
    weight_OI: Tensor, k: int, n_iter: int, avd: bool, divisor_I: Tensor | None = None
) -> tuple[StackPayload, list[float]]:
    """``n_iter`` residual blocks; each residual is formed with the factors as stored, in float16.

    Returns:
        the stack, and ‖R‖² before the first block and after each.
    """
    rows, cols = weight_OI.shape
    residual_OI = weight_OI.float()
    errors = [float(residual_OI.square().sum())]
    lefts, rights, signs = [], [], []
    for _ in range(n_iter):
        if avd:
            signs_OI, left_OK, right_KI = absolute_value_block(residual_OI, k)
            signs.append(pack_signs(residual_OI))
        else:
            signs_OI = torch.ones((), device=weight_OI.device)
            left_OK, right_KI = low_rank(residual_OI, plain_rank(rows, cols, k))
        lefts.append(left_OK.half())
        rights.append(right_KI.half())
        residual_OI = residual_OI - signs_OI * (lefts[-1].float() @ rights[-1].float())
        errors.append(float(residual_OI.square().sum()))
    packed = torch.stack(signs) if signs else None
    return StackPayload((rows, cols), torch.stack(lefts), torch.stack(rights), packed, divisor_I), errors


@dataclass(frozen=True, eq=False)
class Stacks:
    """The decomposition of a model.

    Attributes:
        artefact: a ``StackPayload`` for each view, and the vectors that scales are folded into.
        errors: ‖R‖² of each view's scaled matrix before the first block and after each.
    """

    artefact: Artefact
    errors: dict[str, list[float]]

    def stack(self, name: str) -> StackPayload:
        """All blocks of one view."""
        found = self.artefact[name]
        assert isinstance(found, StackPayload)
        return found

    def save(self, folder: Path) -> None:
        """Write everything into a folder."""
        self.artefact.save(folder)
        (folder / _ERRORS).write_text(json.dumps(self.errors) + "\n")

    @classmethod
    def load(cls, folder: Path, device: str = "cpu") -> Stacks:
        """The inverse of :meth:`save`."""
        return cls(Artefact(folder, device=device), json.loads((folder / _ERRORS).read_text()))


@dataclass(frozen=True, eq=False)
class SortedStacks:
    """Stacks of every view and the order in which blocks are loaded: one artefact that serves every budget.

    Attributes:
        stacks: ``StackPayload`` of each view.
        order: names of views behind the first level, which is always loaded: the n-th mention of a view is its block n + 1.
        sizes: bytes of each view's (first block with whatever belongs to the view, further block).
    """

    stacks: Stacks
    order: list[str]
    sizes: dict[str, tuple[float, float]]

    @property
    def least(self) -> float:
        """Bytes of the first level."""
        return sum(first for first, _ in self.sizes.values())

    def blocks_within(self, budget: float) -> dict[str, int]:
        """Blocks per view of the longest prefix of the order that takes at most ``budget`` bytes."""
        blocks = dict.fromkeys(self.sizes, 1)
        total = self.least
        for name in self.order:
            total += self.sizes[name][1]
            if total > budget:
                break
            blocks[name] += 1
        return blocks

    def save_order(self, folder: Path) -> None:
        """Write the order; the stacks are kept by the stage that decomposes."""
        (folder / _ORDER).write_text(json.dumps({"order": self.order, "sizes": self.sizes}) + "\n")

    @classmethod
    def load(cls, stacks: Stacks, folder: Path) -> SortedStacks:
        """The inverse of :meth:`save_order`."""
        found = json.loads((folder / _ORDER).read_text())
        return cls(stacks, found["order"], {name: (first, more) for name, (first, more) in found["sizes"].items()})


def sort_blocks(
    model: Model, views: list[LinearView], stacks: Stacks, sort: str, batches: list[Any], seed: int
) -> SortedStacks:
    """The order of loading, level by level: every view gets block n + 1 before any gets block n + 2.

    Within a level: ascending loss on ``batches`` with one block added to one view and all others a level below
    (``perplexity``; losses that are not finite come last), descending gain in the squared error of the scaled matrices
    (``weight-error``), or at random.
    """
    names = [view.name for view in views]
    full = {name: stacks.stack(name) for name in names}
    levels = range(1, min(stack.blocks for stack in full.values()))
    if sort == PERPLEXITY:
        with in_place(model, stacks.artefact.vectors):
            order = _by_loss(model, views, full, levels, batches)
    elif sort == WEIGHT_ERROR:
        order = [name for level in levels for name in sorted(names, key=lambda n: -_gain(stacks.errors[n], level))]
    else:
        generator = torch.Generator().manual_seed(derive_seed("block order", seed))
        order = [names[i] for _ in levels for i in torch.randperm(len(names), generator=generator).tolist()]
    return SortedStacks(stacks, order, {name: _sizes(stack) for name, stack in full.items()})


def _by_loss(
    model: Model, views: list[LinearView], full: Mapping[str, StackPayload], levels: range, batches: list[Any]
) -> list[str]:
    bank: LevelBank[int] = LevelBank(views, lambda view, level: full[view.name].prefix(level))
    order: list[str] = []
    with bank.in_place(model):
        for level in levels:
            for view in views:
                bank.switch(view, level)
            losses = {}
            for view in views:
                bank.switch(view, level + 1)
                loss = calibration_loss(model, batches)
                losses[view.name] = loss if math.isfinite(loss) else math.inf
                bank.switch(view, level)
            order += sorted(losses, key=lambda name: losses[name])
    return order


def _gain(errors: list[float], level: int) -> float:
    """Squared error that block ``level + 1`` takes away."""
    return errors[level] - errors[level + 1]


def _sizes(stack: StackPayload) -> tuple[float, float]:
    """Bytes of the first block with what belongs to the whole stack, and of each further block."""
    first = stack.prefix(1).nbytes()
    return first, (stack.nbytes() - first) / max(stack.blocks - 1, 1)
