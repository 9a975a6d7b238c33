"""Data-selection methods: the model is trained on what they keep of a pool of documents.

A method gives a :class:`DocumentScorer`. The base class owns the rest: the scores are one stage for all budgets, the kept
documents another, on which the model's training depends. Nothing acts at inference; ``apply`` only notes on the model what
it was trained on, so that its cost can be told.

Shape suffixes: N documents of the pool, K kept documents.
"""

from __future__ import annotations

import dataclasses
import json
import time
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import numpy as np

from isoflop.core.errors import Infeasible
from isoflop.core.hook import Hook
from isoflop.core.knobs import Knob
from isoflop.core.stage import Stage, StageContext
from isoflop.methods.base import Axes, Method, Regardless
from isoflop.methods.data_selection.scorers import DocumentScorer, OracleScorer
from isoflop.methods.data_selection.select import UNITS, Budget, select
from isoflop.models.base import Model, ModelInfo
from isoflop.models.hooks.documents import DOCUMENTS, DocumentSelection, SelectionSource
from isoflop.models.hooks.occupant import Occupant
from isoflop.models.lm import LmInfo
from isoflop.models.worlds.text_pool import Document, TrainingPool

if TYPE_CHECKING:
    from isoflop.methods.probe import Probe

FEWEST = 4
"""Documents that a selection must be able to hold on average; single ones may be longer than a small budget."""


@dataclass(frozen=True)
class DataSelectionMethod(Method):
    """Base class of methods that keep a part of a pool of training documents, measured in tokens or documents.

    Class attributes:
        wants_target: scores depend on the target; without it, one training serves all targets.
        by_chance: scores depend on the job's seed; without it, one scoring serves all repeats.
    """

    family: ClassVar[str] = "data-selection"
    ratio_of: ClassVar[str] = "tokens of the pool"
    hooks: ClassVar[tuple[Hook[Any], ...]] = (DOCUMENTS,)
    trains_model: ClassVar[bool] = True
    wants_target: ClassVar[bool] = True
    by_chance: ClassVar[bool] = False

    keep: Annotated[
        float, Knob(low=0.001, high=1.0, log=True, ratio=True, doc="share of the pool that is kept, in units")
    ] = 0.1
    unit: Annotated[str, Knob(choices=UNITS, doc="what the share counts")] = "tokens"

    @abstractmethod
    def scorer(self, seed: int) -> DocumentScorer | OracleScorer:
        """The scorer for these knobs, not yet fitted; ``keep`` and ``unit`` make no difference to it.

        It sees no domains, unless it is the oracle's.
        """

    @classmethod
    def identity(cls, info: ModelInfo) -> DataSelectionMethod:
        """Everything is kept."""
        return cls(keep=1.0)

    def axes(self, info: ModelInfo) -> Axes:
        """1 / keep, of the pool."""
        return Axes(ratio=1 / self.keep)

    def check(self, info: ModelInfo) -> None:
        """Refuse models that train on no pool, and shares that keep next to nothing of it."""
        super().check(info)
        documents = info.geometry["pool_documents"]
        if self.keep * documents < FEWEST:
            raise Infeasible(
                f"method {self.name}: keep = {self.keep} of {documents} documents leaves less than {FEWEST}; "
                f"allowed: {FEWEST / documents:.2g} … 1"
            )

    def prepare(
        self, info: ModelInfo, weights: Stage | None, seed: int, trained_with: tuple[Method, ...] = ()
    ) -> SelectionStage:
        """The stage that selects; the model's training depends on it."""
        self.check(info)
        return self.selection(info, seed)

    def selection(self, info: ModelInfo, seed: int) -> SelectionStage:
        """What is kept of the model's pool, the scores one stage for every ``keep`` and ``unit``."""
        pool = pool_of(info)
        scores = ScoreStage(
            Regardless(self, ("keep", "unit")),
            pool if self.wants_target else dataclasses.replace(pool, target=None),
            seed if self.by_chance else None,
        )
        return SelectionStage(scores, self.keep, self.unit)

    def trained_on(self, info: ModelInfo, seed: int) -> SelectionStage | None:
        """What the training depends on: the selection, or None where everything is kept, whoever decides that."""
        return None if self.keep == 1.0 else self.selection(info, seed)

    def occupants(self, model: Model, prepared: Any) -> dict[Hook[Any], Occupant]:
        """What the model was trained on.

        Args:
            prepared: the :class:`DocumentSelection` that its training used.
        """
        if not isinstance(prepared, DocumentSelection):
            raise ValueError(f"method {self.name}: apply() needs the value of its prepare() stage")
        return {DOCUMENTS: prepared}

    def footprint(self, model: Model, ctx: StageContext) -> dict[str, float]:
        """``ratio`` = tokens of the pool over kept ones, and what the selection cost and chose.

        ``selection_seconds`` are CPU seconds of fitting and scoring the pool, once for all budgets, and
        ``selection_<operation>`` the operations that the scorer counted meanwhile (compressions, n-grams);
        ``method_bytes`` is what the scorer held, which a served model does not need; ``target_share`` the share of kept
        tokens from the target's domain; ``length_correlation`` that of the scores with the documents' tokens.
        """
        found = model.occupant(DOCUMENTS)
        if found is None:
            raise ValueError(f"method {self.name} is not applied")
        target = pool_of(model.info).target or ""
        return {
            "ratio": found.pool_tokens / found.kept_tokens,
            "kept_tokens": float(found.kept_tokens),
            "pool_tokens": float(found.pool_tokens),
            "kept_documents": float(len(found.kept_K)),
            "target_share": found.domains.get(target, 0) / found.kept_tokens,
            "length_correlation": found.length_correlation,
            "selection_seconds": found.seconds,
            **{f"selection_{operation}": number for operation, number in found.work.items()},
            "method_bytes": found.method_bytes,
        }

    @classmethod
    def probe(cls) -> Probe:
        """A tiny decoder that is trained for a few steps on what is kept of a small pool."""
        from isoflop.methods.data_selection.probe import DataSelectionProbe

        return DataSelectionProbe()


@dataclass(frozen=True)
class Scored:
    """Scores of a pool.

    Attributes:
        scores_N: of each document, higher is better.
        seconds: CPU seconds of fitting and scoring.
        method_bytes: bytes of what the fitted scorer holds.
        work: operations of fitting and scoring by name.
    """

    scores_N: np.ndarray
    seconds: float
    method_bytes: float
    work: Mapping[str, float] = field(default_factory=dict)


def scored(scorer: DocumentScorer | OracleScorer, pool: Sequence[Document], target: Sequence[Document]) -> Scored:
    """Fit and score, timed. Here documents lose their domains, which the oracle alone, and nothing derived of it, is told."""
    if type(scorer) is OracleScorer:
        domains_N, sought = [document.domain for document in pool], {document.domain for document in target}
        started = time.process_time()
        return Scored(scorer.score(domains_N, sought), time.process_time() - started, 0.0)
    assert isinstance(scorer, DocumentScorer), f"{type(scorer).__name__} scores no documents"
    texts, wanted = ([document.unlabelled() for document in part] for part in (pool, target))
    started = time.process_time()
    scorer.fit(texts, wanted)
    scores_N = scorer.score(texts)
    return Scored(scores_N, time.process_time() - started, scorer.nbytes, scorer.work)


def selection_of(pool: Sequence[Document], found: Scored, keep: float, unit: str) -> DocumentSelection:
    """The documents that a share keeps.

    Raises:
        Infeasible: the best document alone is larger than the share.
    """
    tokens_N = np.array([document.tokens for document in pool])
    kept_K = np.sort(select(found.scores_N, tokens_N, Budget(fraction=keep), unit))
    if not len(kept_K):
        raise Infeasible(f"keep = {keep} is less than the best of {len(pool)} documents; raise keep")
    domains: dict[str, int] = {}
    for number in kept_K:
        domains[pool[number].domain] = domains.get(pool[number].domain, 0) + pool[number].tokens
    return DocumentSelection(
        kept_K,
        int(tokens_N[kept_K].sum()),
        int(tokens_N.sum()),
        domains,
        _correlation(found.scores_N, tokens_N),
        found.seconds,
        found.method_bytes,
        found.work,
    )


@dataclass(frozen=True)
class ScoreStage(Stage):
    """Scores of every document of a pool.

    Args:
        method: whose scores do not depend on what is kept.
        pool: the documents and the target examples; no target for methods that look at none.
        seed: of the job, or None where nothing is drawn.
    """

    version: ClassVar[str] = "2"
    kind: ClassVar[str] = "document-scores"

    method: Regardless
    pool: TrainingPool
    seed: int | None

    def deps(self) -> tuple[Stage, ...]:
        """The texts and their tokens."""
        return self.pool.stages()

    def spec(self) -> dict[str, Any]:
        """The pool by the keys of its stages."""
        pool = [self.pool.tokens.key, self.pool.target]
        return {**super().spec(), "pool": pool}

    def compute(self, ctx: StageContext, folder: Path) -> None:
        """Fit and score."""
        method = self.method.method
        assert isinstance(method, DataSelectionMethod)
        found = scored(method.scorer(self.seed or 0), self.pool.pool(ctx), self.pool.wanted(ctx))
        np.save(folder / "scores.npy", found.scores_N)
        costs = {"seconds": found.seconds, "method_bytes": found.method_bytes, "work": dict(found.work)}
        (folder / "costs.json").write_text(json.dumps(costs) + "\n")

    def load(self, ctx: StageContext, folder: Path) -> Scored:
        """Scores and costs."""
        return Scored(np.load(folder / "scores.npy"), **json.loads((folder / "costs.json").read_text()))


@dataclass(frozen=True)
class SelectionStage(SelectionSource):
    """What a share keeps of a scored pool."""

    version: ClassVar[str] = "2"
    kind: ClassVar[str] = "selection"

    scores: ScoreStage
    keep: float
    unit: str

    def deps(self) -> tuple[Stage, ...]:
        """The scores and what they are of."""
        return (self.scores, *self.scores.deps())

    def compute(self, ctx: StageContext, folder: Path) -> None:
        """Select."""
        found = selection_of(self.scores.pool.pool(ctx), ctx.get(self.scores), self.keep, self.unit)
        np.save(folder / "kept.npy", found.kept_K)
        figures = {name: value for name, value in vars(found).items() if name != "kept_K"}
        (folder / "figures.json").write_text(json.dumps(figures) + "\n")

    def load(self, ctx: StageContext, folder: Path) -> DocumentSelection:
        """The numbers of the kept documents, and figures."""
        return DocumentSelection(np.load(folder / "kept.npy"), **json.loads((folder / "figures.json").read_text()))


def pool_of(info: ModelInfo) -> TrainingPool:
    """The pool that a model trains on; Infeasible where there is none."""
    pool = info.pool if isinstance(info, LmInfo) else None
    if pool is None:
        raise Infeasible(f"model {info.ref} trains on no pool of documents to select from")
    return pool


def _correlation(scores_N: np.ndarray, tokens_N: np.ndarray) -> float:
    if len(scores_N) < 2 or np.ptp(scores_N) == 0 or np.ptp(tokens_N) == 0:
        return 0.0
    return float(np.corrcoef(scores_N, tokens_N)[0, 1])
