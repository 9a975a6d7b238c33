"""Toy models whose "training" is a crowd of processes; a sweep names it under ``import:`` after ``toy_parts``."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import toy_parts

from isoflop.core.local_processes import run_local_processes
from isoflop.core.stage import Stage, StageContext
from isoflop.methods.base import Method
from isoflop.models.base import ModelInfo
from isoflop.models.family import FAMILIES


@dataclass(frozen=True)
class CrowdWeights(toy_parts.ToyWeights):
    """Processes that live for ``seconds``, or until a file ``enough`` lies beside ``toy.log``; each writes its number into ``toy.log``."""

    kind = "crowd-weights"

    @property
    def slots(self) -> int:
        return 2

    def compute(self, ctx: StageContext, folder: Path) -> None:
        place = toy_parts.cache_root(ctx)
        toy_parts.log(place, f"crowd begins {time.time()}")
        with TemporaryDirectory(dir=place, prefix="crowd-") as name:
            (Path(name) / "task.json").write_text(json.dumps({"log": str(place / "toy.log"), "seconds": self.seconds}))
            run_local_processes("crowd_member:live", Path(name), self.slots)
        toy_parts.log(place, f"crowd ends {time.time()}")
        np.save(folder / "weights.npy", np.ones(2))


class CrowdFamily(toy_parts.ToyFamily):
    """``crowd/s`` … with ``seconds`` for the life of its processes."""

    name = "crowd"

    def members(self) -> list[str]:
        return [ref.replace("toy/", "crowd/") for ref in super().members()]

    def info(self, ref: str, options: Mapping[str, Any]) -> ModelInfo:
        found = super().info(ref.replace("crowd/", "toy/"), options)
        return ModelInfo(ref, self.name, "1", found.n_params, found.hooks, found.geometry, offers=found.offers)

    def weights(self, info: ModelInfo, methods: tuple[Method, ...], seed: int) -> Stage:
        return CrowdWeights(info.ref, seed, float(info.geometry.get("seconds", 0)))


FAMILIES.register("crowd")(CrowdFamily())
