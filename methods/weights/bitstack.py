"""BitStack: any-size compression by a stack of one-bit residual blocks (arXiv 2410.23918).

Shape suffixes: O outputs (rows), I inputs (columns).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import torch

from isoflop.core.errors import Infeasible
from isoflop.core.knobs import Knob, KnobValue
from isoflop.core.stage import Stage, StageContext
from isoflop.methods.base import METHODS, Axes, Method
from isoflop.methods.calibration import OnModel
from isoflop.methods.weights.artefact import Artefact
from isoflop.methods.weights.base import Served, WeightMethod, all_matrices_known, known_matrices
from isoflop.methods.weights.folding import FOLD_EXAMPLES, Folding, as_stored, fold_scales
from isoflop.methods.weights.stacks import (
    PERPLEXITY,
    SORTS,
    WEIGHT_ERROR,
    SortedStacks,
    Stacks,
    block_bytes,
    decompose,
    sort_blocks,
)
from isoflop.methods.weights.statistics import CalibrationStage, Statistics, calibration_seed, collect
from isoflop.methods.weights.views import LinearView, linear_views
from isoflop.models.base import Model, ModelInfo

if TYPE_CHECKING:
    from isoflop.methods.weights.probe import WeightProbe

OFF, DIVIDE, FOLD = "off", "divide", "fold"
EPSILON = 1e-3
"""Added to scales, so that none is 0."""


@METHODS.register("bitstack")
@dataclass(frozen=True)
class BitStack(WeightMethod):
    """Signs times a low-rank product of absolute values, residual upon residual; a prefix of the blocks is served.

    One decomposition and one order of the blocks serve every budget: ``bits`` only says how far along the order blocks
    are loaded, so that all sizes are prefixes of one artefact (sections 2.2 and 2.3 of the paper). A block of an O x I
    matrix takes 1 + 16·k·(O + I)/(O·I) bits per weight; the paper's k = 16 suits widths of 4096, and k should shrink
    with the width.
    """

    paper: ClassVar[str] = "arXiv 2410.23918"
    calibrates: ClassVar[bool] = True

    bits: Annotated[float, Knob(low=1.0, high=16.0, ratio=True, unit="bits", doc="budget per weight of the compressed matrices, scales included")] = 4.0  # fmt: skip
    k: Annotated[int, Knob(choices=(1, 2, 4, 8, 16), doc="rank of a block")] = 2
    n_iter: Annotated[int, Knob(low=1, high=16, unit="blocks", doc="blocks per matrix in the artefact")] = 16
    scaling: Annotated[str, Knob(choices=(FOLD, DIVIDE, OFF), doc="of input channels; 1/s folded into norms and matrices, or kept and divided by")] = FOLD  # fmt: skip
    avd: Annotated[bool, Knob(doc="absolute value decomposition; false: low rank of the same bytes, without signs")] = True  # fmt: skip
    sort: Annotated[str, Knob(choices=SORTS, doc="order of the blocks within a level")] = PERPLEXITY
    n_calib: Annotated[int, Knob(low=1, high=100_000, log=True, unit="examples", doc="training examples for the scales")] = 256  # fmt: skip
    n_sort: Annotated[int, Knob(low=1, high=100_000, log=True, unit="examples", doc="training examples for the order")] = 32  # fmt: skip

    @classmethod
    def probe(cls) -> WeightProbe:
        """What a knob does shows on few blocks, too, ordered by few examples."""
        from isoflop.methods.weights.probe import WeightProbe

        few: dict[str, KnobValue] = {"n_iter": 3, "sort": WEIGHT_ERROR, "n_calib": 4}
        shown: dict[str, list[KnobValue]] = {
            "k": [1, 2], "n_iter": [2, 3], "scaling": [FOLD, OFF], "avd": [False, True], "n_calib": [1, 4]
        }  # fmt: skip
        tried = {name: [{**few, name: value} for value in values] for name, values in shown.items()}
        ordered = [{**few, "sort": sort, "n_sort": 2} for sort in SORTS]
        counted = [{**few, "sort": PERPLEXITY, "n_sort": count} for count in (1, 2)]
        return WeightProbe(tried={**tried, "sort": ordered, "n_sort": counted})

    def axes(self, info: ModelInfo) -> Axes:
        """Bits per weight, scales included."""
        return Axes(bits=self.bits, ratio=info.dense_bits / self.bits)

    def check(self, info: ModelInfo) -> None:
        """Refuse budgets below the first level, and orders by a loss where there is none."""
        super().check(info)
        if self.sort == PERPLEXITY:
            info.check_loss(f"method {self.name} with sort = {PERPLEXITY}")
        known = known_matrices(info)
        if not known:
            return
        costs = [(8 * self._first_bytes(rows, cols), rows * cols, n) for rows, cols, n in known]
        if all_matrices_known(info):
            least = sum(bits * n for bits, _, n in costs) / sum(size * n for _, size, n in costs)
        else:  # of the matrices that are not known none costs less than one without end
            least = min(*(bits / size for bits, size, _ in costs), 1 + 16 * self.k / info.geometry["width"])
        if self.bits < least:
            raise self._too_small(least)

    def check_shape(self, rows: int, cols: int) -> None:
        """The rank fits into the matrix."""
        if self.k > min(rows, cols):
            raise Infeasible(
                f"method bitstack: k = {self.k} exceeds the rank of a {rows}x{cols} matrix; allowed: up to {min(rows, cols)}"
            )

    def calibration_knobs(self) -> dict[str, KnobValue]:
        """All but the budget."""
        return {name: value for name, value in self.knobs().items() if name != "bits"}

    def prepare(
        self, info: ModelInfo, weights: Stage | None, seed: int, trained_with: tuple[Method, ...] = ()
    ) -> Stage | None:
        """The stage with the sorted stacks, the same for every budget."""
        self.check(info)
        source = OnModel.source(info, weights, seed, trained_with)
        stacks = StacksStage(
            **source,
            k=self.k,
            n_iter=self.n_iter,
            scaling=self.scaling,
            avd=self.avd,
            calibration=None if self.scaling == OFF else CalibrationStage(**source, n_calib=self.n_calib),
        )
        n_sort = self.n_sort if self.sort == PERPLEXITY else 0  # no other order looks at examples
        return SortStage(**source, stacks=stacks, sort=self.sort, n_sort=n_sort)

    def calibrate(self, model: Model, ctx: StageContext, seed: int) -> SortedStacks:
        """What the stages compute, on a loaded model."""
        examples = calibration_seed(seed)
        statistics = None if self.scaling == OFF else collect(model, ctx, self.n_calib, examples)
        stacks = stack_model(model, ctx, statistics, self.scaling, self.k, self.n_iter, self.avd, examples)
        return sort_model(model, ctx, stacks, self.sort, self.n_sort, examples)

    def served(self, model: Model, views: list[LinearView], prepared: Any) -> Served:
        """As many blocks of the order as the budget holds."""
        if not isinstance(prepared, SortedStacks):
            raise ValueError("method bitstack is calibrated: apply() needs the value of its prepare() stage")
        count = sum(view.numel for view in views)
        budget = self.bits * count / 8
        if budget < prepared.least:
            raise self._too_small(8 * prepared.least / count)
        blocks = prepared.blocks_within(budget)
        stacks = prepared.stacks
        return (lambda view: stacks.stack(view.name).prefix(blocks[view.name])), stacks.artefact.vectors

    def _first_bytes(self, rows: int, cols: int) -> int:
        """Bytes of a matrix at the first level."""
        return block_bytes(rows, cols, self.k, self.avd) + (2 * cols if self.scaling == DIVIDE else 0)

    def _too_small(self, least: float) -> Infeasible:
        return Infeasible(
            f"method bitstack: bits = {self.bits:g} is less than one block per matrix takes with k = {self.k}; "
            f"allowed: bits from {math.ceil(least * 1000) / 1000:g}, or a smaller k"
        )


@dataclass(frozen=True)
class StacksStage(OnModel):
    """The decomposition of a model's matrices."""

    kind: ClassVar[str] = "bitstack"

    k: int
    n_iter: int
    scaling: str
    avd: bool
    calibration: CalibrationStage | None

    def deps(self) -> tuple[Stage, ...]:
        """Those of the model, and the calibration."""
        return (*super().deps(), *(() if self.calibration is None else (self.calibration,)))

    def compute(self, ctx: StageContext, folder: Path) -> None:
        """Scale and decompose every view."""
        statistics = None if self.calibration is None else ctx.get(self.calibration)
        knobs = (self.scaling, self.k, self.n_iter, self.avd)
        with self.model(ctx) as model:
            stack_model(model, ctx, statistics, *knobs, calibration_seed(self.seed)).save(folder)

    def load(self, ctx: StageContext, folder: Path) -> Stacks:
        """The stacks, read lazily."""
        return Stacks.load(folder, ctx.device)


@dataclass(frozen=True)
class SortStage(OnModel):
    """The order in which the blocks of a decomposition are loaded."""

    kind: ClassVar[str] = "bitstack-order"

    stacks: StacksStage
    sort: str
    n_sort: int

    def deps(self) -> tuple[Stage, ...]:
        """Those of the model, and the decomposition."""
        return (*super().deps(), self.stacks)

    def compute(self, ctx: StageContext, folder: Path) -> None:
        """Sort the blocks."""
        stacks = ctx.get(self.stacks)
        with self.model(ctx) as model:
            sort_model(model, ctx, stacks, self.sort, self.n_sort, calibration_seed(self.seed)).save_order(folder)

    def load(self, ctx: StageContext, folder: Path) -> SortedStacks:
        """Stacks and order."""
        return SortedStacks.load(ctx.get(self.stacks), folder)


@torch.no_grad()
def stack_model(
    model: Model,
    ctx: StageContext,
    statistics: Statistics | None,
    scaling: str,
    k: int,
    n_iter: int,
    avd: bool,
    seed: int,
) -> Stacks:
    """Scale every view as ``scaling`` says, and decompose it."""
    views = linear_views(model)
    folding = Folding()
    if statistics is not None:
        batch = next(iter(model.calibration(ctx, FOLD_EXAMPLES, seed))) if scaling == FOLD else None
        scales = {view.name: as_stored(statistics.scales(view) + EPSILON) for view in views}
        folding = fold_scales(model, views, scales, statistics.owner, batch)
    payloads, errors = {}, {}
    for view in views:
        payloads[view.name], errors[view.name] = decompose(folding.scaled(view), k, n_iter, avd, folding.divisor(view))
    return Stacks(Artefact(payloads, folding.vectors), errors)


def sort_model(model: Model, ctx: StageContext, stacks: Stacks, sort: str, examples: int, seed: int) -> SortedStacks:
    """Sort the blocks of ``stacks`` on ``examples`` training examples."""
    batches = list(model.calibration(ctx, examples, seed)) if sort == PERPLEXITY else []
    return sort_blocks(model, linear_views(model), stacks, sort, batches, seed)
