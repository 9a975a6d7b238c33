"""MC-MoE: bits for each expert of a mixture by what the router makes of it (arXiv 2410.06270).

Shape suffixes: O outputs (rows), I inputs (columns), E experts, B widths.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import numpy as np
import torch

from isoflop.core.errors import Infeasible
from isoflop.core.hashing import derive_seed
from isoflop.core.knobs import Knob, KnobValue, knob_specs
from isoflop.core.stage import Stage, StageContext
from isoflop.methods.base import METHODS, Axes, Method
from isoflop.methods.calibration import OnModel
from isoflop.methods.weights.artefact import Artefact
from isoflop.methods.weights.base import Served, WeightMethod, known_matrices
from isoflop.methods.weights.expert_bits import dealt, least_total, significance_costs, solve
from isoflop.methods.weights.expert_grid import BETWEEN, EVERYWHERE, FEEDBACK, LAZY, swept
from isoflop.methods.weights.expert_statistics import ExpertStatistics, LayerExperts, collect_experts
from isoflop.methods.weights.payloads import Payload
from isoflop.methods.weights.statistics import Statistics, calibration_seed, collect_in_turn
from isoflop.methods.weights.views import LinearView, linear_views, replaceable
from isoflop.models.base import Model, ModelInfo
from isoflop.models.hooks.experts import EXPERTS

if TYPE_CHECKING:
    from isoflop.methods.weights.probe import WeightProbe

ILP, UNIFORM, RANDOM, FREQUENCY, WEIGHT = "ilp", "uniform", "random", "frequency", "weight"
ALLOCATIONS = (ILP, UNIFORM, RANDOM, FREQUENCY, WEIGHT)
WHOLE = 16
MENUS = {"3/2/1": (3, 2, 1), "4/3/2": (4, 3, 2), "16": (WHOLE,)}
EXPONENTS = ("alpha", "beta", "gamma")
MEASURED = frozenset({"menu", "group", "n_calib"})
"""Knobs that what is known of the experts depends on."""


@METHODS.register("mc-moe")
@dataclass(frozen=True)
class McMoe(WeightMethod):
    """Experts at mixed widths, everything else in the blocks at ``attn_bits``, rounded by GPTQ behind rounded blocks.

    An expert costs φ^alpha · w^beta · ε^gamma at a width: φ is its share of the selections, w of the routing probability, ε the
    error of the block's output where that expert alone is rounded. An integer programme per layer gives each expert a width of the
    menu, so that the costs sum to the least at a mean of ``bits``, with at least one expert at the widest and one at the next
    (``floors``). ``uniform`` gives all experts one width; ``random``, ``frequency`` and ``weight`` deal the programme's own widths
    by chance, by φ or by w, so that they compare at the very same bytes. 1 bit is ±mean |w| of a group; more bits have grids whose
    range is the best of 101. Stored bits per weight are ``width + 32/group``; routers, norms and embeddings stay dense. Use it for
    mixtures whose experts are most of the model and are used unevenly; skipping experts for tokens is ``odp``.

    ``feedback: between-blocks`` is as released: up to 3 bits no error is taken up within 128 columns. On purpose not as released:
    experts that calibration never selects count as selected half a time (released, they cost nothing); steps and zeros are float16
    but all else is float32 (released, float16). Of ``menu`` and ``attn_bits`` 16 leaves experts, and all else, as they are.
    """

    paper: ClassVar[str] = "arXiv 2410.06270"
    calibrates: ClassVar[bool] = True

    bits: Annotated[float, Knob(low=1.0, high=4.0, ratio=True, unit="bits", doc="mean over a layer's experts that widths may have, grids left out: what the menu spans, with floors from two experts above its least; in the paper 1.5 to 2.5")] = 2.5  # fmt: skip
    allocation: Annotated[str, Knob(choices=ALLOCATIONS, doc="who gets how many bits")] = ILP
    menu: Annotated[
        str,
        Knob(choices=tuple(MENUS), doc="widths that experts may have; 16 leaves them as they are, whatever bits says"),
    ] = "3/2/1"
    attn_bits: Annotated[int, Knob(choices=(2, 3, 4, 8, WHOLE), unit="bits", doc="of attention and whatever else is no routed expert")] = 4  # fmt: skip
    group: Annotated[int, Knob(low=8, high=65536, log=True, unit="weights", doc="of a row that share a grid")] = 128
    alpha: Annotated[float, Knob(low=0.0, high=4.0, doc="exponent of an expert's share of the selections")] = 1.0
    beta: Annotated[float, Knob(low=0.0, high=4.0, doc="exponent of its share of the routing probability")] = 1.5
    gamma: Annotated[float, Knob(low=0.0, high=4.0, doc="exponent of the error; released, alpha")] = 2.0
    floors: Annotated[bool, Knob(doc="at least one expert of the widest and one of the next width")] = True
    feedback: Annotated[str, Knob(choices=FEEDBACK, doc="which columns take up a column's error")] = EVERYWHERE
    damp: Annotated[float, Knob(low=1e-6, high=1.0, log=True, doc="added to the Hessian's diagonal, relative to its mean")] = 0.01  # fmt: skip
    n_calib: Annotated[int, Knob(low=1, high=100_000, log=True, unit="examples", doc="training examples to calibrate on")] = 128  # fmt: skip

    @classmethod
    def identity(cls, info: ModelInfo) -> McMoe:
        """16 bits everywhere."""
        return cls(menu="16", attn_bits=WHOLE)

    @classmethod
    def probe(cls) -> WeightProbe:
        """An untrained mixture; what only some settings show is shown there."""
        from isoflop.methods.weights.mixture_probe import MixtureProbe

        plain = {"alpha": 0.0, "beta": 0.0, "gamma": 1.0}
        return MixtureProbe(
            tried={
                "menu": [{"menu": menu, "bits": 2.75} for menu in MENUS],
                "floors": [{**plain, "gamma": 0.0, "floors": floors, "bits": 2.0} for floors in (True, False)],
                "alpha": [{**plain, "alpha": power, "bits": 2.0} for power in (0.0, 4.0)],
                "beta": [{**plain, "beta": power, "bits": 1.75} for power in (0.0, 4.0)],
                "gamma": [{**plain, "gamma": power, "bits": 2.0} for power in (0.0, 2.0)],
            }
        )

    @property
    def widths(self) -> tuple[int, ...]:
        """The menu, the most bits first."""
        return MENUS[self.menu]

    def total(self, experts: int) -> int:
        """Bits that the experts of a layer may have together."""
        return math.floor(self.bits * experts + 1e-9)

    def check(self, info: ModelInfo) -> None:
        """Refuse models without experts, and means that no widths of the menu have."""
        super().check(info)
        if EXPERTS not in info.hooks:
            raise Infeasible(
                f"method mc-moe: model {info.ref} is no mixture of experts; allowed: tiny-lm/moe-…, and checkpoints of Mixtral's, "
                "Qwen-MoE's, OLMoE's class and others with such routers"
            )
        if self.feedback == BETWEEN and LAZY % self.group:
            raise Infeasible(
                f"method mc-moe: group = {self.group} crosses the blocks of {LAZY} columns of feedback = {BETWEEN}; allowed: divisors of {LAZY}"
            )
        if self.whole:
            return
        if self.allocation == UNIFORM:
            if self.bits not in self.widths:
                raise Infeasible(
                    f"method mc-moe: bits = {self.bits:g} is no width that all experts can have with allocation = {UNIFORM}; "
                    f"allowed: {', '.join(map(str, self.widths))}"
                )
            return
        experts = info.geometry.get("experts", 1)  # of an unknown number none is too few
        least = least_total(experts, self.widths, self.floors and experts > 1)
        if self.total(experts) < least or self.bits > self.widths[0]:
            raise Infeasible(
                f"method mc-moe: bits = {self.bits:g} is no mean that {experts} experts can have with menu = {self.menu} and "
                f"floors = {str(self.floors).lower()}; allowed: {math.ceil(1e4 * least / experts) / 1e4:g} to {self.widths[0]}"
            )

    def axes(self, info: ModelInfo) -> Axes:
        """The mean width of all matrices, where the model tells which of them are experts'; of the experts else."""
        bits = float(WHOLE) if self.whole else self.bits
        own = sum(rows * cols * count for rows, cols, count in info.geometry.get("expert_matrices", ()))
        whole = sum(rows * cols * count for rows, cols, count in known_matrices(info))
        if own and whole >= own:
            bits = (own * bits + (whole - own) * self.attn_bits) / whole
        return Axes(bits=bits, ratio=info.dense_bits / bits)

    @property
    def measures(self) -> bool:
        """Whether widths depend on what calibration tells of the experts."""
        return not self.whole and self.allocation != UNIFORM

    @property
    def whole(self) -> bool:
        """Whether experts stay as they are."""
        return self.widths == (WHOLE,)

    def measured(self) -> McMoe:
        """What the statistics of the experts depend on, all other knobs at their defaults."""
        return self.at_defaults(*(name for name in knob_specs(type(self)) if name not in MEASURED))

    def relevant(self) -> McMoe:
        """With the knobs that others leave without effect at their defaults."""
        idle: set[str] = set()
        if not self.measures:
            idle |= {*EXPONENTS, "floors"} | (set() if self.whole else {"menu"})
        if self.whole:
            idle |= {"bits", "allocation"} | (set() if self.attn_bits <= 3 else {"feedback"})
            if self.attn_bits == WHOLE:
                idle |= {"group", "damp", "n_calib"}
        return self.at_defaults(*sorted(idle))

    def calibration_knobs(self) -> dict[str, KnobValue]:
        """Those that the stored matrices depend on."""
        return self.relevant().knobs()

    def prepare(
        self, info: ModelInfo, weights: Stage | None, seed: int, trained_with: tuple[Method, ...] = ()
    ) -> Stage | None:
        """The stage with the stored matrices; behind it, one for all means and allocations, what is known of the experts."""
        self.check(info)
        source = OnModel.source(info, weights, seed, trained_with)
        experts = ExpertStage(**source, method=self.measured()) if self.measures else None
        return MixtureStage(**source, method=self.relevant(), experts=experts)

    def calibrate(self, model: Model, ctx: StageContext, seed: int) -> Artefact:
        """What both stages compute, on a loaded model."""
        found = self.statistics(model, ctx, seed) if self.measures else None
        return self.compressed(model, ctx, seed, found)

    def statistics(self, model: Model, ctx: StageContext, seed: int) -> ExpertStatistics:
        """What calibration tells of the experts."""
        batches = list(model.calibration(ctx, self.n_calib, calibration_seed(seed)))
        return collect_experts(model, batches, self.widths, self.group, self.name)

    def widths_of(self, layer: int, found: LayerExperts, seed: int) -> tuple[int, ...]:
        """The width of each expert of a layer.

        Raises:
            Infeasible: the budget is less than the experts need; known at plan where the model tells how many there are.
        """
        costs_EB = significance_costs(
            found.counts_E, found.masses_E, found.errors_EB, self.alpha, self.beta, self.gamma
        )
        experts = len(costs_EB)
        try:
            solved = solve(costs_EB, self.widths, self.total(experts), self.floors)
        except ValueError as error:
            raise Infeasible(f"method mc-moe: bits = {self.bits:g}: {error}") from error
        if self.allocation == ILP:
            return solved
        if self.allocation == RANDOM:
            rng = np.random.default_rng(derive_seed("mc-moe widths", seed, layer))
            return dealt(solved, rng.permutation(experts).tolist())
        scores = found.counts_E if self.allocation == FREQUENCY else found.masses_E
        return dealt(solved, np.argsort([-score for score in scores], kind="stable").tolist())

    @torch.no_grad()
    def compressed(self, model: Model, ctx: StageContext, seed: int, found: ExpertStatistics | None) -> Artefact:
        """Every matrix as it is stored; each block sees what the blocks before it give once they are rounded.

        Args:
            found: of the experts; None where all have one width.
        """
        views = linear_views(model)
        widths: dict[int, tuple[int, ...]] = {}
        if found is not None:
            widths = {layer: self.widths_of(layer, experts, seed) for layer, experts in found.layers.items()}
        payloads: dict[str, Payload] = {}

        def take(some: list[LinearView], statistics: Statistics) -> None:
            for view, stats in statistics.each(some):
                weight_OI, width = view.weight(), self._width(view, widths)
                curvature = stats.curvature(self.damp, weight_OI.dtype)
                payloads[view.name] = swept(weight_OI, curvature, width, self.group, self.feedback)
                view.write(payloads[view.name].decode())

        batches = list(model.calibration(ctx, self.n_calib, calibration_seed(seed)))
        with replaceable(model, sorted({view.parameter for view in views})):
            try:
                collect_in_turn(model, linear_views(model), batches, take)
            except ValueError as error:
                raise Infeasible(f"method mc-moe: model {model.info.ref}: {error}") from error
        return Artefact(payloads)

    def _width(self, view: LinearView, widths: Mapping[int, Sequence[int]]) -> int:
        if view.expert is None:
            return self.attn_bits
        if self.whole:
            return WHOLE
        return widths[view.layer][view.expert] if view.layer in widths else int(self.bits)

    def served(self, model: Model, views: list[LinearView], prepared: Any) -> Served:
        """Those of the stage."""
        if prepared is None:
            raise ValueError("method mc-moe is calibrated: apply() needs the value of its prepare() stage")
        return (lambda view: prepared[view.name]), prepared.vectors


@dataclass(frozen=True)
class ExpertStage(OnModel):
    """What calibration tells of a mixture's experts; one for all means and allocations."""

    kind: ClassVar[str] = "expert-statistics"

    method: McMoe

    def compute(self, ctx: StageContext, folder: Path) -> None:
        """One pass."""
        with self.model(ctx) as model:
            self.method.statistics(model, ctx, self.seed).save(folder)

    def load(self, ctx: StageContext, folder: Path) -> ExpertStatistics:
        """The statistics."""
        return ExpertStatistics.load(folder)


@dataclass(frozen=True)
class MixtureStage(OnModel):
    """A mixture's matrices as they are stored."""

    kind: ClassVar[str] = "mixture-artefact"

    method: McMoe
    experts: ExpertStage | None

    def deps(self) -> tuple[Stage, ...]:
        """Those of the model, and what is known of the experts."""
        return super().deps() if self.experts is None else (*super().deps(), self.experts)

    def compute(self, ctx: StageContext, folder: Path) -> None:
        """Encode every view."""
        found = None if self.experts is None else ctx.get(self.experts)
        with self.model(ctx) as model:
            self.method.compressed(model, ctx, self.seed, found).save(folder)

    def load(self, ctx: StageContext, folder: Path) -> Artefact:
        """The payloads, read lazily."""
        return Artefact(folder, device=ctx.device)
