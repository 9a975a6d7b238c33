"""EvoPress: bits or sparsity per matrix, found by evolutionary search under one budget (arXiv 2410.14649).

The levels of every matrix are computed once and kept as payloads (the paper's level database); the search serves them in
place and compares the model's outputs with the uncompressed ones. See ``evolution`` for the search, ``search_base`` for
its baselines, and ``evopress_drop`` for dropping attentions and MLPs.

Shape suffixes: O outputs (rows), I inputs (columns).
"""

from __future__ import annotations

import json
import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from isoflop.core.errors import Infeasible
from isoflop.core.knobs import Knob
from isoflop.core.stage import Stage, StageContext
from isoflop.methods.allocation import allocate
from isoflop.methods.base import METHODS, Axes
from isoflop.methods.calibration import OnModel
from isoflop.methods.weights.artefact import Artefact
from isoflop.methods.weights.base import MatrixCodecMethod, Served
from isoflop.methods.weights.filling import shares
from isoflop.methods.weights.fitness import Fitness
from isoflop.methods.weights.gptq import Gptq
from isoflop.methods.weights.level_bank import LevelBank
from isoflop.methods.weights.magnitude import Magnitude
from isoflop.methods.weights.payloads import Payload
from isoflop.methods.weights.rtn import RoundToNearest
from isoflop.methods.weights.search_base import UNIFORM, SearchMethod
from isoflop.methods.weights.space import Levels, LevelSpace
from isoflop.methods.weights.sparsegpt import SparseGpt
from isoflop.methods.weights.statistics import CalibrationStage, Statistics, ViewStats, calibration_seed, collect
from isoflop.methods.weights.views import LinearView, linear_views
from isoflop.methods.weights.wanda import Wanda
from isoflop.models.base import Model, ModelInfo

_ERRORS = "errors.json"
GPTQ, RTN = "gptq", "rtn"
SPARSEGPT, WANDA, MAGNITUDE = "sparsegpt", "wanda", "magnitude"
SIZE, ANY = "size", "any"
EXCHANGES = (SIZE, ANY)


@dataclass(frozen=True, eq=False)
class Database:
    """Every matrix at every level.

    Attributes:
        payloads: by ``<view>@<level>``.
        errors: by view and level, the relative error of the matrix' outputs on the calibration inputs,
            tr(Δ·H·Δᵀ) / tr(W·H·Wᵀ).
    """

    payloads: Artefact
    errors: dict[str, dict[int, float]]

    def payload(self, view: LinearView, level: int) -> Payload:
        """A matrix at a level."""
        return self.payloads[f"{view.name}@{level}"]

    def save(self, folder: Path) -> None:
        """Write everything into a folder."""
        self.payloads.save(folder)
        (folder / _ERRORS).write_text(json.dumps(self.errors) + "\n")

    @classmethod
    def load(cls, folder: Path, device: str) -> Database:
        """The inverse of :meth:`save`; payloads are read when they are asked for."""
        found = json.loads((folder / _ERRORS).read_text())
        errors = {name: {int(level): error for level, error in levels.items()} for name, levels in found.items()}
        return cls(Artefact(folder, device=device), errors)


@dataclass(frozen=True)
class LevelMethod(SearchMethod):
    """Base class of searches whose units are matrices and whose levels are settings of a codec."""

    database_knobs: ClassVar[tuple[str, ...]]
    n_calib: Annotated[int, Knob(low=1, high=100_000, log=True, unit="examples", doc="training examples that matrices are compressed on")] = 128  # fmt: skip

    @abstractmethod
    def space(self, views: list[LinearView]) -> LevelSpace:
        """Bounds of the levels, and which matrices may exchange them."""

    @abstractmethod
    def codec(self, view: LinearView, views: list[LinearView], level: int) -> MatrixCodecMethod:
        """What compresses a matrix to a level."""

    @abstractmethod
    def uniform(self, views: list[LinearView]) -> Levels:
        """The same level for all matrices."""

    def starts(self, views: list[LinearView], count: int, rng: np.random.Generator) -> list[Levels]:
        """See ``Problem``."""
        return [self.uniform(views)]

    def names(self, model: Model) -> list[str]:
        """Those of the views."""
        return [view.name for view in linear_views(model)]

    def parts_knobs(self) -> dict[str, Any]:
        """Those of the level database."""
        return {name: getattr(self, name) for name in self.database_knobs}

    def parts_stage(self, source: Mapping[str, Any]) -> Stage:
        """The level database."""
        database = type(self)(**self.parts_knobs())
        calibration = CalibrationStage(**source, n_calib=self.n_calib)
        return DatabaseStage(**source, method=database, calibration=calibration)

    def compute_parts(self, model: Model, ctx: StageContext, seed: int) -> Database:
        """The level database."""
        return self.database(model, collect(model, ctx, self.n_calib, calibration_seed(seed)))

    @torch.no_grad()
    def database(self, model: Model, statistics: Statistics) -> Database:
        """Compress every matrix to every level."""
        views = linear_views(model)
        space = self.space(views)
        payloads: dict[str, Payload] = {}
        errors: dict[str, dict[int, float]] = {}
        for (view, stats), low, high in zip(statistics.each(views), space.low, space.high, strict=True):
            found = {
                level: self.codec(view, views, level).encode(view.weight(), stats) for level in range(low, high + 1)
            }
            payloads |= {f"{view.name}@{level}": payload for level, payload in found.items()}
            errors[view.name] = {
                level: output_error(view.weight(), payload.decode(), stats) for level, payload in found.items()
            }
        return Database(Artefact(payloads), errors)

    def problem(self, model: Model, parts: Any) -> LevelProblem:
        """Levels of the model's matrices."""
        assert isinstance(parts, Database)
        return LevelProblem(self, model, parts)

    def served(self, model: Model, views: list[LinearView], prepared: Any) -> Served:
        """Each matrix at its level."""
        found = self.found(prepared)
        return (lambda view: found.parts.payload(view, found.levels[view.name])), {}


class LevelProblem:
    """The search for levels of a model's matrices (a ``Problem``)."""

    def __init__(self, method: LevelMethod, model: Model, database: Database) -> None:
        self._method, self._model, self._database = method, model, database
        self._views = linear_views(model)
        self.space = method.space(self._views)

    def starts(self, count: int, rng: np.random.Generator) -> list[Levels]:
        """See ``Problem``."""
        return self._method.starts(self._views, count, rng)

    def uniform(self) -> Levels:
        """See ``Problem``."""
        return self._method.uniform(self._views)

    def additive(self, judge: Fitness) -> Levels:
        """The least sum of the matrices' output errors within each group, which stores what it stores in every search."""
        levels = list(self.starts(1, np.random.default_rng(0))[0])
        for group in self.space.groups:
            budget = float(self.space.stored(group, levels) - self.space.stored(group, self.space.low))
            choice = allocate(self.space.costs(group), self._errors(group), budget, least=budget).choice
            for i, step in zip(group, choice, strict=True):
                levels[i] = self.space.low[i] + step
        return tuple(levels)

    @contextmanager
    def serving(self) -> Iterator[Callable[[Levels], None]]:
        """Levels are switched in place; matrices that keep theirs are left alone."""
        bank: LevelBank[int] = LevelBank(self._views, self._database.payload)

        def serve(levels: Levels) -> None:
            for view, level in zip(self._views, levels, strict=True):
                bank.switch(view, level)

        with bank.in_place(self._model):
            yield serve

    def _errors(self, group: Sequence[int]) -> list[list[float]]:
        """Of each level of each matrix of a group, from the lowest up."""
        return [
            [
                self._database.errors[self._views[i].name][level]
                for level in range(self.space.low[i], self.space.high[i] + 1)
            ]
            for i in group
        ]


@dataclass(frozen=True)
class DatabaseStage(OnModel):
    """A level database."""

    kind: ClassVar[str] = "level-database"

    method: LevelMethod
    calibration: CalibrationStage

    def deps(self) -> tuple[Stage, ...]:
        """Those of the model, and the calibration."""
        return (*super().deps(), self.calibration)

    def compute(self, ctx: StageContext, folder: Path) -> None:
        """Compress every matrix to every level."""
        with self.model(ctx) as model:
            self.method.database(model, ctx.get(self.calibration)).save(folder)

    def load(self, ctx: StageContext, folder: Path) -> Database:
        """The levels, read lazily."""
        return Database.load(folder, ctx.device)


@METHODS.register("evopress")
@dataclass(frozen=True)
class EvoPress(LevelMethod):
    """Bits per matrix, ``bits`` on average over all weights.

    Levels are whole bits from ``lowest`` to ``highest`` on the grids of ``gptq`` or ``rtn``. Matrices of equal size
    exchange bits one for one (section 3 of the paper), or all of them at equal sums (``exchange = any``, the published code's
    ``--group_rule none``). A fraction of bits starts from random configurations: everything rounded up, then lowered until
    the matrices of each size average ``bits``, as they do in the published configurations. What whole levels leave of the
    budget goes to where it takes the fewest steps; the published code leaves it unused. So every configuration of a search
    stores the same, ``bits + 32/group`` per weight where groups divide rows, or as little below as the sizes allow, and so do
    its baselines.
    """

    database_knobs: ClassVar[tuple[str, ...]] = ("compressor", "group", "lowest", "highest", "n_calib")

    bits: Annotated[float, Knob(low=1.0, high=8.0, ratio=True, unit="bits", doc="per weight on average, without scales and zeros")] = 3.0  # fmt: skip
    compressor: Annotated[str, Knob(choices=(GPTQ, RTN), doc="what rounds to a level")] = GPTQ
    group: Annotated[int, Knob(low=8, high=65536, log=True, unit="weights", doc="of a row that share a grid")] = 32
    lowest: Annotated[int, Knob(low=1, high=8, unit="bits", doc="fewest of a matrix")] = 2
    highest: Annotated[int, Knob(low=1, high=8, unit="bits", doc="most of a matrix")] = 6
    exchange: Annotated[str, Knob(choices=EXCHANGES, doc="which matrices exchange bits: those of equal size, or any, storing as many")] = SIZE  # fmt: skip

    def axes(self, info: ModelInfo) -> Axes:
        """Bits, per weight on average."""
        return Axes(bits=float(self.bits), ratio=info.dense_bits / self.bits)

    def check(self, info: ModelInfo) -> None:
        """The average lies between the levels; all matrices can only have the same level when it is whole."""
        super().check(info)
        if not self.lowest <= self.bits <= self.highest:
            raise Infeasible(
                f"method evopress: bits = {self.bits:g} lies outside of lowest = {self.lowest} … highest = {self.highest}; "
                "allowed: bits between them"
            )
        if self.allocation == UNIFORM and self.bits != int(self.bits):
            raise Infeasible(
                f"method evopress: bits = {self.bits:g} is no level that all matrices can have; with allocation = uniform "
                "allowed: whole bits"
            )

    def space(self, views: list[LinearView]) -> LevelSpace:
        """Matrices of equal size, or all, exchange bits."""
        count = len(views)
        groups = (tuple(range(count)),) if self.exchange == ANY else tuple(map(tuple, by_size(views).values()))
        return LevelSpace((self.lowest,) * count, (self.highest,) * count, groups, tuple(view.numel for view in views))

    def relevant(self) -> EvoPress:
        """Where all matrices have the same level, nothing is exchanged."""
        relevant = super().relevant()
        return relevant.at_defaults("exchange") if self.allocation == UNIFORM else relevant

    def codec(self, view: LinearView, views: list[LinearView], level: int) -> MatrixCodecMethod:
        """Rounding to so many bits."""
        codec = Gptq if self.compressor == GPTQ else RoundToNearest
        return codec(bits=level, group=self.group)

    def uniform(self, views: list[LinearView]) -> Levels:
        """All matrices at ``bits``."""
        return (int(self.bits),) * len(views)

    def starts(self, views: list[LinearView], count: int, rng: np.random.Generator) -> list[Levels]:
        """The uniform configuration, or random ones of the average where that is no whole number."""
        return [self._lowered(views, rng) for _ in range(count if self.bits != int(self.bits) else 1)]

    def _lowered(self, views: list[LinearView], rng: np.random.Generator) -> Levels:
        """Everything rounded up, then bits taken from random matrices of each size until their share of the budget holds."""
        groups = by_size(views)
        sums = shares({size: len(group) for size, group in groups.items()}, self.bits, self.lowest, self.highest)
        levels = [0] * len(views)
        for size, group in groups.items():
            for i in group:
                levels[i] = math.ceil(sums[size] / len(group))
            for _ in range(sum(levels[i] for i in group) - sums[size]):
                levels[int(rng.choice([i for i in group if levels[i] > self.lowest]))] -= 1
        return tuple(levels)


@METHODS.register("evopress-sparse")
@dataclass(frozen=True)
class EvoPressSparse(LevelMethod):
    """Zeros per matrix, a share ``sparsity`` of all weights.

    A level more is the same number of zeros more in every matrix, whatever its size, so that all matrices exchange levels one
    for one and every configuration has exactly as many zeros. Level 0 is the compressor at ``sparsity``. Scores are compared
    over whole matrices (SparseGPT: over its blocks of columns).
    """

    database_knobs: ClassVar[tuple[str, ...]] = ("sparsity", "compressor", "levels", "n_calib")

    sparsity: Annotated[float, Knob(low=0.0, high=0.95, ratio=True, doc="share of zeros")] = 0.5
    compressor: Annotated[str, Knob(choices=(SPARSEGPT, WANDA, MAGNITUDE), doc="what prunes to a level")] = SPARSEGPT
    levels: Annotated[int, Knob(low=1, high=64, doc="up and down from the average, as far as a matrix allows")] = 8

    def axes(self, info: ModelInfo) -> Axes:
        """Weights over those that are not zero."""
        return Axes(ratio=1 / (1 - self.sparsity))

    @classmethod
    def identity(cls, info: ModelInfo) -> EvoPressSparse:
        """Nothing removed."""
        return cls(sparsity=0.0)

    def relevant(self) -> EvoPressSparse:
        """Where nothing goes there is one configuration."""
        if self.sparsity == 0:
            return self.at_defaults("allocation", "generations", "offspring", "survivors")
        return super().relevant()

    def space(self, views: list[LinearView]) -> LevelSpace:
        """All matrices exchange levels."""
        step = self.step(views)
        low = tuple(-min(int(self.sparsity * view.numel) // step, self.levels) for view in views)
        high = tuple(min((view.numel - int(self.sparsity * view.numel)) // step, self.levels) for view in views)
        if self.sparsity == 0:
            high = low
        return LevelSpace(low, high, (tuple(range(len(views))),))

    def step(self, views: list[LinearView]) -> int:
        """Zeros from one level to the next: ½·min(s, 1 - s)/levels·d², d the model's width, as in the published code.

        Rounded to what the compressor can prune in every matrix.
        """
        unit = reduce(math.lcm, (self._grain(view) for view in views))
        wanted = 0.5 * min(self.sparsity, 1 - self.sparsity) / self.levels * views[0].cols ** 2
        return max(1, round(wanted / unit)) * unit

    def codec(self, view: LinearView, views: list[LinearView], level: int) -> MatrixCodecMethod:
        """Pruning to ``level`` steps more."""
        # the nudge, a small part of one weight, keeps rounding from losing one
        more = (level * self.step(views) + 1e-5) / view.numel if level else 0.0
        if self.compressor == SPARSEGPT:
            return SparseGpt(sparsity=self.sparsity + more)
        codec = Wanda if self.compressor == WANDA else Magnitude
        return codec(sparsity=self.sparsity + more, compare="matrix")

    def uniform(self, views: list[LinearView]) -> Levels:
        """Level 0."""
        return (0,) * len(views)

    def _grain(self, view: LinearView) -> int:
        """Numbers of zeros that are multiples of it, and only those, are pruned exactly when each block takes its share."""
        if self.compressor != SPARSEGPT:
            return 1
        block = min(SparseGpt().mask_block, view.cols)
        return view.cols // math.gcd(block, view.cols % block or block)


def by_size(views: Sequence[LinearView]) -> dict[int, list[int]]:
    """Places of the views by their number of weights."""
    groups: dict[int, list[int]] = {}
    for place, view in enumerate(views):
        groups.setdefault(view.numel, []).append(place)
    return groups


def output_error(weight_OI: Tensor, served_OI: Tensor, stats: ViewStats) -> float:
    """tr(Δ·H·Δᵀ) / tr(W·H·Wᵀ): the squared error of a matrix' outputs, relative to their square."""
    weight_OI, difference_OI = weight_OI.float(), (weight_OI - served_OI).float()
    whole = float(((weight_OI @ stats.hessian_II) * weight_OI).sum())
    error = float(((difference_OI @ stats.hessian_II) * difference_OI).sum())
    return error / whole if whole > 0 else 0.0
