"""Scorers of documents: what they share, and those that look at no text.

Shape suffixes: N documents of the pool.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np

from isoflop.core.hashing import derive_seed
from isoflop.models.text_pool import Document


class DocumentScorer(ABC):
    """Says how much each document is wanted; higher is better. ``fit`` once, then ``score`` as often as needed."""

    @abstractmethod
    def fit(self, pool: Sequence[Document], target: Sequence[Document]) -> None:
        """Learn what is needed of the pool (or a sample of it) and of the target examples."""

    @abstractmethod
    def score(self, documents: Sequence[Document]) -> np.ndarray:
        """Finite scores (N,), float64."""

    @property
    def nbytes(self) -> float:
        """Bytes of what the fitted scorer holds."""
        return 0.0


class RandomScorer(DocumentScorer):
    """Uniform numbers, the same for the same seed."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def fit(self, pool: Sequence[Document], target: Sequence[Document]) -> None:
        """Nothing."""

    def score(self, documents: Sequence[Document]) -> np.ndarray:
        """In [0, 1)."""
        return np.random.default_rng(derive_seed("random documents", self.seed)).random(len(documents))


class OracleScorer(RandomScorer):
    """The documents of the target's domain first, in random order, then the others."""

    def fit(self, pool: Sequence[Document], target: Sequence[Document]) -> None:
        """The target's domain."""
        self._domains = {document.domain for document in target}

    def score(self, documents: Sequence[Document]) -> np.ndarray:
        """In [1, 2) for documents of the domain, in [0, 1) for others."""
        return super().score(documents) + np.array([document.domain in self._domains for document in documents])


class LengthMatchedScorer(DocumentScorer):
    """Another scorer's scores, shuffled among documents of about equal length.

    At every budget it keeps as many documents of every length as the other scorer does: what of that one's effect comes
    from lengths remains, everything else is gone.

    Args:
        reference: whose lengths are matched.
        bins: groups of documents with about equal numbers of tokens.
        seed: of the shuffling.
    """

    def __init__(self, reference: DocumentScorer, bins: int, seed: int) -> None:
        self.reference = reference
        self.bins = bins
        self.seed = seed

    def fit(self, pool: Sequence[Document], target: Sequence[Document]) -> None:
        """That of the reference."""
        self.reference.fit(pool, target)

    def score(self, documents: Sequence[Document]) -> np.ndarray:
        """The reference's scores, each in the bin of its document."""
        scores_N = self.reference.score(documents)
        rng = np.random.default_rng(derive_seed("length-matched documents", self.seed))
        by_length = np.argsort([document.tokens for document in documents], kind="stable")
        shuffled_N = np.empty_like(scores_N)
        for group in np.array_split(by_length, min(self.bins, max(1, len(documents)))):
            shuffled_N[group] = scores_N[rng.permutation(group)]
        return shuffled_N

    @property
    def nbytes(self) -> float:
        """Those of the reference."""
        return self.reference.nbytes
