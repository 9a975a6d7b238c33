"""Text classifiers: encoders of the BERT class with one logit per class, and the labelled reviews that they are taught.

Shape suffixes: B reviews, T tokens (padding behind them), K classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from isoflop.core.errors import Infeasible
from isoflop.core.hashing import derive_seed
from isoflop.core.stage import StageContext
from isoflop.models.encoder import EncoderBatch, EncoderInfo, EncoderModel
from isoflop.models.worlds.reviews import STARS, Review, draw_review

CLASSIFIER = "classifier"
"""Head of an encoder (``EncoderInfo.head``)."""
LABELLED_TEXTS = "labelled-texts"
"""Offered by models that tell how many stars a review gives."""
CALIBRATION_BATCH = 16


@dataclass(frozen=True, kw_only=True)
class ClassifierInfo(EncoderInfo):
    """What is known of a text classifier without loading its weights.

    ``n_params`` (N) counts the transformer blocks; embeddings, pooler and classifier are left out.

    Attributes:
        labels: names of the classes, in order.
    """

    labels: tuple[str, ...]

    @property
    def has_loss(self) -> bool:
        """On labelled texts, not on a user's own."""
        return self.text is None

    def check_loss(self, asker: str) -> None:
        """Raise Infeasible where it is to be calibrated on texts without labels."""
        if not self.has_loss:
            raise Infeasible(
                f"{asker} goes by the loss, and the text that model {self.ref} is calibrated on has no labels; allowed: no calibration: data"
            )


@dataclass(frozen=True)
class ClassifierBatch(EncoderBatch):
    """Labelled texts in tokens.

    Attributes:
        labels_B: classes.
    """

    labels_B: Tensor = field(kw_only=True)


class TextClassifier(EncoderModel):
    """A loaded classifier (``BertForSequenceClassification``)."""

    info: ClassifierInfo

    def labelled(self, reviews: Sequence[Review]) -> ClassifierBatch:
        """Reviews as the model reads them, cut to its longest text."""
        return labelled(self.tokenizer, reviews, self.info.tokens_at_most)

    def classify(self, batch: EncoderBatch) -> Tensor:
        """Class logits (B, K), as the model is now; gradients flow when they are enabled."""
        found: Tensor = self.module(**batch.inputs(self.device)).logits
        return found

    def supervised(self, batch: EncoderBatch) -> tuple[Tensor, Tensor]:
        """Logits (B, K) and labels (B,); of texts without labels, states without targets."""
        if not isinstance(batch, ClassifierBatch):
            return super().supervised(batch)
        return self.classify(batch), batch.labels_B.to(self.device)

    def calibration(self, ctx: StageContext, examples: int, seed: int) -> Iterator[EncoderBatch]:
        """Labelled reviews that no test holds, in batches of at most 16; where a user's own text is asked for, windows of it."""
        if self.info.text is not None:
            yield from super().calibration(ctx, examples, seed)
            return
        rng = np.random.default_rng(derive_seed("calibration reviews", seed))
        for first in range(0, examples, CALIBRATION_BATCH):
            yield self.labelled(drawn(rng, min(CALIBRATION_BATCH, examples - first)))


def drawn(rng: np.random.Generator, count: int) -> list[Review]:
    """Reviews of classes that are all equally likely."""
    return [draw_review(rng, int(label)) for label in rng.integers(0, len(STARS), count)]


def labelled(tokenizer: Any, reviews: Sequence[Review], longest: int) -> ClassifierBatch:
    """Reviews in tokens, cut to ``longest`` and padded to one length."""
    texts = [review.text for review in reviews]
    found = tokenizer(texts, truncation=True, max_length=longest, padding=True, return_tensors="pt", verbose=False)
    labels_B = torch.tensor([review.label for review in reviews])
    return ClassifierBatch(found["input_ids"], found["attention_mask"], labels_B=labels_B)
