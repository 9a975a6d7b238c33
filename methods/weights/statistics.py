"""Calibration: what the inputs of each matrix look like on training examples.

One pass over the examples serves every method: the Hessian of the layer-wise squared error (GPTQ, SparseGPT), norms of
the input channels (Wanda) and their mean over samples (BitStack). The pass runs through the uncompressed model, so that
one stage serves every method and ratio. Matrices that read the same tensor share their statistics.

Shape suffixes: O outputs, I inputs, N tokens, B samples.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from isoflop.core.hashing import derive_seed
from isoflop.core.stage import StageContext
from isoflop.methods.calibration import OnModel
from isoflop.methods.weights.blockwise import BlockPasses
from isoflop.methods.weights.obs import Curvature
from isoflop.methods.weights.views import LinearView, linear_views, observed
from isoflop.models.base import Model

_TENSORS = "statistics-{}.safetensors"
_INDEX = "statistics.json"
STRIPE = 256
"""Rows of a Gram matrix that are added to at a time."""


@dataclass(frozen=True, eq=False)
class ViewStats:
    """Statistics of the inputs of one view.

    Attributes:
        tokens: N, inputs seen; 0 for an expert that no token was routed to.
        hessian_II: 2/N · XᵀX in float32; zeros without tokens.
        norms_I: ‖X_j‖₂ over all tokens.
        scales_I: mean over samples of the L2 norm over a sample's tokens (BitStack's s, without its epsilon). The tokens
            of a batch that are routed to one expert count as one sample.
        means_I, maxima_I: mean and largest |X_j| over all tokens; None where an older version calibrated.
    """

    tokens: int
    hessian_II: Tensor
    norms_I: Tensor
    scales_I: Tensor
    means_I: Tensor | None = None
    maxima_I: Tensor | None = None
    _curvatures: dict[tuple[float, torch.dtype, bool], Curvature] = field(default_factory=dict, repr=False)

    def curvature(self, damp: float, dtype: torch.dtype, by_activation: bool = False) -> Curvature:
        """What an OBS sweep over weights of a type knows of the inputs; worked out once, since many matrices may ask."""
        key = damp, torch.float64 if dtype == torch.float64 else torch.float32, by_activation
        if key not in self._curvatures:
            self._curvatures.clear()  # one of them is as large as the Hessian
            self._curvatures[key] = Curvature.of(self.hessian_II, *key)
        return self._curvatures[key]


@dataclass
class _Sums:
    gram_II: Tensor
    norms_I: Tensor
    sizes_I: Tensor
    maxima_I: Tensor
    tokens: int = 0
    samples: int = 0

    @classmethod
    def empty(cls, like: Tensor, cols: int) -> _Sums:
        """Of nothing, where ``like`` lies."""

        def zeros(*shape: int) -> Tensor:
            return like.new_zeros(shape, dtype=torch.float32)

        return cls(zeros(cols, cols), zeros(cols), zeros(cols), zeros(cols))

    def add(self, x: Tensor) -> None:
        x = x.detach().float()
        x_BNI = x if x.dim() == 3 else x.reshape(1, -1, x.shape[-1])
        x_NI = x_BNI.flatten(0, 1)
        for start in range(0, x_NI.shape[1], STRIPE):  # the lower half is the upper one's mirror image
            rows = slice(start, start + STRIPE)
            self.gram_II[rows, start:].addmm_(x_NI[:, rows].T, x_NI[:, start:])
        self.norms_I += x_BNI.norm(dim=1).sum(0)
        if x_NI.shape[0]:
            size_NI = x_NI.abs()
            self.sizes_I += size_NI.sum(0)
            self.maxima_I = torch.maximum(self.maxima_I, size_NI.amax(0))
        self.tokens += x_NI.shape[0]
        self.samples += x_BNI.shape[0]

    def tensors(self) -> dict[str, Tensor]:
        """Once, at the end: the Hessian takes the place of the sum."""
        norms_I = self.gram_II.diagonal().clamp(min=0).sqrt()
        for start in range(0, len(norms_I), STRIPE):
            rows = slice(start, start + STRIPE)
            self.gram_II[rows, rows] = self.gram_II[rows, rows].triu() + self.gram_II[rows, rows].triu(1).T
            self.gram_II[start + STRIPE :, rows] = self.gram_II[rows, start + STRIPE :].T
        hessian_II = self.gram_II.mul_(2 / max(self.tokens, 1))
        means_I = self.sizes_I / max(self.tokens, 1)
        scales_I = self.norms_I / max(self.samples, 1)
        return {"hessian": hessian_II, "norms": norms_I, "scales": scales_I, "means": means_I, "maxima": self.maxima_I}


@dataclass
class _Collector:
    """Adds up statistics; views that are given the same tensor object share one sum."""

    sums: dict[str, _Sums] = field(default_factory=dict)
    owner: dict[str, str] = field(default_factory=dict)
    _seen: dict[int, tuple[str, Tensor]] = field(default_factory=dict)

    def __call__(self, view: LinearView, x: Tensor) -> None:
        if view.name not in self.owner:
            first, _ = self._seen.setdefault(id(x), (view.name, x))  # holding x keeps its id from being used again
            self.owner[view.name] = first
        if self.owner[view.name] != view.name:
            return
        if view.name not in self.sums:
            self.sums[view.name] = _Sums.empty(x, view.cols)
        self.sums[view.name].add(x)

    def end_batch(self) -> None:
        self._seen.clear()

    def statistics(self, views: Sequence[LinearView]) -> Statistics:
        """Those of all views; an expert that no token was routed to has zeros."""
        for view in views:
            if view.name not in self.owner:
                self.owner[view.name] = view.name
                self.sums[view.name] = _Sums.empty(view.weight(), view.cols)
        tensors: dict[str, Tensor | Path] = {
            f"{name}/{part}": t for name, sums in self.sums.items() for part, t in sums.tensors().items()
        }
        return Statistics(tensors, self.owner, {name: sums.tokens for name, sums in self.sums.items()})


Take = Callable[[list[LinearView], "Statistics"], None]
"""Is given some views with their statistics, and must not keep the latter if memory is to stay small."""


@torch.no_grad()
def collect_by_block(model: Model, ctx: StageContext, examples: int, seed: int, take: Take) -> None:
    """Run calibration examples through the model as it is now, block by block where it can be (see ``BlockPasses``)."""
    views = linear_views(model)

    @contextmanager
    def watching(some: list[LinearView]) -> Iterator[Callable[[], None]]:
        collector = _Collector()
        with observed(some, collector):
            yield collector.end_batch
        take(some, collector.statistics(some))

    BlockPasses(model, views, list(model.calibration(ctx, examples, seed))).run(watching)


@torch.no_grad()
def collect_in_turn(model: Model, views: list[LinearView], batches: Sequence[Any], take: Take) -> None:
    """Run batches block by block; what ``take`` writes into a block's matrices is what the next block's inputs come from.

    All matrices of a block are seen before any of them is changed.

    Raises:
        ValueError: the model cannot be run block by block.
    """
    for number, run in BlockPasses(model, views, batches).blocks():
        some = [view for view in views if view.layer == number]
        collector = _Collector()
        with observed(some, collector):
            run(False)
        take(some, collector.statistics(some))
        run(True)


def collect(model: Model, ctx: StageContext, examples: int, seed: int) -> Statistics:
    """The statistics of all blocks at once."""
    found = Statistics({}, {}, {})
    collect_by_block(model, ctx, examples, seed, lambda _, part: found.take(part))
    return found


class Statistics:
    """Statistics of every view of a model, by the view's name; read from disk one matrix at a time.

    Args:
        tensors: ``<view>/hessian`` … by name, or the file to read them from by ``<view>``.
        owner: of each view, the view whose tensors it shares.
        tokens: of each owner, the inputs seen.
    """

    def __init__(self, tensors: dict[str, Tensor | Path], owner: dict[str, str], tokens: dict[str, int]) -> None:
        self._tensors = tensors
        self.owner = owner
        self._tokens = tokens

    def of(self, view: LinearView) -> ViewStats:
        """Statistics of one view, on the device of its weights."""
        name = self.owner[view.name]
        device = view.holder.device
        hessian, norms, scales = (self._read(name, part).to(device) for part in ("hessian", "norms", "scales"))
        found = ViewStats(self._tokens[name], hessian, norms, scales)
        if not self._has(name, "means"):
            return found
        means, maxima = (self._read(name, part).to(device) for part in ("means", "maxima"))
        return replace(found, means_I=means, maxima_I=maxima)

    def each(self, views: Iterable[LinearView]) -> Iterator[tuple[LinearView, ViewStats]]:
        """Views with their statistics, those of one input at a time: what neighbours share is read and worked out once."""
        owner, stats = "", None
        for view in views:
            if stats is None or self.owner[view.name] != owner:
                owner, stats = self.owner[view.name], None  # let the last one go first
                stats = self.of(view)
            yield view, stats

    def scales(self, view: LinearView) -> Tensor:
        """``ViewStats.scales_I`` alone."""
        return self._read(self.owner[view.name], "scales").to(view.holder.device)

    def take(self, other: Statistics) -> None:
        """Add those of other views."""
        self._tensors |= other._tensors
        self.owner |= other.owner
        self._tokens |= other._tokens

    def save(self, folder: Path) -> None:
        """Write everything into a folder, behind what was saved there before."""
        from safetensors.torch import save_file

        index = _read_index(folder)
        file = _TENSORS.format(len(set(index["files"].values())))
        held = {name: t for name, t in self._tensors.items() if isinstance(t, Tensor)}
        save_file({name: t.cpu().contiguous() for name, t in held.items()}, folder / file)
        index["owner"] |= self.owner
        index["tokens"] |= self._tokens
        index["files"] |= dict.fromkeys(self._tokens, file)
        (folder / _INDEX).write_text(json.dumps(index) + "\n")

    @classmethod
    def load(cls, folder: Path) -> Statistics:
        """The inverse of :meth:`save`; tensors are read when they are asked for."""
        index = _read_index(folder)
        return cls({name: folder / file for name, file in index["files"].items()}, index["owner"], index["tokens"])

    def _has(self, owner: str, part: str) -> bool:
        """Whether it was kept; older versions kept no magnitudes."""
        from safetensors import safe_open

        found = self._tensors.get(owner)
        if not isinstance(found, Path):
            return f"{owner}/{part}" in self._tensors
        with safe_open(found, framework="pt") as file:
            return f"{owner}/{part}" in file.keys()  # noqa: SIM118

    def _read(self, owner: str, part: str) -> Tensor:
        from safetensors import safe_open

        found = self._tensors.get(f"{owner}/{part}", self._tensors.get(owner))
        if not isinstance(found, Path):
            assert found is not None
            return found
        with safe_open(found, framework="pt") as file:
            read: Tensor = file.get_tensor(f"{owner}/{part}")
        return read


def _read_index(folder: Path) -> dict[str, dict[str, Any]]:
    """Empty where nothing was saved; folders of older stores have one file for everything, and do not name it."""
    path = folder / _INDEX
    index = json.loads(path.read_text()) if path.exists() else {"owner": {}, "tokens": {}}
    return {"files": dict.fromkeys(index["tokens"], "statistics.safetensors"), **index}


@dataclass(frozen=True)
class CalibrationStage(OnModel):
    """Statistics of a model's linear views on ``n_calib`` training examples; one for all weight methods.

    Attributes:
        sizes: asks for mean and largest magnitudes too, which stores of older versions do not hold; where nobody asks the key is
            the one it always was.
    """

    kind: ClassVar[str] = "weight-calibration"

    n_calib: int
    sizes: bool = False

    def spec(self) -> dict[str, Any]:
        """Without ``sizes`` where nobody asks for them."""
        return {name: value for name, value in super().spec().items() if name != "sizes" or value}

    def compute(self, ctx: StageContext, folder: Path) -> None:
        """One pass through the model; each block is written before the next one runs."""
        with self.model(ctx) as model:
            seed = calibration_seed(self.seed)
            collect_by_block(model, ctx, self.n_calib, seed, lambda _, found: found.save(folder))

    def load(self, ctx: StageContext, folder: Path) -> Statistics:
        """The statistics, read lazily."""
        return Statistics.load(folder)


def calibration_seed(seed: int) -> int:
    """Seed of the calibration examples of a job."""
    return derive_seed("weight calibration", seed)


def input_statistics(x_NI: Tensor) -> ViewStats:
    """Statistics of one matrix's inputs, (N, I), as one sample."""
    sums = _Sums.empty(x_NI, x_NI.shape[1])
    sums.add(x_NI)
    found = sums.tensors()
    return ViewStats(sums.tokens, found["hessian"], found["norms"], found["scales"], found["means"], found["maxima"])
