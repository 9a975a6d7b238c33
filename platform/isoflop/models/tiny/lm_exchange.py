"""Tiny language models of English whose gradients travel between workers: the stage, and what each process runs."""

from __future__ import annotations

import importlib
import json
import resource
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from isoflop.core.local_processes import run_local_processes
from isoflop.models.hooks.gradients import ExchangeReport
from isoflop.models.lm import LmBatch
from isoflop.models.tiny.lm_config import TEXT_SIZES
from isoflop.models.tiny.lm_training import TextRecipe, TextStage, scored_logits, text_lessons, untrained_lm
from isoflop.models.training.distributed import ExchangingMethod, connect, gather_records, leave, simulate, train_rank
from isoflop.models.training.loop import Keeper
from isoflop.models.worlds.lm_text import Tokens


@dataclass(frozen=True)
class ExchangedTextStage(TextStage):
    """A decoder trained by several workers on English text, and ``exchange.json``: what they sent.

    Attributes:
        method: exchanges their gradients.
    """

    kind: ClassVar[str] = "text-lm-exchanged"

    method: ExchangingMethod

    @property
    def slots(self) -> int:
        """As many as the training runs processes."""
        return self.method.processes

    def train(self, module: Any, recipe: TextRecipe, tokens: Tokens, folder: Path, keeper: Keeper) -> list[float]:
        """Train ``module`` with all workers, in this process or in as many others, from the start."""
        method = self.method
        if method.backend == "simulated":
            lessons = text_lessons(tokens.ids_N, recipe, self.seed)
            module.train()
            report = simulate(LmLoss(module), method, recipe, lessons, rows_of, self.seed)
            module.eval()
        else:
            report = self._train_in_processes(module, method, tokens, folder / "workers")
        report.save(folder)
        return report.loss

    def _train_in_processes(self, module: Any, method: ExchangingMethod, tokens: Tokens, work: Path) -> ExchangeReport:
        """Train in processes that meet in the folder ``work``, which lies in the stage's own and is removed with it."""
        from safetensors.torch import load_file

        work.mkdir()
        try:
            np.save(work / "ids.npy", tokens.ids_N)
            task = {
                "size": self.size,
                "seed": self.seed,
                "recipe": dict(self.recipe),
                "knobs": method.knobs(),
                "module": type(method).__module__,  # also one of a sweep's own
                "class": type(method).__qualname__,
                "threads": torch.get_num_threads(),
            }
            (work / "task.json").write_text(json.dumps(task))
            before = _children_cpu_seconds()
            run_local_processes(f"{__name__}:train_process", work, method.workers)
            report = gather_records(work, method.workers)
            report.worker_cpu_seconds = _children_cpu_seconds() - before
            module.load_state_dict(load_file(work / "weights.safetensors"))
        finally:
            shutil.rmtree(work)
        return report


class LmLoss(nn.Module):
    """Mean loss of a causal language model over the scored tokens of a batch."""

    def __init__(self, lm: Any) -> None:
        super().__init__()
        self.lm = lm

    def forward(self, batch: LmBatch) -> Tensor:
        """In nats per token."""
        return F.cross_entropy(*scored_logits(self.lm, batch))


def rows_of(batch: LmBatch, rank: int, workers: int) -> LmBatch:
    """A rank's rows of a batch: equally many for each of ``workers``."""
    rows = len(batch.ids_BT) // workers
    part = slice(rank * rows, (rank + 1) * rows)
    return LmBatch(batch.ids_BT[part], batch.targets_BT[part])


def train_process(folder: Path, rank: int, count: int) -> None:
    """One worker of ``ExchangedTextStage``: reads its task in ``folder``; the first one leaves the weights there."""
    from safetensors.torch import save_file

    task = json.loads((folder / "task.json").read_text())
    torch.set_num_threads(task["threads"])
    method: Any = getattr(importlib.import_module(task["module"]), task["class"])(**task["knobs"])
    recipe = TextRecipe(**task["recipe"])
    module = untrained_lm(
        recipe.shaped(TEXT_SIZES[task["size"]]), recipe.vocabulary, task["seed"], **recipe.config
    ).train()
    lessons = text_lessons(np.load(folder / "ids.npy", mmap_mode="r"), recipe, task["seed"])

    store = connect(folder, rank, count)
    train_rank(LmLoss(module), method, recipe, lessons, rows_of, task["seed"], rank, folder)
    if rank == 0:
        save_file({name: t.contiguous() for name, t in module.state_dict().items()}, folder / "weights.safetensors")
    leave(store, rank, count)


def _children_cpu_seconds() -> float:
    """CPU seconds of this process's children that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
