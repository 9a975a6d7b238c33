"""Scorers of documents: what they share, and those that look at no text.

A :class:`DocumentScorer` is given :class:`~isoflop.models.worlds.text_pool.Text`, which has no domain. The one scorer that is given
domains, :class:`OracleScorer`, is of no kin to it.

Shape suffixes: N documents of the pool.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from typing import final

import numpy as np

from isoflop.core.hashing import derive_seed
from isoflop.models.worlds.text_pool import Text


class DocumentScorer(ABC):
    """Says how much each document is wanted; higher is better. ``fit`` once, then ``score`` as often as needed."""

    @abstractmethod
    def fit(self, pool: Sequence[Text], target: Sequence[Text]) -> None:
        """Learn what is needed of the pool (or a sample of it) and of the target examples."""

    @abstractmethod
    def score(self, documents: Sequence[Text]) -> np.ndarray:
        """Finite scores (N,), float64."""

    @property
    def nbytes(self) -> float:
        """Bytes of what the fitted scorer holds."""
        return 0.0

    @property
    def work(self) -> Mapping[str, float]:
        """Operations since the scorer was made, by name, counted where they are done; rows show them beside the seconds."""
        return {}


class RandomScorer(DocumentScorer):
    """Uniform numbers, the same for the same seed."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def fit(self, pool: Sequence[Text], target: Sequence[Text]) -> None:
        """Nothing."""

    def score(self, documents: Sequence[Text]) -> np.ndarray:
        """In [0, 1)."""
        return _uniform(self.seed, len(documents))


@final
class OracleScorer:
    """The documents of the target's domain first, in random order, then the others.

    It sees domains and no text; no other scorer is given domains.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def score(self, domains_N: Sequence[str], wanted: Collection[str]) -> np.ndarray:
        """In [1, 2) for documents of a wanted domain, in [0, 1) for others, (N,)."""
        return _uniform(self.seed, len(domains_N)) + np.array([domain in wanted for domain in domains_N])


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

    def fit(self, pool: Sequence[Text], target: Sequence[Text]) -> None:
        """That of the reference."""
        self.reference.fit(pool, target)

    def score(self, documents: Sequence[Text]) -> np.ndarray:
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

    @property
    def work(self) -> Mapping[str, float]:
        """That of the reference."""
        return self.reference.work


def _uniform(seed: int, count: int) -> np.ndarray:
    """Numbers in [0, 1), (count,)."""
    return np.random.default_rng(derive_seed("random documents", seed)).random(count)
