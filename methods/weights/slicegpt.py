"""SliceGPT: rows and columns deleted behind a rotation of the residual stream (arXiv 2401.15024)."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import torch

from isoflop.core.errors import Infeasible
from isoflop.core.hook import Hook
from isoflop.core.knobs import Knob
from isoflop.core.stage import Stage, StageContext
from isoflop.methods.base import METHODS, Axes, Method
from isoflop.methods.calibration import OnModel
from isoflop.methods.weights.artefact import Artefact
from isoflop.methods.weights.base import Served, WeightMethod, all_matrices_known, known_matrices
from isoflop.methods.weights.payloads import DensePayload
from isoflop.methods.weights.slicing import (
    Half,
    SlicedServing,
    check_sliceable,
    find_frames,
    halves_of,
    slice_matrices,
)
from isoflop.methods.weights.statistics import calibration_seed
from isoflop.methods.weights.views import LinearView, linear_views
from isoflop.models.base import Model, ModelInfo
from isoflop.models.hooks.matrices import MATRICES
from isoflop.models.hooks.occupant import Occupant

if TYPE_CHECKING:
    from isoflop.methods.probe import Probe

_HALVES = "halves.json"


@METHODS.register("slicegpt")
@dataclass(frozen=True)
class SliceGpt(WeightMethod):
    """The residual stream is rotated to its principal components on calibration text, and the last share ``sliced`` of them goes.

    Each attention and each MLP gets a rotation of its own, found where all before it is sliced already; matrices that read the
    stream lose columns, those that write it lose rows, and the stream passes from one rotation to the next through a matrix of the cut
    width, the shortcut, whose bytes are counted with the matrices. Norms become root mean squares, their weights move into the
    readers. So no weight is set to zero: everything is narrower, but for what the shortcuts cost, more than a tenth of a block's
    weights. ``sliced: 0`` leaves the model alone. Use it where dense, smaller matrices are wanted: 10 to 30 % in the paper.

    On purpose not as released: embeddings and head stay whole, so that the stream enters through one more rotation, which is counted
    (released, they are sliced, too, and tied ones are stored twice); rotations and matrices are stored in float16; no fine-tuning
    afterwards. Served is the narrow model inside the wide one, filled with zeros: outputs and bytes are its own, seconds and FLOPs are
    not. Models whose blocks have other norms or write the stream from several matrices (experts) are refused when they are calibrated.
    """

    paper: ClassVar[str] = "arXiv 2401.15024"
    calibrates: ClassVar[bool] = True

    sliced: Annotated[float, Knob(low=0.0, high=0.9, ratio=True, doc="share of the width that goes")] = 0.25
    round_to: Annotated[int, Knob(choices=(1, 8, 32), unit="channels", doc="what is left of the width is a multiple of")] = 8  # fmt: skip
    n_calib: Annotated[int, Knob(low=1, high=100_000, log=True, unit="examples", doc="training examples for the rotations")] = 128  # fmt: skip

    @classmethod
    def identity(cls, info: ModelInfo) -> SliceGpt:
        """Nothing goes."""
        return cls(sliced=0.0)

    def kept(self, width: int) -> int:
        """What is left of a width: rounded down, as released, but at least one channel."""
        kept = int((1 - self.sliced) * width + 1e-9)
        return max(1, kept - kept % self.round_to)

    def axes(self, info: ModelInfo) -> Axes:
        """Weights over what is left of them, rotations included where the matrices are known."""
        planned = self._planned(info)
        return Axes(ratio=planned[0] / planned[1] if planned else 1 / (1 - self.sliced))

    def check(self, info: ModelInfo) -> None:
        """Refuse a width of which nothing would be left, and one whose rotations would cost more than goes."""
        super().check(info)
        width = info.geometry.get("width")
        if not width or not self.sliced:
            return
        if (1 - self.sliced) * width < self.round_to:
            raise Infeasible(
                f"method slicegpt: sliced = {self.sliced:g} leaves less than round_to = {self.round_to} channels of {width}; "
                f"allowed: sliced up to {1 - self.round_to / width:.3g}, or a smaller round_to"
            )
        planned = self._planned(info)
        if planned and planned[1] >= planned[0]:
            raise Infeasible(
                f"method slicegpt: with sliced = {self.sliced:g} the matrices of model {info.ref} and their rotations would take "
                f"{planned[1]:,} numbers, and the matrices alone are {planned[0]:,}; allowed: {self._paying(info, width)}"
            )

    def _paying(self, info: ModelInfo, width: int) -> str:
        """From where on slicing saves something."""
        shares = (1 - kept / width for kept in range(width - width % self.round_to, 0, -self.round_to))
        pays = (s for s in shares if (found := replace(self, sliced=s)._planned(info)) and found[1] < found[0])
        least = next((s for s in pays if s <= 0.9), None)
        return "sliced = 0" if least is None else f"sliced from {math.ceil(least * 1000) / 1000:g}, or 0"

    def _planned(self, info: ModelInfo) -> tuple[int, int] | None:
        """Weights of all matrices, and numbers that are stored of them; None where not all of them are known.

        Every matrix is cut along one side but the last one that writes the stream, taken to be the largest of its kind. The stream
        enters and leaves through one rotation each, and passes from half to half in 2·layers - 1 others.
        """
        width, layers = info.geometry.get("width"), info.geometry.get("layers")
        if not (width and layers and all_matrices_known(info)):
            return None
        known = known_matrices(info)
        dense = sum(rows * cols * count for rows, cols, count in known)
        if not self.sliced:
            return dense, dense
        kept, last = self.kept(width), max((cols for rows, cols, _ in known if rows == width), default=0) * width
        return dense, (dense - last) * kept // width + last + (2 * layers - 1) * kept**2 + 2 * kept * width

    def relevant(self) -> SliceGpt:
        """Where nothing goes nothing is found."""
        return self if self.sliced else self.at_defaults("round_to", "n_calib")

    def prepare(
        self, info: ModelInfo, weights: Stage | None, seed: int, trained_with: tuple[Method, ...] = ()
    ) -> Stage | None:
        """The stage with the sliced matrices."""
        self.check(info)
        return SliceStage(**OnModel.source(info, weights, seed, trained_with), method=self.relevant())

    @torch.no_grad()
    def calibrate(self, model: Model, ctx: StageContext, seed: int) -> Sliced:
        """What the stage computes, on a loaded model."""
        views = linear_views(model)
        if not self.sliced:
            return Sliced(Artefact({view.name: DensePayload.of(view.weight()) for view in views}), ())
        batches = list(model.calibration(ctx, self.n_calib, calibration_seed(seed)))
        halves = halves_of(model, batches[0])
        check_sliceable(model, halves, batches[0])
        frames = find_frames(model, halves, batches, self.kept(halves[0].writer.rows))
        named = tuple((h.norm, tuple(view.name for view in h.readers), h.writer.name) for h in halves)
        return Sliced(slice_matrices(model, halves, frames), named)

    def occupants(self, model: Model, prepared: Any) -> dict[Hook[Any], Occupant]:
        """The narrow model."""
        if not isinstance(prepared, Sliced):
            raise ValueError("method slicegpt is calibrated: apply() needs the value of its prepare() stage")
        if not prepared.named:
            return super().occupants(model, prepared)
        return {MATRICES: SlicedServing(model, prepared.halves(model), prepared.artefact)}

    @classmethod
    def probe(cls) -> Probe:
        """Of two layers, in which slicing pays for its rotations."""
        from isoflop.methods.weights.probe import WeightProbe

        return WeightProbe(layers=2)

    def served(self, model: Model, views: list[LinearView], prepared: Any) -> Served:
        """The matrices alone, filled with zeros."""
        return (lambda view: prepared.artefact[view.name]), prepared.artefact.vectors


@dataclass(frozen=True, eq=False)
class Sliced:
    """A sliced model.

    Attributes:
        artefact: its matrices and biases.
        named: of each half the names of its norm, its readers and its writer.
    """

    artefact: Artefact
    named: tuple[tuple[str, tuple[str, ...], str], ...]

    def halves(self, model: Model) -> list[Half]:
        """The halves in a loaded model."""
        views = {view.name: view for view in linear_views(model)}
        return [
            Half(norm, tuple(views[name] for name in readers), views[writer]) for norm, readers, writer in self.named
        ]

    def save(self, folder: Path) -> None:
        """Write everything into a folder."""
        self.artefact.save(folder)
        (folder / _HALVES).write_text(json.dumps(self.named) + "\n")

    @classmethod
    def load(cls, folder: Path, device: str = "cpu") -> Sliced:
        """The inverse of :meth:`save`."""
        named = json.loads((folder / _HALVES).read_text())
        return cls(Artefact(folder, device=device), tuple((n, tuple(r), w) for n, r, w in named))


@dataclass(frozen=True)
class SliceStage(OnModel):
    """A model's matrices behind rotations."""

    kind: ClassVar[str] = "sliced-weights"

    method: SliceGpt

    def compute(self, ctx: StageContext, folder: Path) -> None:
        """Rotate and slice."""
        with self.model(ctx) as model:
            self.method.calibrate(model, ctx, self.seed).save(folder)

    def load(self, ctx: StageContext, folder: Path) -> Sliced:
        """The payloads, read lazily."""
        return Sliced.load(folder, ctx.device)
