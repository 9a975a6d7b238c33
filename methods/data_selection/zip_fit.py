"""ZIP-FIT: keep the documents that compress best together with examples of the target (arXiv 2410.18194)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np

from isoflop.core.errors import Infeasible
from isoflop.core.knobs import Knob
from isoflop.methods.base import METHODS
from isoflop.methods.data_selection.base import DataSelectionMethod
from isoflop.methods.data_selection.compressors import COMPRESSORS, CompressedLength, ncd
from isoflop.methods.data_selection.scorers import DocumentScorer
from isoflop.models.base import ModelInfo
from isoflop.models.worlds.text_pool import Text

AGGREGATES = ("mean", "max", "top-5", "concatenated")
ORDERS = ("document-first", "target-first", "symmetric")
TOP = 5


@METHODS.register("zip-fit")
@dataclass(frozen=True)
class ZipFit(DataSelectionMethod):
    """Keeps the documents with the largest mean alignment to the target examples; needs no model.

    With C(x) the compressed bytes of x and xy plain concatenation, of a document x and target examples y_1 … y_n:

    1. NCD(x, y) = (C(xy) - min(C(x), C(y))) / max(C(x), C(y)).
    2. align(x) = 1 - mean_j NCD(x, y_j).
    3. Documents are kept in order of alignment, up to a share of the pool.

    The alignment depends on the length of x: cut texts to one length (``max_chars``, or pieces of equal length in the
    pool), or compare with ``data-random-length``. gzip's header and trailer are 18 bytes, and DEFLATE sees 32 kB back:
    very short texts look alike, and a long document pushes the other text out of reach. The released class compresses
    at level 0 by default, which is a level for lz4; gzip and zlib store at 0, and it is refused here.

    The mean over the examples sees the commonest kind among them: of a target with several kinds of text, documents of
    the rare kinds score low. ``top-5``, which is not the paper's, finds all kinds that five examples show.
    """

    paper: ClassVar[str] = "arXiv 2410.18194"

    compressor: Annotated[str, Knob(choices=tuple(COMPRESSORS), doc="what gives C")] = "gzip"
    level: Annotated[int, Knob(low=0, high=9, doc="of the compressor; 0 compresses with lzma only")] = 6
    n_target: Annotated[int, Knob(low=1, high=200, log=True, doc="target examples looked at")] = 50
    aggregate: Annotated[
        str, Knob(choices=AGGREGATES, doc="over target examples; concatenated: the distance to all of them in one text")
    ] = "mean"
    concatenation: Annotated[
        str, Knob(choices=ORDERS, doc="which text comes first; symmetric: the mean of both distances")
    ] = "document-first"
    max_chars: Annotated[
        int, Knob(low=16, high=100_000, log=True, doc="texts are cut to this length", unit="characters")
    ] = 10_000

    def check(self, info: ModelInfo) -> None:
        """Refuse levels that store, and more target examples than there are."""
        super().check(info)
        levels = COMPRESSORS[self.compressor][1]
        if self.level not in levels:
            raise Infeasible(
                f"method zip-fit: level = {self.level} of {self.compressor} stores without compressing, so that only "
                f"lengths would count; allowed: {levels[0]} … {levels[-1]}"
            )
        available = info.geometry["target_documents"]
        if self.n_target > available:
            raise Infeasible(
                f"method zip-fit: n_target = {self.n_target} exceeds the {available} target examples; allowed: 1 … {available}"
            )

    def scorer(self, seed: int) -> ZipFitScorer:
        """Alignments; nothing is drawn."""
        length = CompressedLength(self.compressor, self.level)
        return ZipFitScorer(length, self.n_target, self.aggregate, self.concatenation, self.max_chars)


class ZipFitScorer(DocumentScorer):
    """Alignments of documents with target examples.

    Args:
        length: C.
        n_target: examples taken of those given to ``fit``, the first.
        aggregate, concatenation, max_chars: see :class:`ZipFit`.
    """

    def __init__(
        self,
        length: CompressedLength,
        n_target: int = 50,
        aggregate: str = "mean",
        concatenation: str = "document-first",
        max_chars: int = 10_000,
    ) -> None:
        self.length = length
        self.n_target = n_target
        self.aggregate = aggregate
        self.concatenation = concatenation
        self.max_chars = max_chars
        self._targets: list[str] = []

    def fit(self, pool: Sequence[Text], target: Sequence[Text]) -> None:
        """Take the target examples; in an order of their own where they become one text."""
        texts = [document.text[: self.max_chars] for document in target[: self.n_target]]
        self._targets = ["".join(sorted(texts))] if self.aggregate == "concatenated" else texts

    def score(self, documents: Sequence[Text]) -> np.ndarray:
        """align(x) of each document; usually in [0, 1]."""
        return np.array([self._align(document.text[: self.max_chars]) for document in documents])

    @property
    def nbytes(self) -> float:
        """The target examples in UTF-8, and the kept lengths."""
        return sum(len(text.encode()) for text in self._targets) + self.length.nbytes

    @property
    def work(self) -> Mapping[str, float]:
        """Texts that were compressed, and their bytes."""
        return {"compressions": float(self.length.calls), "compressed_bytes": float(self.length.read)}

    def _align(self, text: str) -> float:
        found = sorted((1 - self._distance(text, target) for target in self._targets), reverse=True)
        if self.aggregate == "max":
            return found[0]
        best = found[:TOP] if self.aggregate == "top-5" else found
        return math.fsum(best) / len(best)

    def _distance(self, document: str, target: str) -> float:
        if self.concatenation == "target-first":
            return ncd(self.length, target, document)
        first = ncd(self.length, document, target)
        return first if self.concatenation == "document-first" else (first + ncd(self.length, target, document)) / 2
