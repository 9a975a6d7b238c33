"""Weight methods: each matrix of a model is stored as a payload and served as what the payload decodes to.

A method is a codec: ``encode`` turns one matrix, and what calibration knows of its inputs, into a payload. The base class
owns what sits in the hook ``matrices`` (the linear views of the model), the calibration, the stage that keeps encoded models, and the costs.

Shape suffixes: O outputs (rows), I inputs (columns).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self

import torch
from torch import Tensor

from isoflop.core.hook import Hook
from isoflop.core.knobs import Knob, KnobValue, knob_specs
from isoflop.core.stage import Stage, StageContext
from isoflop.methods.base import Method
from isoflop.methods.calibration import OnModel
from isoflop.methods.weights.artefact import Artefact, Serving
from isoflop.methods.weights.payloads import Payload
from isoflop.methods.weights.statistics import (
    CalibrationStage,
    Statistics,
    ViewStats,
    calibration_seed,
    collect_by_block,
)
from isoflop.methods.weights.views import LinearView, linear_views
from isoflop.models.base import Model, ModelInfo
from isoflop.models.hooks.matrices import MATRICES
from isoflop.models.hooks.occupant import Occupant, tensor_bytes

if TYPE_CHECKING:
    from isoflop.methods.probe import Probe

Served = tuple[Callable[[LinearView], Payload], Mapping[str, Tensor]]


@dataclass(frozen=True)
class WeightMethod(Method):
    """Base class of methods that compress the matrices inside a model's blocks.

    Embeddings, head, norms and biases stay dense. ``ratio`` compares the matrices alone; ``model_ratio`` all weights.
    """

    family: ClassVar[str] = "weights"
    ratio_of: ClassVar[str] = "bytes of the weights"
    ratio_bytes: ClassVar[tuple[str, str] | None] = ("weight_bytes_dense", "weight_bytes")
    hooks: ClassVar[tuple[Hook[Any], ...]] = (MATRICES,)

    def check(self, info: ModelInfo) -> None:
        """Refuse models without the hook, and knobs that the matrices' sizes rule out, as far as they are known."""
        super().check(info)
        for rows, cols, _ in known_matrices(info):
            self.check_shape(rows, cols)

    def calibration_knobs(self) -> dict[str, KnobValue]:
        """The knobs that what ``prepare`` computes depends on."""
        return self.knobs()

    def check_shape(self, rows: int, cols: int) -> None:
        """Raise Infeasible when a matrix of this size cannot be encoded; names the knob and what would work."""

    def occupants(self, model: Model, prepared: Any) -> dict[Hook[Any], Occupant]:
        """The compressed matrices, served.

        Args:
            prepared: value of the ``prepare`` stage, or None for a method without one.
        """
        views = linear_views(model)
        for view in views:
            self.check_shape(view.rows, view.cols)
        return {MATRICES: Serving(views, *self.served(model, views, prepared))}

    @abstractmethod
    def served(self, model: Model, views: list[LinearView], prepared: Any) -> Served:
        """The payload of each view, and the vectors that are served with other values (see ``Artefact``).

        Args:
            model: uncompressed.
            prepared: as in ``occupants``.
        """

    def footprint(self, model: Model, ctx: StageContext) -> dict[str, float]:
        """Bytes as stored, everything included.

        ``ratio``: dense bytes of the compressed matrices over theirs as stored; ``bits``: stored bits per weight of them;
        ``model_ratio``, ``model_bits``: the same over all weights that are served, those of a compressor included, per weight of
        the uncompressed model; ``compressed_params``: weights in the matrices.
        """
        views = linear_views(model)
        parameters = {view.parameter: view for view in views}
        if not parameters.keys() <= model.stored.keys():
            raise ValueError(f"method {self.name} is not applied")
        stored = sum(model.stored[name] for name in parameters)
        dense = sum(tensor_bytes(view.weight(), model.info.dense_bits) for view in views)
        count = sum(view.numel for view in views)
        whole = sum(t.numel() for t in {id(p): p for p in model.module.parameters()}.values())
        return {
            "ratio": dense / stored,
            "bits": 8 * stored / count,
            "model_ratio": model.dense_weight_bytes() / model.served_bytes(),
            "model_bits": 8 * model.served_bytes() / whole,
            "compressed_params": float(count),
        }

    def at_defaults(self, *knobs: str) -> Self:
        """The same method with these knobs at their defaults."""
        specs = knob_specs(type(self))
        return replace(self, **{name: specs[name].default for name in knobs})

    @classmethod
    def probe(cls) -> Probe:
        """An untrained decoder."""
        from isoflop.methods.weights.probe import WeightProbe

        return WeightProbe()


@dataclass(frozen=True)
class MatrixCodecMethod(WeightMethod):
    """Base class of methods that encode each matrix by itself, without calibration."""

    @abstractmethod
    def encode(self, weight_OI: Tensor, stats: ViewStats | None = None) -> Payload:
        """The stored form of one matrix.

        Args:
            stats: of its inputs; None for a method without calibration.
        """

    def encode_model(self, model: Model, statistics: Statistics | None = None) -> Artefact:
        """Every view of a model as it is now."""
        return Artefact(self.encode_views(linear_views(model), statistics))

    @torch.no_grad()
    def encode_views(self, views: Sequence[LinearView], statistics: Statistics | None) -> dict[str, Payload]:
        """Some views, by name."""
        known = ((view, None) for view in views) if statistics is None else statistics.each(views)
        return {view.name: self.encode(view.weight(), stats) for view, stats in known}

    def served(self, model: Model, views: list[LinearView], prepared: Any) -> Served:
        """Those of the artefact; without calibration it is encoded here."""
        artefact = prepared if prepared is not None else self.encode_model(model)
        return (lambda view: artefact[view.name]), artefact.vectors


@dataclass(frozen=True)
class CalibratedMethod(MatrixCodecMethod):
    """Base class of methods that encode each matrix by itself, knowing its inputs on training examples."""

    calibrates: ClassVar[bool] = True

    n_calib: Annotated[int, Knob(low=1, high=100_000, log=True, unit="examples", doc="training examples to calibrate on")] = 128  # fmt: skip

    def prepare(
        self, info: ModelInfo, weights: Stage | None, seed: int, trained_with: tuple[Method, ...] = ()
    ) -> Stage | None:
        """The stage with the encoded matrices."""
        self.check(info)
        source = OnModel.source(info, weights, seed, trained_with)
        relevant = self.relevant()
        calibration = CalibrationStage(**source, n_calib=relevant.n_calib)
        return ArtefactStage(**source, method=relevant, calibration=calibration)

    def relevant(self) -> Self:
        """The same method with knobs at their defaults that the others leave without effect: one stage for all of them."""
        return self

    def calibrate(self, model: Model, ctx: StageContext, seed: int) -> Artefact:
        """What the stage computes, on a loaded model."""
        payloads: dict[str, Payload] = {}

        def take(views: list[LinearView], statistics: Statistics) -> None:
            payloads.update(self.encode_views(views, statistics))

        collect_by_block(model, ctx, self.n_calib, calibration_seed(seed), take)
        return Artefact(payloads)

    def served(self, model: Model, views: list[LinearView], prepared: Any) -> Served:
        """Those of the stage."""
        if prepared is None:
            raise ValueError(f"method {self.name} is calibrated: apply() needs the value of its prepare() stage")
        return super().served(model, views, prepared)


@dataclass(frozen=True)
class ArtefactStage(OnModel):
    """A model's matrices as a calibrated method encodes them."""

    kind: ClassVar[str] = "weight-artefact"

    method: MatrixCodecMethod
    calibration: CalibrationStage

    def deps(self) -> tuple[Stage, ...]:
        """Those of the model, and the calibration."""
        return (*super().deps(), self.calibration)

    def compute(self, ctx: StageContext, folder: Path) -> None:
        """Encode every view."""
        with self.model(ctx) as model:
            self.method.encode_model(model, ctx.get(self.calibration)).save(folder)

    def load(self, ctx: StageContext, folder: Path) -> Artefact:
        """The payloads, read lazily."""
        return Artefact(folder, device=ctx.device)


def known_matrices(info: ModelInfo) -> list[tuple[int, int, int]]:
    """(rows, cols, how many) of the compressible matrices, as far as a model's geometry tells.

    ``geometry["matrices"]`` lists all of them; without it these are the attention's, and the MLP's where ``mlp`` is given.
    """
    found = info.geometry.get("matrices")
    if found is not None:
        return [(rows, cols, count) for rows, cols, count in found]
    geometry = info.geometry
    if not {"width", "heads", "layers"} <= geometry.keys():
        return []
    width, layers = geometry["width"], geometry["layers"]
    head = geometry.get("head_width", width // geometry["heads"])
    queries, keys = geometry["heads"] * head, geometry.get("kv_heads", geometry["heads"]) * head
    mlp = [(geometry["mlp"], width, layers), (width, geometry["mlp"], layers)] if "mlp" in geometry else []
    return [(queries, width, layers), (keys, width, 2 * layers), (width, queries, layers), *mlp]


def all_matrices_known(info: ModelInfo) -> bool:
    """Whether :func:`known_matrices` lists every matrix."""
    return "matrices" in info.geometry
