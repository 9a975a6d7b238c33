"""LLMLingua-2: a trained encoder says of every word whether it can be spared (arXiv 2403.12968, microsoft/LLMLingua).

Shape suffixes: U words of a document.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

import numpy as np
from torch import nn

from isoflop.core.knobs import Knob, KnobValue
from isoflop.core.stage import Stage
from isoflop.methods.base import METHODS, Method
from isoflop.methods.prompts.base import KeptUnits, RatedPromptMethod
from isoflop.methods.prompts.classifier import Chunk, ClassifierStage, TokenClassifier
from isoflop.methods.prompts.select import above_percentile
from isoflop.methods.prompts.units import Page, places_of
from isoflop.models.base import ModelInfo
from isoflop.models.lm import LmModel

if TYPE_CHECKING:
    from isoflop.methods.probe import Probe

_DIGIT = re.compile(r"\d")


@dataclass(frozen=True)
class ScoredPage:
    """A document with what the classifier says of its words.

    Attributes:
        score_U: probability of being kept, 1 for forced words.
        plain_U: the same before anything is forced.
        chunk_U: number of the chunk in which each word begins.
        forced_U: words in the list of forced ones (digits not included).
    """

    page: Page
    score_U: np.ndarray
    plain_U: np.ndarray
    chunk_U: np.ndarray
    forced_U: np.ndarray


@METHODS.register("llmlingua2")
@dataclass(frozen=True)
class LlmLingua2(RatedPromptMethod):
    """Keep the words whose probability exceeds a percentile, chunk by chunk, whatever will be asked.

    The classifier is trained here on labels from a rule-based teacher (see ``labels``), for English of the fact world; a
    reader's own tokenizer decides how much a word counts. ``rate`` 1 leaves the text alone. Below it, slightly less
    than ``rate`` of the tokens stays, as in the released code; its training script's faults (shifted labels, clipping
    before the backward pass, padding in the loss) are not repeated.

    On purpose not as released: the worst 5 % of the training texts by variation and 10 % by alignment go, as in the paper, and those at
    the cut stay (released, 10 % each, and all at the cut go); words are aligned as they are written (released, spaCy's lemmas
    without commas); where no word exceeds the percentile the best ones stay.
    """

    paper: ClassVar[str] = "arXiv 2403.12968"
    version: ClassVar[str] = "2"

    token_to_word: Annotated[
        str, Knob(choices=("mean", "first"), doc="a word's probability from those of its pieces")
    ] = "mean"
    threshold_scope: Annotated[str, Knob(choices=("chunk", "prompt"), doc="over what the percentile is taken")] = (
        "chunk"
    )
    context_rate: Annotated[
        float, Knob(low=0.05, high=1.0, doc="share of the documents that stay before words are dropped")
    ] = 1.0
    force: Annotated[str, Knob(doc="words and marks that always stay, separated by spaces")] = ""
    force_digits: Annotated[bool, Knob(doc="pieces with a digit count as certain to be kept")] = False
    drop_consecutive: Annotated[
        bool, Knob(doc="of equal forced words with nothing kept between them only the first stays")
    ] = False
    width: Annotated[int, Knob(choices=(32, 64, 128), doc="width of the classifier")] = 64
    noise: Annotated[float, Knob(low=0.0, high=0.5, doc="share of words whose fate the teacher decides wrongly")] = 0.0

    def prepare(
        self, info: ModelInfo, weights: Stage | None, seed: int, trained_with: tuple[Method, ...] = ()
    ) -> ClassifierStage:
        """The classifier's training."""
        return ClassifierStage(self.width, self.noise, seed)

    @classmethod
    def probe(cls) -> Probe:
        """Forced words show where there are some, and consecutive ones where little else is left between them."""
        from isoflop.methods.prompts.probe import PromptProbe

        stops: dict[str, KnobValue] = {"rate": 0.2, "force": "."}
        return PromptProbe(
            settings={
                "force": [{"force": ""}, {"force": "."}],
                "drop_consecutive": [{**stops, "drop_consecutive": drop} for drop in (False, True)],
            }
        )

    def network(self, prepared: TokenClassifier) -> nn.Module:
        """The classifier."""
        module: nn.Module = prepared.module
        return module

    def select(self, pages: Sequence[Page], query: str | None, reader: LmModel, prepared: TokenClassifier) -> KeptUnits:
        """One pass of the classifier over all chunks, then the percentiles."""
        if self.rate == 1.0 and self.context_rate == 1.0:
            return KeptUnits(tuple(np.ones(len(page.units), dtype=bool) for page in pages))
        chunks = [prepared.chunks(page.document.text) for page in pages]
        flat = prepared.probabilities([chunk for group in chunks for chunk in group])
        scored = []
        for page, group in zip(pages, chunks, strict=True):
            scored.append(self.scored(page, group, flat[: len(group)]))
            flat = flat[len(group) :]
        keep = self.filtered(scored)
        return KeptUnits(tuple(keep), sum(len(chunk.ids) + 2 for group in chunks for chunk in group))

    def scored(self, page: Page, chunks: Sequence[Chunk], keep: Sequence[np.ndarray]) -> ScoredPage:
        """Probabilities of pieces made into probabilities of words."""
        plain: list[list[float]] = [[] for _ in page.units]
        forced: list[list[float]] = [[] for _ in page.units]
        chunk_U = np.zeros(len(page.units), dtype=np.int64)
        for number, (chunk, chances) in enumerate(zip(chunks, keep, strict=True)):
            places = places_of([start for start, _ in chunk.offsets], page.units)
            for place, (start, end), chance in zip(places, chunk.offsets, chances.tolist(), strict=True):
                if place is None:
                    continue
                if not plain[place]:
                    chunk_U[place] = number
                plain[place].append(chance)
                sure = self.force_digits and _DIGIT.search(page.document.text[start:end])
                forced[place].append(1.0 if sure else chance)
        words = self.force.split()
        forced_U = np.array([word in words for word in page.words], dtype=bool)
        score_U = np.where(forced_U, 1.0, [self._word(chances) for chances in forced])
        return ScoredPage(page, score_U, np.array([self._word(c) for c in plain]), chunk_U, forced_U)

    def filtered(self, scored: Sequence[ScoredPage]) -> list[np.ndarray]:
        """The documents that stay, then the words of each that stay, as one bool per word."""
        means = [float(s.plain_U.mean()) if len(s.plain_U) else 0.0 for s in scored]
        cut = np.percentile(means, int(100 * (1 - self.context_rate) + 1e-9)) if means else 0.0
        stays = [mean >= cut for mean in means]
        keep = [np.zeros(len(s.page.units), dtype=bool) for s in scored]
        if self.rate == 1.0:
            return [mask | stay for mask, stay in zip(keep, stays, strict=True)]
        for group in self._groups([number for number, stay in enumerate(stays) if stay], scored):
            parts = [(scored[number], rows) for number, rows in group]
            words = [s.page.words[i] for s, rows in parts for i in rows]
            score_U, tokens_U, forced_U = (
                np.concatenate([column(s)[rows] for s, rows in parts])
                for column in (lambda s: s.score_U, lambda s: s.page.tokens_U, lambda s: s.forced_U)
            )
            kept_U, start = self._kept(words, score_U, tokens_U, forced_U), 0
            for number, rows in group:
                keep[number][rows] = kept_U[start : start + len(rows)]
                start += len(rows)
        return keep

    def _groups(self, pages: Sequence[int], scored: Sequence[ScoredPage]) -> list[list[tuple[int, np.ndarray]]]:
        """Words that share a percentile: those of a chunk, or all; each group as (page, its words)."""
        chunks = [
            (page, np.flatnonzero(scored[page].chunk_U == number))
            for page in pages
            for number in range(int(scored[page].chunk_U.max(initial=-1)) + 1)
        ]
        chunks = [(page, rows) for page, rows in chunks if len(rows)]
        return [[chunk] for chunk in chunks] if self.threshold_scope == "chunk" else [chunks] if chunks else []

    def _kept(
        self, words: Sequence[str], score_U: np.ndarray, tokens_U: np.ndarray, forced_U: np.ndarray
    ) -> np.ndarray:
        if not self.drop_consecutive:
            return above_percentile(score_U, tokens_U, self.rate)
        cut = np.percentile(score_U, int(100 * (1 - self.rate) + 1e-9))
        repeated_U = _repeated(words, forced_U, forced_U | (score_U > cut))
        kept_U = above_percentile(np.where(repeated_U, 0.0, score_U), tokens_U, self.rate)
        return kept_U & ~_repeated(words, forced_U, kept_U)

    def _word(self, chances: Sequence[float]) -> float:
        if not chances:
            return 0.0
        return chances[0] if self.token_to_word == "first" else sum(chances) / len(chances)


def _repeated(words: Sequence[str], forced_U: np.ndarray, kept_U: np.ndarray) -> np.ndarray:
    """Kept forced words that follow the same word with nothing kept between, (U,) of bool."""
    repeated_U, last = np.zeros(len(words), dtype=bool), None
    for number in np.flatnonzero(kept_U).tolist():
        repeated_U[number] = forced_U[number] and words[number] == last
        last = words[number]
    return repeated_U
