"""A toy world without training cost, for tests of the engine: a model family, methods and a task whose errors follow a
law exactly, and methods that misbehave on purpose.

A sweep names it under ``import: [toy_parts]``. Every computation of a stage and every evaluation is appended to
``toy.log`` beside the stage cache's folder, so that tests can count them, also across processes.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from torch import nn

from isoflop.core.errors import Infeasible
from isoflop.core.hashing import derive_seed
from isoflop.core.knobs import Knob, check_knobs
from isoflop.core.stage import Stage, StageContext
from isoflop.methods.base import METHODS, Axes, Method
from isoflop.models.base import Model, ModelInfo
from isoflop.models.family import FAMILIES, ModelFamily
from isoflop.tasks.base import TASKS, Shard, Task

SIZES = {"toy/s": 1_000, "toy/m": 4_000, "toy/l": 16_000, "toy/xl": 64_000}
FULL_TOKENS = 64
ALPHA, BETA, SCALE = 0.3, 0.1, 2.0
_LEAK: list[bytearray] = []


def cache_root(ctx: Any) -> Path:
    """The folder that holds this context's stage cache."""
    return Path(ctx.root).parent


def log(folder: Path, text: str) -> None:
    """One line in ``toy.log``; short appends of several processes do not mix."""
    with (folder / "toy.log").open("a") as file:
        file.write(f"{text}\n")


def log_lines(cache_dir: Path, prefix: str = "") -> list[str]:
    """The lines that begin with ``prefix``."""
    path = Path(cache_dir) / "toy.log"
    return [line for line in path.read_text().splitlines() if line.startswith(prefix)] if path.exists() else []


@dataclass(frozen=True)
class ToyBase(Stage):
    """Shared by all toy models, as a vision tower is."""

    kind = "toy-base"

    def compute(self, ctx: StageContext, folder: Path) -> None:
        log(cache_root(ctx), f"stage {self.key}")
        np.save(folder / "base.npy", np.ones(2))

    def load(self, ctx: StageContext, folder: Path) -> np.ndarray:
        return np.load(folder / "base.npy")


@dataclass(frozen=True)
class ToyWeights(Stage):
    """The "training" of one toy model."""

    kind = "toy-weights"
    ref: str
    seed: int
    seconds: float = 0.0
    fail: str = ""
    base: Stage = ToyBase()

    def compute(self, ctx: StageContext, folder: Path) -> None:
        log(cache_root(ctx), f"stage {self.key}")
        time.sleep(self.seconds)
        if self.fail:
            misbehave(self.fail, cache_root(ctx), self.key)
        np.save(folder / "weights.npy", ctx.get(self.base) * derive_seed(self.ref, self.seed))

    def load(self, ctx: StageContext, folder: Path) -> np.ndarray:
        return np.load(folder / "weights.npy")


@dataclass(frozen=True)
class ToyCalibration(Stage):
    """What a method with ``prepare`` computes."""

    kind = "toy-calibration"
    ref: str
    k: int

    def compute(self, ctx: StageContext, folder: Path) -> None:
        log(cache_root(ctx), f"stage {self.key}")
        (folder / "k.txt").write_text(str(self.k))

    def load(self, ctx: StageContext, folder: Path) -> int:
        return int((folder / "k.txt").read_text())


@dataclass(frozen=True)
class ToyPlace(Stage):
    """Gives a method the folder of the stage cache, where it may leave marks."""

    kind = "toy-place"

    def compute(self, ctx: StageContext, folder: Path) -> None:
        (folder / "here.txt").write_text("here")

    def load(self, ctx: StageContext, folder: Path) -> Path:
        return cache_root(ctx)


class ToyModel(Model):
    """A size, and the number of tokens that methods leave."""

    def __init__(self, info: ModelInfo, weights: np.ndarray) -> None:
        self.info = info
        self.module = nn.Linear(2, 2)
        self.weights = weights
        self.tokens = float(FULL_TOKENS)
        self.factor = 1.0
        self.bad = ""
        self.place = Path()


class ToyFamily(ModelFamily):
    """``toy/s`` … ``toy/xl``; option ``seconds`` makes "training" slow, ``fail`` makes it misbehave."""

    name = "toy"

    def members(self) -> list[str]:
        return list(SIZES)

    def info(self, ref: str, options: Mapping[str, Any]) -> ModelInfo:
        if ref not in SIZES:
            from isoflop.core.errors import unknown

            raise unknown("toy model", ref, SIZES)
        geometry = {"visual_tokens": FULL_TOKENS, **options}
        return ModelInfo(ref, "toy", "1", SIZES[ref], frozenset(), geometry, offers=frozenset({"toy"}))

    def weights(self, info: ModelInfo, methods: tuple[Method, ...], seed: int) -> Stage:
        return ToyWeights(info.ref, seed, float(info.geometry.get("seconds", 0)), str(info.geometry.get("fail", "")))

    def load(self, info: ModelInfo, weights: Stage | None, ctx: StageContext) -> ToyModel:
        assert weights is not None
        log(cache_root(ctx), f"load {info.ref}")
        return ToyModel(info, ctx.get(weights))


FAMILIES.register("toy")(ToyFamily())


@dataclass(frozen=True)
class ToyMethod(Method):
    """Sets tokens and factor, and puts them back."""

    family = "toy-family"
    needs = frozenset({"toy"})

    @contextmanager
    def apply(self, model: Model, prepared: Any) -> Iterator[None]:
        assert isinstance(model, ToyModel)
        before = dict(vars(model))
        try:
            self.change(model, prepared)
            yield
        finally:
            vars(model).update(before)

    def change(self, model: ToyModel, prepared: Any) -> None:
        """The method's effect."""


@METHODS.register("toy-full")
@dataclass(frozen=True)
class ToyFull(ToyMethod):
    """All tokens; no knobs."""

    def axes(self, info: ModelInfo) -> Axes:
        return Axes(visual_tokens=FULL_TOKENS)


@METHODS.register("toy-tokens")
@dataclass(frozen=True)
class ToyTokens(ToyMethod):
    """Fewer tokens; 13 is unlucky for toy/s. ``late`` and ``scale`` matter only in mode ``scaled``."""

    late: Annotated[int, Knob(low=0, high=9, doc="declared before the knob it depends on")] = 0
    tokens: Annotated[int, Knob(low=1, high=64, log=True, ratio=True, unit="tokens")] = 64
    mode: Annotated[str, Knob(choices=("plain", "scaled"))] = "plain"
    scale: Annotated[float, Knob(low=0.5, high=2.0, log=True)] = 1.0
    flag: Annotated[bool, Knob()] = False

    def axes(self, info: ModelInfo) -> Axes:
        return Axes(visual_tokens=float(self.tokens))

    def check(self, info: ModelInfo) -> None:
        super().check(info)
        if self.tokens == 13 and info.ref == "toy/s":
            raise Infeasible("method toy-tokens: tokens = 13 is unlucky for toy/s; allowed: any other number")

    def change(self, model: ToyModel, prepared: Any) -> None:
        model.tokens = float(self.tokens)
        if self.mode == "scaled":
            model.factor *= self.scale * (1 + 0.01 * self.late)


@METHODS.register("toy-prepared")
@dataclass(frozen=True)
class ToyPrepared(ToyMethod):
    """A method with a calibration stage."""

    k: Annotated[int, Knob(low=1, high=8, ratio=True)] = 2

    def axes(self, info: ModelInfo) -> Axes:
        return Axes(visual_tokens=FULL_TOKENS / self.k)

    def prepare(
        self, info: ModelInfo, weights: Stage | None, seed: int, trained_with: tuple[Method, ...] = ()
    ) -> Stage:
        return ToyCalibration(info.ref, self.k)

    def change(self, model: ToyModel, prepared: Any) -> None:
        assert prepared == self.k
        model.tokens = FULL_TOKENS / self.k

    def trace(self, prepared: Any) -> dict[str, list[float]]:
        return {"loss": [prepared / (1 + step) for step in range(500)], "error": [0.5, math.nan, 0.25], "none": []}


@METHODS.register("toy-required")
@dataclass(frozen=True)
class ToyRequired(ToyMethod):
    """A knob without a default."""

    strength: Annotated[float, Knob(low=0.0, high=1.0)]

    def change(self, model: ToyModel, prepared: Any) -> None:
        model.factor += self.strength


@METHODS.register("toy-boundless")
@dataclass(frozen=True)
class ToyBoundless(ToyMethod):
    """Knobs whose ranges no column and no sampler can hold."""

    wide: Annotated[int, Knob(low=-(2**70), high=2**70)] = 0
    free: Annotated[float, Knob()] = 0.0


@METHODS.register("toy-bad")
@dataclass(frozen=True)
class ToyBad(ToyMethod):
    """Misbehaves in the way that ``how`` names; ``n`` only makes several jobs of it."""

    how: Annotated[str, Knob()] = "fine"
    n: Annotated[int, Knob(low=0, high=1000)] = 0

    def prepare(
        self, info: ModelInfo, weights: Stage | None, seed: int, trained_with: tuple[Method, ...] = ()
    ) -> Stage:
        return ToyPlace()

    def change(self, model: ToyModel, prepared: Any) -> None:
        model.bad, model.place = self.how, prepared


@TASKS.register("toy-task")
@dataclass(frozen=True)
class ToyTask(Task):
    """Error = SCALE · N^-ALPHA · V^-BETA · factor, with a little seeded noise per example."""

    shards: Annotated[int, Knob(low=1, high=1000)] = 2
    examples: Annotated[int, Knob(low=1, high=1000)] = 4
    seconds: Annotated[float, Knob(low=0.0, high=1000.0, doc="per shard")] = 0.0
    noise: Annotated[float, Knob(low=0.0, high=1.0)] = 0.01
    power: Annotated[float, Knob(low=0.0, high=9.0, doc="multiplies the exponent of V")] = 1.0

    def evaluate(self, model: Model, ctx: StageContext, seed: int) -> Iterator[Shard]:
        assert isinstance(model, ToyModel)
        log(cache_root(ctx), f"eval {model.info.ref} {model.tokens:g} {model.bad} pid {os.getpid()}")
        mean = SCALE * model.info.n_params**-ALPHA * model.tokens ** (-BETA * self.power) * model.factor
        for shard in range(self.shards):
            if model.bad and shard == self.shards - 1:
                misbehave(model.bad, model.place, f"{model.info.ref}")
            time.sleep(self.seconds)
            ids = np.arange(shard * self.examples, (shard + 1) * self.examples)
            rng = np.random.default_rng([seed, shard])
            errors = mean * (1 + self.noise * rng.standard_normal(self.examples))
            if model.bad == "nan":
                errors[0] = np.nan
            yield Shard(ids, errors, {"loss": errors * 2, **dict.fromkeys(odd_names(model.bad), errors)})

    def measure(self, model: Model, ctx: StageContext) -> dict[str, float]:
        assert isinstance(model, ToyModel)
        cost: dict[str, Any] = {
            "visual_tokens": model.tokens,
            "text_tokens": 2.0,
            "flops": 2.0 * model.info.n_params * (model.tokens + 2),
        }
        return {**cost, "odd": "not a number"} if model.bad == "footprint" else cost


@TASKS.register("toy-other")
@dataclass(frozen=True)
class ToyOther(ToyTask):
    """The same with twice the exponent of V."""

    power: Annotated[float, Knob(low=0.0, high=9.0)] = 2.0


class Unpicklable(Exception):
    """Holds what no pickle can carry, and cannot even say so."""

    def __init__(self) -> None:
        super().__init__("unpicklable")
        self.hook = lambda: None

    def __reduce__(self) -> Any:
        raise TypeError("not picklable")


class Panic(BaseException):
    """As libraries in Rust raise."""


MISTAKES = {  # in somebody's code: the same again, however often it is tried
    "type": TypeError, "attribute": AttributeError, "name": NameError, "key": KeyError, "assertion": AssertionError,
    "unwritten": NotImplementedError, "division": ZeroDivisionError,
}  # fmt: skip
OTHERS = {  # what may go better elsewhere or later
    "raise": ValueError, "runtime": RuntimeError, "file": FileNotFoundError, "connection": ConnectionResetError,
    "panic": Panic, "generator-exit": GeneratorExit, "keyboard": KeyboardInterrupt,
}  # fmt: skip


class Unprintable(Exception):
    """Fails while it is turned into text."""

    def __str__(self) -> str:
        raise RuntimeError("no words")


def odd_names(how: str) -> list[str]:
    """Two names for metrics, for ``how="names KEY"``."""
    if not how.startswith("names "):
        return []
    from outside_texts import TEXTS

    return [TEXTS[how[6:]], f"{TEXTS[how[6:]]}!"]


def misbehave(how: str, place: Path, key: str) -> None:
    """Do what ``how`` says. ``once-X`` does X the first time only."""
    if how.startswith("once-"):
        mark = place / f"mark-{how}-{key.replace('/', '-')}"
        if mark.exists():
            return
        mark.touch()
        how = how.removeprefix("once-")
    if how in MISTAKES or how in OTHERS:
        raise {**MISTAKES, **OTHERS}[how]("toy failure\nof two lines")
    if how.startswith("says "):
        from outside_texts import TEXTS

        name = TEXTS[how[5:]][:99].replace("\0", "").encode(errors="replace").decode()
        raise type(f"Error {name}", (ValueError,), {})(TEXTS[how[5:]])
    if how == "unpicklable":
        raise Unpicklable
    if how == "unprintable":
        raise Unprintable
    if how == "sysexit":
        sys.exit(3)
    if how == "exit":
        os._exit(7)
    if how == "hang":
        time.sleep(3600)
    if how == "oom":
        raise torch.OutOfMemoryError("toy: CUDA out of memory")
    if how == "infeasible":
        raise Infeasible("toy: not on this model")
    if how == "leak":
        while True:
            _LEAK.append(bytearray(64 * 2**20))


def build_method(name: str, **knobs: Any) -> Method:
    """A method with checked knobs, for unit tests."""
    cls = METHODS.get(name)
    return cls(**check_knobs(cls, knobs, name))
