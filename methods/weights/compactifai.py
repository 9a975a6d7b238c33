"""CompactifAI: matrices as matrix product operators, healed by a short training (arXiv 2401.14109).

Shape suffixes: O outputs (rows), I inputs (columns).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor

from isoflop.core.hashing import derive_seed
from isoflop.core.knobs import Knob, KnobValue
from isoflop.core.stage import StageContext
from isoflop.methods.base import METHODS, Axes
from isoflop.methods.weights.base import known_matrices
from isoflop.methods.weights.healing import Form, Forms, Healed, HealedMethod, Whole
from isoflop.methods.weights.level_bank import LevelBank, calibration_loss
from isoflop.methods.weights.mpo import Chain, core_numel, decompose, site_sizes
from isoflop.methods.weights.payloads import Payload
from isoflop.methods.weights.statistics import Statistics, ViewStats
from isoflop.methods.weights.views import LinearView, linear_views
from isoflop.models.base import Model, ModelInfo

DEPTH, BLOCK, MATRIX = "depth", "block", "matrix"
SERVED_WHOLE, SERVED_CUT = 0, 1


@METHODS.register("compactifai")
@dataclass(frozen=True)
class CompactifAi(HealedMethod):
    """Each matrix becomes a chain of small tensors whose bonds hold at most ``chi`` singular values; then the chains are trained.

    Rows and columns are split into ``sites`` factors, as equal as their primes allow, and singular value decompositions from the
    left take one pair of factors off after the other, so that what is lost is the sum of the squares of what is cut. A chain of N
    sites takes the sum of chi_{n-1}·o_n·i_n·chi_n entries; a matrix whose chain would be larger than itself stays whole. Before
    healing, much is lost, more than by a plain low rank of the same size (``svd``); compare the two behind equal training.

    ``spared`` is the share of the matrices, by weights, that stay whole: those of the first blocks (``spare_by: depth``; early blocks
    are the most sensitive in the paper), or of the blocks or matrices whose cut alone costs most on ``n_profile`` examples
    (``spare_by: block``, ``matrix``); the losses that were measured are the trace ``sensitivity``. With ``core_bits`` the
    trained entries are rounded to grids of 64, and the grids counted.

    Our choices, where the paper does not say: factors in ascending order, singular values in the last tensor, AdamW without decay
    on the chains alone (released code of others trains everything), the loss as measure of sensitivity (the paper: MMLU). Served is
    the contracted matrix; contracting a chain with inputs gives the same numbers.
    """

    paper: ClassVar[str] = "arXiv 2401.14109"

    chi: Annotated[int, Knob(low=1, high=65536, log=True, ratio=True, doc="bond dimension: singular values kept between two sites")] = 16  # fmt: skip
    sites: Annotated[int, Knob(choices=(2, 3, 4), doc="tensors of a chain")] = 2
    spared: Annotated[float, Knob(low=0.0, high=1.0, doc="share of the weights whose matrices stay whole, at most")] = 0.0  # fmt: skip
    spare_by: Annotated[str, Knob(choices=(DEPTH, BLOCK, MATRIX), doc="which: the first blocks, or what a measurement finds sensitive")] = DEPTH  # fmt: skip
    n_profile: Annotated[int, Knob(low=1, high=100_000, log=True, unit="examples", doc="training examples for that measurement")] = 16  # fmt: skip
    core_bits: Annotated[int, Knob(choices=(16, 8, 4), unit="bits", doc="of an entry of the chains as stored")] = 16

    @classmethod
    def identity(cls, info: ModelInfo) -> CompactifAi:
        """Bonds that cut nothing: every chain would be larger than its matrix."""
        return cls(chi=65536)

    def relevant(self) -> CompactifAi:
        """Where nothing is spared nothing is measured."""
        method = super().relevant()
        if not self.spared:
            return method.at_defaults("spare_by", "n_profile")
        return method.at_defaults("n_profile") if self.spare_by == DEPTH else method

    def check(self, info: ModelInfo) -> None:
        """Refuse a measurement of the loss where there is none."""
        super().check(info)
        if self.spared and self.spare_by != DEPTH:
            info.check_loss(f"method {self.name} with spare_by = {self.spare_by}")

    def axes(self, info: ModelInfo) -> Axes:
        """Weights over entries; grids are left out, and what is spared counts as if it were spread evenly."""
        known = known_matrices(info)
        if not known:
            return Axes()
        dense = sum(rows * cols * count for rows, cols, count in known)
        cut = sum(count * min(rows * cols, self._planned(rows, cols)) for rows, cols, count in known)
        return Axes(ratio=dense / (self.spared * dense + (1 - self.spared) * cut))

    def _planned(self, rows: int, cols: int) -> float:
        """What a chain takes, in weights of 16 bits."""
        return core_numel(rows, cols, self.sites, self.chi) * self.core_bits / 16

    def form(self, weight_OI: Tensor, stats: ViewStats | None, seed: int) -> Form:
        """Its chain, or the matrix itself where that is smaller."""
        rows, cols = weight_OI.shape
        if self._planned(rows, cols) >= rows * cols:
            return Whole(weight_OI)
        cores = decompose(weight_OI, site_sizes(rows, self.sites), site_sizes(cols, self.sites), self.chi)
        return Chain(cores, self.core_bits)

    def compress(
        self, model: Model, ctx: StageContext, statistics: Statistics | None, seed: int, scratch: Path | None = None
    ) -> Healed:
        """Cut every matrix, spare the most sensitive ones, and heal the others."""
        views = linear_views(model)
        forms = self.forms(views, statistics, seed)
        profile: dict[str, list[float]] = {}
        if self.spared:
            units = _units(views, self.spare_by)
            if self.spare_by != DEPTH:
                batches = list(model.calibration(ctx, self.n_profile, derive_seed("sensitivity", seed)))
                profile["sensitivity"] = sensitivities(model, views, forms, units, batches)
            spared = most_sensitive(views, units, profile.get("sensitivity"), self.spared)
            forms = [Whole(v.weight()) if v.name in spared else f for v, f in zip(views, forms, strict=True)]
        losses = self.heal(model, ctx, Forms(views, forms), seed, scratch)
        return self.stored(views, forms, losses, profile)

    @classmethod
    def tried(cls) -> Mapping[str, Sequence[Mapping[str, KnobValue]]]:
        """A measurement shows where something is spared, and which, where some matrices are."""
        half: dict[str, KnobValue] = {"spared": 0.5, "heal_steps": 0}
        return {
            "spare_by": [{**half, "spare_by": by} for by in (MATRIX, DEPTH)],
            "n_profile": [{**half, "spare_by": MATRIX, "n_profile": count} for count in (1, 2, 4)],
        }


def _units(views: Sequence[LinearView], by: str) -> list[list[LinearView]]:
    """What is spared or cut together: matrices, or all matrices of a block."""
    if by == MATRIX:
        return [[view] for view in views]
    found: dict[int, list[LinearView]] = {}
    for view in views:
        found.setdefault(view.layer, []).append(view)
    return [found[layer] for layer in sorted(found)]


@torch.no_grad()
def sensitivities(
    model: Model,
    views: Sequence[LinearView],
    forms: Sequence[Form],
    units: Sequence[Sequence[LinearView]],
    batches: list[Any],
) -> list[float]:
    """Nats that the loss grows by when one unit alone is served cut, all others whole."""
    payloads = {view.name: form.payload() for view, form in zip(views, forms, strict=True)}

    def at(view: LinearView, level: int) -> Payload:
        return payloads[view.name] if level == SERVED_CUT else whole[view.name]

    whole = {view.name: Whole(view.weight()).payload() for view in views}
    bank: LevelBank[int] = LevelBank(list(views), at)
    before = calibration_loss(model, batches)
    found = []
    with bank.in_place(model):
        for unit in units:
            for view in unit:
                bank.switch(view, SERVED_CUT)
            found.append(calibration_loss(model, batches) - before)
            for view in unit:
                bank.switch(view, SERVED_WHOLE)
    return found


def most_sensitive(
    views: Sequence[LinearView], units: Sequence[Sequence[LinearView]], losses: Sequence[float] | None, share: float
) -> frozenset[str]:
    """Names of the views that are spared: units from the most sensitive one on, in their order without losses, while they fit.

    Args:
        share: of all weights, at most.
    """
    order = range(len(units)) if losses is None else sorted(range(len(units)), key=lambda n: -losses[n])
    left = share * sum(view.numel for view in views) + 1e-6
    spared: list[str] = []
    for number in order:
        left -= sum(view.numel for view in units[number])
        if left < 0:
            break
        spared += [view.name for view in units[number]]
    return frozenset(spared)
