"""Random documents of the lengths that another method keeps: the control for scores that follow lengths."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from isoflop.core.errors import Infeasible
from isoflop.core.knobs import Knob
from isoflop.methods.base import METHODS, build
from isoflop.methods.data_selection.base import DataSelectionMethod
from isoflop.methods.data_selection.scorers import DocumentScorer, LengthMatchedScorer
from isoflop.models.base import ModelInfo


@METHODS.register("data-random-length")
@dataclass(frozen=True)
class DataRandomLength(DataSelectionMethod):
    """Keeps as many documents of every length as ``matched`` keeps, but random ones.

    The documents are sorted by tokens and cut into ``bins`` groups of equal size; within each, the scores of ``matched``
    (at its default knobs) are shuffled.
    """

    by_chance: ClassVar[bool] = True

    matched: Annotated[str, Knob(choices=("zip-fit", "dsir"), doc="method whose lengths are matched")] = "zip-fit"
    bins: Annotated[int, Knob(low=1, high=1000, log=True, doc="groups of documents of about equal length")] = 16

    def reference(self) -> DataSelectionMethod:
        """The matched method at the same share."""
        method = build(self.matched, {"keep": self.keep, "unit": self.unit})
        assert isinstance(method, DataSelectionMethod)
        return method

    def check(self, info: ModelInfo) -> None:
        """Refuse what the matched method refuses."""
        super().check(info)
        try:
            self.reference().check(info)
        except Infeasible as error:
            raise Infeasible(f"method data-random-length: matched = {self.matched}: {error}") from error

    def scorer(self, seed: int) -> LengthMatchedScorer:
        """The matched method's scores, shuffled among equals."""
        reference = self.reference().scorer(seed)
        assert isinstance(reference, DocumentScorer)
        return LengthMatchedScorer(reference, self.bins, seed)
