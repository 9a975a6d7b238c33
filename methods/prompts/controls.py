"""The two ends of the family: the whole context, and none of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from isoflop.methods.base import METHODS
from isoflop.methods.prompts.base import KeptUnits, PromptMethod
from isoflop.methods.prompts.units import Page
from isoflop.models.base import ModelInfo
from isoflop.models.lm import LmModel


@METHODS.register("full-context")
@dataclass(frozen=True)
class FullContext(PromptMethod):
    """Every document as it is: ratio 1."""

    @classmethod
    def identity(cls, info: ModelInfo) -> FullContext:
        """Always."""
        return cls()

    def select(self, pages: Sequence[Page], query: str | None, reader: LmModel, prepared: Any) -> KeptUnits:
        """Everything."""
        return KeptUnits(tuple(np.ones(len(page.units), dtype=bool) for page in pages))


@METHODS.register("no-context")
@dataclass(frozen=True)
class NoContext(PromptMethod):
    """The question alone: what the reader knows without its documents, the floor of every curve."""

    def select(self, pages: Sequence[Page], query: str | None, reader: LmModel, prepared: Any) -> KeptUnits:
        """Nothing."""
        return KeptUnits(tuple(np.zeros(len(page.units), dtype=bool) for page in pages))
