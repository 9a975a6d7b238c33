"""The conformance suite's pool and model for data selection: what is kept trains a tiny decoder for a few steps.

Shape suffixes: B batch, T tokens, K kept documents.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from isoflop.core.folder_context import FolderContext
from isoflop.methods.base import Method, build
from isoflop.methods.data_selection.base import DataSelectionMethod, scored, selection_of
from isoflop.methods.kv_cache.probe import VOCABULARY, untrained_decoder
from isoflop.methods.probe import AbsoluteCost, Probe
from isoflop.models.hooks.documents import DOCUMENTS, DocumentSelection
from isoflop.models.lm import NOT_SCORED, LmBatch, LmModel
from isoflop.models.tiny.lm_training import LmRecipe, train_lm
from isoflop.models.worlds.lm_text import Tokens, TokensStage, TrainedTokenizer
from isoflop.models.worlds.text_domains import DOMAINS, DomainsStage
from isoflop.models.worlds.text_pool import Document, TrainingPool, pool_lessons

PIECES, TARGETS, LENGTH = 40, 50, 150
CONTEXT, ROWS = 16, 4
RECIPE = LmRecipe(steps=2, batch=4, warmup=0.0)
WORDS = 60


def documents_of(domain: str, pieces: int, length: int, seed: int) -> list[Document]:
    """Made-up documents of a domain's words, drawn with a Zipf law; about ``length`` long, and longer in later domains."""
    rng = np.random.default_rng([DOMAINS.index(domain), seed])
    words = [f"{domain[: 2 + n % 3]}{n}" for n in range(WORDS)]
    weights = 1 / (1 + np.arange(WORDS))
    texts = []
    for _ in range(pieces):
        size = int(length * rng.uniform(0.5, 1.5) * (0.5 + 0.5 * DOMAINS.index(domain)))
        texts.append(" ".join(rng.choice(words, size // 3, p=weights / weights.sum()))[:size])
    return [Document(text, domain, len(text)) for text in texts]


class DataSelectionProbe(Probe):
    """Logits of a decoder that is trained on what is kept of a made-up pool; the cost is the tokens that are kept."""

    def __init__(self, examples: int = 3) -> None:
        self.model: LmModel = untrained_decoder(layers=1)
        corpus = DomainsStage.here(PIECES, TARGETS, LENGTH, 0.0)
        tokens = TokensStage(corpus, TrainedTokenizer(corpus, 300), "pool")
        self.model.info = replace(
            self.model.info,
            hooks=self.model.info.hooks | {DOCUMENTS},
            geometry={
                **self.model.info.geometry,
                "pool_documents": PIECES * len(DOMAINS),
                "target_documents": TARGETS,
            },
            pool=TrainingPool(corpus, tokens, "code"),
        )
        self.ctx = FolderContext.temporary()
        self.examples = examples
        shuffled = np.random.default_rng(0).permutation(PIECES * len(DOMAINS))
        pool = [document for domain in DOMAINS for document in documents_of(domain, PIECES, LENGTH, 0)]
        self._pool = [pool[n] for n in shuffled]
        self._target = documents_of("code", TARGETS, LENGTH, 1)
        self._tokens = _characters(self._pool)
        self._trained: dict[bytes, Any] = {}
        rng = np.random.default_rng(1)
        self._ids = torch.from_numpy(rng.integers(0, VOCABULARY, (examples, CONTEXT)))

    def prepared(self, method: Method, seed: int) -> DocumentSelection:
        """What the method keeps; the seconds, which no knob decides, are not told."""
        assert isinstance(method, DataSelectionMethod)
        found = scored(method.scorer(seed), self._pool, self._target if method.wants_target else [])
        return replace(selection_of(self._pool, found, method.keep, method.unit), seconds=0.0)

    def forget(self) -> None:
        """Train anew."""
        self._trained.clear()

    def verify(self, method: Method, prepared: Any) -> None:
        """What is kept is a set of documents of the size that was asked for, and the lessons hold these documents only."""
        assert isinstance(method, DataSelectionMethod)
        assert isinstance(prepared, DocumentSelection)
        kept = prepared.kept_K
        assert (np.diff(kept) > 0).all(), "documents are kept twice or not in order"
        sizes = [d.tokens if method.unit == "tokens" else 1 for d in self._pool]
        size = sum(sizes[n] for n in kept)
        assert size <= method.keep * sum(sizes) + 1e-9, f"{size} {method.unit} are kept, more than keep = {method.keep}"
        allowed = {tuple(pair) for n in kept for pair in pairwise(self._ids_of(n))}
        seams = {(self._ids_of(a)[-1], self._ids_of(b)[0]) for a in kept for b in kept}
        for inputs_BT, targets_BT in self._lessons(kept):
            pairs = zip(inputs_BT.flatten().tolist(), targets_BT.flatten().tolist(), strict=True)
            assert set(pairs) <= allowed | seams, "lessons hold what was not kept"

    def absolute(self) -> Sequence[AbsoluteCost]:
        """A character is a token here: of the whole pool all characters are kept; a quarter of its documents is 40 by domain."""
        characters = sum(len(document.text) for document in self._pool)
        whole, quarter = (build("data-random", {"keep": keep, "unit": "documents"}) for keep in (1.0, 0.25))
        return (
            AbsoluteCost(whole, "cost", characters),
            AbsoluteCost(whole, "kept_tokens", characters),
            AbsoluteCost(whole, "pool_tokens", characters),
            AbsoluteCost(quarter, "kept_documents", PIECES * len(DOMAINS) / 4),
        )

    @torch.no_grad()
    def outputs(self, rows: Sequence[int]) -> Tensor:
        """Logits of the decoder after its training, (B, tokens · vocabulary)."""
        selection = self.model.occupant(DOCUMENTS)
        kept_K = np.arange(len(self._pool)) if selection is None else selection.kept_K
        ids_BT = self._ids[list(rows)]
        model = LmModel(self.model.info, self._module(kept_K))
        return model.logits(LmBatch(ids_BT, torch.full_like(ids_BT, NOT_SCORED))).flatten(1)

    def cost(self) -> float:
        """Tokens that are kept, counted on the documents."""
        selection = self.model.occupant(DOCUMENTS)
        kept = range(len(self._pool)) if selection is None else selection.kept_K
        return float(sum(self._pool[n].tokens for n in kept))

    def _module(self, kept_K: np.ndarray) -> Any:
        key = kept_K.tobytes()
        if key not in self._trained:
            module = deepcopy(self.model.module).requires_grad_(True)
            with torch.enable_grad():
                train_lm(module, RECIPE, (LmBatch(*pair) for pair in self._lessons(kept_K)))
            self._trained[key] = module.requires_grad_(False)
        return self._trained[key]

    def _lessons(self, kept_K: np.ndarray) -> Any:
        return pool_lessons(self._tokens, kept_K, RECIPE.steps, ROWS, CONTEXT, 0)

    def _ids_of(self, number: int) -> list[int]:
        starts = self._tokens.starts
        ids: list[int] = self._tokens.ids_N[starts[number] : starts[number + 1]].tolist()
        return ids


def _characters(documents: list[Document]) -> Tokens:
    """A token for every character."""
    codes = np.concatenate([np.frombuffer(document.text.encode(), dtype=np.uint8) for document in documents])
    starts = np.cumsum([0, *(len(document.text) for document in documents)])
    return Tokens(codes.astype(np.int64) % VOCABULARY, np.arange(1, len(codes) + 1), starts)
