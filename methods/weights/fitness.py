"""The fitness of compressed configurations: how far a model's outputs are from the uncompressed ones on training examples.

Shape suffixes: B examples, S scored positions, W classes, K largest logits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from isoflop.methods.weights.space import Levels
from isoflop.models.base import Model

KL, SPARSE_KL, LOSS = "kl", "sparse-kl", "loss"
FITNESSES = (KL, SPARSE_KL, LOSS)
TOP = 10
"""Logits per position that ``sparse-kl`` looks at, as in the published code."""


class Fitness:
    """Scores configurations on examples drawn anew for each call (a ``Judge``).

    ``kl`` is KL(uncompressed ‖ compressed) in nats per position; ``sparse-kl`` the same over the ``TOP`` largest logits of
    the uncompressed model, renormalised, which saves the memory of the others; ``loss`` the cross-entropy, whose
    exponential is the perplexity.

    Args:
        model: uncompressed, now.
        batches: the calibration set, for ``Model.supervised``; the outputs on it are kept.
        kind: one of ``FITNESSES``.
        serve: makes the model serve a configuration.
    """

    def __init__(self, model: Model, batches: Sequence[Any], kind: str, serve: Callable[[Levels], None]) -> None:
        self.tokens = 0
        self._model = model
        self._batches = list(batches)
        self._kind = kind
        self._serve = serve
        self._places = [(number, row) for number, batch in enumerate(self._batches) for row in range(size_of(batch))]
        self._dense = [self._reference(rows_of(self._batches[number], [row])) for number, row in self._places]

    def __len__(self) -> int:
        """Examples in the calibration set."""
        return len(self._places)

    def scores(self, candidates: Sequence[Levels], examples: int, rng: np.random.Generator) -> list[float]:
        """The fitness of each configuration on the same ``examples`` of the set (all of it where it holds no more)."""
        chosen = np.arange(len(self))
        if examples < len(self):
            chosen = np.sort(rng.choice(len(self), examples, replace=False))
        parts = self._parts(chosen.tolist())
        found = []
        for levels in candidates:
            self._serve(levels)
            found.append(self._score(parts))
        return found

    def _parts(self, chosen: list[int]) -> list[tuple[Any, list[tuple[Tensor, ...]]]]:
        """The chosen examples as few batches, each with its rows' references."""
        by_batch: dict[int, list[int]] = {}
        for index in chosen:
            by_batch.setdefault(self._places[index][0], []).append(index)
        return [
            (rows_of(self._batches[number], [self._places[i][1] for i in indices]), [self._dense[i] for i in indices])
            for number, indices in by_batch.items()
        ]

    @torch.no_grad()
    def _score(self, parts: list[tuple[Any, list[tuple[Tensor, ...]]]]) -> float:
        total, count = 0.0, 0
        for batch, references in parts:
            logits_SW, targets_S = self._model.supervised(batch)
            joined = tuple(torch.cat(part) for part in zip(*references, strict=True))
            total += float(self._divergence(logits_SW.float(), targets_S, joined))
            count += len(targets_S)
        self.tokens += count
        return total / count

    @torch.no_grad()
    def _reference(self, batch: Any) -> tuple[Tensor, ...]:
        """What is kept of the uncompressed model's outputs on an example."""
        logits_SW, _ = self._model.supervised(batch)
        if self._kind == KL:
            return (logits_SW.float().log_softmax(-1),)
        if self._kind == SPARSE_KL:
            logits_SK, ids_SK = logits_SW.float().topk(min(TOP, logits_SW.shape[-1]), dim=-1)
            return logits_SK.log_softmax(-1), ids_SK
        return ()

    def _divergence(self, logits_SW: Tensor, targets_S: Tensor, reference: tuple[Tensor, ...]) -> Tensor:
        """Summed over positions."""
        if self._kind == LOSS:
            return F.cross_entropy(logits_SW, targets_S, reduction="sum")
        if self._kind == SPARSE_KL:
            logits_SW = logits_SW.gather(-1, reference[1])
        return F.kl_div(logits_SW.log_softmax(-1), reference[0], log_target=True, reduction="sum")


def rows_of(batch: Any, rows: list[int]) -> Any:
    """Some examples of a batch: a tensor, or a dataclass or mapping of tensors, whose first dimension counts examples."""
    if isinstance(batch, Tensor):
        return batch[rows]
    if isinstance(batch, Mapping):
        return {key: rows_of(value, rows) for key, value in batch.items()}
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        fields = {f.name: rows_of(getattr(batch, f.name), rows) for f in dataclasses.fields(batch)}
        return dataclasses.replace(batch, **fields)
    return batch


def size_of(batch: Any) -> int:
    """Examples in a batch (see :func:`rows_of`)."""
    if isinstance(batch, Tensor):
        return int(batch.shape[0])
    values = batch.values() if isinstance(batch, Mapping) else vars(batch).values()
    return next(size_of(value) for value in values if isinstance(value, (Tensor, Mapping)))
