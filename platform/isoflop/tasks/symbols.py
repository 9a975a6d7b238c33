"""What the tasks in the world of symbols share: suites drawn in blocks, the error as a share of wrong answers."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, ClassVar

import numpy as np
import torch

from isoflop.core.hashing import derive_seed
from isoflop.core.knobs import Knob
from isoflop.core.stage import StageContext
from isoflop.models.lm import NOT_SCORED, LmBatch, LmInfo
from isoflop.models.worlds import recall_world as world
from isoflop.tasks.base import Shard
from isoflop.tasks.language_task import LanguageTask, Suite

BLOCK = 64


@dataclass(frozen=True)
class SymbolTask(LanguageTask):
    """Base class of ``kv-recall`` and ``kv-copy``."""

    needs: ClassVar[frozenset[str]] = frozenset({f"vocabulary:{world.VOCABULARY}"})
    metrics: ClassVar[tuple[str, ...] | None] = ("nll",)

    query: Annotated[str, Knob(choices=("blind", "aware"), doc="whether the prompt tells what will be asked")] = "blind"

    @abstractmethod
    def draw(self, rng: np.random.Generator, rows: int) -> LmBatch:
        """Random examples."""

    def suite(self, info: LmInfo, ctx: StageContext) -> Suite:
        """All examples, the same for every model."""
        return _suite(self)

    def shard_of(
        self, ids_B: np.ndarray, nll_B: np.ndarray, right_B: np.ndarray, scored_B: np.ndarray, units_B: np.ndarray
    ) -> Shard:
        """Error: share of wrong answers; ``nll``: nats per answer."""
        return Shard(ids_B, 1.0 - right_B / units_B, {"nll": nll_B / units_B})


@lru_cache(maxsize=8)
def _suite(task: SymbolTask) -> Suite:
    blocks = []
    for start in range(0, task.examples, BLOCK):  # a generator per block, so that a shorter suite is a prefix
        rng = np.random.default_rng([derive_seed("examples", task.name, task.version), start])
        blocks.append(task.draw(rng, BLOCK))
    ids_NT = torch.cat([block.ids_BT for block in blocks])[: task.examples]
    targets_NT = torch.cat([block.targets_BT for block in blocks])[: task.examples]
    units_N = (targets_NT != NOT_SCORED).sum(1).numpy().astype(np.float64)
    return Suite(LmBatch(ids_NT, targets_NT, blocks[0].prefix), units_N)
