"""TOVA: token omission via attention (arXiv 2401.06104)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from isoflop.methods.base import METHODS
from isoflop.methods.kv_cache.accumulated import Accumulated


@METHODS.register("tova")
@dataclass(frozen=True)
class Tova(Accumulated):
    """Each layer drops the tokens to which the last query attends least, on average over its heads."""

    paper: ClassVar[str] = "arXiv 2401.06104"

    @property
    def forgets(self) -> float:
        """Only the last query counts."""
        return 0.0

    @property
    def per_layer(self) -> bool:
        """All heads of a layer keep the same tokens."""
        return True
