"""LR²VQ: groups of weights in a space of few dimensions, clustered there, both learned together (arXiv 2211.11397).

Shape suffixes: O outputs (rows), I inputs (columns), N groups, G weights of a group (the paper's d), D dimensions (its d~), K entries
of the codebook.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, ClassVar, Self

import torch
from torch import Tensor, nn

from isoflop.core.errors import Infeasible
from isoflop.core.hashing import derive_seed
from isoflop.core.knobs import Knob, KnobValue
from isoflop.core.stage import StageContext
from isoflop.methods.base import METHODS, Axes
from isoflop.methods.weights.base import known_matrices
from isoflop.methods.weights.codebooks import (
    CodebookPayload,
    code_bits,
    distances,
    groups_of,
    k_means,
    matrix_of,
    nearest,
)
from isoflop.methods.weights.healing import Form, Forms, Healed, HealedMethod, Whole
from isoflop.methods.weights.statistics import Statistics, ViewStats
from isoflop.methods.weights.views import linear_views
from isoflop.models.base import Model, ModelInfo

DKM, STE = "dkm", "ste"
ROUNDS, STILL = 5, 1e-4
"""Rounds of soft clustering in a step at most, and the relative movement of entries below which they end."""

MOST_SHARES = 2**30
"""Of groups in entries, over all matrices: float32 numbers that a step of soft clustering holds several times."""


@METHODS.register("lr2vq")
@dataclass(frozen=True)
class Lr2Vq(HealedMethod):
    """Groups of ``m`` inputs of a row become points Z in ``rank`` dimensions times a basis B, and the points codes of a codebook.

    B and Z begin as the principal components of the groups. They are trained first (``pretrain_steps``), so that the model
    takes up what the projection loses; then Z is clustered (k-means++), and codebook and basis are trained (``heal_steps``) with
    assignments that follow: soft, by a softmax over distances that is iterated to a fixed point (``assign: dkm``, arXiv 2108.12659),
    or hard with gradients straight through (``ste``). Each group takes log2(``k``) bits. ``m`` sets the ratio; ``rank`` changes
    accuracy alone, but for the tables: 16·min(K·D + D·m, K·m) bits a matrix, which are counted, and dominate small matrices.
    ``rank`` = ``m`` is plain vector quantisation, or DKM. Without training no rank can do better than that; the gain comes of it.

    Our choices, since only the abstract could be read and no code is released: the order of steps above; a codebook for each
    matrix; temperatures relative to the mean square of the points; gradients of soft clustering through its last round; the last
    group of a row is filled with zeros where ``m`` does not divide it. Soft clustering holds a number for each group and entry: ``ste``
    is for large models.
    """

    paper: ClassVar[str] = "arXiv 2211.11397"

    m: Annotated[int, Knob(choices=(4, 8, 16, 32, 64), ratio=True, unit="weights", doc="of a row that share a code")] = 8  # fmt: skip
    k: Annotated[int, Knob(choices=(16, 64, 256, 1024), doc="entries of a matrix's codebook, at most one for each group")] = 256  # fmt: skip
    rank: Annotated[int, Knob(low=1, high=64, doc="dimensions in which groups are clustered; m for all of them")] = 4
    assign: Annotated[str, Knob(choices=(DKM, STE), doc="how groups follow the codebook while it is trained")] = DKM
    tau: Annotated[float, Knob(low=1e-4, high=10.0, log=True, doc="temperature of soft assignments, relative to the points' mean square")] = 0.01  # fmt: skip
    pretrain_steps: Annotated[int, Knob(low=0, high=1_000_000, doc="of training points and basis before they are clustered")] = 100  # fmt: skip

    def check(self, info: ModelInfo) -> None:
        """Refuse more dimensions than weights, and a training without a loss."""
        super().check(info)
        if self.rank > self.m:
            raise Infeasible(
                f"method lr2vq: rank = {self.rank} exceeds m = {self.m}; allowed: rank up to {self.m}, or a larger m"
            )
        if self.heal_steps and self.assign == DKM:
            held = sum(rows * -(-cols // self.m) * self.k * count for rows, cols, count in known_matrices(info))
            if held > MOST_SHARES:
                raise Infeasible(
                    f"method lr2vq: assign = {DKM} holds {held:.2g} shares of groups in entries in each step on model {info.ref}, and "
                    f"at most {MOST_SHARES:.2g} are tried; allowed: assign = {STE}, a larger m, a smaller k, or heal_steps = 0"
                )
        if self.pretrain_steps:
            info.check_loss(f"method {self.name} with pretrain_steps = {self.pretrain_steps}")

    def relevant(self) -> Lr2Vq:
        """Temperatures are those of soft assignments, which only training makes."""
        method = self if self.pretrain_steps else super().relevant()
        if not self.heal_steps:
            return method.at_defaults("assign", "tau")
        return method.at_defaults("tau") if self.assign == STE else method

    def begun(self, steps: int) -> Self:
        """Both trainings."""
        return replace(super().begun(steps), pretrain_steps=min(self.pretrain_steps, steps))

    def axes(self, info: ModelInfo) -> Axes:
        """Bits per weight, tables included where the matrices are known."""
        known = known_matrices(info)
        if not known:
            return Axes(bits=code_bits(self.k) / self.m, ratio=info.dense_bits * self.m / code_bits(self.k))
        count = sum(rows * cols * n for rows, cols, n in known)
        bits = sum(n * min(16 * rows * cols, stored_bits(rows, cols, self.m, self.k, self.rank)) for rows, cols, n in known)  # fmt: skip
        return Axes(bits=bits / count, ratio=info.dense_bits * count / bits)

    def form(self, weight_OI: Tensor, stats: ViewStats | None, seed: int) -> Form:
        """Its points, clustered as they are; a matrix that codes and tables would not shorten stays whole."""
        form = self.points(weight_OI)
        return self.clustered(form, seed) if isinstance(form, Points) else form

    def points(self, weight_OI: Tensor) -> Form:
        """Its groups in few dimensions."""
        rows, cols = weight_OI.shape
        if stored_bits(rows, cols, self.m, self.k, self.rank) >= 16 * rows * cols:
            return Whole(weight_OI)
        groups_NG = groups_of(weight_OI.float(), self.m)
        if self.rank == self.m:
            return Points((rows, cols), groups_NG.clone(), None)
        basis_DG = principal(groups_NG, self.rank)
        return Points((rows, cols), groups_NG @ basis_DG.T, basis_DG)

    def clustered(self, form: Points, seed: int) -> Clustered:
        """The points as they are now, with a codebook."""
        generator = torch.Generator().manual_seed(seed)
        table_KD = k_means(form.points_ND.detach(), self.k, generator)
        return Clustered(form, table_KD, self.assign, self.tau)

    def compress(
        self, model: Model, ctx: StageContext, statistics: Statistics | None, seed: int, scratch: Path | None = None
    ) -> Healed:
        """Both trainings, with the clustering in between."""
        views = linear_views(model)
        with torch.no_grad():
            forms = [self.points(view.weight()) for view in views]
        before = replace(self, heal_steps=self.pretrain_steps)
        losses = before.heal(
            model, ctx, Forms(views, forms), derive_seed("pretraining", seed), _folder(scratch, "points")
        )
        with torch.no_grad():
            forms = [
                self.clustered(form, derive_seed("form", self.name, view.name, seed)) if isinstance(form, Points) else form
                for view, form in zip(views, forms, strict=True)
            ]  # fmt: skip
        losses += self.heal(model, ctx, Forms(views, forms), seed, _folder(scratch, "codebook"))
        return self.stored(views, forms, losses)

    @classmethod
    def tried(cls) -> Mapping[str, Sequence[Mapping[str, KnobValue]]]:
        """A temperature shows where it is high enough to matter."""
        return {"tau": [{"tau": 0.01}, {"tau": 1.0}]}


def _folder(scratch: Path | None, name: str) -> Path | None:
    """Of one of two trainings."""
    if scratch is None:
        return None
    (scratch / name).mkdir(exist_ok=True)
    return scratch / name


def stored_bits(rows: int, cols: int, m: int, k: int, rank: int) -> int:
    """n·⌈log2 k⌉ of codes, and the tables: 16·min(k·D + D·m, k·m), or 16·k·m where the rank is m."""
    count = rows * -(-cols // m)
    entries = min(k, count)
    tables = entries * m if rank == m else min(entries * rank + rank * m, entries * m)
    return count * code_bits(entries) + 16 * tables


def principal(groups_NG: Tensor, rank: int) -> Tensor:
    """Orthonormal rows (D, G): the leading right singular vectors of the groups."""
    _, vectors_GG = torch.linalg.eigh(groups_NG.double().T @ groups_NG.double())
    return vectors_GG[:, -rank:].flip(1).T.to(groups_NG.dtype)


class Points(Form):
    """A matrix as points and a basis, or as its groups themselves."""

    def __init__(self, shape: tuple[int, int], points_ND: Tensor, basis_DG: Tensor | None) -> None:
        super().__init__()
        self.shape = shape
        self.points_ND = nn.Parameter(points_ND.contiguous())
        self.basis_DG = None if basis_DG is None else nn.Parameter(basis_DG.contiguous())

    def spanned(self, points_ND: Tensor) -> Tensor:
        """The matrix (O, I) of other points in this basis."""
        return matrix_of(points_ND if self.basis_DG is None else points_ND @ self.basis_DG, *self.shape)

    def weight(self) -> Tensor:
        """Of the points."""
        return self.spanned(self.points_ND)

    def payload(self) -> CodebookPayload:
        """Points are never stored."""
        raise NotImplementedError("points are clustered before they are stored")


class Clustered(Form):
    """Points that follow a codebook, and the codebook them.

    Attributes:
        table_KD: the entries; a parameter where assignments are hard, moved by the points where they are soft.
    """

    def __init__(self, points: Points, table_KD: Tensor, assign: str, tau: float) -> None:
        super().__init__()
        self.points = points
        self.assign, self.tau = assign, tau
        if assign == STE:
            self.table_KD = nn.Parameter(table_KD)
        else:
            self.register_buffer("table_KD", table_KD)

    def weight(self) -> Tensor:
        """Of the assigned points: as they will be stored, or mixed from the entries by how near these are."""
        points_ND = self.points.points_ND
        if self.assign == DKM:
            return self.points.spanned(self._soft(points_ND))
        entries_ND = self.table_KD[nearest(points_ND.detach(), self.table_KD.detach())]
        return self.points.spanned(entries_ND + points_ND - points_ND.detach())

    def _soft(self, points_ND: Tensor) -> Tensor:
        """DKM: entries and assignments in turn until they rest, then once more with gradients; the entries are kept."""
        temperature = self.tau * points_ND.detach().square().sum(1).mean().clamp(min=1e-20)
        with torch.no_grad():
            for _ in range(ROUNDS):
                moved_KD = _centres(points_ND, _shares(points_ND, self.table_KD, temperature), self.table_KD)
                still = (moved_KD - self.table_KD).norm() <= STILL * self.table_KD.norm()
                self.table_KD.copy_(moved_KD)
                if bool(still):
                    break
        table_KD = self.table_KD.clone()
        shares_NK = _shares(points_ND, table_KD, temperature)
        return shares_NK @ _centres(points_ND, shares_NK, table_KD)

    def payload(self) -> CodebookPayload:
        """Hard assignments, to the nearest entry."""
        points_ND, table_KD = self.points.points_ND.detach(), self.table_KD.detach()
        basis = self.points.basis_DG
        codes_N1 = nearest(points_ND, table_KD)[:, None]
        group = points_ND.shape[1] if basis is None else basis.shape[1]
        return CodebookPayload.of(
            self.points.shape, codes_N1, table_KD[None], None if basis is None else basis.detach(), None, group
        )

    def entries(self) -> int:
        """Numbers of the tables as they are stored."""
        stored = self.payload()
        return stored.tables_MKD.numel() + (0 if stored.basis_DG is None else stored.basis_DG.numel())


def _shares(points_ND: Tensor, table_KD: Tensor, temperature: Tensor) -> Tensor:
    """How much of each point belongs to each entry (N, K)."""
    return (-distances(points_ND, table_KD) / temperature).softmax(1)


def _centres(points_ND: Tensor, shares_NK: Tensor, table_KD: Tensor) -> Tensor:
    """Means of the points by their shares; an entry without any stays where it is."""
    mass_K1 = shares_NK.sum(0)[:, None]
    return torch.where(mass_K1 > 1e-6, shares_NK.T @ points_ND / mass_K1.clamp(min=1e-6), table_KD)
