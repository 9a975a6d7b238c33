"""A scorer cannot read the domain of what it scores: only the oracle is told, whatever another scorer tries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pool_cases import OPTIONS, REF, pool, target

from isoflop.core.folder_context import FolderContext
from isoflop.methods.base import METHODS, build
from isoflop.methods.data_selection.base import DataSelectionMethod, scored
from isoflop.methods.data_selection.scorers import DocumentScorer, OracleScorer
from isoflop.models.family import family_of
from isoflop.models.worlds.text_domains import DOMAINS
from isoflop.models.worlds.text_pool import Document, Text

NAMES = [name for name in METHODS.names() if issubclass(METHODS.get(name), DataSelectionMethod)]


def labels(thing: Any) -> set[str]:
    """Every domain that an object gives away by an attribute, a field or what an attribute can be called for."""
    found = set()
    for name in {*dir(thing), "domain", "label", "name", "document", "__dict__"}:
        value = getattr(thing, name, None)
        if callable(value) and not name.startswith("__"):
            found |= labels(value())
        values = value.values() if isinstance(value, dict) else [value]
        found |= {v for v in values if isinstance(v, str) and v in DOMAINS}
    return found


class CheatingScorer(DocumentScorer):
    """Wants what carries the same label as the target examples."""

    def fit(self, pool: Sequence[Text], target: Sequence[Text]) -> None:
        self._wanted = set().union(*(labels(example) for example in target))

    def score(self, documents: Sequence[Text]) -> np.ndarray:
        return np.array([float(bool(labels(document) & self._wanted)) for document in documents])


@dataclass(frozen=True)
class Cheat(DataSelectionMethod):
    """The method of this scorer."""

    def scorer(self, seed: int) -> CheatingScorer:
        return CheatingScorer()


def test_the_cheat_would_work_on_labelled_documents() -> None:
    documents, examples = pool(), target()
    cheat = CheatingScorer()
    cheat.fit(examples, examples)  # type: ignore[arg-type]
    found = cheat.score(documents)  # type: ignore[arg-type]
    assert found.tolist() == [float(document.domain == "code") for document in documents]
    assert not issubclass(Document, Text), "a labelled document would pass for a text"


def test_a_scorer_that_looks_for_labels_finds_none() -> None:
    assert scored(CheatingScorer(), pool(), target()).scores_N.tolist() == [0.0] * len(pool())


def test_the_stage_that_scores_hides_labels(
    pool_ctx: FolderContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The way of a job: documents of the real corpus, whose names tell their domain."""
    monkeypatch.setattr(METHODS, "_entries", dict(METHODS._entries))
    METHODS.register("cheat")(Cheat)
    stage = build("cheat", {"keep": 0.5}).prepare(family_of(REF).info(REF, OPTIONS), None, 0)
    assert stage is not None
    scores = stage.scores  # type: ignore[attr-defined]
    scores.compute(pool_ctx, tmp_path)  # not through the cache, which might hold what another run computed
    assert set(scores.load(pool_ctx, tmp_path).scores_N.tolist()) == {0.0}


@pytest.mark.parametrize("name", NAMES)
def test_only_the_oracle_notices_that_labels_are_changed(name: str) -> None:
    method = build(name, {})
    assert isinstance(method, DataSelectionMethod)
    documents, examples = pool(), target(50)
    other = [replace(d, domain=DOMAINS[DOMAINS.index(d.domain) - 1]) for d in documents]
    found = [scored(method.scorer(0), part, examples).scores_N for part in (documents, other)]
    assert (found[0] == found[1]).all() == (name != "data-oracle")


def test_who_takes_after_the_oracle_is_told_nothing() -> None:
    class Heir(OracleScorer):  # type: ignore[misc]
        pass

    class Both(CheatingScorer, OracleScorer):  # type: ignore[misc]
        pass

    with pytest.raises(AssertionError, match="Heir scores no documents"):
        scored(Heir(0), pool(), target())
    assert set(scored(Both(0), pool(), target()).scores_N.tolist()) == {0.0}
