"""What the tasks on language models share: sequences with scored positions, errors per sequence, measuring.

Shape suffixes: N examples, B batch, T tokens, W vocabulary.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from torch.nn import functional as F

from isoflop.core.errors import Infeasible
from isoflop.core.hashing import derive_seed
from isoflop.core.hook import Hook
from isoflop.core.knobs import Knob
from isoflop.core.stage import StageContext
from isoflop.models.base import Model, ModelInfo
from isoflop.models.budget import tokens_at_once
from isoflop.models.counting import flops_of
from isoflop.models.features import batches
from isoflop.models.hooks.feed_forward import FEED_FORWARD
from isoflop.models.lm import NOT_SCORED, LmBatch, LmInfo, LmModel
from isoflop.tasks.base import Shard, Task
from isoflop.tasks.footprint import byte_costs, decoder_cache, peak_bytes_of, seconds_of

SIZES = ("width", "layers", "train_tokens")
"""What a row says of its model besides N, for laws."""


@dataclass(frozen=True)
class Suite:
    """All examples of a task, of one length.

    Attributes:
        sequences: ids and targets (N, T), and the tokens that are compressed before the rest is seen.
        units_N: by what an example's costs are divided: scored positions, or bytes of text.
    """

    sequences: LmBatch
    units_N: np.ndarray

    def rows(self, ids_B: np.ndarray) -> LmBatch:
        """Some examples."""
        rows = torch.from_numpy(ids_B)
        return replace(self.sequences, ids_BT=self.sequences.ids_BT[rows], targets_BT=self.sequences.targets_BT[rows])

    def __len__(self) -> int:
        return len(self.units_N)


@dataclass(frozen=True)
class LanguageTask(Task):
    """Base class of tasks that score tokens of given sequences.

    Everything is scored in one forward pass: tokens inside the prompt see each other exactly, later ones see it as the
    methods on the cache have left it, which equals decoding token by token. The suite and its numbers depend on the
    options only; the job's seed shuffles the order. A shorter suite is a prefix of a longer one.
    """

    asks: ClassVar[frozenset[Hook[Any]]] = frozenset({FEED_FORWARD})

    examples: Annotated[int, Knob(low=1, high=100_000, doc="number of sequences")] = 256
    shard: Annotated[
        int, Knob(low=1, high=100_000, doc="sequences per shard; a pruner may stop a job between shards")
    ] = 64

    @abstractmethod
    def suite(self, info: LmInfo, ctx: StageContext) -> Suite:
        """All examples, in order of their numbers."""

    @abstractmethod
    def tokens_needed(self) -> int:
        """Length of a sequence."""

    @abstractmethod
    def shard_of(
        self, ids_B: np.ndarray, nll_B: np.ndarray, right_B: np.ndarray, scored_B: np.ndarray, units_B: np.ndarray
    ) -> Shard:
        """Errors and metrics of some examples.

        Args:
            nll_B, right_B, scored_B: of each example: summed negative log-likelihood in nats, tokens that the model
                would have chosen, and tokens scored.
            units_B: see ``Suite``.
        """

    def check(self, info: ModelInfo) -> None:
        """The hooks that the task needs, and room for its sequences."""
        super().check(info)
        room = lm_info(info, self.name).geometry["positions"]
        if self.tokens_needed() > room:
            raise Infeasible(
                f"task {self.name}: its sequences have {self.tokens_needed()} tokens; model {info.ref} has room for {room}"
            )

    def order(self, seed: int, count: int) -> np.ndarray:
        """Example numbers in the order of ``evaluate``."""
        return np.random.default_rng(derive_seed("order", self.name, seed)).permutation(count)

    @torch.no_grad()
    def evaluate(self, model: Model, ctx: StageContext, seed: int) -> Iterator[Shard]:
        """Score the suite shard by shard."""
        lm = lm_model(model, self.name)
        suite = self.suite(lm.info, ctx)
        order_N = self.order(seed, len(suite))
        length = suite.sequences.ids_BT.shape[1]
        size = tokens_at_once(lm, length) // length
        for part in batches(len(order_N), self.shard):
            ids = order_N[part]
            pieces = [(score(lm, suite.rows(ids[piece])), observed(lm)) for piece in batches(len(ids), size)]
            columns = zip(*(scores for scores, _ in pieces), strict=True)
            nll_B, right_B, scored_B = (np.concatenate(column) for column in columns)
            shard = self.shard_of(ids, nll_B, right_B, scored_B, suite.units_N[ids])
            seen = {name: np.concatenate([found[name] for _, found in pieces]) for name in pieces[0][1]}
            yield replace(shard, metrics={**shard.metrics, **seen})

    @torch.no_grad()
    def measure(self, model: Model, ctx: StageContext) -> dict[str, float]:
        """Footprint of example 0, batch of one: one forward pass over the sequence, its cache at the end."""
        lm = lm_model(model, self.name)
        batch = self.suite(lm.info, ctx).rows(np.zeros(1, dtype=np.int64)).to(lm.device)
        length = batch.ids_BT.shape[1]
        whole = (
            batch if batch.prefix else replace(batch, prefix=length)
        )  # the cache of all tokens, where none is a prompt
        flops, _ = flops_of(lambda: lm.logits(batch))
        return {
            "visual_tokens": 0.0,
            "text_tokens": float(length),
            "prompt_tokens": float(batch.prefix),
            **{name: float(lm.info.geometry[name]) for name in SIZES if name in lm.info.geometry},
            "flops": float(flops),
            "flops_llm": float(flops),
            **byte_costs(lm, decoder_cache(lm, lambda: lm.logits(whole)), lm.dense_cache_bytes(length)),
            "seconds": seconds_of(lambda: lm.logits(batch), lm.devices),
            "peak_bytes": float(lm.resident_bytes() + peak_bytes_of(lambda: lm.logits(batch), lm.devices)),
        }


def score(model: LmModel, batch: LmBatch) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each sequence: summed negative log-likelihood in nats, right tokens, scored tokens; each (B,)."""
    batch = batch.to(model.device)
    nll, right = [], []
    for logits_SW, targets_S in model.scored_logits(batch):
        nll.append(F.cross_entropy(logits_SW.float(), targets_S, reduction="none").double())
        right.append((logits_SW.argmax(-1) == targets_S).double())
    scored_BT = batch.targets_BT != NOT_SCORED
    rows_S = scored_BT.nonzero()[:, 0]
    zero_B = torch.zeros(len(scored_BT), dtype=torch.float64, device=rows_S.device)
    nll_B, right_B = (zero_B.index_add(0, rows_S, torch.cat(x)) if x else zero_B for x in (nll, right))
    return nll_B.cpu().numpy(), right_B.cpu().numpy(), scored_BT.sum(1).double().cpu().numpy()


def observed(model: LmModel) -> dict[str, np.ndarray]:
    """What the method on the feed-forward blocks noted of each sequence of the last pass, by name; each (B,)."""
    policy = model.occupant(FEED_FORWARD)
    return {} if policy is None else {name: x_B.cpu().numpy() for name, x_B in policy.observed().items()}


def lm_model(model: Model, task: str) -> LmModel:
    """``model`` as a language model; Infeasible otherwise."""
    if not isinstance(model, LmModel):
        raise Infeasible(f"task {task} needs a language model, which {model.info.ref} is not")
    return model


def lm_info(info: ModelInfo, task: str) -> LmInfo:
    """``info`` as that of a language model; Infeasible otherwise."""
    if not isinstance(info, LmInfo):
        raise Infeasible(f"task {task} needs a language model, which {info.ref} is not")
    return info
