"""Text classification: how many stars a review gives.

Shape suffixes: N examples, B batch, K classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
import torch
from torch.nn import functional as F

from isoflop.core.errors import Infeasible
from isoflop.core.hashing import derive_seed
from isoflop.core.knobs import Knob
from isoflop.core.stage import StageContext
from isoflop.models.base import Model, ModelInfo
from isoflop.models.counting import flops_of
from isoflop.models.features import batches
from isoflop.models.text_classifier import LABELLED_TEXTS, ClassifierInfo, TextClassifier
from isoflop.models.worlds.reviews import STARS, Review, review_number
from isoflop.tasks.base import TASKS, Shard, Task
from isoflop.tasks.data.rankers import cost_of_run

BATCH = 100
MEASURED = 2 * len(STARS)
"""Reviews over which operations are averaged: two of each class."""


@TASKS.register("text-classification")
@dataclass(frozen=True)
class TextClassification(Task):
    """How many stars, of five, a review of three to six sentences gives; chance error 0.80.

    The error of an example is 1 when the most likely class is not its own. ``nll`` is kept beside it: the negative log-likelihood
    of that class, in nats. All classes are equally frequent; the job's seed shuffles the order. A shorter suite is a prefix of a
    longer one.
    """

    needs: ClassVar[frozenset[str]] = frozenset({LABELLED_TEXTS})
    metrics: ClassVar[tuple[str, ...] | None] = ("nll",)
    chance: ClassVar[float] = 1.0 - 1.0 / len(STARS)

    examples: Annotated[int, Knob(low=1, high=1_000_000, doc="number of test reviews")] = 1000
    shard: Annotated[
        int, Knob(low=1, high=1_000_000, doc="examples per shard; a pruner may stop a job between shards")
    ] = 500

    def check(self, info: ModelInfo) -> None:
        """Refuse models that classify no texts."""
        super().check(info)
        if not isinstance(info, ClassifierInfo):
            raise Infeasible(f"task {self.name} needs a text classifier, which {info.ref} is not; allowed: tiny-bert/…")

    def order(self, seed: int) -> np.ndarray:
        """Example numbers in the order of ``evaluate``, shape (N,)."""
        return np.random.default_rng(derive_seed("order", self.name, seed)).permutation(self.examples)

    @torch.no_grad()
    def evaluate(self, model: Model, ctx: StageContext, seed: int) -> Iterator[Shard]:
        """Score the suite shard by shard."""
        classifier, order_N = _classifier(model, self.name), self.order(seed)
        for part in batches(self.examples, self.shard):
            ids_N, errors, nll = order_N[part], list[np.ndarray](), list[np.ndarray]()
            for piece in batches(len(ids_N), BATCH):
                batch = classifier.labelled([self.review(number) for number in ids_N[piece].tolist()])
                logits_BK, labels_B = classifier.supervised(batch)
                errors.append((logits_BK.argmax(-1) != labels_B).double().cpu().numpy())
                nll.append(F.cross_entropy(logits_BK.float(), labels_B, reduction="none").double().cpu().numpy())
            yield Shard(ids_N, np.concatenate(errors), {"nll": np.concatenate(nll)})

    def review(self, number: int) -> Review:
        """A test review."""
        return review_number(number, f"{self.name} {self.version}")

    @torch.no_grad()
    def measure(self, model: Model, ctx: StageContext) -> dict[str, float]:
        """Footprint of classifying a review, batch of one; operations and tokens are means over two reviews of each class."""
        classifier = _classifier(model, self.name)
        alone = [classifier.labelled([self.review(number)]) for number in range(MEASURED)]
        flops = float(np.mean([flops_of(lambda b=batch: classifier.supervised(b))[0] for batch in alone]))  # type: ignore[misc]
        return {
            **cost_of_run(classifier, lambda: classifier.supervised(alone[0])),
            "text_tokens": float(np.mean([batch.tokens for batch in alone])),
            "flops": flops,
            "flops_llm": flops,
        }


def _classifier(model: Model, task: str) -> TextClassifier:
    if not isinstance(model, TextClassifier):
        raise Infeasible(f"task {task} needs a text classifier, which {model.info.ref} is not; allowed: tiny-bert/…")
    return model
