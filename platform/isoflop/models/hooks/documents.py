"""The hook ``documents``: which documents of a pool a model is trained on.

Nothing acts at inference; the occupant tells of the selection that the model's training used.

Shape suffixes: K kept documents.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from isoflop.core.hook import Hook
from isoflop.core.stage import Stage
from isoflop.models.hooks.occupant import Occupant


@dataclass(frozen=True)
class DocumentSelection(Occupant):
    """The occupant: what a method keeps of a pool.

    Attributes:
        kept_K: numbers of the kept documents, ascending.
        kept_tokens, pool_tokens: tokens of these documents, and of the whole pool.
        domains: tokens kept of each domain.
        length_correlation: of the scores with the documents' tokens (Pearson); 0 where either is constant.
        seconds: CPU seconds of fitting and scoring, of all documents.
        method_bytes: bytes of what the fitted scorer holds.
        work: operations of fitting and scoring by name, counted while they ran.
    """

    kept_K: np.ndarray
    kept_tokens: int
    pool_tokens: int
    domains: Mapping[str, int] = field(default_factory=dict)
    length_correlation: float = 0.0
    seconds: float = 0.0
    method_bytes: float = 0.0
    work: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class SelectionSource(Stage):
    """A stage whose value is a :class:`DocumentSelection`."""


class DocumentChooser(Protocol):
    """A method of this hook as the family that trains with it sees it."""

    def trained_on(self, info: Any, seed: int) -> SelectionSource | None:
        """The stage of what is kept for a training; None where that is the whole pool."""


DOCUMENTS: Hook[DocumentSelection] = Hook("documents", -20, "chooses the documents that a model is trained on")
