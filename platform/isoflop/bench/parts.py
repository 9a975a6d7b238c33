"""Models, methods and tasks for measuring the engine: jobs that do nothing, and jobs bound by what they load or share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from isoflop.core.errors import unknown
from isoflop.core.knobs import Knob
from isoflop.core.stage import Stage, StageContext
from isoflop.methods.base import METHODS, Method
from isoflop.models.base import Model, ModelInfo
from isoflop.models.family import FAMILIES, ModelFamily
from isoflop.models.training.taught import Taught
from isoflop.tasks.base import TASKS, Shard, Task

_LAYERS, _WIDTH = 12, 2048  # 50.4 million parameters
_IMAGES, _PATCHES = 64, 576


def big_network() -> nn.Module:
    """A stack of linear layers with 50 million parameters."""
    return nn.Sequential(*[nn.Linear(_WIDTH, _WIDTH) for _ in range(_LAYERS)])


@dataclass(frozen=True)
class BigWeights(Stage):
    """The big network's weights on disk, as a checkpoint would lie there."""

    kind: ClassVar[str] = "bench-weights"

    def compute(self, ctx: StageContext, folder: Path) -> None:
        torch.manual_seed(0)
        save_file(big_network().state_dict(), folder / "model.safetensors")

    def load(self, ctx: StageContext, folder: Path) -> Path:
        return folder / "model.safetensors"


def load_big(path: Path) -> nn.Module:
    """What loading a checkpoint costs: build the module, read the file, copy the weights."""
    network = big_network()
    network.load_state_dict(load_file(path))
    return network.eval()


@dataclass(frozen=True)
class Features(Stage):
    """Patch features of some images from a small vision transformer: dear to compute, cheap to use."""

    kind: ClassVar[str] = "bench-features"

    def compute(self, ctx: StageContext, folder: Path) -> None:
        np.save(folder / "features.npy", compute_features())

    def load(self, ctx: StageContext, folder: Path) -> np.ndarray:
        loaded: np.ndarray = np.load(folder / "features.npy", mmap_mode="r")
        return loaded


def compute_features() -> np.ndarray:
    """Features (images, patches, 128) of a 4-layer transformer encoder on 64 random images."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(128, 4, 256, batch_first=True, dropout=0.0)
    encoder = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False).eval()
    with torch.inference_mode():
        parts = [encoder(torch.randn(8, _PATCHES, 128)) for _ in range(_IMAGES // 8)]
    return torch.cat(parts).numpy()


def pooled_error(features: np.ndarray, tokens: int) -> float:
    """How much of the features a pooling to ``tokens`` tokens loses."""
    grouped = features.reshape(len(features), tokens, -1, features.shape[-1])
    return float(((grouped - grouped.mean(2, keepdims=True)) ** 2).mean())


class BenchModel(Model):
    """A module, or nothing."""

    def __init__(self, info: ModelInfo, module: nn.Module) -> None:
        self.info = info
        self.module = module
        self.setting: Mapping[str, Any] = {}


class BenchFamily(ModelFamily):
    """``bench/noop``: nothing; ``bench/big``: 50 million parameters from disk."""

    name = "bench"

    def members(self) -> list[str]:
        return []

    def info(self, ref: str, options: Mapping[str, Any]) -> ModelInfo:
        sizes = {"bench/noop": 1, "bench/big": _LAYERS * _WIDTH * (_WIDTH + 1)}
        if ref not in sizes:
            raise unknown("model", ref, sizes)
        return ModelInfo(ref, self.name, "1", sizes[ref], frozenset())

    def weights(self, info: ModelInfo, methods: tuple[Taught, ...], seed: int) -> Stage | None:
        return BigWeights() if info.ref == "bench/big" else None

    def load(self, info: ModelInfo, weights: Stage | None, ctx: StageContext) -> Model:
        return BenchModel(info, nn.Identity() if weights is None else load_big(ctx.get(weights)))


FAMILIES.register("bench")(BenchFamily())


@METHODS.register("bench-knobs")
@dataclass(frozen=True)
class BenchKnobs(Method):
    """Knobs that do nothing but enter the score."""

    family: ClassVar[str] = "bench"
    x: Annotated[float, Knob(low=0.0, high=1.0, doc="enters the score")] = 0.5
    y: Annotated[float, Knob(low=1e-3, high=1.0, log=True, doc="enters the score")] = 0.1
    z: Annotated[float, Knob(low=0.0, high=10.0, doc="enters the score")] = 1.0
    k: Annotated[int, Knob(low=1, high=_PATCHES, ratio=True, doc="tokens that features are pooled to")] = 8

    @contextmanager
    def apply(self, model: Model, prepared: Any) -> Iterator[None]:
        assert isinstance(model, BenchModel)
        model.setting = self.knobs()
        try:
            yield
        finally:
            model.setting = {}


def noop_score(x: float, y: float, z: float) -> float:
    """The objective of the no-op benchmark, the same for every engine."""
    return (x - 0.3) ** 2 + (y - 0.1) ** 2 + (z - 3.0) ** 2 / 100


class _BenchTask(Task):
    def evaluate(self, model: Model, ctx: StageContext, seed: int) -> Iterator[Shard]:
        assert isinstance(model, BenchModel)
        yield Shard(np.zeros(1, dtype=np.int64), np.array([self.score(model, ctx)]))

    def score(self, model: BenchModel, ctx: StageContext) -> float:
        raise NotImplementedError

    def measure(self, model: Model, ctx: StageContext) -> dict[str, float]:
        return {}


@TASKS.register("bench-noop")
@dataclass(frozen=True)
class NoopTask(_BenchTask):
    """Scores the knobs; no model is run."""

    def score(self, model: BenchModel, ctx: StageContext) -> float:
        return noop_score(model.setting["x"], model.setting["y"], model.setting["z"])


@TASKS.register("bench-forward")
@dataclass(frozen=True)
class ForwardTask(_BenchTask):
    """One small batch through the model."""

    def score(self, model: BenchModel, ctx: StageContext) -> float:
        return forward_score(model.module, model.setting["x"])


def forward_score(network: nn.Module, x: float) -> float:
    """The objective of the reload-bound benchmark."""
    with torch.inference_mode():
        return float(network(torch.full((4, _WIDTH), x)).abs().mean())


@TASKS.register("bench-features")
@dataclass(frozen=True)
class FeatureTask(_BenchTask):
    """Pools shared features."""

    def stages(self, info: ModelInfo) -> tuple[Stage, ...]:
        return (Features(),)

    def score(self, model: BenchModel, ctx: StageContext) -> float:
        return pooled_error(ctx.get(Features()), int(model.setting["k"]))
