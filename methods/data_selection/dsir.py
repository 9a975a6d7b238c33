"""DSIR: importance resampling with hashed n-grams (arXiv 2302.03169).

Shape suffixes: N documents, H buckets.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np

from isoflop.core.hashing import derive_seed
from isoflop.core.knobs import Knob
from isoflop.methods.base import METHODS
from isoflop.methods.data_selection.base import DataSelectionMethod
from isoflop.methods.data_selection.scorers import DocumentScorer
from isoflop.models.worlds.text_pool import Text

SMOOTHING = 1e-8
WORD = re.compile(r"\w+|[^\w\s]+")


@METHODS.register("dsir")
@dataclass(frozen=True)
class Dsir(DataSelectionMethod):
    """Draws documents without replacement with the weights of two bags of hashed n-grams, the target's over the pool's.

    1. c(x) in N^H counts the words and n-grams of x, lower-cased, by a hash into H buckets.
    2. p and q are the shares of the buckets in all target examples and in the pool.
    3. log w(x) = c(x) · (log(p + 1e-8) - log(q + 1e-8)).
    4. The documents with the largest log w(x) + g are kept, g Gumbel noise, one number per document, which draws without
       replacement in proportion to w; ``noise: false`` keeps the largest weights.

    The sum over n-grams is not divided by their number, as released, so that long documents have extreme weights, and
    the noise matters between documents of nearly equal weight only. The released code scores with 2-grams and 10,000
    buckets whatever was fitted; here the knobs hold for both.
    """

    paper: ClassVar[str] = "arXiv 2302.03169"
    by_chance: ClassVar[bool] = True

    ngrams: Annotated[int, Knob(low=1, high=5, doc="longest run of words that is counted")] = 2
    buckets: Annotated[int, Knob(low=16, high=1_000_000, log=True, doc="H")] = 10_000
    noise: Annotated[bool, Knob(doc="draw in proportion to the weights; false: keep the largest")] = True

    def scorer(self, seed: int) -> DsirScorer:
        """Log weights, with noise of the seed."""
        return DsirScorer(self.ngrams, self.buckets, seed if self.noise else None)


class DsirScorer(DocumentScorer):
    """Log importance weights.

    Args:
        ngrams, buckets: see :class:`Dsir`.
        seed: of the Gumbel noise; None adds none.
    """

    def __init__(self, ngrams: int = 2, buckets: int = 10_000, seed: int | None = None) -> None:
        self.ngrams = ngrams
        self.buckets = buckets
        self.seed = seed
        self._log_ratio_H = np.zeros(buckets)
        self._counted = 0

    def fit(self, pool: Sequence[Text], target: Sequence[Text]) -> None:
        """The two bags."""
        wanted_H, present_H = (self._shares(documents) for documents in (target, pool))
        self._log_ratio_H = np.log(wanted_H + SMOOTHING) - np.log(present_H + SMOOTHING)

    def score(self, documents: Sequence[Text]) -> np.ndarray:
        """log w, plus noise."""
        scores_N = np.array([self.counts(document.text) @ self._log_ratio_H for document in documents])
        if self.seed is None:
            return scores_N
        return scores_N + np.random.default_rng(derive_seed("dsir", self.seed)).gumbel(size=len(documents))

    def counts(self, text: str) -> np.ndarray:
        """c(x), (H,)."""
        counts_H = np.zeros(self.buckets)
        words = WORD.findall(text.lower())
        for length in range(1, self.ngrams + 1):
            grams = Counter(" ".join(words[start : start + length]) for start in range(len(words) - length + 1))
            self._counted += grams.total()
            for gram, number in grams.items():
                counts_H[_hash(gram) % self.buckets] += number
        return counts_H

    @property
    def nbytes(self) -> float:
        """The table of log ratios."""
        return float(self._log_ratio_H.nbytes)

    @property
    def work(self) -> Mapping[str, float]:
        """Words and n-grams that were counted."""
        return {"ngrams": float(self._counted)}

    def _shares(self, documents: Iterable[Text]) -> np.ndarray:
        total_H = sum((self.counts(document.text) for document in documents), np.zeros(self.buckets))
        return total_H / max(1.0, total_H.sum())


def _hash(gram: str) -> int:
    return int.from_bytes(hashlib.sha256(gram.encode()).digest())
